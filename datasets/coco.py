"""Objects in the format of COCO: a folder of images and a JSON file of annotations.

Tsung-Yi Lin et al. (2014): Microsoft COCO: Common Objects in Context. ECCV. https://arxiv.org/abs/1405.0312

`COCO` is the published dataset: train2017/, val2017/, annotations/instances_train2017.json and instances_val2017.json. `cocojson`
is any other: by default train/, val/, annotations/train.json and annotations/val.json. A category's id in the JSON is its class
here; ids without a category have no name, and 0 is the background. So COCO's 80 categories are among the classes 1 to 90, as in
torchvision's published weights.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.pipeline.boxes import COLUMNS, BoxedFiles, clipped
from datasets.pipeline.splits import PHOTOGRAPHS, Loaded, Source

NO_NAME = "N/A"
MAX_CLASSES = 10_000  # a higher category id is a mistake


def load(
    source: Source,
    *,
    train_images: str = "train",
    train_annotations: str = "annotations/train.json",
    val_images: str = "val",
    val_annotations: str = "annotations/val.json",
    keep_empty: bool = True,
    drop_degenerate: bool = False,
) -> Loaded:
    """Names are relative to the data folder. `keep_empty` false omits images without objects from training. `drop_degenerate`
    omits boxes without an area, of which COCO has two, instead of raising an error."""
    root = source.root
    train, classes = _read(root / train_images, root / train_annotations, drop_degenerate)
    test, of_val = _read(root / val_images, root / val_annotations, drop_degenerate)
    if classes != of_val:
        raise OSError(f"{root / val_annotations} declares other categories than {root / train_annotations}")
    if not keep_empty:
        train = train.subset(torch.tensor([i for i, objects in enumerate(train.labels) if len(objects)]))
    return Loaded(train, test, classes)


def _read(images: Path, annotations: Path, drop_degenerate: bool) -> tuple[BoxedFiles, tuple[str, ...]]:
    content = _parse(annotations)
    numbers = {category["id"]: category["name"] for category in content["categories"]}
    if not numbers or not all(isinstance(number, int) and 0 <= number < MAX_CLASSES for number in numbers):
        raise OSError(f"{annotations}: the ids of categories must be whole numbers from 1 on, below {MAX_CLASSES:,}")
    classes = ("background", *(numbers.get(number, NO_NAME) for number in range(1, max(numbers) + 1)))
    known = {image["id"]: image for image in content["images"]}
    rows: dict[Any, list[list[float]]] = {number: [] for number in known}
    for annotation in content["annotations"]:
        where = f"{annotations}: annotation {annotation.get('id', '?')}"
        image, label = known.get(annotation["image_id"]), annotation["category_id"]
        if image is None:
            raise OSError(f"{where} is of the image {annotation['image_id']}, which isn't among the file's images")
        if not 0 < label < len(classes) or classes[label] == NO_NAME:
            raise OSError(f"{where} has the category {label}, which isn't declared")
        left, top, width, height = map(float, annotation["bbox"])
        if width <= 0 or height <= 0:
            if drop_degenerate:
                continue
            raise OSError(f"{where} has a box without an area, {annotation['bbox']}; data.drop_degenerate omits such boxes")
        box = clipped((left, top, left + width, top + height), image["width"], image["height"], where)
        rows[image["id"]].append([*box, label, annotation.get("iscrowd", 0), annotation.get("area", width * height)])
    existing = {os.path.relpath(os.path.join(at, name), images) for at, _, names in os.walk(images) for name in names}
    for image in known.values():
        if os.path.normpath(image["file_name"]) not in existing:
            raise OSError(f"{images / image['file_name']} is missing; {annotations} has it as image {image['id']}")
    paths = np.array([os.fsencode(images / image["file_name"]) for image in known.values()])
    return BoxedFiles(paths, [np.array(rows[number], np.float32).reshape(-1, COLUMNS) for number in known]), classes


def _parse(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
        for part, keys in (("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name"))):
            if any(key not in entry for entry in content[part] for key in keys):
                raise KeyError(f"{' or '.join(keys)} in {part}")
        if any(key not in entry for entry in content["annotations"] for key in ("image_id", "category_id", "bbox")):
            raise KeyError("image_id, category_id or bbox in annotations")
    except OSError as error:
        raise OSError(
            f"{path} can't be read ({error.strerror}); expected one, and a folder of images, for each of training and validation"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is not a file of COCO annotations ({type(error).__name__}: {error})") from error
    return content


_coco = partial(
    load,
    train_images="train2017",
    train_annotations="annotations/instances_train2017.json",
    val_images="val2017",
    val_annotations="annotations/instances_val2017.json",
    drop_degenerate=True,
)

DATASETS = [
    PHOTOGRAPHS(name="cocojson", load=load, img_size=800, targets="boxes"),
    PHOTOGRAPHS(name="COCO", load=_coco, img_size=800, targets="boxes", n_classes=91),
]
