"""Classification: one class per image."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config.errors import ConfigError
from engine.config.schema import Config
from engine.tasks import BuiltInTask, TaskKind, loss_of_heads, summed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images; class numbers or, for mixed images, probabilities
Loss = Literal["cross_entropy", "bce", "focal"]
Augmentation = Literal["flip", "flip_and_shift"]  # of an evaluation

N_BINS = 15  # of the expected calibration error
GRAIN = 2.0**-24  # the distance of two float32 numbers just below 1


@dataclass(eq=False)
class Classification(BuiltInTask):
    monitor = "acc@1"
    shown = ("acc@1", "acc@5")

    classes: Sequence[str]
    _: KW_ONLY
    aux_weight: float = 0.3
    loss: Loss = "cross_entropy"
    label_smoothing: float = 0.0
    bce_threshold: float | None = None
    focal_gamma: float = 2.0
    class_weights: Tensor | None = None
    tta: Augmentation | None = None

    def weight(self, batch: Batch) -> int:
        return len(batch[1])

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        logits, loss, sums = loss_of_heads(model(images), lambda out: self._training_loss(out, targets), self.aux_weight)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return loss, {**sums, "acc@1": (logits.argmax(1) == labels).sum()}

    def _training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "bce":
            return binary_cross_entropy(logits, targets, self.label_smoothing, self.bce_threshold).sum()
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits.device)
        if self.loss == "focal":
            return focal_loss(logits, targets, self.focal_gamma, self.label_smoothing, self.class_weights).sum()
        return cross_entropy(logits, targets, self.label_smoothing, self.class_weights).sum()

    def evaluation_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample in an evaluation, without label smoothing and class weights."""
        if self.loss == "focal":
            return focal_loss(logits, targets, self.focal_gamma)
        return binary_cross_entropy(logits, targets) if self.loss == "bce" else cross_entropy(logits, targets)

    def metric(self, device: torch.device) -> "Accuracy":
        return Accuracy(self, device)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.probabilities(self.logits(model, batch[0]))

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return averaged_logits(model, images, self.tta)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities; with the loss bce each class is a separate question, and they don't sum to 1."""
        return logits.sigmoid() if self.loss == "bce" else logits.softmax(1)

    def _draw_on(self, figure: "Figure", images: Tensor, batch: Batch, predictions: Tensor) -> None:
        from engine.plots.images import Row, class_titles, draw_images

        draw_images(figure, [Row("", images, *class_titles(predictions, self.classes, batch[1]))])


def averaged_logits(model: nn.Module, images: Tensor, tta: Augmentation | None) -> Tensor:
    """Return the logits that an evaluation counts: the mean over the views of each image that `tta` names."""
    if tta is None:
        return model(images)
    logits = (model(images) + model(images.flip(-1))) / 2
    if tta == "flip":
        return logits
    padded, (height, width) = F.pad(images, [1] * 4, mode="reflect"), images.shape[-2:]
    shifted = padded[..., :height, :width], padded[..., 2:, 2:]
    return logits / 2 + sum(model(view) + model(view.flip(-1)) for view in shifted) / 8


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None) -> Tensor:
    """Return the loss of each sample."""
    return F.cross_entropy(logits, targets, class_weights, reduction="none", label_smoothing=smoothing)


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Return the loss of each sample: cross-entropy, less of it for samples that are classified well already.

    Lin, Goyal, Girshick, He, Dollar (2017): Focal Loss for Dense Object Detection. https://arxiv.org/abs/1708.02002
    """
    n_classes = logits.shape[1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, n_classes).to(logits.dtype)
    targets = (1 - smoothing) * targets + smoothing / n_classes
    log_p = logits.log_softmax(1)
    terms = targets * (1 - log_p.exp()) ** gamma * -log_p
    return (terms * class_weights if class_weights is not None else terms).sum(1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0, threshold: float | None = None) -> Tensor:
    """Return the loss of each sample, with a yes/no question per class: the mean over the classes, as in timm.

    Wightman, Touvron, Jegou (2021): ResNet strikes back. https://arxiv.org/abs/2110.00476
    """
    n_classes = logits.shape[1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, n_classes).to(logits.dtype)
    targets = (1 - smoothing) * targets + smoothing / n_classes
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


class Accuracy:
    """Loss, accuracy and calibration of every sample, counted once.

    The sums hold integers and multiples of GRAIN, which float64 adds without rounding: they do not depend on how the samples are
    divided into batches and over ranks.
    """

    def __init__(self, task: Classification, device: torch.device) -> None:
        self.task, self.tables, n = task, task.tables, len(task.classes)
        # loss, top 5; per class: right, all; per bin: confidence, right, all; true x predicted
        self._sizes = [2, n, n, N_BINS, N_BINS, N_BINS, n * n if "confusion" in self.tables else 0]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(sum(self._sizes), dtype=dtype, device=device)
        self._bin_ends = torch.arange(1, N_BINS, dtype=dtype, device=device) / N_BINS
        self._right = [torch.empty(0, dtype=torch.bool, device=device)]  # of each sample, if that table is asked for

    def update(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch
        logits = self.task.logits(model, images)
        logits = logits.to(self._sums.dtype)  # float32 rounds the last rows of a batch differently, by more than a grain
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best == targets.unsqueeze(1)).to(logits.dtype)
        right, predicted = hits[:, 0], best[:, 0]
        confidence = self._in_grains(self.task.probabilities(logits).gather(1, best[:, :1]).squeeze(1))

        totals, right_of_class, n_of_class, sure, right_of_bin, n_of_bin, confusion = self._sums.split(self._sizes)  # views
        totals += torch.stack([self._in_grains(self.task.evaluation_losses(logits, targets)).sum(), hits.sum()])
        right_of_class.index_add_(0, targets, right)
        n_of_class.index_add_(0, targets, torch.ones_like(right))
        bins = torch.bucketize(confidence, self._bin_ends)
        for of_bin, values in ((sure, confidence), (right_of_bin, right), (n_of_bin, torch.ones_like(right))):
            of_bin.index_add_(0, bins, values)
        if "samples" in self.tables:
            self._right.append(right > 0)
        if "confusion" in self.tables:
            confusion.index_add_(0, targets * len(self.task.classes) + predicted, torch.ones_like(right))

    def _in_grains(self, values: Tensor) -> Tensor:
        return (values / GRAIN).round() * GRAIN

    def sums(self) -> Tensor | list[tuple[Tensor, Tensor]]:
        return [(self._sums.cpu(), torch.cat(self._right).cpu())] if "samples" in self.tables else self._sums

    def compute(self, sums: Tensor | list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        sums, all_right = summed(sums)
        parts = (part.numpy() for part in sums.double().cpu().split(self._sizes))
        totals, right, n, sure, right_of_bin, n_of_bin, confusion = parts
        (loss, top5), count, occurs = totals.tolist(), int(n.sum()), n > 0
        metrics: dict[str, Any] = {
            "loss": loss / count,
            "acc@1": float(right.sum()) / count,
            "acc@5": top5 / count,
            "balanced_acc": float(np.mean(right[occurs] / n[occurs])),
            "ece": float(np.abs(right_of_bin - sure).sum()) / count,
            "count": count,
        }
        if "per_class" in self.tables:
            counted = zip(self.task.classes, right.tolist(), n.tolist(), strict=True)
            metrics["per_class"] = {name: r / of if of else None for name, r, of in counted}
        if "bins" in self.tables:  # of confidence, in equal steps from 0 to 1
            counted = zip(sure.tolist(), right_of_bin.tolist(), n_of_bin.astype(int).tolist(), strict=True)
            metrics["bins"] = [{"confidence": s / of, "acc@1": r / of, "count": of} if of else None for s, r, of in counted]
        if "confusion" in self.tables:  # rows are the true classes
            metrics["confusion"] = confusion.astype(int).reshape(len(n), len(n)).tolist()
        if all_right is not None:
            metrics["samples"] = ("acc@1", all_right)
        return metrics


def from_config(config: Config, data: Any) -> Classification:
    train, n_classes = config.train, len(data.classes)
    no, yes = train.label_smoothing / n_classes, 1 - train.label_smoothing + train.label_smoothing / n_classes
    if train.loss == "bce" and train.bce_threshold is not None and not no <= train.bce_threshold < yes:
        problem = f"{train.bce_threshold:g} would give every class the same label"
        smoothing = f"train.label_smoothing {train.label_smoothing:g} turns a no into {no:.4g} and a yes into {yes:.4g}"
        raise ConfigError("train.bce_threshold", f"{problem}: {smoothing}")
    labels = data.splits["train"].labels if "train" in data.splits else None  # a tool may know the classes alone
    if labels is not None:
        counts = torch.bincount(labels.cpu(), minlength=n_classes)
        rarest, commonest = int(counts.argmin()), int(counts.argmax())
        if counts[rarest] < counts[commonest]:
            words = "training images per class: from %d (%s) to %d (%s)"
            log.info(words, counts[rarest], data.classes[rarest], counts[commonest], data.classes[commonest])
    return Classification(
        data.classes,
        aux_weight=train.aux_weight,
        loss=train.loss,  # type: ignore[arg-type]  # a rule has checked it
        label_smoothing=train.label_smoothing,
        bce_threshold=train.bce_threshold,
        focal_gamma=train.focal_gamma,
        class_weights=class_weights(train.class_weights, labels, n_classes, inverse_frequencies),
        tta=config.eval.tta,
    )


def class_weights(
    given: Sequence[float] | Literal["balanced"] | None,
    labels: Tensor | None,
    n_classes: int,
    balanced: Callable[[Tensor, int], Tensor],
) -> Tensor | None:
    """Return train.class_weights as a tensor, of which `balanced` computes those for labels; None without weights or labels."""
    if given is None:
        return None
    if given == "balanced":
        return balanced(labels, n_classes) if labels is not None else None
    if len(given) != n_classes:
        raise ConfigError("train.class_weights", f"{len(given)} numbers for {n_classes} classes")
    return torch.tensor([float(weight) for weight in given])


def inverse_frequencies(labels: Tensor, n_classes: int) -> Tensor:
    """Return the weights that give every class the same sum over the samples; their mean over the samples is 1."""
    counts = torch.bincount(labels, minlength=n_classes)
    return counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))


TASKS = {"classification": TaskKind(from_config, other_keys=("augment.zoom",), losses=("cross_entropy", "bce", "focal"))}
