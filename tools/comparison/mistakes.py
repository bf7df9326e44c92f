"""The most confident mistakes of each run's best checkpoint, as small images in a page."""

import base64
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.config.errors import ConfigError, RunError
from engine.inference.trained import load_trained
from tools.comparison.rows import Row
from tools.comparison.verdict import Verdict
from tools.pictures.predictions import find_mistakes
from tools.pictures.subject import read_samples, require_classification
from tools.tables import print_lines

MAX_SIDE = 128  # pixels
LOSSLESS_SIDE = 64  # images of at most so many pixels are kept as they are


def mistakes_of(rows: Sequence[Row], n: int, overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Find up to `n` mistakes of each row's best run, or the reason for none, such as a missing checkpoint or dataset."""
    found = []
    for row in tqdm(rows, "mistakes", unit="run", leave=False, disable=not sys.stderr.isatty()):
        step, samples, why_none = 0, [], None
        try:
            trained = load_trained(max(row.runs, key=lambda run: run.best or 0).path, overrides)
            require_classification(trained.task, trained.config, "mistakes")
            step, indices = trained.step, find_mistakes(trained, "valid", n)
            if indices:
                chosen = read_samples(trained, "valid", indices)
                with torch.no_grad():
                    predictions = trained.task.predict(trained.model, chosen.batch)
                confidences, predicted = (part.tolist() for part in predictions.max(1))
                for image, true, confidence, index in zip(chosen.images, chosen.names, confidences, predicted, strict=True):
                    sample = {"predicted": trained.classes[index], "confidence": confidence, "true": true}
                    samples.append({"picture": data_url(image), **sample})
            else:
                why_none = "it makes no mistake"
        except (ConfigError, RunError) as error:
            print_lines(f"no mistakes of {row.name}: {error}", file=sys.stderr)
            why_none = str(error)
        found.append({"name": row.name, "step": step, "samples": samples, "why_none": why_none})
    return found


def disagreements(verdicts: Sequence[Verdict], n: int, overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each verdict's words, with up to `n` of the images that A or B gets right more often than the other."""
    found: list[dict[str, Any]] = []
    for verdict in verdicts:
        found.append({"text": str(verdict), "only": {}, "why_none": None})
        try:
            trained = load_trained(verdict.a.first.path, overrides)
            of_a = np.nan_to_num(verdict.estimate.gains)
            for name, gains in ((verdict.a.name, of_a), (verdict.b.name, -of_a)):
                indices = [i for i in np.argsort(-gains, kind="stable")[:n].tolist() if gains[i] > 0]
                chosen = read_samples(trained, verdict.split, indices) if indices else None
                found[-1]["only"][name] = [
                    {"picture": data_url(image), "true": true, "gain": f"image {i}: {100 * gains[i]:+.0f} points"}
                    for image, true, i in (zip(chosen.images, chosen.names, indices, strict=True) if chosen else ())
                ]
        except (ConfigError, RunError) as error:
            found[-1]["why_none"] = str(error)
    return found


def data_url(image: Tensor) -> str:
    """Encode an image, C H W from 0 to 1: PNG if it is small, else a JPEG thumbnail."""
    levels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # C H W -> H W C
    picture, encoded = Image.fromarray(np.squeeze(levels, -1) if levels.shape[-1] == 1 else levels), io.BytesIO()
    is_small = max(picture.size) <= LOSSLESS_SIDE
    kind = "png" if is_small else "jpeg"
    picture.thumbnail((MAX_SIDE, MAX_SIDE))  # never enlarges
    picture.save(encoded, kind, optimize=is_small, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
