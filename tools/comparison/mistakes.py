"""What the best checkpoints of runs are wrong about, and surest of, as small pictures in a page."""

import base64
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.config.errors import ConfigError, RunError
from engine.inference.trained import load_trained
from tools.comparison.runs import RunRecord
from tools.comparison.table import Row
from tools.pictures.predictions import mistakes
from tools.pictures.subject import expect_classes, samples_of

LARGEST = 128  # pixels of a side
SMALL = 64  # up to here every pixel is kept as it is


@dataclass(frozen=True)
class Mistake:
    picture: str  # a data URL
    predicted: str
    confidence: float
    true: str


@dataclass(frozen=True)
class Mistakes:
    name: str
    step: int = 0  # of the checkpoint
    samples: Sequence[Mistake] = ()
    why_none: str | None = None


def mistakes_of(rows: Sequence[Row], n: int, overrides: Mapping[str, Any]) -> list[Mistakes]:
    """Of each row, of its best run."""
    bar = tqdm(rows, "mistakes", unit="run", leave=False, disable=not sys.stderr.isatty())
    return [_of_run(row.name, max(row.runs, key=lambda run: run.best or 0), n, overrides) for row in bar]


def _of_run(name: str, run: RunRecord, n: int, overrides: Mapping[str, Any]) -> Mistakes:
    """A run whose data or checkpoint isn't here is no reason to have no page; it says so."""
    try:
        trained = load_trained(run.path, overrides)
        expect_classes(trained.task, trained.config, "mistakes")
        places = mistakes(trained, "valid", n)
        if not places:
            return Mistakes(name, trained.step, why_none="it makes no mistake")
        subjects = samples_of(trained, "valid", places)
    except (ConfigError, RunError) as error:
        print(f"no mistakes of {name}: {error}", file=sys.stderr)
        return Mistakes(name, why_none=str(error))
    with torch.no_grad():
        surest = trained.task.predict(trained.model, (subjects.inputs, subjects.labels)).max(1)
    found = zip(subjects.images, surest.indices.tolist(), surest.values.tolist(), subjects.names, strict=True)
    samples = [Mistake(_as_url(image), trained.classes[at], value, true) for image, at, value, true in found]
    return Mistakes(name, trained.step, samples)


def _as_url(image: Tensor) -> str:
    """C H W from 0 to 1."""
    levels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(np.squeeze(levels, -1) if levels.shape[-1] == 1 else levels)
    written = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(written, "PNG", optimize=True)
    else:
        picture.thumbnail((LARGEST, LARGEST))
        picture.save(written, "JPEG", quality=80)
    kind = "png" if max(picture.size) <= SMALL else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
