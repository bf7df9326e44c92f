"""What predict.py writes of images with masks or boxes: a folder of PNGs, or a JSON as COCO's."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.config.errors import RunError

if TYPE_CHECKING:
    from engine.inference.images import ReadBatch
    from engine.inference.trained import Trained

Predicted = tuple["ReadBatch", Sequence[Any]]  # a batch, and what is predicted of each of its images


def write_masks(folder: Path, names: Sequence[str], found: Iterator[Predicted], trained: "Trained") -> None:
    """A mask for each image, as large as it, whose pixels are the numbers of classes.json, with a palette to look at."""
    into = dict(zip(names, mask_paths(folder, names), strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "classes.json").write_text(json.dumps(trained.classes) + "\n")
        for read, masks in found:
            for place, mask in zip(read.places, masks, strict=True):
                path = into[names[place]]
                path.parent.mkdir(parents=True, exist_ok=True)
                trained.task.write(mask, path)
    except OSError as error:
        raise RunError(f"{error.filename or folder} can't be written: {error.strerror}") from error


def mask_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Named as the images, in folders as theirs: from the last one that all of them are in."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    relative = [os.path.relpath(os.path.abspath(name), common) for name in names]
    without_ending = [os.path.splitext(name)[0] for name in relative]
    is_alone = len(set(without_ending)) == len(names)
    return [folder / f"{name}.png" for name in (without_ending if is_alone else relative)]


def write_coco(file: IO[str], names: Sequence[str], found: Iterator[Predicted], trained: "Trained") -> None:
    """A set in COCO's format, whose annotations have a score besides; written as they come, the list of images last."""
    images: list[dict[str, Any]] = []
    n_boxes, separator = 0, "\n"
    file.write('{"annotations": [')
    for read, predictions in found:
        for place, (height, width), prediction in zip(read.places, read.sizes, predictions, strict=True):
            images.append({"id": place + 1, "file_name": names[place], "width": width, "height": height})
            for entry in trained.task.entries(prediction, place + 1):
                n_boxes += 1
                area = entry["bbox"][2] * entry["bbox"][3]
                file.write(separator + json.dumps({"id": n_boxes, **entry, "area": area, "iscrowd": 0}))
                separator = ",\n"
    categories = [{"id": label, "name": name} for label, name in enumerate(trained.classes) if label and name != "N/A"]
    file.write(f'\n],\n"images": {json.dumps(images)},\n"categories": {json.dumps(categories)}}}\n')
