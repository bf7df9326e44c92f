"""Objects in the format of COCO: a folder of images and a JSON file of annotations.

Tsung-Yi Lin et al. (2014): Microsoft COCO: Common Objects in Context. ECCV. https://arxiv.org/abs/1405.0312

`COCO` is the published dataset: train2017/, val2017/, annotations/instances_train2017.json and instances_val2017.json. `cocojson`
is any other: train/, val/, annotations/train.json and annotations/val.json; an export of Roboflow (train/_annotations.coco.json,
valid/ and test/ likewise), CVAT or Label Studio; or other paths by options.

Class 0 is the background. If all category ids are from 1 to 9,999, they are the classes, and those between them have no name: so
COCO's 80 categories are among the classes 1 to 90, as in torchvision's published weights. Otherwise the classes 1, 2, ... are the
categories in the order of their ids.
"""

import logging
import os
import reprlib
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.pipeline.boxes import COLUMNS, MAX_SIDE, NO_NAME, BoxedFiles, check_classes, clipped, has_area
from datasets.pipeline.splits import PHOTOGRAPHS, Loaded, Source, from_parts
from models.loading.files import MalformedFile, one_line, read_json, stays_inside

log = logging.getLogger(__name__)

MAX_CLASSES = 10_000
MAX_BYTES = 1 << 32  # of a file of annotations; COCO's has 450 MB

LAYOUTS = {  # folders of images and their annotations; the first that exists is used
    "train": (
        ("train", "annotations/train.json"),
        ("train", "train/_annotations.coco.json"),  # Roboflow
        ("images", "annotations/instances_default.json"),  # CVAT
        (".", "result.json"),  # Label Studio
    ),
    "val": (("val", "annotations/val.json"), ("valid", "valid/_annotations.coco.json")),
    "test": (("test", "annotations/test.json"), ("test", "test/_annotations.coco.json")),
}


def load(
    source: Source,
    *,
    train_images: str | None = None,
    train_annotations: str | None = None,
    val_images: str | None = None,
    val_annotations: str | None = None,
    test_images: str | None = None,
    test_annotations: str | None = None,
    test_ratio: float = 0.2,
    keep_empty: bool = True,
    drop_degenerate: bool = False,
) -> Loaded:
    """Names are relative to the data folder; null: found by LAYOUTS. Without val and test, `test_ratio` of the images are held
    out, the same ones for the same seed. `keep_empty` false omits images without objects from training. `drop_degenerate` omits
    boxes without an area, of which COCO has two, instead of raising an error."""
    given = {"train": (train_images, train_annotations), "val": (val_images, val_annotations)}
    given["test"] = (test_images, test_annotations)
    files, parts, categories = {}, {}, {}
    for part, (images, annotations) in given.items():
        found = next((layout for layout in LAYOUTS[part] if os.path.lexists(source.root / layout[1])), None)
        if part != "train" and images is annotations is found is None:
            continue
        usual = found or LAYOUTS[part][0]
        files[part] = source.root / (annotations or usual[1])
        parts[part], categories[part] = _read(source.root / (images or usual[0]), files[part], drop_degenerate)
        if categories[part] != categories["train"]:
            raise MalformedFile(files[part], f"declares other categories than {files['train']}")
    train, of_train = parts["train"], categories["train"]
    if not keep_empty:
        kept = [i for i, objects in enumerate(train.labels) if len(objects)]
        if not kept:
            raise MalformedFile(files["train"], "no image has an object, and data.keep_empty is false")
        parts["train"] = train.subset(torch.tensor(kept))
    numbers = class_numbers(of_train)
    classes = ["background", *[NO_NAME] * max(numbers.values())]
    for category, number in numbers.items():
        classes[number] = of_train[category]
    check_classes(parts, classes)
    category_ids = None
    if any(category != number for category, number in numbers.items()):
        words = "%s: category ids are not all from 1 to 9,999: the classes 1 to %d are in their order"
        log.info(words, files["train"], len(numbers))
        category_ids = (None, *numbers)
    return from_parts(parts, tuple(classes), test_ratio, source.seed, category_ids)


def class_numbers(categories: Iterable[int]) -> dict[int, int]:
    """Return the class of each category id."""
    ids = sorted(categories)
    if ids[0] > 0 and ids[-1] < MAX_CLASSES:
        return {category: category for category in ids}
    return {category: number for number, category in enumerate(ids, 1)}


def _read(images: Path, annotations: Path, drop_degenerate: bool) -> tuple[BoxedFiles, dict[int, str]]:
    content = _parse(annotations)
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    known = {entry["id"]: entry for entry in content["images"]}
    for part, by_id in (("categories", categories), ("images", known)):
        if len(by_id) < len(content[part]) or not by_id:
            raise MalformedFile(annotations, f"{part} have the same id twice" if by_id else f"it has no {part}")
    if len(categories) >= MAX_CLASSES:
        raise MalformedFile(annotations, f"it has {len(categories):,} categories; at most {MAX_CLASSES - 1:,} are supported")
    numbers = class_numbers(categories)
    rows: dict[int, list[list[float]]] = {image: [] for image in known}
    for i, entry in enumerate(content["annotations"]):
        try:
            row = _row(entry, known, numbers, drop_degenerate)
        except ValueError as error:
            raise MalformedFile(annotations, f"{_title(entry, i)} {error}") from error
        if row is not None:
            rows[entry["image_id"]].append(row)
    if n_dropped := len(content["annotations"]) - sum(map(len, rows.values())):
        log.warning("%s: %d boxes without an area are dropped", annotations, n_dropped)
    existing = {os.path.relpath(os.path.join(at, name), images) for at, _, names in os.walk(images) for name in names}
    for image in known.values():
        if os.path.normpath(image["file_name"]) not in existing:
            where = one_line(images / image["file_name"])
            raise OSError(f"{where} is missing; {annotations} has it as image {image['id']}")
    paths = np.array([os.fsencode(images / image["file_name"]) for image in known.values()])
    return BoxedFiles(paths, [np.array(rows[image], np.float32).reshape(-1, COLUMNS) for image in known]), categories


def _row(entry: dict[str, Any], images: dict[int, Any], numbers: dict[int, int], drop_degenerate: bool) -> list[float] | None:
    """Return the row of boxes.py for an annotation; None for a box without an area, if these are to be dropped."""
    image = images.get(entry["image_id"])
    if image is None:
        raise ValueError(f"is of the image {entry['image_id']}, which isn't among the file's images")
    if entry["category_id"] not in numbers:
        raise ValueError(f"has the category {entry['category_id']}, which isn't declared")
    left, top, width, height = map(float, entry["bbox"])
    box = [left, top, left + width, top + height]
    if has_area(box) and has_area(box := clipped(box, image["width"], image["height"])):
        return [*box, numbers[entry["category_id"]], entry.get("iscrowd", 0), entry.get("area", width * height)]
    if drop_degenerate:
        return None
    raise ValueError(f"has a box without an area, {entry['bbox']}; data.drop_degenerate omits such boxes")


def _is_number(value: Any, low: float = -MAX_SIDE, high: float = MAX_SIDE) -> bool:
    return type(value) in (int, float) and low <= value <= high  # false for NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)  # control, surrogate


Kind = tuple[Callable[[Any], bool], str]  # whether a value is of this kind, and the words for it
WHOLE: Kind = (lambda value: type(value) is int, "a whole number")
TEXT: Kind = (_is_text, "text without control characters")
FILE: Kind = (lambda value: _is_text(value) and stays_inside(value), "a path inside the folder of images")
SIDE: Kind = (lambda value: _is_number(value, 1), "a number of pixels")
BOX: Kind = (lambda v: isinstance(v, list) and len(v) == 4 and all(map(_is_number, v)), "left, top, width and height in pixels")
FLAG: Kind = (lambda value: value in (0, 1), "0 or 1")
AREA: Kind = (lambda value: _is_number(value, 0, MAX_SIDE**2), "a number of pixels")
FIELDS: dict[str, dict[str, Kind]] = {
    "categories": {"id": WHOLE, "name": TEXT},
    "images": {"id": WHOLE, "file_name": FILE, "width": SIDE, "height": SIDE},
    "annotations": {"image_id": WHOLE, "category_id": WHOLE, "bbox": BOX, "iscrowd": FLAG, "area": AREA},
}
SINGULAR = {"categories": "category", "images": "image", "annotations": "annotation"}
OPTIONAL = {"iscrowd": 0, "area": 0}


def _parse(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the parts of a file, whose entries have all fields, each of its kind."""
    try:
        content = read_json(path, MAX_BYTES)
    except MalformedFile:
        raise
    except OSError as error:
        expected = "expected one, and a folder of images, for each of training and validation"
        raise OSError(f"{path} can't be read ({error.strerror}); {expected}") from error
    for part, fields in FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise MalformedFile(path, f"it is not a file of COCO annotations: it has no list {part!r}")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise MalformedFile(path, f"number {i + 1} of its {part} is not an object")
            if part == "annotations" and not entry.get("bbox") and (box := _box_around(entry.get("segmentation"))):
                entry["bbox"] = box
            for name, (is_valid, expected) in fields.items():
                value = entry.get(name, OPTIONAL.get(name))
                if not is_valid(value):
                    found = f"{name} is {reprlib.repr(value)}" if name in entry else f"{name} is missing"
                    raise MalformedFile(path, f"{_title(entry, i, SINGULAR[part])}: {found}; expected {expected}")
    return content


def _box_around(polygons: Any) -> list[float] | None:
    """Return the box of an annotation with nothing but polygons, each a list of x and y in turn; None for anything else."""
    lists = polygons if isinstance(polygons, list) else []
    if not lists or not all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in lists):
        return None
    values = [value for polygon in lists for value in polygon]
    if not all(map(_is_number, values)):
        return None
    xs, ys = values[::2], values[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _title(entry: dict[str, Any], i: int, kind: str = "annotation") -> str:
    """Return what a message calls an entry: its id, if it has one, or its place in the list."""
    number = entry.get("id")
    return f"{kind} {number}" if type(number) is int else f"{kind} number {i + 1}"


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
