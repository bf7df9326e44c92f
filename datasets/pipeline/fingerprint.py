"""A fingerprint of the data that a run was trained on, to notice that they were changed.

In memory, every pixel and target counts. Of files, the names, their order and the targets count, and the sizes of up to N_SIZES
files, evenly spread: a stat of each of ImageNet's files would take 12 s on a local disk, and minutes on a network one. So a file
that was edited is noticed in a small split if its size changed, and by chance in a large one. The data folder may move.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.pipeline.places import file_of
from datasets.pipeline.splits import Files, Split
from models.loading.files import one_line

N_SIZES = 1000
DIGITS = 16  # of a digest
Fingerprint = dict[str, dict[str, int | str]]  # split -> the number of its images, and digests by what they are of


def fingerprint(splits: Mapping[str, Split], classes: Sequence[str], root: Path) -> Fingerprint:
    """Return the fingerprint of each split. The names of files are relative to `root`, where they are in it."""
    prefix, found = os.fsencode(root) + os.fsencode(os.sep), Fingerprint()
    for name, split in splits.items():
        if isinstance(split, Files):
            n = min(N_SIZES, len(split))
            sizes = np.array([_size(split.paths[i * len(split) // n]) for i in range(n)])
            of_images = {"names": _digest(_relative(split.paths, prefix)), "sizes": _digest(sizes)}
        else:
            of_images = {"pixels": _digest(split.images)}
        labels = _relative(split.labels, prefix) if isinstance(split.labels, np.ndarray) else split.labels
        found[name] = {"images": len(split), **of_images, "labels": _digest("\0".join(classes), labels)}
    return found


def fingerprint_differences(before: Any, now: Any) -> list[str]:
    """Return how the data differ, a phrase for each split that does; nothing if one side has no fingerprint, as in old runs."""
    if not all(isinstance(side, dict) and side and all(isinstance(one, dict) for one in side.values()) for side in (before, now)):
        return []
    phrases = []
    for split in dict.fromkeys((*before, *now)):
        old, new = before.get(split), now.get(split)
        if old is None or new is None:
            phrases.append(f"{one_line(split)}: {'is new' if old is None else 'is missing'}")
        elif old != new:
            what = [one_line(key) for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key) and key != "images"]
            count = [f"{new.get('images')} images instead of {one_line(str(old.get('images')))}"]
            parts = (count if old.get("images") != new.get("images") else []) + ([f"other {', '.join(what)}"] if what else [])
            phrases.append(f"{one_line(split)}: {'; '.join(parts)}")
    return phrases


def _size(place: bytes) -> int:
    with suppress(OSError):  # reading the image reports it
        return os.stat(file_of(os.fsdecode(place))).st_size
    return -1


def _relative(names: np.ndarray, prefix: bytes) -> np.ndarray:
    """Remove the prefix of names, bytes, if all have it: by columns, as a loop over a million names takes a second."""
    letters = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1) if names.dtype.kind == "S" else None
    if letters is None or not (letters[:, : len(prefix)] == np.frombuffer(prefix, np.uint8)[: letters.shape[1]]).all():
        return names
    return letters[:, len(prefix) :]


def _digest(*parts: Any) -> str:
    """Return a digest of text, tensors, arrays, and lists of arrays, with their shapes and types."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        elif isinstance(part, (Tensor, np.ndarray)):
            array = part.detach().cpu().contiguous().numpy() if isinstance(part, Tensor) else np.ascontiguousarray(part)
            digest.update(f"{array.shape} {array.dtype.str}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)  # releases Python's global lock
        elif all(isinstance(one, np.ndarray) for one in part):  # the rows of boxes.py for each image
            digest.update(_digest(torch.tensor([len(one) for one in part]), np.concatenate([*part])).encode())
        else:  # of a plugin
            digest.update(repr(part).encode())
    return digest.hexdigest()[:DIGITS]
