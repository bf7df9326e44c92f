"""Pascal VOC: photographs with 20 kinds of objects.

Mark Everingham, Luc Van Gool, Christopher K. I. Williams, John Winn, Andrew Zisserman (2010): The Pascal Visual Object Classes
(VOC) Challenge. IJCV. http://host.robots.ox.ac.uk/pascal/VOC/

The folder is the one that the published archives unpack to, VOCdevkit/VOC2012, or one that holds it. For segmentation, most
published results train on `trainaug`: 10,582 images with the masks of Hariharan, Arbelaez, Bourdev, Maji, Malik (2011): Semantic
Contours from Inverse Detectors, ICCV, which go by the names ImageSets/Segmentation/trainaug.txt and SegmentationClassAug.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np

from datasets.masks import MaskedFiles, check_masks
from datasets.splits import DatasetSpec, Loaded, Source

CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable")
CLASSES += ("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
MASKS = ("SegmentationClass", "SegmentationClassAug")


def load_masks(source: Source, *, year: int = 2012, train_set: str = "train", val_set: str = "val") -> Loaded:
    """`train_set` and `val_set` are files of ImageSets/Segmentation, such as train, trainaug, trainval, val."""
    folder = find_folder(source.root, year)
    train, val = (_masked(folder, name) for name in (train_set, val_set))
    for split in (train, val):
        check_masks(split, len(CLASSES))
    return Loaded(train, val, CLASSES)


def find_folder(root: Path, year: int) -> Path:
    for folder in (root, root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise OSError(
        f"VOC{year} is not in {root}; unpack the archive of http://host.robots.ox.ac.uk/pascal/VOC/ so that there is "
        f"{root / 'VOCdevkit' / f'VOC{year}' / 'JPEGImages'}, or name its folder with data.dataroot"
    )


def names_in(folder: Path, kind: str, name: str) -> list[str]:
    """Of a list of images: ImageSets/<kind>/<name>.txt."""
    path = folder / "ImageSets" / kind / f"{name}.txt"
    try:
        found = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        raise OSError(f"{path} can't be read ({error.strerror}); the lists there are {there}") from error
    if not found:
        raise OSError(f"{path} names no image")
    return found


def _masked(folder: Path, name: str) -> MaskedFiles:
    images, masks = [], []
    for image in names_in(folder, "Segmentation", name):
        images.append(folder / "JPEGImages" / f"{image}.jpg")
        masks.append(next((mask for kind in MASKS if (mask := folder / kind / f"{image}.png").is_file()), None))
        if masks[-1] is None or not images[-1].is_file():
            lacks = images[-1] if masks[-1] is not None else folder / MASKS[0] / f"{image}.png"
            raise OSError(f"{lacks} is missing; ImageSets/Segmentation/{name}.txt names it")
    return MaskedFiles(*(np.array([os.fsencode(path) for path in paths]) for paths in (images, masks)))


_VOC = partial(
    DatasetSpec,
    name="VOC",
    channels=3,
    img_size=512,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    n_classes=len(CLASSES),
    hflip=True,
    in_files=True,
)

DATASETS = [_VOC(load=load_masks, targets="masks")]
