"""Any folder of images and masks: train/images, train/masks, val/images, val/masks, or only images and masks.

A mask is a PNG of the image's size that holds a class number in every pixel (or palette indices), or colors that a file names, as
CamVid's label_colors.txt. It is named like its image except for a suffix and the ending.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datasets.pipeline.images import IMAGE_ENDINGS, UnreadableImage
from datasets.pipeline.masks import IGNORED, MASK_ENDINGS, MaskedFiles, Palette, check_masks, highest_label
from datasets.pipeline.splits import PARTS, PHOTOGRAPHS, Loaded, Source, from_parts
from models.loading.files import MalformedFile, one_line, read_limited

log = logging.getLogger(__name__)

SPLIT = "<split>"
NO_CLASS = ("void", "ignore", "ignored", "unlabeled", "unlabelled")  # names of colors that are ignored


def load(
    source: Source,
    *,
    classes: list[str] | None = None,
    ignore_label: int = IGNORED,
    palette: str | None = None,
    image_folder: str | None = None,
    mask_folder: str | None = None,
    mask_suffix: str = "",
    test_ratio: float = 0.2,
) -> Loaded:
    """`classes` are the names of 0, 1, ...; null: their number is data.n_classes or, if that is null too, found in the masks.

    `palette` is a file with a color and a name in each line, `128 64 128 road`; several colors may have one name. `classes` are
    then some of its names, and the other colors are ignored; null: all of them but void, ignored and unlabeled. The folders are
    relative to the data folder. In both, <split> means train, val (or valid) and test; null: <split>/images and <split>/masks, or
    images and masks. Without val and test, `test_ratio` of the images are held out, the same ones for the same seed.
    """
    if not 0 <= ignore_label <= IGNORED:
        raise ValueError(f"ignore_label is {ignore_label}; it can be 0 to {IGNORED}")
    if palette is not None and ignore_label != IGNORED:
        raise ValueError("ignore_label is of masks with numbers, and palette of masks with colors")
    root = source.root
    colors, classes = read_palette(root / palette, classes) if palette is not None else (None, classes)
    prefix = f"{SPLIT}/" if (root / "train").is_dir() else ""
    images, masks = image_folder or f"{prefix}images", mask_folder or f"{prefix}masks"
    if (SPLIT in images) != (SPLIT in masks):
        raise ValueError(f"image_folder {images} and mask_folder {masks} have to contain {SPLIT}, or neither")
    parts = {}
    for part, names in PARTS.items() if SPLIT in images else [("train", ("",))]:
        name = next((name for name in names if (root / images.replace(SPLIT, name)).is_dir()), None)
        if part == "train" or name is not None:
            of_images, of_masks = (root / folder.replace(SPLIT, name or part) for folder in (images, masks))
            parts[part] = pairs_in(of_images, of_masks, mask_suffix, ignore_label, colors)
    try:
        n_classes = len(classes or ()) or source.n_classes or 1 + max(map(highest_label, parts.values()))
    except UnreadableImage as error:
        raise OSError(str(error)) from error
    classes = [*(classes or (f"class {i}" for i in range(n_classes)))]
    check_masks(parts, classes, source.exif_rotate)
    return from_parts(parts, tuple(classes), test_ratio, source.seed)


def pairs_in(
    of_images: Path, of_masks: Path, suffix: str = "", ignored: int = IGNORED, palette: Palette | None = None
) -> MaskedFiles:
    if of_images == of_masks and not suffix:
        raise ValueError(f"images and masks are both in {of_images}; mask_suffix tells which are the masks")
    images = _by_name(of_images, IMAGE_ENDINGS, lambda stem: None if of_images == of_masks and stem.endswith(suffix) else stem)
    masks = _by_name(of_masks, MASK_ENDINGS, lambda stem: stem.removesuffix(suffix) if stem.endswith(suffix) else None)
    expected = {"image": (of_images, ""), "mask": (of_masks, suffix)}
    for these, those, what in ((masks, images, "image"), (images, masks, "mask")):
        if alone := sorted(these.keys() - those.keys()):
            folder, ending = expected[what]
            where = folder / f"{alone[0]}{ending}.*"
            raise OSError(one_line(f"{these[alone[0]]} has no {what}: expected {where} ({len(alone)} such)"))
    paths, mask_paths = (np.array([os.fsencode(of[name]) for name in sorted(images)]) for of in (images, masks))
    return MaskedFiles(paths, mask_paths, ignored, palette)


def _by_name(folder: Path, endings: Sequence[str], name_of: Callable[[str], str | None]) -> dict[str, Path]:
    """Return the files of a folder by the names that they have in common with their counterparts."""
    if not folder.is_dir():
        raise OSError(f"{folder}: no such folder; expected images/ and masks/, in train/ and val/ or in the data folder itself")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = name_of(path.stem) if path.name.lower().endswith(tuple(endings)) else None
        if name is not None and name in found:
            raise OSError(f"{found[name]} and {path} have the same name")
        if name is not None:
            found[name] = path
    if not found:
        raise OSError(f"{folder} holds no file that ends in {', '.join(endings)}")
    return found


def read_palette(path: Path, classes: Sequence[str] | None) -> tuple[Palette, list[str]]:
    """Return the palette in a file, and its classes: `classes`, or all names but those of NO_CLASS, in their order."""
    try:
        lines = read_limited(path).decode(errors="replace").splitlines()
    except FileNotFoundError as error:
        raise OSError(f"data.palette: {path} can't be read ({error.strerror})") from error
    names: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        words = re.findall(r"[^\s,;]+", line)
        is_number = [word.isdecimal() and len(word) <= 3 and int(word) <= 255 for word in words]
        if not words or line.startswith("#") or (number == 1 and not any(is_number)):  # the first line may be a heading
            continue
        color, name = (words[:3], words[3:]) if all(is_number[:3]) else (words[-3:], words[:-3])
        if not name or not (all(is_number[:3]) or all(is_number[-3:])):
            raise MalformedFile(path, f"line {number}: expected red, green and blue from 0 to 255 and a name, or the name first")
        red, green, blue = map(int, color)
        packed = red << 16 | green << 8 | blue
        if names.setdefault(packed, " ".join(name)) != " ".join(name):
            raise MalformedFile(path, f"line {number}: the color of {names[packed]} again")
    found = list(dict.fromkeys(names.values()))
    kept = list(classes or (name for name in found if name.lower() not in NO_CLASS))
    if unknown := [name for name in kept if name not in found]:
        raise ValueError(f"classes has {unknown[0]}, which {path} doesn't name; it names {', '.join(found[:50])}")
    if not 0 < len(kept) <= IGNORED:
        raise MalformedFile(path, f"it names {len(kept)} classes; from 1 to {IGNORED} are supported")
    if ignored := [name for name in found if name not in kept]:
        log.info("%s: pixels with the color of %s are ignored", path, one_line(", ".join(ignored)))
    labels = [kept.index(names[color]) if names[color] in kept else IGNORED for color in sorted(names)]
    return Palette(np.array(sorted(names), np.uint32), np.array(labels, np.uint8)), kept


DATASETS = [PHOTOGRAPHS(name="pairs", load=load, img_size=512, targets="masks")]
