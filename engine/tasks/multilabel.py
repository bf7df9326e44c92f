"""Multi-label classification: any number of classes per image, each of them a yes/no question."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config.errors import ConfigError
from engine.config.schema import Config
from engine.tasks import BuiltInTask, TaskKind, loss_of_heads
from engine.tasks.classification import Augmentation, averaged_logits, class_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = tuple[Tensor, Tensor]  # images; N x classes, 1 where the class occurs, or shares of 1 for mixed images
Loss = Literal["bce", "focal", "asymmetric"]


@dataclass(eq=False)
class MultiLabel(BuiltInTask):
    monitor = "mAP"
    shown = ("mAP", "f1_micro", "f1_macro")

    classes: Sequence[str]
    _: KW_ONLY
    aux_weight: float = 0.3
    loss: Loss = "bce"
    focal_gamma: float = 2.0
    positive_weights: Tensor | None = None
    tta: Augmentation | None = None

    def __post_init__(self) -> None:
        self.thresholds = torch.full((len(self.classes),), 0.5)

    def weight(self, batch: Batch) -> int:
        return len(batch[1])

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        loss = partial(self._loss_sum, targets=targets, positive_weights=self.positive_weights)
        return loss_of_heads(model(images), loss, self.aux_weight)[1:]

    def _loss_sum(self, logits: Tensor, targets: Tensor, positive_weights: Tensor | None = None) -> Tensor:
        """Return the mean over the classes, summed over the images."""
        logits, targets = logits.float(), targets.float()
        weights = positive_weights.to(logits.device) if positive_weights is not None else None
        n_classes = logits.shape[1]
        if self.loss == "asymmetric":
            from timm.loss import AsymmetricLossMultiLabel  # Ben-Baruch et al. (2020), https://arxiv.org/abs/2009.14119

            return AsymmetricLossMultiLabel()(logits, targets) / n_classes
        if self.loss == "focal":
            from torchvision.ops import sigmoid_focal_loss

            losses = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=self.focal_gamma)
            losses = losses if weights is None else losses * (1 + (weights - 1) * targets)
            return losses.sum() / n_classes
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum") / n_classes

    def metric(self, device: torch.device) -> "RankedLabels":
        return RankedLabels(self)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the probability of each class, N x classes. They don't sum to 1."""
        return averaged_logits(model, batch[0], self.tta).sigmoid()

    def present(self, probabilities: Tensor) -> Tensor:
        """Return where a probability reaches the threshold of its class."""
        return probabilities >= self.thresholds.to(probabilities)

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Take over the thresholds that the validation split has chosen, by class."""
        self.thresholds = torch.tensor([thresholds.get(name, 0.5) for name in self.classes])

    def _draw_on(self, figure: "Figure", images: Tensor, batch: Batch, predictions: Tensor) -> None:
        from engine.plots.images import draw_labels

        draw_labels(figure, images, batch[1] > 0.5 if batch[1] is not None else None, self.present(predictions), self.classes)


class RankedLabels:
    """Average precision and F1 of each class, from the probabilities of every image, which are kept and gathered over ranks."""

    def __init__(self, task: MultiLabel) -> None:
        self.task, self.tables = task, task.tables
        self._found: list[tuple[float, Tensor, Tensor]] = []  # loss, probabilities and targets of each batch

    def update(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch
        logits = averaged_logits(model, images, self.task.tta).float()
        loss = self.task._loss_sum(logits, targets)
        self._found.append((float(loss), logits.sigmoid().cpu(), targets.cpu() > 0.5))

    def sums(self) -> list[tuple[float, Tensor, Tensor]]:
        return self._found

    def compute(self, sums: list[tuple[float, Tensor, Tensor]]) -> dict[str, Any]:
        from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

        losses, probabilities, targets = zip(*sums, strict=True)
        scores, truth = torch.cat(probabilities), torch.cat(targets).int()
        occurs, classes = truth.any(0), self.task.classes
        if not occurs.any():
            raise ValueError("no image of this split has a label: there is nothing to evaluate")
        n = int(occurs.sum())
        precisions = torch.full((len(classes),), torch.nan)
        whole: dict[str, Any] = {"validate_args": False}  # which would refuse a single class
        precisions[occurs] = multilabel_average_precision(scores[:, occurs], truth[:, occurs], n, average="none", **whole)
        present = self.task.present(scores).int()
        metrics: dict[str, Any] = {
            "loss": sum(losses) / len(scores),
            "mAP": float(precisions[occurs].mean()),
            "f1_micro": float(multilabel_f1_score(present, truth, len(classes), average="micro", **whole)),
            "f1_macro": float(multilabel_f1_score(present, truth, len(classes), average="macro", **whole)),
            "count": len(scores),
        }
        if "per_class" in self.tables:
            found = zip(classes, precisions.tolist(), occurs.tolist(), strict=True)
            metrics["per_class"] = {name: value if there else None for name, value, there in found}
        if "confusion" in self.tables:  # for each class: absent or present in truth (rows) and prediction
            pairs = zip(classes, (2 * truth + present).T, strict=True)
            metrics["confusion"] = {name: of_class.bincount(minlength=4).view(2, 2).tolist() for name, of_class in pairs}
        if "thresholds" in self.tables:
            columns = [(name, scores[:, i], truth[:, i]) for i, name in enumerate(classes) if occurs[i]]
            metrics["thresholds"] = {name: best_threshold(*column) for name, *column in columns}
        if "samples" in self.tables:  # how well the labels of an image are ranked above the others; NaN without a label
            hits = truth.gather(1, scores.argsort(dim=1, descending=True)).float()
            precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
            metrics["samples"] = ("image AP", (precision * hits).sum(1) / hits.sum(1))
        return metrics


def best_threshold(scores: Tensor, truth: Tensor) -> float:
    """Return the lowest of the scores at which F1 is highest."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(truth.numpy(), scores.numpy())
    f1 = 2 * precision * recall / (precision + recall).clip(min=1e-12)
    return float(thresholds[f1[:-1].argmax()])


def from_config(config: Config, data: Any) -> MultiLabel:
    train, classes = config.train, data.classes
    if train.class_weights is not None and train.loss == "asymmetric":
        raise ConfigError("train.class_weights", "the loss asymmetric has no class weights", "bce and focal do")
    labels = data.splits["train"].labels if "train" in data.splits else None  # a tool may know the classes alone
    return MultiLabel(
        classes,
        aux_weight=train.aux_weight,
        loss=train.loss,  # type: ignore[arg-type]  # a rule has checked it
        focal_gamma=train.focal_gamma,
        positive_weights=class_weights(train.class_weights, labels, len(classes), absent_per_present),
        tta=config.eval.tta,
    )


def absent_per_present(labels: Tensor, n_classes: int) -> Tensor:
    """Return for each class the number of images without it for each one with it."""
    n_with = labels.float().sum(0)
    return (len(labels) - n_with) / n_with.clamp(min=1)


OTHER_KEYS = ("augment.zoom", "train.label_smoothing", "train.bce_threshold", "data.sampler", "distill.teacher")

TASKS = {"multilabel": TaskKind(from_config, targets="labels", other_keys=OTHER_KEYS, losses=("bce", "focal", "asymmetric"))}
