"""The other sides of training: plain scripts and trainers of other packages. Each runs until it is stopped."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import CIFAR10

from models import create_model
from tools.benchmarks.sides import DEVICE, Turns

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
N_STEPS = 64_000  # of the schedule


@dataclass(frozen=True)
class Job:
    """A model, its data and how to train it."""

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the model
    channels: int = 3
    img_size: int = 32
    batch_size: int = 64
    root: Path = Path()  # folder of CIFAR-10's files, or MNIST's
    workers: int = 0
    lr: float = LR

    def new_model(self) -> nn.Module:
        return create_model(self.model, n_classes=10, in_channels=self.channels, img_size=self.img_size, **self.arguments)


RESNET = Job("resnet18", {"first_block": "cifar10"})
LENET = Job("lenet", batch_size=256, lr=0.01)
LENET_28 = Job("lenet", channels=1, img_size=28, batch_size=256, lr=0.01)


def cifar10(root: Path) -> CIFAR10:
    """Read CIFAR-10 by torchvision, without its checksums, as the images are random."""
    normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    with patch("torchvision.datasets.cifar.check_integrity", return_value=True):
        return CIFAR10(root, transform=transforms.Compose(steps))


def new_loader(data: Any, batch_size: int, workers: int, *, endless: bool = True, **options: Any) -> DataLoader:
    """Return torch's DataLoader over a shuffled epoch, or over endless random samples."""
    sampler = RandomSampler(data, replacement=endless, num_samples=10**9 if endless else None)
    return DataLoader(data, batch_size, sampler=sampler, num_workers=workers, drop_last=True, **options)


def cifar10_loader(job: Job, **options: Any) -> DataLoader:
    return new_loader(cifar10(job.root), job.batch_size, job.workers, pin_memory=DEVICE.type == "cuda", **options)


def sgd(model: nn.Module, job: Job) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def bare(job: Job, turns: Turns | None) -> None:
    """Train on one batch in memory. Of several ranks, each has a part of it, and only rank 0 has turns."""
    shape, model = (job.batch_size, job.channels, job.img_size, job.img_size), job.new_model().to(DEVICE)
    batch: tuple[Tensor, ...] = torch.randn(shape), torch.arange(job.batch_size) % 10
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
        rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
        batch = tuple(part.chunk(n_ranks)[rank].clone() for part in batch)
        model = DistributedDataParallel(model)
    batches = repeat(tuple(part.to(DEVICE) for part in batch))
    _loop(model, sgd(model, job), batches if turns is None else turns.counted(batches, job.batch_size))


def bare_evaluation(job: Job, n_images: int, turns: Turns) -> None:
    """Call the model on batches in memory."""
    model = job.new_model().to(DEVICE).eval()
    images = torch.randn(n_images, job.channels, job.img_size, job.img_size, device=DEVICE)
    with torch.no_grad():
        for batch in turns.counted(chain.from_iterable(repeat(images.split(job.batch_size))), job.batch_size):
            model(batch)


def plain_script(job: Job, turns: Turns) -> None:
    """Train by a script with torchvision's transforms and torch's DataLoader, a running loss and accuracy."""
    model = job.new_model().to(DEVICE)
    scheduler, totals = CosineAnnealingLR(sgd(model, job), T_max=N_STEPS), Counter[str]()

    def after(loss: Any, logits: Tensor, labels: Tensor) -> None:
        scheduler.step()
        totals.update(loss=loss.item(), right=int((logits.argmax(1) == labels).sum()), seen=len(labels))

    _loop(model, scheduler.optimizer, turns.counted(cifar10_loader(job), job.batch_size), after)


def _loop(model: nn.Module, optimizer: Any, batches: Iterable[Any], after: Callable[..., None] | None = None) -> None:
    model.train()
    for images, labels in batches:
        images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(loss, logits, labels)


def resnet_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of ResNet-18 and the state of its optimizer after one step."""
    model = RESNET.new_model()
    optimizer = sgd(model, RESNET)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def bare_saves(folder: Path, keep_last: int, turns: Turns) -> None:
    """Save weights and optimizer again and again, flushed to the disk; one step per save."""
    weights, optimizer = resnet_states()
    for step in turns.counted(count(), 1):
        new = folder / str(step)
        new.mkdir(parents=True)
        save_file(weights, new / "model.safetensors")
        torch.save({"optimizer": optimizer, "step": step}, new / "state.pt")
        for path in new.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder / str(step - keep_last), ignore_errors=True)


def timm_loop(job: Job, turns: Turns) -> None:
    """Run the loop of timm's train.py, with its optimizer, schedule and meters, without its prefetcher."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    loader, model, losses = cifar10_loader(job), job.new_model().to(DEVICE), AverageMeter()
    optimizer = create_optimizer_v2(model, opt="momentum", lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    data: Any = loader.dataset
    per_epoch, n_updates = len(data) // job.batch_size, count(1)
    length: Any = {"num_epochs": N_STEPS // per_epoch, "step_on_epochs": False, "updates_per_epoch": per_epoch}
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", **length)

    def after(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        losses.update(loss.item(), len(labels))
        scheduler.step_update(num_updates=next(n_updates), metric=losses.avg)

    _loop(model, optimizer, turns.counted(loader, job.batch_size), after)


def lightning(job: Job, turns: Turns) -> None:
    """Train by Lightning's Trainer, without logger, checkpoints and progress bar."""
    from lightning import LightningModule, Trainer

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.new_model()

        def on_train_batch_start(self, *_: Any) -> None:
            turns.tick(job.batch_size)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            scheduler = CosineAnnealingLR(sgd(self, job), T_max=N_STEPS)
            return {"optimizer": scheduler.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    unused: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=-1, devices=1, **unused).fit(Classifier(), cifar10_loader(job, endless=False))


def hf_trainer(job: Job, folder: Path, turns: Turns) -> None:
    """Train by the Trainer of Hugging Face transformers, without reports and checkpoints."""
    from transformers import Trainer, TrainingArguments

    class Classifying(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            images, labels = inputs
            return F.cross_entropy(model(images), labels)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            turns.tick(job.batch_size)
            return super().training_step(*args, **kwargs)

        def get_train_dataloader(self) -> Any:
            """Replace the Trainer's method, which mistakes this project's folder datasets/ for the library of that name."""
            return self.accelerator.prepare(cifar10_loader(job, endless=False))

    model = job.new_model()
    unused: Any = {"max_grad_norm": 0, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    length: Any = {"max_steps": N_STEPS, "per_device_train_batch_size": job.batch_size}
    arguments = TrainingArguments(str(folder), learning_rate=job.lr, lr_scheduler_type="cosine", **length, **unused)
    Classifying(model, arguments, optimizers=(sgd(model, job), None)).train()
