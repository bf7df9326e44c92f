"""What is in a dataset, image by image: size, format, classes, and a thumbnail to find duplicates by; or why it can't be read."""

import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datasets import Files, Split
from datasets.pipeline.boxes import CLASS
from datasets.pipeline.cores import usable_cores
from datasets.pipeline.images import IMAGE_FORMATS, ImageFile, UnreadableImage
from datasets.pipeline.masks import IGNORED, Palette, read_mask
from datasets.pipeline.places import shown
from engine.config.text import printable

CHUNK = 64  # files per task of a process
SIDE = 32  # of a thumbnail
IN_MEMORY = "in memory"  # the format of an image without a file


@dataclass(frozen=True)
class Facts:
    split: str
    name: str  # of the file, relative to the data folder; or the number of the image in its split
    labels: tuple[int, ...]  # its classes; of boxes, one for each object
    target: bytes = b""  # equal for equal targets: the label, mask or boxes
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    pixels: bytes = b""  # a digest of the decoded image
    thumbnail: bytes = b""  # SIDE SIDE 3, YCbCr
    problem: str = ""  # why it can't be read


def read_facts(splits: Mapping[str, Split], root: Path, targets: str) -> list[Facts]:
    """Read every image of the splits, in their order. Files are read in a process for each core."""
    facts: list[Facts] = []
    progress = tqdm(total=sum(map(len, splits.values())), unit="image", unit_scale=True)
    for name, split in splits.items():
        describe = partial(_described, name, targets, getattr(split, "ignored", IGNORED), getattr(split, "palette", None))
        if isinstance(split, Files):
            places = [os.fsdecode(place) for place in split.paths]
            names = [shown(place.removeprefix(f"{root}{os.sep}")) for place in places]
            of_images = split.labels.tolist() if isinstance(split.labels, (Tensor, np.ndarray)) else split.labels
            with ProcessPoolExecutor(usable_cores()) as pool:
                _collect(facts, pool.map(describe, names, places, of_images, chunksize=CHUNK), progress)
        else:
            _collect(facts, map(describe, map(str, range(len(split))), split.images, split.labels.numpy()), progress)
    progress.close()
    return facts


def _collect(facts: list[Facts], found: Iterator[Facts], progress: tqdm) -> None:
    for one in found:
        if one.problem:
            tqdm.write(printable(one.problem), sys.stdout)
        facts.append(one)
        progress.update()


def _described(
    split: str, targets: str, ignored: int, palette: Palette | None, name: str, source: str | Tensor, target: Any
) -> Facts:
    labels: tuple[int, ...] = ()
    try:
        if targets == "masks":
            target = read_mask(os.fsdecode(target), palette) if isinstance(target, bytes) else target
            labels = tuple(label for label in np.unique(target).tolist() if label not in (ignored, IGNORED))
        elif targets == "boxes":
            labels = tuple(label for label in target[:, CLASS].astype(int).tolist() if label > 0)
        else:
            labels = tuple(np.flatnonzero(target).tolist()) if targets == "labels" else (int(target),)
        if isinstance(source, str):
            file = ImageFile(source)
            image = file.decode()
            with Image.open(io.BytesIO(file.data), formats=IMAGE_FORMATS) as opened:
                kind, mode = opened.format or "", opened.mode
        else:
            image = Image.fromarray(source.permute(1, 2, 0).squeeze(-1).numpy())  # C H W -> H W C
            kind, mode = IN_MEMORY, image.mode
            image = image.convert("RGB")
    except UnreadableImage as error:
        return Facts(split, name, labels, problem=str(error))
    of_target = hashlib.blake2b(np.ascontiguousarray(target).tobytes(), digest_size=16).digest()
    pixels = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0).convert("YCbCr").tobytes()
    return Facts(split, name, labels, of_target, *image.size, kind, mode, pixels, small)


def counts(facts: list[Facts], classes: tuple[str, ...], *, objects: bool) -> list[dict[str, Any]]:
    """Return the number of images, or of objects, of each class in each split. Background and unnamed classes have no row."""
    found: dict[str, Counter[int]] = {}
    for one in facts:
        found.setdefault(one.split, Counter()).update(one.labels if objects else set(one.labels))
    rows = [{"class": name, **{split: counter[i] for split, counter in found.items()}} for i, name in enumerate(classes)]
    return [row for row in rows if any(row[split] for split in found) or row["class"] not in ("background", "N/A")]


def count_problems(rows: list[dict[str, Any]]) -> list[str]:
    """Say which classes are missing from a split, and how unequal the counts in training are."""
    splits = [key for key in (rows[0] if rows else {}) if key != "class"]
    problems = []
    for split in splits:
        if missing := [row["class"] for row in rows if not row[split]]:
            more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
            problems.append(f"{split} has no image of {', '.join(missing[:5])}{more}")
    ranked = sorted((row for row in rows if row.get("train")), key=lambda row: row["train"])
    if ranked and ranked[-1]["train"] >= 10 * ranked[0]["train"]:
        rare, common = ranked[0], ranked[-1]
        ratio = common["train"] / rare["train"]
        two = f"{rare['class']} ({rare['train']:,}) and {common['class']} ({common['train']:,})"
        remedy = "data.sampler balanced or train.class_weights balanced may help"
        problems.append(f"train is imbalanced: {two} differ by a factor of {ratio:.0f}; {remedy}")
    return problems


def sizes(facts: list[Facts]) -> list[tuple[str, str]]:
    """Return what people want to know about the sizes of the readable images, as names and values."""
    readable = [one for one in facts if not one.problem]
    if not readable:
        return []
    by_area = sorted(readable, key=lambda one: (one.width * one.height, one.name))
    ratios = sorted(one.width / one.height for one in readable)
    extremes = {"smallest": by_area[0], "median": by_area[len(by_area) // 2], "largest": by_area[-1]}
    rows = [(name, f"{one.width} x {one.height} ({one.split}: {one.name})") for name, one in extremes.items()]
    rows.append(("width / height", f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}"))
    formats = Counter(f"{one.format}, {one.mode}" for one in readable)
    rows.append(("formats", "; ".join(f"{n:,} {name}" for name, n in formats.most_common())))
    return rows


def thumbnails(facts: list[Facts]) -> np.ndarray:
    """Return N 3 SIDE SIDE."""
    both = np.frombuffer(b"".join(one.thumbnail for one in facts), np.uint8).reshape(len(facts), SIDE, SIDE, 3)
    return np.ascontiguousarray(both.transpose(0, 3, 1, 2))


def picture(split: Split, index: int, side: int) -> Tensor:
    """Return an image as C H W, from 0 to 1, at most `side` pixels wide and high if it is a file."""
    if not isinstance(split, Files):
        return split.images[index] / 255
    image = ImageFile(os.fsdecode(split.paths[index])).decode()
    image.thumbnail((side, side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
