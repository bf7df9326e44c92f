"""timm, by its training script: the calls of train.py, which no package contains, in its order, with `--resume auto`.

https://github.com/huggingface/pytorch-image-models/blob/main/train.py (`--resume`, last.pth.tar, `--no-aug`, `--color-jitter`)
https://huggingface.co/docs/timm/training_script
Its data are image folders, so that digits have three channels; a checkpoint is saved after each epoch.
"""

import os
from argparse import Namespace

import torch
from timm.data import create_dataset, create_loader
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, init_distributed_device, random_seed

from tests.exam import work

job = work.Job.from_command_line()
kind = job.kind
distributed = job.evaluate and "RANK" in os.environ
if distributed:
    init_distributed_device(Namespace(device="cpu", dist_backend="gloo", dist_url=None))
random_seed(work.SEED, int(os.environ.get("RANK", "0")))
model = job.model(channels=3)
optimizer = create_optimizer_v2(model, opt="sgd", lr=work.LR, momentum=work.MOMENTUM, weight_decay=0.0)


def loader(split: str, *, is_training: bool):
    return create_loader(
        create_dataset("", root=str(job.folder), split=split, is_training=is_training, batch_size=kind.batch_size),
        input_size=(3, kind.img_size, kind.img_size),
        batch_size=kind.batch_size,
        is_training=is_training,
        no_aug=job.data == "digits",
        color_jitter=0.0,
        mean=work.MEAN,
        std=work.STD,
        crop_pct=1.0,
        num_workers=1,
        distributed=distributed,
        device=torch.device("cpu"),
    )


def train() -> None:
    train_loader, eval_loader = loader("train", is_training=True), loader("val", is_training=False)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=work.N_EPOCHS, step_on_epochs=False, updates_per_epoch=len(train_loader)
    )
    last = job.run / "last.pth.tar"
    start_epoch = resume_checkpoint(model, str(last), optimizer) if job.resume and last.exists() else 0
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(job.run), recovery_dir=str(job.run))
    schedule.step_update(start_epoch * len(train_loader))
    for epoch in range(start_epoch, work.N_EPOCHS):
        model.train()
        for i, (images, labels) in enumerate(train_loader):
            job.probe.trained(images, epoch, n_updates := epoch * len(train_loader) + i)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(num_updates=n_updates + 1)
        accuracy = evaluate(eval_loader)
        saver.save_checkpoint(epoch, metric=accuracy)
        schedule.step(epoch + 1, accuracy)
    job.finish(model)


@torch.no_grad()
def evaluate(eval_loader) -> float:
    model.eval()
    n_correct = n = 0
    for images, labels in eval_loader:
        job.probe.evaluated(images)
        n_correct, n = n_correct + int((model(images).argmax(1) == labels).sum()), n + len(labels)
    return n_correct / n


evaluate(loader("val", is_training=False)) if job.evaluate else train()
