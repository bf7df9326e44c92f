"""What an export is made of: the model as it evaluates, and how its images are prepared."""

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
    name: str
    arguments: dict[str, Any]  # of the model's constructor
    model: nn.Module  # on the CPU, in float32, in evaluation mode
    classes: tuple[str, ...]
    channels: int
    img_size: int
    built_for: int  # an image size that the model may have been built for instead
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    probabilities: Literal["softmax", "sigmoid"] = "softmax"

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.mean, self.std, self.img_size, "cpu")

    def images(self, n: int) -> Tensor:
        """Clouds of color, as bytes: for networks they differ more than noise does."""
        generator = torch.Generator().manual_seed(n)
        coarse = torch.rand(n, self.channels, 4, 4, generator=generator)
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
        raise ConfigError(f"task {config.task}: export.py knows what classification gives, and nothing else")
    spec = find_dataset(config.data.name)
    in_files = spec.in_files and not config.data.args.get("in_memory")  # else images are scaled as a whole
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
def expect_equal(exported: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], images: list[Tensor], what: str) -> str:
    """Both must give the same logits; says how far they are apart, beside how much logits differ from image to image."""
    given, expected = (torch.cat([model(batch) for batch in images]) for model in (exported, eager))
    error, spread = float((given - expected).abs().max()), float(expected.std(dim=0).mean())
    if not error <= 1e-3 * spread + 1e-5 * float(expected.abs().max()):
        raise RunError(f"{what} doesn't give what the model gives: logits are off by {error:.2g}, and differ by {spread:.2g}")
    return f"the largest error of a logit is {error:.2g}; from image to image they differ by {spread:.2g}"


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` when all is well."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
            yield Path(temporary)
            for file in sorted(Path(temporary).iterdir()):
                file.replace(folder / file.name)
    except OSError as error:
        raise RunError(f"{folder} can't be written: {error.strerror or error}") from error
