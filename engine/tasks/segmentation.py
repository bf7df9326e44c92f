"""Segmentation: a class for every pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.pipeline.masks import IGNORED, Batch, fitted
from engine.config.schema import Config
from engine.tasks import BuiltInTask, TaskKind, loss_of_heads, summed
from models.heads.segmentation import create_segmenter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class Segmentation(BuiltInTask):
    monitor = "mIoU"
    shown = ("mIoU", "pixel_acc")

    classes: Sequence[str]
    _: KW_ONLY
    aux_weight: float = 0.3
    dice_weight: float = 0.0
    tta: Literal["flip"] | None = None

    def weight(self, batch: Batch) -> Tensor:
        """Return the number of valid pixels. With no valid pixel the loss is 0, not NaN."""
        masks = batch[1]
        assert isinstance(masks, Tensor), "training images have one size"
        return (masks != IGNORED).sum().float().clamp(min=1e-6)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, masks = batch
        assert isinstance(masks, Tensor), "training images have one size"
        outputs, targets = model(images), masks.long()

        def loss_of(logits: Tensor) -> Tensor:
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            return loss + self.dice_weight * dice_loss(logits, targets) if self.dice_weight else loss

        logits, loss, sums = loss_of_heads(outputs, loss_of, self.aux_weight)
        return loss, {**sums, "pixel_acc": (logits.argmax(1) == targets).sum()}

    def metric(self, device: torch.device) -> "Overlap":
        return Overlap(self, device)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        logits = model(images)
        return (logits + model(images.flip(-1)).flip(-1)) / 2 if self.tta == "flip" else logits

    def predict(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Return the class of every pixel, at the size of each mask."""
        images, masks = batch
        pairs = zip(self.logits(model, images), masks, strict=True)
        return [in_own_size(logits, mask.shape).argmax(0).to(torch.uint8) for logits, mask in pairs]

    def _draw_on(self, figure: "Figure", images: Tensor, batch: Batch, predictions: Sequence[Tensor] | None) -> None:
        from engine.plots.overlays import draw_masks

        draw_masks(figure, self.visible(images, batch), list(batch[1]), predictions, self.classes)

    @staticmethod
    def visible(images: Tensor, batch: Batch) -> list[Tensor]:
        """Return the part of each input that shows the image, without the padding."""
        sizes = (fitted(mask.shape[-2], mask.shape[-1], images.shape[-1]) for mask in batch[1])
        return [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]


def in_own_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Scale the logits (C S S) of a padded image to the size of that image: C H W."""
    height, width = fitted(size[0], size[1], logits.shape[-1])
    if (height, width) == tuple(size):
        return logits[:, :height, :width]
    part = logits[None, :, :height, :width]
    return F.interpolate(part, tuple(size), mode="bilinear", align_corners=False)[0]


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 minus the overlap of probabilities and mask, averaged over classes; an image weighs as much as its valid pixels.

    Milletari, Navab, Ahmadi (2016): V-Net. https://arxiv.org/abs/1606.04797. One pixel is added to numerator and denominator,
    so that a class that is neither present nor predicted has no loss.
    """
    valid = targets != IGNORED
    probabilities = logits.float().softmax(1) * valid.unsqueeze(1)
    overlaps = []
    for c, of_class in enumerate(probabilities.unbind(1)):
        there = (targets == c).float()
        common = (of_class * there).sum((1, 2))
        overlaps.append((2 * common + 1) / (of_class.sum((1, 2)) + there.sum((1, 2)) + 1))
    return ((1 - torch.stack(overlaps).mean(0)) * valid.sum((1, 2))).sum()


class Overlap:
    """Loss and confusion matrix over all valid pixels of the original masks.

    The counts are integers, which float64 adds without rounding: they do not depend on how images are divided over ranks.
    """

    def __init__(self, task: Segmentation, device: torch.device) -> None:
        self.classes, self.logits, self.tables = task.classes, task.logits, task.tables
        where = "cpu" if device.type == "mps" else device  # mps has no double precision
        self._sums = torch.zeros(1 + len(self.classes) ** 2, dtype=torch.float64, device=where)
        self._overlaps = [torch.empty(0, dtype=torch.float64, device=where)]  # mean IoU of each image

    def update(self, model: nn.Module, batch: Batch) -> None:
        images, masks = batch
        for logits, mask in _in_own_sizes(self.logits(model, images), masks):
            targets = mask.long()
            valid = targets != IGNORED
            pairs = targets * len(self.classes) + logits.argmax(1)
            self._sums[0] += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").to(self._sums)
            for of_image, there in zip(pairs, valid, strict=True):
                counts = of_image[there].bincount(minlength=len(self.classes) ** 2).to(self._sums)
                self._sums[1:] += counts
                counts = counts.view(len(self.classes), -1)
                right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
                self._overlaps.append((right / union)[union > 0].mean().reshape(1))  # NaN without a valid pixel

    def sums(self) -> Tensor | list[tuple[Tensor, Tensor]]:
        return [(self._sums.cpu(), torch.cat(self._overlaps).cpu())] if "samples" in self.tables else self._sums

    def compute(self, sums: Tensor | list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        sums, overlaps = summed(sums)
        loss, n = float(sums[0]), len(self.classes)
        confusion = sums[1:].cpu().numpy().reshape(n, n)  # rows are the true classes
        right, there, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        union, count = there + predicted - right, int(confusion.sum())
        if not count:
            raise ValueError("these masks have no valid pixel: there is nothing to evaluate")
        iou = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
        metrics: dict[str, Any] = {
            "loss": loss / count,
            "mIoU": float(np.mean([value for value in iou if value is not None])),
            "pixel_acc": float(right.sum()) / count,
            "mean_acc": float(np.mean(right[there > 0] / there[there > 0])),
            "count": count,
        }
        if "per_class" in self.tables:
            metrics["per_class"] = dict(zip(self.classes, iou, strict=True))
        if "confusion" in self.tables:
            metrics["confusion"] = confusion.astype(int).tolist()
        if overlaps is not None:
            metrics["samples"] = ("image IoU", overlaps)
        return metrics


def _in_own_sizes(logits: Tensor, masks: Tensor | list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and masks of one size, B C H W and B H W; in one piece if they have it already."""
    if isinstance(masks, Tensor) and masks.shape[-2:] == logits.shape[-2:]:
        yield logits, masks
        return
    for of_image, mask in zip(logits, masks, strict=True):
        yield in_own_size(of_image, mask.shape).unsqueeze(0), mask.unsqueeze(0)


def create_network(config: Config, **options: Any) -> nn.Module:
    own = config.segmentation
    return create_segmenter(
        config.model.name, head=own.head, output_stride=own.output_stride, aux_head=own.aux_head, **options, **config.model.args
    )


def from_config(config: Config, data: Any) -> Segmentation:
    return Segmentation(
        data.classes,
        aux_weight=config.train.aux_weight,
        dice_weight=config.segmentation.dice_weight,
        tta="flip" if config.eval.tta == "flip" else None,  # a rule refuses flip_and_shift here
    )


OTHER_KEYS: tuple[str, ...] = ("augment.mixup", "augment.cutmix", "augment.cutout", "augment.auto", "augment.erasing")
OTHER_KEYS += ("augment.repeats", "augment.resize_from", "augment.scale", "augment.crop_pct", "augment.interpolation")
OTHER_KEYS += ("train.loss", "train.class_weights", "train.label_smoothing", "data.sampler", "distill.teacher", "eval.resize")

TASKS = {"segmentation": TaskKind(from_config, create_network, targets="masks", other_keys=OTHER_KEYS)}
