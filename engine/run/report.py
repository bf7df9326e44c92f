"""What a run says of itself when it begins and when it ends."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.build import Run
from engine.config.resolve import LoadedConfig, flatten, load_config, to_dict, to_yaml
from engine.devices.memory import peak_memory
from engine.devices.sharding import is_sharded
from engine.journal import Journal
from engine.run.folder import CLASSES, RunFolder
from engine.run.log import millions
from engine.run.metrics import read_metrics

log = logging.getLogger(__name__)

DRAWN = 32  # predictions
# Keys whose change leaves the weights as they would have been.
HARMLESS = ("train.print_freq", "train.save_freq", "train.eval_freq", "train.keep_last", "train.profile")
HARMLESS += ("dataloader.", "eval.", "tracking.", "data.dataroot", "data.verify", "data.download")


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


def write_beginning(folder: RunFolder, config: LoadedConfig, environment: dict[str, Any], classes: Sequence[str]) -> None:
    """config.yaml, classes.json, with which a model can be used where its data are not, and environment.json, in which those of
    earlier sessions stay."""
    written = folder.path / "environment.json"
    earlier = [] if folder.is_new or not written.is_file() else json.loads(written.read_text())
    sessions = [*earlier.pop("earlier_sessions"), earlier] if earlier else []
    folder.write_json("environment.json", {**environment, "earlier_sessions": sessions})
    folder.write_json(CLASSES, list(classes))
    folder.write("config.yaml", to_yaml(config))
    (folder.path / "results.json").unlink(missing_ok=True)


def opening(config: LoadedConfig, run: Run, folder: RunFolder, *, resumed: bool) -> str:
    device, data = run.accelerator.device.type, run.data
    where = f"{run.accelerator.num_processes} x {device}" if run.accelerator.num_processes > 1 else device
    return (
        f"{f'resuming at step {run.state.step}' if resumed else 'training'}: "
        f"{config.model.name} ({millions(_n_params(run))} parameters) on {data.spec.name} "
        f"({len(data.splits['train']):,} images, {len(data.classes)} classes, {data.img_size}x{data.img_size}), "
        f"{run.n_steps:,} steps = {run.n_steps / run.steps_per_epoch:.4g} epochs of batch {run.batch_size}, "
        f"{config.train.precision} on {where}; run folder {folder.path}"
    )


def say_what_changed(run_dir: Path, config: LoadedConfig, environment: Mapping[str, Any]) -> None:
    """A resumed run that differs from the one that was begun says where, and whether its weights are affected."""
    began_as, now = flatten(to_dict(load_config(run_dir / "config.yaml"))), flatten(to_dict(config))
    inexact = "; from here on the run is not bit-exact with one that was never changed"
    for key in sorted(began_as.keys() | now.keys()):
        if began_as.get(key) != now.get(key):
            log.info("%s is now %s, was %s%s", key, now.get(key), began_as.get(key), "" if key.startswith(HARMLESS) else inexact)
    written = run_dir / "environment.json"
    before = json.loads(written.read_text()) if written.is_file() else environment
    digests = {Path(path).name: digest for path, digest in environment["plugins"].items()}
    for path, digest in before.get("plugins", {}).items():
        if digests.get(Path(path).name) != digest:
            log.info("the plugin %s was changed%s", Path(path).name, inexact)
    for name, said in (("world_size", "ranks"), ("threads", "threads"), ("device", "device")):
        if before.get(name) != environment[name]:
            log.info(
                "%s: now %s, was %s: the same batches, but sums in another order%s",
                said,
                environment[name],
                before.get(name),
                inexact,
            )


def write_results(folder: RunFolder, run: Run, journal: Journal, result: Result) -> None:
    state = run.state
    results = {
        "status": result.status,
        "why": result.why,
        "step": state.step,
        "n_steps": run.n_steps,
        "monitor": run.task.monitor,
        "best": {"step": state.best_step, **state.best_metrics},
        "last": state.last_metrics,
        "test": result.test,
        "wall_time": round(state.elapsed, 3),
        "images_per_sec": round(journal.images / journal.seconds, 1) if journal.seconds else None,
        "peak_memory_mb": peak_memory(run.accelerator.device),
        "params": _n_params(run),
        "macs": _count_macs(run) if result.status == "completed" else None,
    }
    try:
        folder.write_json("results.json", results)
    except OSError as error:
        log.warning("results.json can't be written: %s", error)


def closing(run: Run, result: Result) -> str:
    """The table at the end."""
    monitor, state, path = run.task.monitor, run.state, result.run_dir
    rows = []
    if state.best_metrics:
        rows += [
            (f"best valid {monitor}", f"{100 * state.best_metrics[f'valid/{monitor}']:.2f} % at step {state.best_step}"),
            (f"last valid {monitor}", f"{100 * state.last_metrics[f'valid/{monitor}']:.2f} %"),
        ]
    if result.test:
        rows.append((f"test {monitor} of the best", f"{100 * result.test[f'test/{monitor}']:.2f} %"))
    rows += [
        ("time", f"{state.elapsed:.1f} s"),
        ("run folder", str(path)),
        ("curves", str(path / "figures" / "curves.png")),
        ("TensorBoard", f"tensorboard --logdir {path / 'tensorboard'}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["done", *(f"  {name:<{width}}  {value}" for name, value in rows)])


@torch.no_grad()
def predict_some(run: Run) -> tuple[Any, Any]:
    """The first validation images of this rank, and what is predicted. On every rank, as sharded weights need all of them."""
    batch = tuple(part[:DRAWN] for part in next(iter(run.data.loader("valid").batches())))
    run.model.eval()
    return batch, run.task.predict(run.model, batch)


def draw(run: Run, config: LoadedConfig, folder: RunFolder, batch: Any, predictions: Any) -> None:
    """figures/curves.png and figures/predictions.png."""
    from engine.plots.curves import draw_curves
    from engine.plots.style import new_figure, save_figure

    figures = folder.path / "figures"
    title = f"{config.model.name} on {run.data.spec.name}"
    draw_curves(curves := new_figure(), {title: read_metrics(folder.path)}, title=title)
    save_figure(curves, figures / "curves.png")
    save_figure(run.task.draw(run.train_loader.normalize.undo(batch[0]), batch, predictions), figures / "predictions.png")


def _n_params(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.model.parameters())


def _count_macs(run: Run) -> int | None:
    """On a copy without what Accelerate has put around its forward; a model of somebody's own may not be traceable."""
    if is_sharded(run.model):  # a part of it can't be counted
        return None
    from engine.run.macs import count

    model = run.accelerator.unwrap_model(copy.deepcopy(run.model), keep_fp32_wrapper=False).float()
    try:
        return count(model, run.data.spec.channels, run.data.img_size).macs
    except Exception as error:  # whatever that model raises when it is traced
        log.warning("the multiply-accumulates of %s could not be counted: %s", type(model).__name__, str(error).splitlines()[0])
        return None
