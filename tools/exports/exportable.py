"""The input of every export (the model and its preprocessing), the check of an export against the model, and its safe writing."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import find_dataset
from datasets.pipeline.augment import Normalize
from engine.config.errors import ConfigError, RunError
from engine.inference.trained import Trained


@dataclass(frozen=True)
class Exportable:
    """A classifier, on the CPU in float32 and evaluation mode, with the preprocessing of its images."""

    name: str
    arguments: dict[str, Any]  # for create_model, besides the sizes
    model: nn.Module
    classes: tuple[str, ...]
    channels: int
    img_size: int
    built_for: int  # the image size that create_model received
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    probabilities: Literal["softmax", "sigmoid"] = "softmax"

    @property
    def all_arguments(self) -> dict[str, Any]:
        sizes = {"n_classes": len(self.classes), "in_channels": self.channels, "img_size": self.built_for}
        return {**sizes, **self.arguments}

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.mean, self.std, self.img_size, "cpu")

    def images(self, n: int) -> Tensor:
        """Make uint8 images of color clouds: the logits of a network differ more between these than between images of noise."""
        coarse = torch.rand(n, self.channels, 4, 4, generator=torch.Generator().manual_seed(n))
        clouds = F.interpolate(coarse, (self.img_size, self.img_size), mode="bilinear")
        return (255 * clouds).round().to(torch.uint8)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "classes": list(self.classes),
            "output": f"logits, batch x {len(self.classes)}; {self.probabilities} makes probabilities of them",
            "preprocessing": {
                "colours": {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels} channels"),
                "resize": f"the shorter side to img_size / crop_pct ({self.interpolation}, antialiased), then the middle",
                "img_size": self.img_size,
                "crop_pct": self.crop_pct,
                "interpolation": self.interpolation,
                "mean": list(self.mean),
                "std": list(self.std),
            },
        }


def exportable_from(trained: Trained) -> Exportable:
    config, prepare = trained.config, trained.prepare
    if config.task != "classification":
        raise ConfigError(f"export.py does not support task {config.task}, only classification")
    spec = find_dataset(config.data.name)
    in_files = spec.in_files and not config.data.args.get("in_memory")  # images in memory are resized without a crop
    model = trained.accelerator.unwrap_model(copy.deepcopy(trained.model), keep_fp32_wrapper=False)
    as_published = {key: value for key, value in getattr(model, "PUBLISHED_WITH", {}).items() if getattr(model, key) == value}
    return Exportable(
        name=config.model.name,
        arguments={**config.model.args, **as_published},
        model=model.to("cpu", torch.float32).eval(),
        classes=tuple(trained.classes),
        channels=spec.channels,
        img_size=prepare.img_size,
        built_for=config.data.img_size or spec.img_size,
        mean=prepare.mean,
        std=prepare.std,
        interpolation=prepare.interpolation if in_files else "bilinear",
        crop_pct=prepare.crop_pct if in_files else 1.0,
        probabilities="sigmoid" if config.train.loss == "bce" else "softmax",
    )


@torch.no_grad()
def expect_equal(exported: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], images: list[Tensor], name: str) -> str:
    """Raise an error unless both compute the same logits; describe the difference, compared to that between images."""
    actual, expected = (torch.cat([model(batch) for batch in images]) for model in (exported, eager))
    error, spread = float((actual - expected).abs().max()), float(expected.std(dim=0).mean())
    if not error <= 1e-3 * spread + 1e-5 * float(expected.abs().max()):
        raise RunError(f"{name} differs from the model: logits are off by {error:.2g}, and differ by {spread:.2g} between images")
    return f"the largest error of a logit is {error:.2g}; from image to image they differ by {spread:.2g}"


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move its files into `folder` if no error occurs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
            Path(temporary).chmod(folder.stat().st_mode & 0o777)  # save_tensors copies the permissions of the directory
            yield Path(temporary)
            for file in sorted(Path(temporary).iterdir()):
                file.replace(folder / file.name)
    except OSError as error:
        raise RunError(f"{folder} can't be written: {error.strerror or error}") from error
