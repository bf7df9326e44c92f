"""The training that every framework does in the exam: data, model, optimizer, and a probe that records and interrupts it.

An adapter trains by `Job.from_command_line()`: it calls `probe.trained` in each training step with the images that the step
consumes, `probe.evaluated` with the images that its metric counts, and `finish` with the trained model.
"""

import argparse
import ctypes
import json
import os
import resource
import signal
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.lenet import LeNet5

N_EPOCHS = 3
SEED = 1
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # of every channel, so that a probe can undo the normalization
LR, MOMENTUM = 0.05, 0.9
WEIGHTS = "weights.pt"  # the final ones, which the exam compares


@dataclass(frozen=True)
class Kind:
    """Sizes of a training; no number of training images leaves a smaller last batch, which some frameworks drop."""

    channels: int
    img_size: int
    n_classes: int
    batch_size: int
    n_train: int
    n_test: int  # not a multiple of two ranks
    save_every: int  # updates between two checkpoints, for the frameworks that save within an epoch

    @property
    def epoch_steps(self) -> int:
        return self.n_train // self.batch_size


KINDS = {
    "digits": Kind(channels=1, img_size=28, n_classes=10, batch_size=64, n_train=1408, n_test=389, save_every=8),
    "pictures": Kind(channels=3, img_size=32, n_classes=4, batch_size=16, n_train=128, n_test=33, save_every=3),
}


@dataclass(frozen=True)
class Job:
    run: Path
    data: str  # a key of KINDS
    resume: bool
    evaluate: bool
    save: str = "steps"  # how a framework with several documented ways saves

    @classmethod
    def from_command_line(cls) -> "Job":
        parser = argparse.ArgumentParser()
        parser.add_argument("run", type=Path)
        parser.add_argument("data", choices=KINDS)
        parser.add_argument("--resume", action="store_true", help="resume the run, if it has a checkpoint")
        parser.add_argument("--evaluate", action="store_true", help="only evaluate, perhaps on several ranks")
        parser.add_argument("--save", default="steps", help="steps, epoch, or stateful: steps, with a stateful data loader")
        die_with_parent()
        job = cls(**vars(parser.parse_args()))
        torch.set_num_threads(1)
        torch.manual_seed(SEED)
        return job

    @property
    def kind(self) -> Kind:
        return KINDS[self.data]

    @property
    def folder(self) -> Path:
        """The data as an image folder, in train/ and val/."""
        return self.run.parent / "data" / self.data

    @cached_property
    def probe(self) -> "Probe":
        return Probe(self)

    @property
    def n_steps(self) -> int:
        return N_EPOCHS * self.kind.epoch_steps

    def model(self, channels: int | None = None) -> nn.Module:
        torch.manual_seed(SEED)
        return LeNet5(n_classes=self.kind.n_classes, in_channels=channels or self.kind.channels, img_size=self.kind.img_size)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps)

    def dataset(self, *, train: bool) -> torch.utils.data.Dataset:
        """Return (image, label) samples: digits as tensors, pictures from files with random crops and flips."""
        if self.data == "digits":
            images, labels = digits(train=train)
            return torch.utils.data.TensorDataset((images - MEAN[0]) / STD[0], labels)
        from torchvision import datasets, transforms

        augmentation = [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()] if train else []
        steps = [*augmentation, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        return datasets.ImageFolder(str(self.folder / ("train" if train else "val")), transforms.Compose(steps))

    def loader(self, *, train: bool) -> torch.utils.data.DataLoader:
        """Return what a tutorial of any of the frameworks makes; workers decode the pictures."""
        loader_type = torch.utils.data.DataLoader
        if self.save == "stateful" and train:
            from torchdata.stateful_dataloader import StatefulDataLoader

            loader_type = StatefulDataLoader
        workers = 0 if self.data == "digits" else 1
        return loader_type(self.dataset(train=train), batch_size=self.kind.batch_size, shuffle=train, num_workers=workers)

    def finish(self, model: nn.Module) -> None:
        torch.save({name: value.clone() for name, value in model.state_dict().items()}, self.run / WEIGHTS)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def digits(*, train: bool) -> tuple[Tensor, Tensor]:
    """Return the split that main.py makes of digits with this size of the test: images from 0 to 1, and labels."""
    from datasets.digits import load
    from datasets.pipeline.splits import Source

    loaded = load(Source(root=None, seed=SEED), test_ratio=test_ratio())  # type: ignore[arg-type]
    split = loaded.train if train else loaded.test
    return F.interpolate(split.images / 255, size=(28, 28), mode="bilinear"), split.labels


def test_ratio() -> float:
    kind = KINDS["digits"]
    return (kind.n_test - 0.5) / (kind.n_train + kind.n_test)


class Probe:
    """Records which samples a training step consumed or an evaluation counted, and interrupts the training."""

    def __init__(self, job: Job) -> None:
        self.job, self.fault = job, json.loads(os.environ.get("EXAM_FAULT", "null"))
        self.references = {train: standardized(digits(train=train)[0]) for train in (True, False)} if job.data == "digits" else {}
        rank = os.environ.get("RANK", "0")
        number = len(list(job.run.glob("trained-*.jsonl")))
        job.run.mkdir(parents=True, exist_ok=True)
        self.files = {True: job.run / f"trained-{number}.jsonl", False: job.run / f"evaluated-{rank}.jsonl"}

    def trained(self, images: Tensor, epoch: int, step: int, mean: float = MEAN[0], std: float = STD[0]) -> None:
        """Record the images of an update, `step` being the number of updates before it as the framework counts them."""
        self._record(True, {"epoch": epoch, "step": step, "ids": self._identify(images * std + mean, train=True)})
        if self.fault and step == self.fault["step"]:
            self._interrupt(self.fault["what"])

    def evaluated(self, images: Tensor, mean: float = MEAN[0], std: float = STD[0]) -> None:
        self._record(False, {"ids": self._identify(images * std + mean, train=False)})

    def _record(self, train: bool, line: dict) -> None:
        with self.files[train].open("a") as file:
            file.write(f"{json.dumps(line)}\n")

    def _identify(self, images: Tensor, *, train: bool) -> list[int]:
        """Return the number of each sample: digits are looked up, and a picture's is its red channel, which no crop changes."""
        images = images.detach().float().cpu()
        if self.job.data == "digits":
            return torch.cdist(standardized(images[:, :1]), self.references[train]).argmin(1).tolist()
        return (images[:, 0].flatten(1).median(1).values * 255 / RED_STEP).round().int().tolist()

    def _interrupt(self, what: str) -> None:
        if what != "in a save":
            os.kill(os.getpid(), getattr(signal, what))
            return
        sizes = [path.stat().st_size for path in self.job.run.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process in the middle of the write
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def standardized(images: Tensor) -> Tensor:
    """Return vectors that normalization doesn't change; they are small, so that interpolation changes them little."""
    flat = F.interpolate(images, size=(14, 14), mode="bilinear", antialias=True).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True)


RED_STEP = 1.9  # between the red channels of two pictures


def write_data(folder: Path) -> None:
    """Write both data as image folders. A picture's red channel is constant and tells its number."""
    import numpy as np
    from PIL import Image

    for part in ("train", "val"):
        images, labels = digits(train=part == "train")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / "digits" / part / str(int(label)) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image[0] * 255).round().byte().numpy()).convert("RGB").save(path)
        random = np.random.default_rng(part == "train")
        kind = KINDS["pictures"]
        for i in range(kind.n_train if part == "train" else kind.n_test):
            label = i % kind.n_classes
            pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[8 * label : 8 * label + 8, :, 1] += 120  # a bright bar, at the height of the class
            pixels[..., 0] = round(RED_STEP * i)
            path = folder / "pictures" / part / f"class_{label}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
