"""samples/<split>-<step>.npz of a run folder: the score of each sample in an evaluation, for comparisons of runs."""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.run.folder import committed_checkpoints
from models.loading.files import MalformedFile, read_limited, replace_file

FOLDER, NAME = "samples", re.compile(r"\w+-(\d+)\.npz")
FORMAT = 1  # a reader refuses a newer one
MAX_UNPACKED = 100_000_000  # bytes


@dataclass(frozen=True)
class SampleScores:
    """What each sample of a split got, in the dataset's order."""

    split: str
    step: int
    metric: str  # what a score is: acc@1, image IoU, image AP
    scores: np.ndarray  # booleans, or numbers from 0 to 1; NaN where an image has nothing to find
    data: Mapping[str, Any]  # the fingerprint of the split


def samples_path(run_dir: Path, split: str, step: int) -> Path:
    return run_dir / FOLDER / f"{split}-{step}.npz"


def write_samples(run_dir: Path, found: SampleScores) -> Path:
    """Write the file of an evaluation: one bit for each sample that is right or wrong, else float16."""
    scores, content = found.scores, io.BytesIO()
    about = {"format": FORMAT, "split": found.split, "step": found.step, "metric": found.metric, "n": len(scores)}
    packed = np.packbits(scores) if scores.dtype == bool else scores.astype(np.float16)
    np.savez(content, about=np.array(json.dumps({**about, "data": found.data}).encode()), scores=packed)
    path = samples_path(run_dir, found.split, found.step)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, content.getvalue())
    return path


def read_samples(path: Path) -> SampleScores:
    """Read such a file. Anything else raises MalformedFile."""
    content = io.BytesIO(read_limited(path, follow_link=False))
    try:
        with zipfile.ZipFile(content) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_UNPACKED:
                raise ValueError("its arrays are too large")
        arrays = np.load(content, allow_pickle=False)
        about, scores = json.loads(bytes(arrays["about"].item())), arrays["scores"]
        if about["format"] > FORMAT:
            raise ValueError("a newer version of this program wrote it")
        if scores.dtype == np.uint8:
            scores = np.unpackbits(scores, count=about["n"]).astype(bool)
        kinds = (("split", str), ("step", int), ("metric", str), ("data", dict))
        is_valid = scores.shape == (about["n"],) and scores.dtype in (bool, np.float16)
        if not is_valid or ((scores < 0) | (scores > 1)).any() or not all(isinstance(about[name], kind) for name, kind in kinds):
            raise ValueError("its values don't fit together")
    except (ValueError, LookupError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise MalformedFile(path, f"it does not hold the scores of samples ({error})") from error
    return SampleScores(about["split"], about["step"], about["metric"], scores, about["data"])


def prune_samples(run_dir: Path, keep: int | None = None) -> None:
    """Remove the files of steps that have no checkpoint, except those of the step `keep`."""
    steps = {int(folder.name.removeprefix("step-")) for folder in committed_checkpoints(run_dir)} | {keep}
    for path in (run_dir / FOLDER).glob("*.npz"):
        if (named := NAME.fullmatch(path.name)) and int(named[1]) not in steps:
            path.unlink(missing_ok=True)
