"""Pascal VOC: photographs with 20 kinds of objects.

Mark Everingham, Luc Van Gool, Christopher K. I. Williams, John Winn, Andrew Zisserman (2010): The Pascal Visual Object Classes
(VOC) Challenge. IJCV. http://host.robots.ox.ac.uk/pascal/VOC/

The data folder is VOCdevkit/VOC2012, to which the published archives unpack, or a parent of it. For segmentation, most published
results train on `trainaug`: 10,582 images with the masks of Hariharan, Arbelaez, Bourdev, Maji, Malik (2011): Semantic Contours
from Inverse Detectors, ICCV. Its files are ImageSets/Segmentation/trainaug.txt and SegmentationClassAug/.
"""

import os
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import numpy as np

from datasets.pipeline.boxes import COLUMNS, MAX_SIDE, BoxedFiles, clipped, has_area
from datasets.pipeline.masks import MaskedFiles, check_masks
from datasets.pipeline.splits import PHOTOGRAPHS, Loaded, Source
from models.loading.files import MalformedFile, one_line, read_limited, stays_inside

CLASSES: tuple[str, ...]
CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable")
CLASSES += ("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
MAX_LIST = 100_000_000  # bytes of a list of names
MASKS = ("SegmentationClass", "SegmentationClassAug")


def load_masks(source: Source, *, year: int = 2012, train_set: str = "train", val_set: str = "val") -> Loaded:
    """`train_set` and `val_set` are files of ImageSets/Segmentation, such as train, trainaug, trainval, val."""
    folder = find_folder(source.root, year)
    train, val = (_masked(folder, name) for name in (train_set, val_set))
    for split in (train, val):
        check_masks(split, len(CLASSES), source.exif_rotate)
    return Loaded(train, val, CLASSES)


def load_boxes(source: Source, *, year: int = 2012, train_set: str = "train", val_set: str = "val") -> Loaded:
    """`train_set` and `val_set` are files of ImageSets/Main. Objects marked as difficult are treated like crowds in COCO."""
    folder = find_folder(source.root, year)
    return Loaded(_boxed(folder, train_set), _boxed(folder, val_set), CLASSES)


def find_folder(root: Path, year: int) -> Path:
    for folder in (root, root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise OSError(
        f"VOC{year} is not in {root}; unpack the archive of http://host.robots.ox.ac.uk/pascal/VOC/ so that there is "
        f"{root / 'VOCdevkit' / f'VOC{year}' / 'JPEGImages'}, or name its folder with data.dataroot"
    )


def names_in(folder: Path, kind: str, name: str) -> list[str]:
    """Read the names of images in ImageSets/<kind>/<name>.txt."""
    path = folder / "ImageSets" / kind / f"{name}.txt"
    try:
        found = [line.split()[0] for line in read_limited(path, MAX_LIST).decode().splitlines() if line.strip()]
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


def _masked(folder: Path, name: str) -> MaskedFiles:
    images, masks = [], []
    for image in names_in(folder, "Segmentation", name):
        path, candidates = folder / "JPEGImages" / f"{image}.jpg", [folder / kind / f"{image}.png" for kind in MASKS]
        mask = next((mask for mask in candidates if mask.is_file()), None)
        if mask is None or not path.is_file():
            gone = one_line(candidates[0] if mask is None else path)
            raise OSError(f"{gone} is missing; ImageSets/Segmentation/{name}.txt names it")
        images.append(os.fsencode(path))
        masks.append(os.fsencode(mask))
    return MaskedFiles(np.array(images), np.array(masks))


def _boxed(folder: Path, name: str) -> BoxedFiles:
    paths, objects = [], []
    for image in names_in(folder, "Main", name):
        path, annotation = folder / "JPEGImages" / f"{image}.jpg", folder / "Annotations" / f"{image}.xml"
        if not path.is_file():
            raise OSError(f"{one_line(path)} is missing; ImageSets/Main/{name}.txt names it")
        paths.append(os.fsencode(path))
        objects.append(np.array(_objects(annotation), dtype=np.float32).reshape(-1, COLUMNS))
    return BoxedFiles(np.array(paths), objects)


def _objects(annotation: Path) -> list[list[float]]:
    """Return the rows of boxes.py. The file counts pixels from 1, and its box includes the last one."""
    try:
        content = read_limited(annotation)
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_WithoutDoctype()))
        width, height = (_number(root, f"size/{side}", 1) for side in ("width", "height"))
        return [_row(one, width, height) for one in root.findall("object")]
    except MalformedFile:
        raise
    except (OSError, ElementTree.ParseError, LookupError) as error:  # LookupError: an unknown encoding
        raise OSError(f"{one_line(annotation)}: this annotation can't be read ({error})") from error
    except ValueError as error:
        raise MalformedFile(annotation, str(error)) from error


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("it declares a document type, whose entities could expand without end")


def _row(one: ElementTree.Element, width: float, height: float) -> list[float]:
    name, difficult = one.findtext("name", ""), one.findtext("difficult") or "0"
    if name not in CLASSES[1:]:
        raise ValueError(f"{name or 'an object without a name'} is not a class of VOC")
    if difficult.strip() not in ("0", "1"):
        raise ValueError(f"{name} has difficult {difficult}, which is neither 0 nor 1")
    try:
        left, top, right, bottom = (_number(one, f"bndbox/{side}", -MAX_SIDE) for side in ("xmin", "ymin", "xmax", "ymax"))
        box = clipped((left - 1, top - 1, right, bottom), width, height)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    if not has_area(box):
        raise ValueError(f"{name} has a box without an area, from {left:g} {top:g} to {right:g} {bottom:g}")
    return [*box, CLASSES.index(name), int(difficult), (box[2] - box[0]) * (box[3] - box[1])]


def _number(element: ElementTree.Element, path: str, low: float) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"has no {path}")
    value = float(text)
    if not low <= value <= MAX_SIDE:  # also NaN
        raise ValueError(f"has {path} {text}, which is not a number of pixels")
    return value


_VOC = partial(PHOTOGRAPHS, name="VOC", img_size=512, n_classes=len(CLASSES))

DATASETS = [_VOC(load=load_masks, targets="masks"), _VOC(load=load_boxes, targets="boxes")]
