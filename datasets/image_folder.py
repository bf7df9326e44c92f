"""A folder of images, one folder per class: train/<class>/*.jpg and val/<class>/*.jpg, the layout of ImageNet.

Olga Russakovsky et al. (2015): ImageNet Large Scale Visual Recognition Challenge. IJCV. https://arxiv.org/abs/1409.0575
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from datasets.files import IMAGE_ENDINGS
from datasets.splits import DatasetSpec, Files, Loaded, Source


def load(source: Source) -> Loaded:
    train_folder, test_folder = source.root / "train", source.root / "val"
    if not train_folder.is_dir():
        raise OSError(
            f"{train_folder}: no such folder; expected {source.root}/train/<class>/*.jpg and {source.root}/val/<class>/*.jpg"
        )
    classes = _classes(train_folder)
    if not classes:
        raise OSError(f"{train_folder} holds no class folders; expected {train_folder}/<class>/*.jpg")
    train = _list_files(train_folder, classes)
    if not test_folder.is_dir():
        raise OSError(f"{test_folder}: no such folder; evaluation reads {source.root}/val/<class>/*.jpg")
    if unknown := sorted(set(_classes(test_folder)) - set(classes)):
        raise OSError(f"{test_folder / unknown[0]} is a class that {train_folder} doesn't have")
    return Loaded(train, _list_files(test_folder, classes), classes)


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")))


def _list_files(folder: Path, classes: tuple[str, ...]) -> Files:
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = folder / name
        if not of_class.is_dir():
            continue
        found = sorted(entry.path for entry in os.scandir(of_class) if entry.name.lower().endswith(IMAGE_ENDINGS))
        if not found:
            raise OSError(f"{of_class} holds no image ({', '.join(IMAGE_ENDINGS)})")
        paths += map(os.fsencode, found)
        labels += [label] * len(found)
    return Files(np.array(paths), torch.tensor(labels, dtype=torch.int64))


_FOLDER = partial(
    DatasetSpec, load=load, channels=3, img_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), hflip=True
)

DATASETS = [_FOLDER("imagefolder"), _FOLDER("ImageNet", n_classes=1000)]
