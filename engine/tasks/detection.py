"""Detection: where objects are, and of which class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from datasets import find_dataset
from datasets.pipeline.boxes import Batch, Target
from engine.config.schema import Config
from engine.tasks import BuiltInTask, TaskKind
from models.heads.detection import create_detector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Prediction = dict[str, Tensor]  # boxes N 4, labels N, scores N; the best come first


@dataclass(eq=False)
class Detection(BuiltInTask):
    """Trains torchvision's detectors, which divide their loss by the matched objects of each forward.

    So the weight of a batch is its number of images, and several micro-batches or ranks do not give exactly the gradient of one
    batch: a part with few objects counts as much as one with many.
    """

    monitor = "mAP"
    shown = ("mAP", "mAP@50", "mAP@75")

    classes: Sequence[str]

    def weight(self, batch: Batch) -> int:
        return len(batch[0])

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        losses = model(images, [learned_from(target) for target in targets])
        sums = {f"loss_{name.removeprefix('loss_')}": value * len(images) for name, value in losses.items()}
        loss = sum(sums.values())
        return loss, {"loss": loss, **sums}

    def metric(self, device: torch.device) -> "AveragePrecision":
        return AveragePrecision(self)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Predict images of one size together: padding to the size of others would make predictions depend on the batch."""
        found: list[Prediction] = [{}] * len(batch[0])
        of_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(batch[0]):
            of_size.setdefault(image.shape, []).append(i)
        for places in of_size.values():
            for i, prediction in zip(places, model([batch[0][i] for i in places]), strict=True):
                found[i] = prediction
        return found

    def _draw_on(self, figure: "Figure", images: Tensor, batch: Batch, predictions: Sequence[Prediction] | None) -> None:
        from engine.plots.overlays import draw_boxes

        draw_boxes(figure, self.visible(images, batch), batch[1], predictions, self.classes)

    @staticmethod
    def visible(images: Tensor, batch: Batch) -> list[Tensor]:
        """Return the part of each picture that is image, without the padding."""
        return [image[:, : own.shape[-2], : own.shape[-1]] for image, own in zip(images, batch[0], strict=True)]

    def entries(self, prediction: Prediction, image_id: int | str) -> list[dict[str, Any]]:
        """Return entries of a COCO results file: boxes by corner, width and height."""
        found = zip(*(prediction[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
        return [
            {"image_id": image_id, "category_id": label, "bbox": [left, top, right - left, bottom - top], "score": score}
            for (left, top, right, bottom), label, score in found
        ]


def learned_from(target: Target) -> dict[str, Tensor]:
    """Return the target without crowds, from which nothing is learned."""
    single = ~target["iscrowd"]
    return {"boxes": target["boxes"][single], "labels": target["labels"][single]}


class AveragePrecision:
    """COCO's mean average precision, by pycocotools: over classes and overlaps from 0.5 to 0.95, at most 100 boxes an image.

    It is not a sum over images: the predictions for each image are kept, and gathered over ranks.
    """

    def __init__(self, task: Detection) -> None:
        self.task, self.classes, self.tables = task, task.classes, task.tables
        self._found: list[tuple[Prediction, Target]] = []

    def update(self, model: nn.Module, batch: Batch) -> None:
        for prediction, target in zip(self.task.predict(model, batch), batch[1], strict=True):
            found = {name: value.cpu() for name, value in prediction.items()}
            self._found.append((found, {name: value.cpu() for name, value in target.items()}))

    def sums(self) -> list[tuple[Prediction, Target]]:
        return self._found

    def compute(self, sums: list[tuple[Prediction, Target]]) -> dict[str, Any]:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(backend="pycocotools", class_metrics="per_class" in self.tables)
        metric.warn_on_many_detections = False  # the best 100 count, as in COCO
        predictions, targets = zip(*sums, strict=True)
        metric.update(list(predictions), list(targets))
        result = metric.compute()
        metrics: dict[str, Any] = {
            "mAP": float(result["map"]),
            "mAP@50": float(result["map_50"]),
            "mAP@75": float(result["map_75"]),
            "mAR@100": float(result["mar_100"]),
            "count": len(sums),
        }
        if "per_class" in self.tables:
            of_class = dict(zip(result["classes"].tolist(), result["map_per_class"].tolist(), strict=True))
            metrics["per_class"] = {
                name: value if (value := of_class.get(label, -1.0)) >= 0 else None
                for label, name in enumerate(self.classes)
                if label and name != "N/A"
            }
        if "samples" in self.tables:
            metrics["samples"] = ("image AP", torch.tensor([image_precision(*pair) for pair in sums]))
        return metrics


def image_precision(prediction: Prediction, target: Target) -> float:
    """Return the average precision of one image at COCO's overlaps, over objects of all its classes; NaN without an object."""
    from torchvision.ops import box_iou

    objects, order = learned_from(target), prediction["scores"].argsort(descending=True)
    n, n_found, overlaps = len(objects["labels"]), len(order), torch.linspace(0.5, 0.95, 10).unsqueeze(1)
    iou = box_iou(prediction["boxes"][order], objects["boxes"]) * (prediction["labels"][order, None] == objects["labels"])
    hits, free = torch.zeros(10, n_found), torch.ones(10, n, dtype=torch.bool)
    for i, of_box in enumerate(iou if n else ()):  # the best box first takes the object that it overlaps most
        best, which = torch.where(free & (of_box >= overlaps), of_box, -1.0).max(1)
        hits[:, i] = (best > 0).float()
        free[torch.arange(10), which] &= best <= 0
    precision = hits.cumsum(1) / torch.arange(1, n_found + 1)
    highest = precision.flip(1).cummax(1).values.flip(1) if n_found else precision  # at this recall or more
    return float((highest * hits).sum() / (10 * n)) if n else float("nan")


def create_network(config: Config, **options: Any) -> nn.Module:
    spec = find_dataset(config.data.name, "boxes")
    options |= {"mean": config.data.mean or spec.mean, "std": config.data.std or spec.std, **vars(config.detection)}
    return create_detector(config.model.name, **options, **config.model.args)


def from_config(config: Config, data: Any) -> Detection:
    return Detection(data.classes)


OTHER_KEYS: tuple[str, ...] = ("augment.mixup", "augment.cutmix", "augment.cutout", "augment.auto", "augment.erasing")
OTHER_KEYS += ("augment.repeats", "augment.resize_from", "augment.scale", "augment.crop_pct", "augment.interpolation")
OTHER_KEYS += ("augment.zoom", "augment.crop_padding", "augment.padding_mode", "train.loss", "train.label_smoothing")
OTHER_KEYS += ("train.aux_weight", "train.class_weights", "data.sampler", "distill.teacher", "eval.img_size", "eval.resize")
OTHER_KEYS += ("eval.tta",)

PACKAGES = ("pycocotools", "torchmetrics")

TASKS = {"detection": TaskKind(from_config, create_network, targets="boxes", other_keys=OTHER_KEYS, packages=PACKAGES)}
