"""accelerate, by its guide to checkpoints and the example that it links:

https://huggingface.co/docs/accelerate/usage_guides/checkpoint (save_state, load_state, skip_first_batches, stateful loaders)
https://github.com/huggingface/accelerate/blob/main/examples/by_feature/checkpointing.py (folders step_{n})
https://huggingface.co/docs/accelerate/package_reference/utilities (DataLoaderConfiguration: use_seedable_sampler)
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from tests.exam import work

job = work.Job.from_command_line()
stateful = job.save == "stateful"
accelerator = Accelerator(
    cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader=stateful)
)
set_seed(work.SEED)
model, loaders = job.model(), (job.loader(train=True), job.loader(train=False))
optimizer = job.optimizer(model)
model, optimizer, train_loader, eval_loader, schedule = accelerator.prepare(model, optimizer, *loaders, job.schedule(optimizer))


def train() -> None:
    saved = sorted(job.run.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    step = 0
    if job.resume and saved:
        accelerator.load_state(str(saved[-1]))
        step = int(saved[-1].name.removeprefix("step_"))
    first_epoch, n_skipped = divmod(step, job.kind.epoch_steps)
    for epoch in range(first_epoch, work.N_EPOCHS):
        model.train()
        train_loader.set_epoch(epoch)
        loader = train_loader
        if epoch == first_epoch and n_skipped and not stateful:  # a stateful loader continues where it was
            loader = accelerator.skip_first_batches(train_loader, n_skipped)
        for images, labels in loader:
            job.probe.trained(images, epoch, step)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % job.kind.save_every == 0:
                accelerator.save_state(str(job.run / f"step_{step}"))
        evaluate()
    job.finish(accelerator.unwrap_model(model))


@torch.no_grad()
def evaluate() -> None:
    model.eval()
    for images, labels in eval_loader:
        predictions = model(images).argmax(1)
        _, _, counted = accelerator.gather_for_metrics((predictions, labels, images))
        if accelerator.is_main_process:
            job.probe.evaluated(counted)


evaluate() if job.evaluate else train()
accelerator.end_training()
