"""A run from its first line to its last: start or resume, train, and write down what came of it."""

import json
import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn

from engine.agreement import EXIT_CODES
from engine.builder import Run, build, check, new_model
from engine.checkpoint import Checkpoints, read_checkpoint
from engine.config import LoadedConfig, load_config, to_dict, to_yaml
from engine.environment import describe, make_accelerator
from engine.errors import ConfigError, RunError
from engine.journal import Journal, restore
from engine.loop import Interrupted, fit
from engine.run_folder import Resumption, RunFolder, find_resumption, remove_tree
from engine.tasks import Task
from engine.tracking import add_log_file, read_metrics, remove_log_file, set_up_terminal

log = logging.getLogger(__name__)
T = TypeVar("T")

# Keys whose change leaves the weights as they would have been.
HARMLESS = (
    "train.print_freq",
    "train.save_freq",
    "train.eval_freq",
    "train.keep_last",
    "dataloader.",
    "data.dataroot",
    "data.verify",
    "data.download",
    "eval.",
)


@dataclass
class Result:
    status: str  # completed or interrupted
    run_dir: Path
    step: int
    best: dict[str, float]
    last: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)
    exit_code: int = 0


def train(
    config: LoadedConfig,
    *,
    exp_dir: str | Path | None = None,
    resume: str | None = None,
    dry_run: bool = False,
    model: nn.Module | None = None,
    task: Task | None = None,
) -> Result:
    """Train as `config` says. `exp_dir` is the run's folder, `resume` is latest, best, auto or a path; a `model` or a `task` of your
    own takes the place of the config's. A failure raises ConfigError or RunError; a signal gives a Result that says interrupted."""
    set_up_terminal(is_main=os.environ.get("RANK", "0") == "0")
    check(config)
    accelerator = make_accelerator(config)
    config.train.precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    for note in config.notes:
        level = logging.WARNING if note.startswith("warning: ") else logging.INFO
        log.log(level, "%s", note.removeprefix("warning: "))
    if dry_run:
        return _dry_run(config, accelerator, model, task)
    resumption = find_resumption(resume, exp_dir)
    try:
        with _open_folder(accelerator, exp_dir, resume, resumption) as folder:
            return _train_in(folder, config, accelerator, resumption, model, task)
    finally:
        if accelerator.num_processes > 1:
            accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)


def _train_in(
    folder: RunFolder,
    config: LoadedConfig,
    accelerator: Accelerator,
    resumption: Resumption | None,
    model: nn.Module | None,
    task: Task | None,
) -> Result:
    run = build(config, accelerator, model=model, task=task)
    checkpoints = Checkpoints(folder.path, config.train.keep_last)
    environment = describe(accelerator)
    if resumption is not None:
        checkpoint = checkpoints.load(resumption.which)
        restore(run, checkpoint, checkpoint.path)
        if accelerator.is_main_process:
            _say_what_changed(folder.path, config, environment)
            checkpoints.rewind(run.state.step, run.state.best_step)
    if accelerator.is_main_process:
        _write_beginning(folder, config, environment)
    journal = Journal(run, folder, checkpoints)
    log.info("%s", _opening(config, run, folder, resumed=resumption is not None))
    result = Result("completed", folder.path, run.state.step, run.state.best_metrics, run.state.last_metrics)
    try:
        fit(run, journal)
        if "test" in run.data.splits:
            result.test = _evaluate_best(run, folder, journal)
        _write_end(folder, run, journal, result, config)
        if accelerator.is_main_process:
            _draw(folder, run, config)
            log.info("%s", _closing(run, result, folder))
    except Interrupted as interruption:
        result.status, result.exit_code = "interrupted", EXIT_CODES[interruption.signum]
        _write_end(folder, run, journal, result, config)
        log.info("interrupted at step %d, which is saved; %s continues the run", run.state.step, _how_to_resume(folder))
    except BaseException as error:
        result.status = "failed"
        _write_end(folder, run, journal, result, config, why=f"{type(error).__name__}: {error}")
        raise
    finally:
        journal.close()
    return result


@contextmanager
def _open_folder(
    accelerator: Accelerator, exp_dir: str | Path | None, resume: str | None, resumption: Resumption | None
) -> Iterator[RunFolder]:
    """The run's folder, made or reopened by rank 0. What goes wrong inside is written to its log; a run that never began leaves none."""
    own: list[RunFolder] = []

    def opened() -> Path:
        if resumption is not None:
            own.append(RunFolder.reopen(resumption.run_dir))
        else:
            own.append(RunFolder.start(exp_dir, may_hold_a_run=resume == "auto"))
        return own[0].path

    path = _on_main(accelerator, opened)
    folder = own[0] if own else RunFolder(path, is_new=False)
    log_file = add_log_file(path / "output.log") if own else None
    try:
        yield folder
    except BaseException as error:
        if log_file is not None:
            said = str(error) if isinstance(error, (ConfigError, RunError)) else traceback.format_exc()
            log_file.handle(logging.makeLogRecord({"msg": said, "levelno": logging.ERROR, "levelname": "ERROR"}))
        raise
    finally:
        if log_file is not None:
            remove_log_file(log_file)
        if own:
            began = (path / "config.yaml").exists()
            if not began:
                (path / "output.log").unlink(missing_ok=True)
            folder.close() if began else folder.discard_if_empty()


def _on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on rank 0, and have its result, or its failure, on all."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ConfigError, RunError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _dry_run(config: LoadedConfig, accelerator: Accelerator, model: nn.Module | None, task: Task | None) -> Result:
    """Build everything, train two steps, evaluate one batch; leave nothing."""
    train = config.train
    train.n_steps, train.n_epochs, train.print_freq, train.eval_freq, train.save_freq = 2, None, 1, 2, 2
    path = Path(_on_main(accelerator, lambda: tempfile.mkdtemp(prefix="dry-run-")))
    try:
        run = build(config, accelerator, model=model, task=task)
        run.max_eval_batches = 1
        journal = Journal(run, RunFolder(path, is_new=True), Checkpoints(path, train.keep_last))
        try:
            fit(run, journal)
        finally:
            journal.close()
        log.info("dry run: everything was built, trained for two steps, evaluated on one batch and saved")
        return Result("completed", path, run.state.step, run.state.best_metrics, run.state.last_metrics)
    except Interrupted as interruption:
        return Result("interrupted", path, 0, {}, {}, exit_code=EXIT_CODES[interruption.signum])
    finally:
        if accelerator.is_main_process:
            remove_tree(path)


def _evaluate_best(run: Run, folder: RunFolder, journal: Journal) -> dict[str, float]:
    """The test split, with the weights that validation chose."""
    best = read_checkpoint((folder.path / "ckpt" / "best").resolve())
    last = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(best.weights)
    metrics = run.evaluate("test")
    run.model.load_state_dict(last)
    journal.write(metrics)
    return metrics


def _say_what_changed(run_dir: Path, config: LoadedConfig, environment: dict[str, Any]) -> None:
    began_as = _flat(to_dict(load_config(run_dir / "config.yaml")))
    now = _flat(to_dict(config))
    for key in sorted(began_as.keys() | now.keys()):
        if began_as.get(key) != now.get(key):
            exact = "" if key.startswith(HARMLESS) else "; from here on the run is not bit-exact with one that was never changed"
            log.info("%s is now %s, was %s%s", key, now.get(key), began_as.get(key), exact)
    written = run_dir / "environment.json"
    world_size = json.loads(written.read_text())["world_size"] if written.is_file() else environment["world_size"]
    if world_size != environment["world_size"]:
        log.info(
            "%d ranks instead of %d: the same global batches, but sums in another order, so not bit-exact",
            environment["world_size"],
            world_size,
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_beginning(folder: RunFolder, config: LoadedConfig, environment: dict[str, Any]) -> None:
    written = folder.path / "environment.json"
    earlier = json.loads(written.read_text()) if written.is_file() and not folder.is_new else None
    sessions = [*earlier.pop("earlier_sessions", []), earlier] if earlier else []
    folder.write_json("environment.json", {**environment, "earlier_sessions": sessions})
    folder.write("config.yaml", to_yaml(config))
    (folder.path / "results.json").unlink(missing_ok=True)


def _write_end(
    folder: RunFolder, run: Run, journal: Journal, result: Result, config: LoadedConfig, why: str | None = None
) -> None:
    state = run.state
    result.step, result.best, result.last = state.step, state.best_metrics, state.last_metrics
    if not run.accelerator.is_main_process:
        return
    size = _count(run, config) if result.status == "completed" else {}
    folder.write_json(
        "results.json",
        {
            "status": result.status,
            "why": why,
            "step": state.step,
            "n_steps": run.n_steps,
            "best": {"step": state.best_step, **state.best_metrics},
            "last": state.last_metrics,
            "test": result.test,
            "wall_time": round(state.elapsed, 3),
            "images_per_sec": round(journal.images / journal.seconds, 1) if journal.seconds else None,
            "params": sum(p.numel() for p in run.model.parameters()),
            "macs": size.get("macs"),
        },
    )
    if result.status == "completed" and result.best:
        journal.tracker.hyperparameters(
            to_dict(config), {f"hparam/{run.task.monitor}": state.best_metrics[f"valid/{run.task.monitor}"]}, state.step
        )


def _count(run: Run, config: LoadedConfig) -> dict[str, int]:
    """On a fresh model: the trained one carries Accelerate's precision with it."""
    from engine.macs import count

    data = run.data
    return asdict(
        count(new_model(config, len(data.classes), data.spec.channels, data.img_size), data.spec.channels, data.img_size)
    )


@torch.no_grad()
def _draw(folder: RunFolder, run: Run, config: LoadedConfig) -> None:
    from engine.figures import draw_curves, save_figure

    history = read_metrics(folder.path)
    save_figure(draw_curves(history, f"{config.model.name} on {run.data.spec.name}"), folder.path / "figures" / "curves.png")
    batch = tuple(part[:32] for part in next(iter(run.data.loader("valid").batches())))
    run.model.eval()
    predictions = run.task.predict(run.model, batch)
    images = run.train_loader.normalise.undo(batch[0])
    save_figure(run.task.draw(images, batch, predictions), folder.path / "figures" / "predictions.png")


def _opening(config: LoadedConfig, run: Run, folder: RunFolder, resumed: bool) -> str:
    n_params = sum(p.numel() for p in run.model.parameters())
    accelerator = run.accelerator
    where = (
        f"{accelerator.num_processes} x {accelerator.device.type}" if accelerator.num_processes > 1 else accelerator.device.type
    )
    verb = f"resuming at step {run.state.step}" if resumed else "training"
    return (
        f"{verb}: {config.model.name} ({n_params / 1e6:.3g} M parameters) on {run.data.spec.name} "
        f"({len(run.data.splits['train']):,} images, {len(run.data.classes)} classes, {run.data.img_size}x{run.data.img_size}), "
        f"{run.n_steps:,} steps = {run.n_steps / run.steps_per_epoch:.4g} epochs of batch {run.batch_size}, "
        f"{config.train.precision} on {where}; run folder {folder.path}"
    )


def _closing(run: Run, result: Result, folder: RunFolder) -> str:
    monitor, state = run.task.monitor, run.state
    rows = [
        (f"best valid {monitor}", f"{100 * state.best_metrics[f'valid/{monitor}']:.2f} % at step {state.best_step}"),
        (f"last valid {monitor}", f"{100 * state.last_metrics[f'valid/{monitor}']:.2f} %"),
    ]
    if result.test:
        rows.append((f"test {monitor} of the best", f"{100 * result.test[f'test/{monitor}']:.2f} %"))
    rows += [
        ("time", f"{state.elapsed:.1f} s"),
        ("run folder", str(folder.path)),
        ("curves", str(folder.path / "figures" / "curves.png")),
        ("TensorBoard", f"tensorboard --logdir {folder.path / 'tensorboard'}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["done", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _how_to_resume(folder: RunFolder) -> str:
    return f"main.py -r {folder.path}"
