"""Labels as people write them, names or numbers, and the splits that samples belong to."""

import logging
import re
from array import array
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from datasets.pipeline.splits import PARTS, Files, Loaded, Source, from_parts
from models.loading.files import MalformedFile, first_line, one_line

log = logging.getLogger(__name__)

TRAIN, VALID, TEST = range(3)  # the places of the parts in PARTS
WORDS = {word: i for i, words in enumerate(PARTS.values()) for word in words} | {"training": TRAIN, "dev": VALID}
FIRST_WORD = re.compile("[a-z]+", re.IGNORECASE)
WHOLE = re.compile(r"(-?[0-9]{1,18})(\.0*)?")
MAX_CLASSES = 100_000


def part_of_name(name: str) -> int | None:
    """Return the split of a file or folder whose name begins with that of a split; None for any other."""
    word = FIRST_WORD.match(name)
    return WORDS.get(word[0].lower()) if word else None


class Labels:
    """The labels of samples. Each distinct one is checked once, and an error names the place where it occurs first.

    `several`: a sample may have any number of labels. `place` is the word for a sample's place in its file, such as line.
    """

    def __init__(self, several: bool, place: str) -> None:
        self.several, self.place = several, place
        self._codes: dict[Any, int] = {}  # of the distinct labels, in the order of their first occurrence
        self._values: list[str | int] = []  # by code
        self._first: list[tuple[Path, int | str]] = []  # by code
        self._of_samples, self._counts = array("q"), array("q")  # codes, and how many of them each sample has

    def add(self, labels: Sequence[Any], file: Path, place: int | str) -> None:
        """Add a sample; it has exactly one label unless there may be several."""
        for label in labels:
            code = self._codes.get(label) if isinstance(label, Hashable) else None
            if code is None:
                if len(self._values) >= MAX_CLASSES:
                    raise self.error(file, place, f"the labels are more than {MAX_CLASSES:,} different ones")
                if label is None or label != label or (isinstance(label, str) and not label.strip()):
                    raise self.error(file, place, "the label is missing")
                if not isinstance(label, (str, int)) and not (isinstance(label, float) and label.is_integer()):
                    raise self.error(file, place, f"the label {first_line(repr(label))} is neither text nor a whole number")
                self._values.append(label.strip() if isinstance(label, str) else int(label))
                self._first.append((file, place))
                code = self._codes[label] = len(self._codes)
            self._of_samples.append(code)
        self._counts.append(len(labels))

    def error(self, file: Path, place: int | str, problem: str) -> MalformedFile:
        return MalformedFile(file, f"{self.place} {one_line(str(place))}: {problem}")

    def targets(self, names: Sequence[str] | None, n_classes: int | None) -> tuple[Tensor, tuple[str, ...]]:
        """Return the targets of a task, and the names of its classes.

        Whole numbers are classes: indices of `names`, if these are known. Otherwise the classes are the labels in sorted order.
        """
        values, whole = self._values, [WHOLE.fullmatch(str(value)) for value in self._values]
        if names is None and all(whole):
            whole_numbers = [int(match[1]) for match in whole if match]
            values, names = [*whole_numbers], [str(i) for i in range(n_classes or min(1 + max(0, *whole_numbers), MAX_CLASSES))]
        elif names is None:
            values = [str(value) for value in values]
            names = sorted(set(map(str, values)))
        n, number_of = len(names), {name: i for i, name in enumerate(names)}
        numbers = [value if isinstance(value, int) else number_of.get(value, -1) for value in values]
        for number, value, where in zip(numbers, values, self._first, strict=True):
            if not 0 <= number < n:
                known = f"0 to {n - 1}" if isinstance(value, int) else f"{first_line(names[0])} to {first_line(names[-1])}"
                raise self.error(*where, f"the label {first_line(str(value))} is not one of the {n:,} classes, {known}")
        found = np.array(numbers, dtype=np.int64)[np.frombuffer(self._of_samples, dtype=np.int64)]
        if not self.several:
            return torch.from_numpy(found), tuple(names)
        counts = np.frombuffer(self._counts, dtype=np.int64)
        if len(counts) * n > psutil.virtual_memory().available:
            raise OSError(f"{self._first[0][0]}: {len(counts):,} samples with {n:,} classes don't fit into memory")
        targets = torch.zeros(len(counts), n, dtype=torch.uint8)
        targets[torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), torch.from_numpy(found)] = 1
        return targets, tuple(names)


def make_splits(
    files: Files, parts: np.ndarray, classes: tuple[str, ...], source: Source, test_ratio: float, where: Path
) -> Loaded:
    """Divide samples by `parts`: TRAIN, VALID or TEST of each. If all are for training, hold out a test split, class by class.

    A class that only another split has is an error.
    """
    members = {name: torch.from_numpy(np.flatnonzero(parts == i)) for i, name in enumerate(PARTS)}
    by_part = {name: files.subset(indices) for name, indices in members.items() if len(indices)}
    if "train" not in by_part:
        raise OSError(f"{where}: there is no sample for training")
    for name, split in by_part.items():
        if (extra := (_counts(split, classes) > 0) & (_counts(by_part["train"], classes) == 0)).any():
            names = [first_line(classes[i]) for i in extra.nonzero().flatten().tolist()]
            raise OSError(f"{where}: the {name} split has classes that training doesn't have: {', '.join(names[:5])}")
    return from_parts(by_part, classes, test_ratio, source.seed, by_class=files.labels.ndim == 1)


def _counts(split: Files, classes: Sequence[str]) -> Tensor:
    return split.labels.bincount(minlength=len(classes)) if split.labels.ndim == 1 else split.labels.sum(0)
