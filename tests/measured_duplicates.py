"""Measure how many planted near duplicates tools/verify_dataset.py finds, and how long that takes.

    python -m tests.measured_duplicates PHOTOS CIFAR > docs/measured/duplicates.md

PHOTOS is a folder of JPEGs, CIFAR the data folder of CIFAR-10.
"""

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets import Source, find_dataset
from tools.dataset_report.duplicates import group_numbers, near_duplicates
from tools.dataset_report.facts import SIDE
from tools.tables import markdown

N_PLANTED = 1000  # among the images of CIFAR
FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def encoded(image: Image.Image, quality: int = 50) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image, scale: float = 0.6) -> Image.Image:
    width, height = image.size
    return image.resize((round(scale * width), round(scale * height)), Image.Resampling.BILINEAR)


def cropped(image: Image.Image, x: float, y: float, part: float = 0.9) -> Image.Image:
    """Crop to a part of the width and of the height; x and y, from 0 to 1, are the position."""
    (width, height), rest = image.size, 1 - part
    box = (x * rest * width, y * rest * height, (x * rest + part) * width, (y * rest + part) * height)
    return image.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))


def kinds(random: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    return {
        "encoded again (JPEG, quality 50)": encoded,
        "resized to 60 %": resized,
        "mirrored": lambda image: image.transpose(FLIP),
        "cropped to 90 % of each side, centered": lambda image: cropped(image, 0.5, 0.5),
        "cropped to 90 % of each side, anywhere": lambda image: cropped(image, *random.random(2)),
        "mirrored, cropped anywhere, encoded again": lambda image: encoded(cropped(image.transpose(FLIP), *random.random(2))),
    }


def thumbnail(image: Image.Image) -> np.ndarray:
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0).convert("YCbCr")
    return np.asarray(small).transpose(2, 0, 1)


def measure(images: list[Image.Image], n_planted: int) -> tuple[dict[str, float], int, float]:
    """Plant a copy of each kind of the first images. Return the share found of each kind, the number of pairs found that were not
    planted, and the seconds for all images without the planted ones."""
    originals = np.stack([thumbnail(image) for image in images])
    start = time.perf_counter()
    known = set(near_duplicates(originals))
    seconds = time.perf_counter() - start
    shares = {}
    for kind, change in kinds(np.random.default_rng(0)).items():
        planted = np.stack([thumbnail(change(image)) for image in images[:n_planted]])
        groups = group_numbers(near_duplicates(np.concatenate([originals, planted])), len(images) + n_planted)
        shares[kind] = float((groups[:n_planted] == groups[len(images) :]).mean())
    return shares, len(known), seconds


def main(photos: str, cifar: str) -> None:
    loaded = find_dataset("CIFAR-10", "classes").load(Source(Path(cifar), verify=False, download=False))
    pixels = torch.cat([loaded.train.images, loaded.test.images]).permute(0, 2, 3, 1).numpy()  # N C H W -> N H W C
    of_cifar = [Image.fromarray(image) for image in pixels]
    of_photos = [Image.open(path).convert("RGB") for path in sorted(Path(photos).glob("*.jpg"))]
    by_photo, n_photo_pairs, _ = measure(of_photos, len(of_photos))
    by_cifar, n_cifar_pairs, seconds = measure(of_cifar, N_PLANTED)
    start = time.perf_counter()
    near_duplicates(np.stack([thumbnail(image) for image in (*of_cifar, *map(resized_up, of_cifar[:40_000]))]))
    for_100_000 = time.perf_counter() - start
    rows = [[kind, f"{100 * by_photo[kind]:.0f} %", f"{100 * by_cifar[kind]:.1f} %"] for kind in by_photo]
    rows.append(["other pairs, not planted", f"{n_photo_pairs:,}", f"{n_cifar_pairs:,}"])
    print(f"{os.cpu_count()} cores (CPU), {time.strftime('%Y-%m-%d')}:\n")
    print(
        markdown(
            [["copies found", f"{len(of_photos)} photographs", f"{N_PLANTED:,} of {len(of_cifar):,} of CIFAR-10"], *rows], (1, 2)
        )
    )
    print(
        f"\nThe search took {seconds:.0f} s for {len(of_cifar):,} images and {for_100_000:.0f} s for 100,000, once they are read."
    )


def resized_up(image: Image.Image) -> Image.Image:
    """Return another image: the upper half, turned, so that 100,000 pictures differ."""
    return image.crop((0, 0, 32, 20)).rotate(90, expand=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
