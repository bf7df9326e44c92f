"""Images of somebody's own: found, read, and prepared as a model's validation images are."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import Files, find_dataset
from datasets.files import IMAGE_ENDINGS, UnreadableImage
from datasets.loaders import eval_loader
from engine.builder import workers
from engine.errors import RunError
from engine.trained import Trained


def find_images(words: Sequence[str]) -> list[Path]:
    """The images that files, folders (with what is in them) and globs mean, each once, in this order."""
    found: dict[Path, None] = {}
    for word in words:
        found |= dict.fromkeys(_images_of(word))
    return list(found)


def _images_of(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if path.is_dir():
        images = sorted(file for file in path.rglob("*") if file.name.lower().endswith(IMAGE_ENDINGS) and file.is_file())
        if not images:
            raise RunError(f"{path}: there is no image in this folder ({', '.join(IMAGE_ENDINGS)})")
        return images
    if not path.exists() and has_magic(word):
        images = sorted(Path(name) for name in glob(str(path), recursive=True) if name.lower().endswith(IMAGE_ENDINGS))
        if not images:
            raise RunError(f"{word}: no image has such a name")
        return images
    if not path.is_file():
        raise RunError(f"{path}: no such image")
    return [path]


def batches_of(trained: Trained, paths: Sequence[Path], batch_size: int) -> Iterator[Tensor]:
    """Batches of the images, normalised, on the model's device."""
    spec, several = find_dataset(trained.config.data.name), workers(trained.config)
    files = Files(np.array([os.fsencode(path) for path in paths]), torch.zeros(len(paths), dtype=torch.int64))
    is_in_memory = not spec.in_files or trained.config.data.args.get("in_memory")  # such images are seen whole
    prepare = replace(trained.prepare, crop_pct=1.0) if is_in_memory else trained.prepare
    several = replace(several, num_workers=min(several.num_workers, len(paths) // 64))  # a few are read before one has started
    loader = eval_loader(files, batch_size, 0, 1, prepare, several, trained.accelerator.device)
    try:
        for images, _ in loader.batches():
            yield images.mean(1, keepdim=True) if spec.channels == 1 else images
    except UnreadableImage as error:
        raise RunError(str(error)) from error
