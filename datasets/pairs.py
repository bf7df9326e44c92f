"""Any folder of images and masks: train/images, train/masks, val/images, val/masks, or only images and masks.

A mask is a PNG of the image's size that holds a class number in every pixel (or palette indices), and is named like its image
except for the ending.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.pipeline.images import IMAGE_ENDINGS, UnreadableImage
from datasets.pipeline.masks import IGNORED, MASK_ENDINGS, MaskedFiles, check_masks, highest_label
from datasets.pipeline.splits import PHOTOGRAPHS, Loaded, Source, hold_out


def load(source: Source, *, classes: list[str] | None = None, ignore_label: int = IGNORED, test_ratio: float = 0.2) -> Loaded:
    """`classes` are the names of 0, 1, ...; null: their number is data.n_classes or, if that is null too, found in the masks.

    Without a val folder, `test_ratio` of the images are held out, the same ones for the same seed.
    """
    if not 0 <= ignore_label <= IGNORED:
        raise ValueError(f"ignore_label is {ignore_label}; it can be 0 to {IGNORED}")
    root = source.root
    if (root / "train").is_dir():
        train, test = (pairs_in(root / part, ignore_label) for part in ("train", "val"))
    else:
        train, test = hold_out(pairs_in(root, ignore_label), test_ratio, source.seed)
    try:
        n_classes = len(classes or ()) or source.n_classes or 1 + max(highest_label(split) for split in (train, test))
    except UnreadableImage as error:
        raise OSError(str(error)) from error
    for split in (train, test):
        check_masks(split, n_classes, source.exif_rotate)
    return Loaded(train, test, tuple(classes or (f"class {i}" for i in range(n_classes))))


def pairs_in(folder: Path, ignored: int) -> MaskedFiles:
    images, masks = _by_name(folder / "images", IMAGE_ENDINGS), _by_name(folder / "masks", MASK_ENDINGS)
    for these, those, what in ((masks, images, "image"), (images, masks, "mask")):
        if alone := sorted(these.keys() - those.keys()):
            expected = folder / f"{what}s" / f"{alone[0]}.*"
            raise OSError(f"{these[alone[0]]} has no {what}: expected {expected} ({len(alone)} such)")
    paths, of_masks = (np.array([os.fsencode(of[name]) for name in sorted(images)]) for of in (images, masks))
    return MaskedFiles(paths, of_masks, ignored)


def _by_name(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise OSError(f"{folder}: no such folder; expected images/ and masks/, in train/ and val/ or in the data folder itself")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.lower().endswith(tuple(endings)):
            if path.stem in found:
                raise OSError(f"{found[path.stem]} and {path} have the same name")
            found[path.stem] = path
    if not found:
        raise OSError(f"{folder} holds no file that ends in {', '.join(endings)}")
    return found


DATASETS = [PHOTOGRAPHS(name="pairs", load=load, img_size=512, targets="masks")]
