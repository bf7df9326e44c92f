"""Images with masks or boxes, in the pictures whose other images have a class."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.config.errors import ConfigError
from tools.pictures.columns import Row
from tools.pictures.subject import batches_asked_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from engine.inference.trained import Trained
    from engine.tasks import Task


def is_of_scenes(task: "Task") -> bool:
    from engine.tasks.detection import Detection
    from engine.tasks.segmentation import Segmentation

    return isinstance(task, (Detection, Segmentation))


def draw_predictions(figure: "Figure", args: Namespace, trained: "Trained") -> None:
    import torch

    if args.wrong:
        raise ConfigError(f"--wrong: one class is right or wrong, and task is {trained.config.task}")
    batch = joined(batches_asked_for(args, trained))
    with torch.no_grad():
        predictions = trained.task.predict(trained.model, batch)
    trained.task.draw(trained.normalize.undo(batch[0]), batch, predictions, figure)


def joined(batches: "Iterable[Sequence[Any]]") -> list[Any]:
    """One batch of several."""
    import torch

    return [_joined(parts, torch.cat) for parts in zip(*batches, strict=True)]


def _joined(parts: Sequence[Any], cat: Any) -> Any:
    if parts[0] is None:
        return None
    return [item for part in parts for item in part] if isinstance(parts[0], list) else cat(parts)


def rows_of(task: "Task", name: str, pictures: "Tensor", batch: Sequence[Any]) -> list[Row]:
    """The images with what is said of each: a mask below it, boxes upon it."""
    import torch

    from engine.plots.images import short
    from engine.plots.overlays import add_boxes, with_mask
    from engine.tasks.segmentation import Segmentation

    images = task.visible(pictures, batch)
    if not isinstance(task, Segmentation):

        def boxes(axes: "Axes", i: int) -> None:
            add_boxes(axes, batch[1][i], task.classes)

        return [Row(name, images, add=boxes)]
    over = partial(with_mask, n_classes=len(task.classes))
    masks = [torch.from_numpy(over(image, mask)).permute(2, 0, 1) for image, mask in zip(images, batch[1], strict=True)]
    titles = ["\n".join(short(task.classes[label]) for label in _objects_in(mask)) for mask in batch[1]]
    return [Row(name, images), Row("mask", masks, titles)]


def _objects_in(mask: "Tensor") -> list[int]:
    """The labels in it but for the first, which is the background of every set."""
    from datasets.pipeline.masks import IGNORED

    return [label for label in mask.unique().tolist() if label not in (0, IGNORED)]
