"""The other sides: plain scripts as a person would write them, and trainers of other packages with the same model and pipeline.

Each of them goes on until it is stopped, as what is measured are its steps.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.benchmarks.sides import Turns

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
N_STEPS = 64_000  # of the schedule
FOR_EVER = 10**9


@dataclass(frozen=True)
class Job:
    """What all sides train."""

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the model
    channels: int = 3
    img_size: int = 32
    batch_size: int = 64
    root: Path = Path()  # of CIFAR-10's files
    workers: int = 0
    lr: float = LR

    def new_model(self) -> "nn.Module":
        from models import create_model

        return create_model(self.model, n_classes=10, in_channels=self.channels, img_size=self.img_size, **self.arguments)

    def loader(self, *, endless: bool = False, as_dict: bool = False) -> "DataLoader":
        """torchvision's data set and transforms, in torch's DataLoader."""
        import torch
        from torch.utils.data import DataLoader, RandomSampler

        data = cifar10(self.root, as_dict=as_dict)
        order = {"sampler": RandomSampler(data, replacement=True, num_samples=FOR_EVER)} if endless else {"shuffle": True}
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available(), "drop_last": True}
        return DataLoader(data, self.batch_size, **order, **options)


@dataclass
class Pictures:
    """As torchvision's CIFAR10 gives them, for workers that are started in any way."""

    arrays: Any
    labels: list[int]
    transform: Any
    as_dict: bool

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        image, label = self.transform(Image.fromarray(self.arrays[index])), self.labels[index]
        return {"pixel_values": image, "labels": label} if self.as_dict else (image, label)


def cifar10(root: Path, *, as_dict: bool = False) -> Pictures:
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    class AnyFiles(CIFAR10):
        """Of random images too: no checksums."""

        train_list = [(name, None) for name, _ in CIFAR10.train_list]
        test_list = [(name, None) for name, _ in CIFAR10.test_list]
        meta = {**CIFAR10.meta, "md5": None}

    steps = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ]
    read = AnyFiles(root)
    return Pictures(read.data, read.targets, transforms.Compose(steps), as_dict)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sgd(model: "nn.Module", job: Job) -> Any:
    import torch

    return torch.optim.SGD(model.parameters(), lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _one_batch(job: Job) -> Any:
    import torch

    device = _device()
    images = torch.randn(job.batch_size, job.channels, job.img_size, job.img_size, device=device)
    return images, (torch.arange(job.batch_size) % 10).to(device)


# Plain PyTorch


def bare(job: Job, turns: Turns) -> None:
    """The least there can be: one batch, that is there already, again and again."""
    from torch.nn import functional as F

    model = job.new_model().to(_device()).train()
    optimizer = _sgd(model, job)
    for images, labels in turns.counted(repeat(_one_batch(job)), job.batch_size):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def bare_ddp(job: Job, turns: Turns | None) -> None:
    """The same on several ranks, each with its part of the batch."""
    import torch
    from torch import distributed
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    images, labels = (part.chunk(distributed.get_world_size())[distributed.get_rank()].clone() for part in _one_batch(job))
    model = DistributedDataParallel(job.new_model().to(_device()).train())
    optimizer = _sgd(model, job)
    batches = repeat((images, labels))
    for own_images, own_labels in turns.counted(batches, job.batch_size) if turns is not None else batches:
        loss = F.cross_entropy(model(own_images), own_labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def bare_evaluation(job: Job, n_images: int, turns: Turns) -> None:
    """Every batch is there already."""
    import torch

    model = job.new_model().to(_device()).eval()
    images = torch.randn(n_images, job.channels, job.img_size, job.img_size, device=_device())
    batches = chain.from_iterable(repeat(images.split(job.batch_size)))
    with torch.no_grad():
        for batch in turns.counted(batches, job.batch_size):
            model(batch)


def plain_script(job: Job, turns: Turns) -> None:
    """A script with torchvision's transforms and torch's DataLoader, a running loss and accuracy."""
    from torch import nn
    from torch.optim.lr_scheduler import CosineAnnealingLR

    device = _device()
    model = job.new_model().to(device).train()
    criterion, optimizer = nn.CrossEntropyLoss(), _sgd(model, job)
    scheduler = CosineAnnealingLR(optimizer, T_max=N_STEPS)
    total_loss = n_right = n_seen = 0
    for images, labels in turns.counted(job.loader(endless=True), job.batch_size):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        logits = model(images)
        loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        total_loss += loss.item() * len(images)
        n_right += (logits.argmax(1) == labels).sum().item()
        n_seen += len(images)


# Other packages


def timm_loop(job: Job, turns: Turns) -> None:
    """The loop of timm's train.py, with its optimizer, schedule and meters, and without its prefetcher."""
    import torch
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    device, log = _device(), logging.getLogger("train")
    model = job.new_model().to(device)
    loader = job.loader(endless=True)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    per_epoch = len(loader.dataset) // job.batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=N_STEPS // per_epoch, step_on_epochs=False, updates_per_epoch=per_epoch
    )
    loss_fn = torch.nn.CrossEntropyLoss().to(device)
    amp_autocast, losses = suppress, AverageMeter()
    model.train()
    optimizer.zero_grad()
    for n_updates, (images, targets) in enumerate(turns.counted(loader, job.batch_size), start=1):
        images, targets = images.to(device), targets.to(device)
        with amp_autocast():
            loss = loss_fn(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), images.size(0))
        optimizer.zero_grad()
        if n_updates % 50 == 0:
            lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
            log.info("Train: %d Loss: %#.3g (%#.3g) LR: %.3e", n_updates, losses.val, losses.avg, lr)
        scheduler.step_update(num_updates=n_updates, metric=losses.avg)


def lightning(job: Job, turns: Turns) -> None:
    """Lightning's Trainer, with neither logger, checkpoints nor progress bar."""
    import torch
    from lightning import Callback, LightningModule, Trainer
    from torch.nn import functional as F

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.new_model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = _sgd(self, job)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=N_STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Steps(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            turns.tick(job.batch_size)

    trainer = Trainer(
        max_epochs=-1,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps()],
    )
    trainer.fit(Classifier(), job.loader())


def hf_trainer(job: Job, folder: Path, turns: Turns) -> None:
    """The Trainer of Hugging Face transformers, without reports and checkpoints."""
    from torch import nn
    from torch.nn import functional as F
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.new_model()

        def forward(self, pixel_values: Any, labels: Any) -> dict[str, Any]:
            logits = self.model(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.tick(job.batch_size)

    class WithLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            """As its own, which takes this project's folder datasets/ for the library of that name."""
            return self.accelerator.prepare(job.loader(as_dict=True))

    model = WithLoss()
    arguments = TrainingArguments(
        str(folder),
        max_steps=N_STEPS,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.lr,
        lr_scheduler_type="cosine",
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    WithLoader(model, arguments, callbacks=[Steps()], optimizers=(_sgd(model, job), None)).train()


RIVALS = {"lightning": "Lightning's Trainer", "transformers": "transformers' Trainer", "timm": "timm's train loop"}
