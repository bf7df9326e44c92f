"""Pascal VOC: photographs with 20 kinds of objects; and other images with boxes in the same layout.

Mark Everingham, Luc Van Gool, Christopher K. I. Williams, John Winn, Andrew Zisserman (2010): The Pascal Visual Object Classes
(VOC) Challenge. IJCV. http://host.robots.ox.ac.uk/pascal/VOC/

The data folder is VOCdevkit/VOC2012, to which the published archives unpack, or a parent of it. For segmentation, most published
results train on `trainaug`: 10,582 images with the masks of Hariharan, Arbelaez, Bourdev, Maji, Malik (2011): Semantic Contours
from Inverse Detectors, ICCV. Its files are ImageSets/Segmentation/trainaug.txt and SegmentationClassAug/.

A folder of another name than VOC2012 with JPEGImages/ and Annotations/ holds boxes of a person's own classes: `data.classes` or,
if that is null, the names in the annotations, sorted. ImageSets/Main/ has the lists train, val and test, or a part of them;
without it, all annotated images are used.
"""

import logging
import os
import reprlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.pipeline.boxes import CLASS, COLUMNS, MAX_SIDE, BoxedFiles, check_classes, clipped, has_area
from datasets.pipeline.images import IMAGE_ENDINGS
from datasets.pipeline.masks import MaskedFiles, check_masks
from datasets.pipeline.splits import PHOTOGRAPHS, Loaded, Source, from_parts
from models.loading.files import MalformedFile, one_line, read_limited, stays_inside

log = logging.getLogger(__name__)

CLASSES: tuple[str, ...]
CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable")
CLASSES += ("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
MAX_LIST = 100_000_000  # bytes of a list of names
ENDINGS = (*IMAGE_ENDINGS, *map(str.upper, IMAGE_ENDINGS))
MASKS = ("SegmentationClass", "SegmentationClassAug")


def load_masks(source: Source, *, year: int = 2012, train_set: str = "train", val_set: str = "val") -> Loaded:
    """`train_set` and `val_set` are files of ImageSets/Segmentation, such as train, trainaug, trainval, val."""
    folder, splits = find_folder(source.root, year), {}
    for name in (train_set, val_set):
        images, masks = [], []
        for image in names_in(folder, "Segmentation", name):
            path, candidates = folder / "JPEGImages" / f"{image}.jpg", [folder / kind / f"{image}.png" for kind in MASKS]
            mask = next((mask for mask in candidates if mask.is_file()), None)
            if mask is None or not path.is_file():
                gone = one_line(candidates[0] if mask is None else path)
                raise OSError(f"{gone} is missing; ImageSets/Segmentation/{name}.txt names it")
            images.append(os.fsencode(path))
            masks.append(os.fsencode(mask))
        splits[name] = MaskedFiles(np.array(images), np.array(masks))
    check_masks(splits, CLASSES, source.exif_rotate)
    return Loaded(splits[train_set], splits[val_set], CLASSES)


def load_boxes(
    source: Source,
    *,
    year: int = 2012,
    train_set: str = "train",
    val_set: str = "val",
    classes: list[str] | None = None,
    test_ratio: float = 0.2,
    drop_degenerate: bool = False,
) -> Loaded:
    """`train_set` and `val_set` are files of ImageSets/Main. Objects marked as difficult are treated like crowds in COCO.

    In a folder named by the year, `classes` null means the published data. In other data, lists that don't exist are skipped, and
    test.txt is read too. Without val and test, `test_ratio` of the images are held out, the same ones for the same seed.
    `drop_degenerate` omits boxes without an area instead of raising an error.
    """
    folder = find_folder(source.root, year)
    is_published = classes is None and folder.resolve().name == f"VOC{year}"
    if classes is not None and not 0 < len(set(classes)) == len(classes):
        raise ValueError(f"classes are {', '.join(classes) or 'empty'}; expected different names")
    known = CLASSES[1:] if is_published else classes
    objects = _Objects({name: number for number, name in enumerate(known or (), 1)}, known is None, drop_degenerate)
    lists, lists_folder = {"train": train_set, "val": val_set}, folder / "ImageSets" / "Main"
    if not is_published:
        lists |= {} if "test" in lists.values() else {"test": "test"}
        is_there = {name: (lists_folder / f"{name}.txt").is_file() for name in lists.values()}
        lists = {part: name for part, name in lists.items() if part == "train" or part != name or is_there[name]}
    if is_published or lists_folder.is_dir() or train_set != "train":
        named = {part: names_in(folder, "Main", name, with_spaces=not is_published) for part, name in lists.items()}
        parts = {part: _boxed(folder, f"ImageSets/Main/{lists[part]}.txt", names, objects) for part, names in named.items()}
    else:
        names = sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
        parts = {"train": _boxed(folder, "Annotations", names, objects)}
    if objects.n_dropped:
        log.warning("%s: %d boxes without an area are dropped", folder, objects.n_dropped)
    if not objects.numbers:
        raise OSError(f"{folder / 'Annotations'} has no object in the images of {', '.join(lists)}")
    classes = [*objects.numbers]
    if known is None:  # number the classes in the order of their names
        classes.sort()
        order = np.array([0, *(1 + classes.index(name) for name in objects.numbers)], dtype=np.float32)
        for rows in (rows for part in parts.values() for rows in part.labels):
            rows[:, CLASS] = order[rows[:, CLASS].astype(int)]
        log.info("%s: the classes are %s", folder, ", ".join(map(one_line, classes)))
    classes = ["background", *classes]
    check_classes(parts, classes)
    return from_parts(parts, tuple(classes), test_ratio, source.seed)


def find_folder(root: Path, year: int) -> Path:
    for folder in (root, root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"):
        if (folder / "JPEGImages").is_dir():
            return folder
    unpacked = root / "VOCdevkit" / f"VOC{year}" / "JPEGImages"
    advice = f"unpack the archive of http://host.robots.ox.ac.uk/pascal/VOC/ so that there is {unpacked}"
    raise OSError(f"VOC{year} is not in {root}; {advice}, or name its folder with data.dataroot")


def names_in(folder: Path, kind: str, name: str, *, with_spaces: bool = False) -> list[str]:
    """Read the names of images in ImageSets/<kind>/<name>.txt. A published list may have more columns."""
    path = folder / "ImageSets" / kind / f"{name}.txt"
    try:
        lines = [line.strip() for line in read_limited(path, MAX_LIST).decode().splitlines() if line.strip()]
        found = lines if with_spaces else [line.split()[0] for line in lines]
    except MalformedFile:
        raise
    except OSError as error:
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        raise OSError(f"{path} can't be read ({error.strerror}); there are {there}") from error
    except UnicodeDecodeError as error:
        raise MalformedFile(path, f"it is not a list of names ({error})") from error
    if not found:
        raise MalformedFile(path, "it names no image")
    if outside := next((image for image in found if not stays_inside(image)), None):
        raise MalformedFile(path, f"{outside} is not the name of an image in {folder / 'JPEGImages'}")
    return found


def _boxed(folder: Path, origin: str, names: Sequence[str], objects: "_Objects") -> BoxedFiles:
    paths, rows = [], []
    for name in names:
        stem = os.path.join(folder, "JPEGImages", name)
        path = next((stem + ending for ending in ENDINGS if os.path.isfile(stem + ending)), None)
        if path is None:
            raise OSError(f"{one_line(stem)}{IMAGE_ENDINGS[0]} is missing; {origin} names it")
        paths.append(os.fsencode(path))
        rows.append(objects.read(folder / "Annotations" / f"{name}.xml"))
    return BoxedFiles(np.array(paths), rows)


@dataclass
class _Objects:
    """Reads annotations to the rows of boxes.py. An annotation counts pixels from 1, and its boxes include the last one."""

    numbers: dict[str, int]  # of each class
    is_open: bool  # add the classes that are found
    drop_degenerate: bool
    n_dropped: int = 0

    def read(self, annotation: Path) -> np.ndarray:
        try:
            root = ElementTree.fromstring(read_limited(annotation), ElementTree.XMLParser(target=_WithoutDoctype()))
            width, height = (_number(root, f"size/{side}", 1) for side in ("width", "height"))
            rows = [self._row(one, width, height) for one in root.findall("object")]
        except MalformedFile:
            raise
        except (OSError, ElementTree.ParseError, LookupError) as error:  # LookupError: an unknown encoding
            raise OSError(f"{one_line(annotation)}: this annotation can't be read ({error})") from error
        except ValueError as error:
            raise MalformedFile(annotation, str(error)) from error
        kept = [row for row in rows if row is not None]
        self.n_dropped += len(rows) - len(kept)
        return np.array(kept, dtype=np.float32).reshape(-1, COLUMNS)

    def _row(self, one: ElementTree.Element, width: float, height: float) -> list[float] | None:
        name, difficult = one.findtext("name", "").strip(), one.findtext("difficult") or "0"
        if self.is_open and name:
            self.numbers.setdefault(name, len(self.numbers) + 1)
        if name not in self.numbers:
            what = "VOC" if tuple(self.numbers) == CLASSES[1:] else reprlib.repr([*self.numbers])
            raise ValueError(f"{name or 'an object without a name'} is not a class of {what}; data.classes names the classes")
        if difficult.strip() not in ("0", "1"):
            raise ValueError(f"{name} has difficult {difficult}, which is neither 0 nor 1")
        try:
            left, top, right, bottom = (_number(one, f"bndbox/{side}", -MAX_SIDE) for side in ("xmin", "ymin", "xmax", "ymax"))
            box = clipped((left - 1, top - 1, right, bottom), width, height)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
        if has_area(box):
            return [*box, self.numbers[name], int(difficult), (box[2] - box[0]) * (box[3] - box[1])]
        if self.drop_degenerate:
            return None
        extent = f"from {left:g} {top:g} to {right:g} {bottom:g}"
        raise ValueError(f"{name} has a box without an area, {extent}; data.drop_degenerate omits such boxes")


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("it declares a document type, whose entities could expand without end")


def _number(element: ElementTree.Element, path: str, low: float) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"has no {path}")
    value = float(text)
    if not low <= value <= MAX_SIDE:  # also NaN
        raise ValueError(f"has {path} {text}, which is not a number of pixels")
    return value


DATASETS = [
    PHOTOGRAPHS(name="VOC", img_size=512, load=load_masks, targets="masks", n_classes=len(CLASSES)),
    PHOTOGRAPHS(name="VOC", img_size=512, load=load_boxes, targets="boxes"),
]
