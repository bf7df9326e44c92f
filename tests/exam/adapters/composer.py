"""Composer, by its notes on resumption:

https://docs.mosaicml.com/projects/composer/en/latest/notes/resumption.html (autoresume, run_name, save_folder)
https://docs.mosaicml.com/projects/composer/en/latest/trainer/checkpointing.html (save_interval)
"""

import torch
from composer import Trainer
from composer.models import ComposerModel
from torchmetrics.classification import MulticlassAccuracy

from tests.exam import work

job = work.Job.from_command_line()


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = job.model()
        self.accuracy = MulticlassAccuracy(job.kind.n_classes, average="micro")

    def forward(self, batch):
        if self.training:
            time = trainer.state.timestamp
            job.probe.trained(batch[0], time.epoch.value, time.batch.value)
        return self.model(batch[0])

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train=False):
        return {} if is_train else {"accuracy": self.accuracy}

    def update_metric(self, batch, outputs, metric):
        job.probe.evaluated(batch[0])
        metric.update(outputs, batch[1])


def sampled(*, train: bool) -> torch.utils.data.DataLoader:
    """Return a loader whose sampler is Composer's, which several ranks need."""
    from composer.utils import dist

    dataset = job.dataset(train=train)
    sampler = dist.get_sampler(dataset, shuffle=train)
    workers = 0 if job.data == "digits" else 1
    return torch.utils.data.DataLoader(dataset, job.kind.batch_size, sampler=sampler, num_workers=workers)


model = Model()
optimizer = job.optimizer(model)
trainer = Trainer(
    model=model,
    train_dataloader=sampled(train=True),
    eval_dataloader=sampled(train=False),
    optimizers=optimizer,
    schedulers=job.schedule(optimizer),
    step_schedulers_every_batch=True,
    max_duration=f"{work.N_EPOCHS}ep",
    device="cpu",
    seed=work.SEED,
    run_name="exam",
    save_folder=str(job.run / "checkpoints"),
    save_interval=f"{job.kind.save_every}ba",
    save_overwrite=True,
    autoresume=not job.evaluate,
    progress_bar=False,
)
if job.evaluate:
    trainer.eval()
else:
    trainer.fit()
    job.finish(model.model)
