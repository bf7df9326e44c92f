"""The records of how a run starts and ends: files in its folder, and lines of the log."""

import json
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from datasets.pipeline.cores import usable_cores
from datasets.pipeline.fingerprint import fingerprint_differences
from engine.config.schema import WITHOUT_EFFECT_ON_WEIGHTS, flatten
from engine.run.folder import CATEGORY_IDS, CLASSES, CONFIG, ENVIRONMENT, RunFolder, plugins_in, read_config, read_replaceable
from models.loading.files import first_line

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "numpy", "safetensors", "omegaconf")
INEXACT = "; from here on the run is not bit-exact with one that was never changed"


@dataclass
class Result:
    """How a run ended."""

    run_dir: Path
    status: str = "completed"  # completed, interrupted or failed
    why: str | None = None
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    exit_code: int = 0


def describe_environment(
    accelerator: Accelerator, precision: str | None, plugins: dict[str, str], data: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of environment.json: where and with what a run is trained."""
    device = accelerator.device
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "command": [sys.executable, *sys.argv],
        "device": device_name + (f", {usable_cores()} cores" if device.type == "cpu" else ""),
        "world_size": accelerator.num_processes,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "plugins": plugins,
        "data": data,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the code, with a + if files were changed since; None outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parents[2]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_start(
    folder: RunFolder,
    config_yaml: str,
    environment: Mapping[str, Any],
    classes: Sequence[str],
    category_ids: Sequence[int | None] | None = None,
) -> None:
    """Write config.yaml; classes.json and category_ids.json, for use without the data; and environment.json, which keeps those
    of earlier sessions."""
    earlier = {} if folder.is_new else read_replaceable(folder.path, ENVIRONMENT, dict)
    sessions = earlier.pop("earlier_sessions", [])
    sessions = [*(sessions if isinstance(sessions, list) else []), earlier] if earlier else []
    folder.write_json(ENVIRONMENT, {**environment, "earlier_sessions": sessions})
    folder.write_json(CLASSES, list(classes))
    if category_ids is not None:
        folder.write_json(CATEGORY_IDS, list(category_ids))
    else:
        (folder.path / CATEGORY_IDS).unlink(missing_ok=True)
    folder.write(CONFIG, config_yaml)
    (folder.path / "results.json").unlink(missing_ok=True)


def log_changes(
    run_dir: Path,
    trained_with: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    trained_on: Mapping[str, Any] | None = None,
) -> None:
    """Log what differs from the training so far, and whether it affects the weights.

    `trained_with` are the values of the config that the checkpoint was trained with. Old checkpoints have none: only the command
    line can differ from config.yaml then. `trained_on` is the fingerprint of its data, which old checkpoints don't have either.
    """
    before, now = (json.loads(json.dumps(values)) for values in (trained_with or flatten(read_config(run_dir)), flatten(config)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            effect = "" if key.startswith(WITHOUT_EFFECT_ON_WEIGHTS) else INEXACT
            log.info("%s is now %s, was %s%s", first_line(key), now.get(key), first_line(str(before.get(key))), effect)
    for difference in fingerprint_differences(trained_on, environment["data"]):
        log.warning("the data are not those of the training so far: %s%s", difference, INEXACT)
    earlier = read_replaceable(run_dir, ENVIRONMENT, dict) or environment
    digests = {Path(plugin).name: digest for plugin, digest in environment["plugins"].items()}
    for plugin, digest in plugins_in(earlier).items():
        if digests.get(Path(plugin).name) != digest:
            log.info("the plugin %s was changed%s", first_line(Path(plugin).name), INEXACT)
    for key, name in (("world_size", "ranks"), ("threads", "threads"), ("device", "device")):
        if earlier.get(key) != environment[key]:
            change = f"now {environment[key]}, was {first_line(str(earlier.get(key)))}"
            log.info("%s: %s: the same batches, but sums in another order%s", name, change, INEXACT)


def log_line(
    metrics: Mapping[str, float], step: int, n_steps: int, steps_per_epoch: int, shown: Sequence[str], *, is_best: bool
) -> str:
    """Return the line for people: epoch, step, and the metrics of each split; the `shown` ones in percent."""
    words = [f"epoch {step / steps_per_epoch:.4g}/{n_steps / steps_per_epoch:.4g}", f"step {step}/{n_steps}"]
    for split in dict.fromkeys(name.partition("/")[0] for name in metrics):
        own = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{split}/")}
        names = [name for name in ("loss", *shown, "lr", "grad_norm") if name in own]
        words.append(" ".join([split, *(f"{n} {100 * own[n]:.2f} %" if n in shown else f"{n} {own[n]:.4g}" for n in names)]))
    if "train/images_per_sec" in metrics:
        words.append(f"{metrics['train/images_per_sec']:.0f} images/s")
    return " | ".join([*words, "best"] if is_best else words)


def write_results(folder: RunFolder, results: Mapping[str, Any]) -> None:
    try:
        folder.write_json("results.json", results)
    except OSError as error:
        log.warning("results.json can't be written: %s", error)


def final_table(result: Result, monitor: str, best_step: int | None, seconds: float) -> str:
    """Return the table that ends the log of a completed run."""
    rows = []
    if result.best:
        rows += [
            (f"best valid {monitor}", f"{100 * result.best[f'valid/{monitor}']:.2f} % at step {best_step}"),
            (f"last valid {monitor}", f"{100 * result.last[f'valid/{monitor}']:.2f} %"),
        ]
    if result.test:
        rows.append((f"test {monitor} of the best", f"{100 * result.test[f'test/{monitor}']:.2f} %"))
    path = result.run_dir
    rows += [
        ("time", f"{seconds:.1f} s"),
        ("run folder", str(path)),
        ("curves", str(path / "figures" / "curves.png")),
        ("TensorBoard", f"tensorboard --logdir {path / 'tensorboard'}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["done", *(f"  {name:<{width}}  {value}" for name, value in rows)])
