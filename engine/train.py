"""Train: build or restore a run, then for each batch update, log, evaluate and save a checkpoint, and write down the results."""

import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from engine.build import Run, build
from engine.config.errors import ConfigError, RunError, located
from engine.config.resolve import ResolvedConfig
from engine.config.schema import flatten, to_dict, to_yaml
from engine.devices.accelerator import has_bf16_instructions, make_accelerator, requested_precision
from engine.devices.agreement import EXIT_CODES, Agreement, Interrupted, all_ranks, on_main
from engine.devices.failures import explained
from engine.devices.memory import peak_memory, reset_peak_memory
from engine.devices.sharding import is_sharded, load_weights
from engine.evaluate import evaluate, readable, share_buffers
from engine.plugins import loaded_plugins
from engine.run.checkpoint import Checkpoint, Checkpoints
from engine.run.folder import CONFIG, THRESHOLDS, Resumption, RunFolder, find_resumption, read_replaceable, remove_tree
from engine.run.log import add_log_file, millions, remove_log_file, set_up_terminal
from engine.run.metrics import Clock, MetricsLog, read_metrics
from engine.run.report import Result, describe_environment, final_table, log_changes, log_line, write_results, write_start
from engine.run.samples import SampleScores, prune_samples, write_samples
from engine.run.trackers import Trackers
from engine.tasks import HasThresholds, Task

log = logging.getLogger(__name__)

NOT_DETERMINISTIC = (
    "deterministic false: two runs get the same batches and random numbers, but GPU kernels may sum in another order, "
    "so that weights differ in the last bits; deterministic true allows no such kernels"
)
SLOW_BF16 = "this processor has no instructions for bf16: --train.precision fp32 may be several times as fast"
N_DRAWN = 32  # predictions in figures/predictions.png


@dataclass
class Outputs:
    """Where a run writes. Rank 0 has the metrics log and the trackers; a dry run has no checkpoints."""

    folder: RunFolder
    clock: Clock
    checkpoints: Checkpoints | None = None
    metrics: MetricsLog | None = None
    trackers: Trackers | None = None

    def close(self, status: str) -> None:
        if self.metrics is not None:
            self.metrics.close()
        if self.trackers is not None:
            self.trackers.close(status)


# The loop


def fit(run: Run, outputs: Outputs, agreement: Agreement) -> None:
    """Train from the state's step to the last one. A signal on any rank ends it after a checkpoint, by Interrupted."""
    state = run.state
    run.model.train()
    if state.step == 0 and run.eval_first and not state.last_metrics:
        state.open_line = {}
    with progress_bar(run) as progress:
        # an open line is due before the first step, or was left by a signal that came before the evaluation of its step
        if state.open_line is not None and evaluate_and_log(run, outputs, agreement):
            save(run, outputs)
        for batch in profiled(run, outputs.folder, train_batches(run, first=state.step)):
            if out_of_patience(run):
                break
            if state.step == 0:
                show_batch(run, outputs, batch)
            log_due = is_due(run, run.print_freq, state.step + 1)
            run.update(state, batch, measure=log_due)
            progress.update()
            is_best = False
            if log_due or is_due(run, run.eval_freq, state.step):
                state.open_line = training_metrics(run, outputs) if log_due else {}
                is_best = evaluate_and_log(run, outputs, agreement)
            elif signum := agreement.stop():
                save(run, outputs, must=True)
                raise Interrupted(signum)
            if is_best or is_due(run, run.save_freq, state.step):
                save(run, outputs)
    if out_of_patience(run):
        log.info("step %d: %d evaluations without a better one (train.patience); the run ends", state.step, run.patience)
        save(run, outputs, must=True)


def train_batches(run: Run, first: int) -> Iterator[Any]:
    """Yield the batches of the updates from `first` on, mixed as the config says."""
    for step, batch in enumerate(readable(run.train_loader.batches(first, run.n_steps)), start=first):
        is_mixed = run.mix is not None and (run.mix_epochs is None or step < run.mix_epochs * run.steps_per_epoch)
        yield run.mix(step, batch) if run.mix is not None and is_mixed else batch


def is_due(run: Run, freq: int, step: int) -> bool:
    return step % freq == 0 or step == run.n_steps


def out_of_patience(run: Run) -> bool:
    return run.patience is not None and run.state.evaluations_since_best >= run.patience


def training_metrics(run: Run, outputs: Outputs) -> dict[str, float]:
    metrics = run.state.close_window(run.accelerator)  # waits for the device, so the speed is measured after it
    return {**metrics, "train/images_per_sec": outputs.clock.images_per_sec(run.state.step, run.batch_size)}


def evaluate_and_log(run: Run, outputs: Outputs, agreement: Agreement) -> bool:
    """Evaluate if that is due, and write the line of this step; return whether it is the best so far.

    A signal cuts this short. Then the checkpoint remembers the open line, and a resumed run evaluates and logs it first.
    """
    state = run.state
    try:
        if signum := agreement.stop():
            raise Interrupted(signum)
        metrics: dict[str, float] = {}
        averaged: dict[str, float] = {}
        if is_due(run, run.eval_freq, state.step):
            metrics = evaluate_split(run, "valid", agreement, outputs)
            averaged = evaluate_split(run, "valid", agreement, averaged=True) if state.ema is not None else {}
    except Interrupted:
        save(run, outputs, must=True)
        raise
    is_best = bool(metrics) and state.note_evaluation(metrics, f"valid/{run.task.monitor}")
    line, state.open_line = (state.open_line or {}) | metrics | averaged, None
    write_line(run, outputs, line)
    return is_best


def evaluate_split(
    run: Run, split: str, agreement: Agreement | None = None, outputs: Outputs | None = None, *, averaged: bool = False
) -> dict[str, float]:
    """Return the metrics of a split by their logged names: valid/acc@1, or valid_ema/acc@1 of the averaged weights."""
    task = run.task.with_tables("samples") if outputs is not None else run.task
    model: nn.Module = run.state.ema.module if averaged and run.state.ema is not None else run.model
    share_buffers(model, run.accelerator)
    stop = agreement.stop if agreement is not None else None
    metrics = evaluate(model, run.data.loader(split), task, run.accelerator, max_batches=run.max_eval_batches, stop=stop)
    if (samples := metrics.pop("samples", None)) is not None and outputs is not None:
        keep_samples(run, outputs, split, *samples)
    return {f"{split}{'_ema' if averaged else ''}/{name}": value for name, value in metrics.items()}


def keep_samples(run: Run, outputs: Outputs, split: str, metric: str, scores: Tensor) -> None:
    """Write the score of each sample; those of the test belong to the best step. They are removed with its checkpoint."""
    best, checkpoints = run.state.best_step, outputs.checkpoints
    if outputs.metrics is None or checkpoints is None:  # another rank, or a dry run
        return
    step = best if split == "test" and best is not None else run.state.step
    found = SampleScores(split, step, metric, scores.numpy(), (checkpoints.data or {}).get(split, {}))
    try:
        prune_samples(outputs.folder.path, keep=step)
        write_samples(outputs.folder.path, found)
    except OSError as error:
        log.warning("the scores of the samples of %s can't be written: %s", split, error)


def write_line(run: Run, outputs: Outputs, metrics: dict[str, float]) -> None:
    """Write one line to the log, metrics.jsonl, TensorBoard and the trackers. A loss that is not finite ends the run."""
    state = run.state
    state.elapsed += outputs.clock.tick()
    if outputs.metrics is not None:
        line = {"epoch": round(state.step / run.steps_per_epoch, 4), "elapsed": round(state.elapsed, 3)} | metrics
        outputs.metrics.record(state.step, line)
        if outputs.trackers is not None:
            outputs.trackers.record(state.step, line)
        is_best = state.best_step == state.step and any(name.startswith("valid/") for name in metrics)
        log.info("%s", log_line(metrics, state.step, run.n_steps, run.steps_per_epoch, run.task.shown, is_best=is_best))
    for name, value in metrics.items():
        if name.endswith("/loss") and not math.isfinite(value):
            raise diverged(run, outputs, f"{name} is {value}")
    outputs.clock.start_window(state.step)


def save(run: Run, outputs: Outputs, *, must: bool = False) -> None:
    """Commit a checkpoint of this step. If part of it is not finite, the run ends instead; a dry run saves nothing."""
    state, checkpoints = run.state, outputs.checkpoints
    if checkpoints is None:
        return
    if not state.is_finite(run.accelerator):
        raise diverged(run, outputs, "a weight or the optimizer's state is not finite")
    state.elapsed += outputs.clock.tick()
    weights, remembered = state.content(run.accelerator)
    ema_weights = state.ema.module.state_dict() if state.ema is not None else None

    def commit() -> None:
        if outputs.metrics is not None:
            remembered["metrics_bytes"] = state.metrics_bytes = outputs.metrics.flush()
        checkpoints.save(state.step, weights, remembered, state.best_step, ema_weights)

    must |= state.step == run.n_steps
    on_main(run.accelerator, lambda: checkpoints.save_or_warn(state.step, commit, must=must))
    outputs.clock.skip_since_tick()


def diverged(run: Run, outputs: Outputs, why: str) -> RunError:
    last_good = outputs.checkpoints.last_good() if outputs.checkpoints is not None else "there is no checkpoint yet"
    error = RunError(
        f"the training diverged at step {run.state.step}: {why}; {last_good}. A lower train.optim.lr or a warm-up may help"
    )
    error.on_every_rank = True
    return error


# A run from its start to its end


def train(
    config: ResolvedConfig,
    *,
    exp_dir: str | Path | None = None,
    resume: str | Resumption | None = None,
    may_hold_a_run: bool = False,
    dry_run: bool = False,
    model: nn.Module | None = None,
    task: Task | None = None,
) -> Result:
    """Train as `config` says.

    `exp_dir` is the run's folder, `resume` is latest, best, auto, a path, or what `find_resumption` found for these; without one,
    `exp_dir` must not hold a run unless `may_hold_a_run`. A `model` or `task` replaces the config's. A failure raises ConfigError
    or RunError; a run that was told to stop returns a Result that says so.
    """
    set_up_terminal(is_main=os.environ.get("RANK", "0") == "0")
    with located(config.origins):
        accelerator = make_accelerator(config.train, deterministic=config.deterministic)
        config = _with_precision(config, accelerator.device)
        with Agreement(config.train.timeout, config.train.time_limit) as agreement:
            try:
                if dry_run:
                    return _dry_run(config, accelerator, agreement, model, task)
                resumption = find_resumption(resume, exp_dir) if isinstance(resume, str) else resume
                opened = _open_folder(accelerator, exp_dir, resumption, may_hold_a_run=may_hold_a_run or resume == "auto")
                with opened as folder, located(config.origins), explained(config.train, accelerator):
                    return _train_in(folder, config, accelerator, agreement, resumption, model, task)
            except Interrupted as interruption:
                log.info("interrupted by %s before the first step; nothing was changed", interruption)
                return Result(Path(exp_dir or "runs"), "interrupted", exit_code=EXIT_CODES[interruption.signum])
            finally:
                if accelerator.num_processes > 1:
                    accelerator.end_training()
                    AcceleratorState._reset_state(reset_partial_state=True)


def _train_in(
    folder: RunFolder,
    config: ResolvedConfig,
    accelerator: Accelerator,
    agreement: Agreement,
    resumption: Resumption | None,
    model: nn.Module | None,
    task: Task | None,
) -> Result:
    _log_notes(config)
    reset_peak_memory(accelerator.device)
    run = build(config, accelerator, model=model, task=task)
    checkpoints = Checkpoints(folder.path, config.train.keep_last, flatten(to_dict(config)))
    checkpoint = checkpoints.load(resumption.which) if resumption is not None else None
    if checkpoint is not None:
        run.state.restore(checkpoint, accelerator.process_index, accelerator.num_processes)
        if (earlier := _finished_before(run, config, folder)) is not None:
            return earlier
    outputs = Outputs(folder, Clock(run.state.step), checkpoints)
    agreement.begin()
    on_main(accelerator, lambda: _start(run, config, outputs, checkpoint))
    log.info("%s", _first_line(config, run, folder, resumed=resumption is not None))
    result = Result(folder.path)
    try:
        with explained(config.train, accelerator):
            try:
                fit(run, outputs, agreement)
                if "test" in run.data.splits or isinstance(run.task, HasThresholds):
                    result.test = _test_best(run, outputs, agreement)
            except Interrupted as interruption:
                result.status, result.exit_code = "interrupted", EXIT_CODES[interruption.signum]
            agreement.finish()
    except BaseException as error:
        agreement.finish(failed=True)
        result.status, result.why = "failed", str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        result.step, result.best, result.last = run.state.step, run.state.best_metrics, run.state.last_metrics
        _finish(run, config, outputs, agreement, result)
    if result.status == "completed":
        log.info("%s", final_table(result, run.task.monitor, run.state.best_step, run.state.elapsed))
    else:
        log.info("interrupted at step %d, which is saved; -r %s continues the run", result.step, folder.path)
    return result


def _start(run: Run, config: ResolvedConfig, outputs: Outputs, checkpoint: Checkpoint | None) -> None:
    """Write the files of the run's start, and open those of its metrics."""
    folder, values = outputs.folder, to_dict(config)
    data = run.fingerprint.result() if run.fingerprint is not None else {}
    environment = describe_environment(run.accelerator, config.train.precision, loaded_plugins(), data)
    try:
        if checkpoint is not None and outputs.checkpoints is not None:
            log_changes(folder.path, checkpoint.config, values, environment, checkpoint.data)
            outputs.checkpoints.rewind(run.state.step, run.state.best_step)
        write_start(folder, to_yaml(config), environment, run.data.classes, run.data.category_ids)
        outputs.metrics = MetricsLog(folder, run.state.step, run.state.metrics_bytes)
    except OSError as error:
        raise RunError(f"{folder.path} can't be written ({error.strerror or error})") from error
    if outputs.checkpoints is not None:
        outputs.checkpoints.data = data
    outputs.trackers = Trackers(config.tracking, values, folder)


def _finished_before(run: Run, config: ResolvedConfig, folder: RunFolder) -> Result | None:
    """Return the result of a run that is complete already, and say how to continue it. Its files stay as they are."""
    results = on_main(run.accelerator, lambda: read_replaceable(folder.path, "results.json", dict))
    state, is_done = run.state, run.state.step >= run.n_steps or out_of_patience(run)
    if not is_done or results.get("status") != "completed" or results.get("step") != state.step:
        return None
    key = "patience" if state.step < run.n_steps else "n_steps" if config.train.n_steps is not None else "n_epochs"
    log.info("nothing left to do: %s is complete at step %d; --train.%s N continues it", folder.path, state.step, key)
    test = results.get("test")
    return Result(
        folder.path,
        step=state.step,
        best=state.best_metrics,
        last=state.last_metrics,
        test=test if isinstance(test, dict) else {},
    )


def _with_precision(config: ResolvedConfig, device: torch.device) -> ResolvedConfig:
    """Enter the precision that the launcher decides, and note who decided."""
    precision, by = requested_precision(config.train), "neither train.precision nor the launcher asks for another"
    if config.train.precision is not None:
        by = f"train.precision, {config.origin('train.precision').name}"
    elif precision != "fp32":
        by = "the launcher's mixed precision, as train.precision is null"
    notes = (*config.notes, f"precision {precision}: {by}", *(() if config.deterministic else (NOT_DETERMINISTIC,)))
    if precision == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        notes += (SLOW_BF16,)
    settled: Any = precision  # make_accelerator has checked it
    return replace(config, train=replace(config.train, precision=settled), notes=notes)


@contextmanager
def _open_folder(
    accelerator: Accelerator,
    exp_dir: str | Path | None,
    resumption: Resumption | None,
    *,
    may_hold_a_run: bool,
) -> Iterator[RunFolder]:
    """Make or reopen the run's folder on rank 0, whose output.log also gets errors. A run that never starts leaves no folder."""
    opened: list[RunFolder] = []

    def open_it() -> Path:
        if resumption is not None:
            opened.append(RunFolder.reopen(resumption.run_dir))
        else:
            opened.append(RunFolder.start(exp_dir, may_hold_a_run=may_hold_a_run))
        return opened[0].path

    path = on_main(accelerator, open_it)
    if not opened:  # not rank 0
        yield RunFolder(path, is_new=False)
        return
    try:
        log_file = add_log_file(path / "output.log")
    except OSError as error:
        opened[0].close()
        raise RunError(f"{error.filename} can't be written ({error.strerror})") from error
    try:
        yield opened[0]
    except BaseException as error:
        is_bug = isinstance(error, Exception) and not isinstance(error, (ConfigError, RunError))
        message = traceback.format_exc() if is_bug else str(error) or type(error).__name__
        log_file.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, "%s", (message,), None))
        raise
    finally:
        remove_log_file(log_file)
        opened[0].close()
        if not (path / CONFIG).exists():
            opened[0].discard()


def _dry_run(
    config: ResolvedConfig, accelerator: Accelerator, agreement: Agreement, model: nn.Module | None, task: Task | None
) -> Result:
    """Build everything, train two steps, evaluate one batch; leave nothing behind."""
    _log_notes(config)
    path = Path(on_main(accelerator, lambda: tempfile.mkdtemp(prefix="dry-run-")))
    result = Result(path)
    try:
        run = build(config, accelerator, model=model, task=task)
        run.n_steps, run.print_freq, run.eval_freq, run.max_eval_batches = 2, 1, 2, 1  # the schedule stays that of the whole run
        outputs = Outputs(RunFolder(path, is_new=True), Clock(0))
        if accelerator.is_main_process:
            outputs.metrics = MetricsLog(outputs.folder, 0, 0)
        try:
            agreement.begin()
            with explained(config.train, accelerator):
                fit(run, outputs, agreement)
                agreement.finish()
        finally:
            outputs.close("completed")
        log.info("dry run: everything was built, trained for two steps and evaluated on one batch")
    except Interrupted as interruption:
        result.status, result.exit_code = "interrupted", EXIT_CODES[interruption.signum]
    finally:
        if accelerator.is_main_process:
            remove_tree(path)
    return result


def _test_best(run: Run, outputs: Outputs, agreement: Agreement) -> dict[str, float]:
    """With the weights that validation chose, choose the thresholds of a multi-label task, and evaluate the test split."""
    metrics: dict[str, float] = {}
    with _best_weights(run, outputs) as are_there:
        if are_there and isinstance(run.task, HasThresholds):
            task = run.task.with_tables("thresholds")
            chosen = evaluate(run.model, run.data.loader("valid"), task, run.accelerator, stop=agreement.stop)["thresholds"]
            run.task.set_thresholds(chosen)
            with warned(f"{THRESHOLDS} can't be written"):
                if outputs.metrics is not None:
                    outputs.folder.write_json(THRESHOLDS, chosen)
        if are_there and "test" in run.data.splits:
            metrics = evaluate_split(run, "test", agreement, outputs)
    if metrics:
        write_line(run, outputs, metrics)
    return metrics


@contextmanager
def _best_weights(run: Run, outputs: Outputs) -> Iterator[bool]:
    """Give the model the weights that validation chose. Yield False if they are lost."""
    state, best, problem = run.state, None, "another rank can't read it"
    try:
        best = Checkpoints(outputs.folder.path, keep_last=1).load("best")
        if best.step != state.best_step:
            best, problem = None, f"the best step {state.best_step} was not saved"
    except RunError as error:
        problem = str(error)
    if not all_ranks(run.accelerator, best is not None):
        if state.best_step != state.step:
            log.warning("no test metrics, because the best checkpoint is lost: %s", problem)
            yield False
            return
        log.warning("the best checkpoint is lost: %s; the test uses the weights of the last step, which are the same", problem)
        best = None
    last = {name: value.clone() for name, value in run.model.state_dict().items()}
    if best is not None:
        load_weights(run.model, best.weights)
    yield True
    run.model.load_state_dict(last)


def _finish(run: Run, config: ResolvedConfig, outputs: Outputs, agreement: Agreement, result: Result) -> None:
    """Write results.json, draw figures if the run is completed, and close all outputs. Nothing here makes a run fail."""
    if run.accelerator.is_main_process:
        write_results(outputs.folder, _results(run, outputs.clock, result))
    if result.status == "completed":
        agreement.progress()
        _draw(run, config, outputs)
    agreement.progress()
    outputs.close(result.status)


# What is shown and written around the loop


def _log_notes(config: ResolvedConfig) -> None:
    for note in config.notes:
        level = logging.WARNING if note.startswith("warning: ") else logging.INFO
        log.log(level, "%s", note.removeprefix("warning: "))


def _first_line(config: ResolvedConfig, run: Run, folder: RunFolder, *, resumed: bool) -> str:
    device, data, n_ranks = run.accelerator.device.type, run.data, run.accelerator.num_processes
    return (
        f"{f'resuming at step {run.state.step}' if resumed else 'training'}: "
        f"{config.model.name} ({millions(_n_params(run))} parameters) on {data.spec.name} "
        f"({len(data.splits['train']):,} images, {len(data.classes)} classes, {data.img_size}x{data.img_size}), "
        f"{run.n_steps:,} steps = {run.n_steps / run.steps_per_epoch:.4g} epochs of batch {run.batch_size}, "
        f"{config.train.precision} on {f'{n_ranks} x {device}' if n_ranks > 1 else device}; run folder {folder.path}"
    )


def profiled(run: Run, folder: RunFolder, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches; with train.profile, record a trace of some updates."""
    if not run.profile:
        return batches
    from engine.devices.profiler import recorded

    rank, n_left = run.accelerator.process_index, run.n_steps - run.state.step
    return recorded(batches, folder.path / "profile", rank=rank, n_updates=run.profile, n_left=n_left)


def progress_bar(run: Run) -> tqdm:
    visible = run.accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(total=run.n_steps, initial=run.state.step, unit="step", dynamic_ncols=True, leave=False, disable=not visible)


def show_batch(run: Run, outputs: Outputs, batch: Any) -> None:
    """Put the first images, as the model sees them, into TensorBoard."""
    if outputs.metrics is not None:
        from torchvision.utils import make_grid

        images = run.train_loader.normalize.undo(batch[0][:64]).cpu()
        outputs.metrics.images("train/images", make_grid(images, nrow=8, padding=1), step=0)
    outputs.clock.start_window(run.state.step)


def _draw(run: Run, config: ResolvedConfig, outputs: Outputs) -> None:
    """Write figures/predictions.png, figures/curves.png and TensorBoard's hyperparameters."""
    if outputs.metrics is not None or is_sharded(run.model):  # sharded weights need all ranks to predict
        with warned("figures/predictions.png can't be drawn"):
            _draw_predictions(run, outputs)
    if outputs.metrics is None:
        return
    path, state, monitor = outputs.folder.path, run.state, run.task.monitor
    with warned("figures/curves.png can't be drawn"):
        from engine.plots.curves import draw_curves
        from engine.plots.style import new_figure, save_figure

        title = f"{config.model.name} on {run.data.spec.name}"
        draw_curves(curves := new_figure(), {title: read_metrics(path)}, title=title)
        save_figure(curves, path / "figures" / "curves.png")
    if state.best_metrics:
        best = {f"hparam/{monitor}": state.best_metrics[f"valid/{monitor}"]}
        outputs.metrics.hyperparameters(to_dict(config), best, state.step)


@torch.no_grad()
def _draw_predictions(run: Run, outputs: Outputs) -> None:
    batch = None
    try:
        batch = tuple(part[:N_DRAWN] for part in next(readable(run.data.loader("valid", N_DRAWN).batches())))
    finally:
        all_can_predict = not is_sharded(run.model) or all_ranks(run.accelerator, batch is not None)
    if not all_can_predict:
        raise RunError("another rank can't read the images")
    run.model.eval()
    predictions = run.task.predict(run.model, batch)
    if outputs.metrics is not None:
        from engine.plots.style import save_figure

        figure = run.task.draw(run.train_loader.normalize.undo(batch[0]), batch, predictions)
        save_figure(figure, outputs.folder.path / "figures" / "predictions.png")


@contextmanager
def warned(consequence: str) -> Iterator[None]:
    """Turn any failure, also of a plugin, into a warning, because the training is done."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (OSError, RunError)) else f"{type(error).__name__}: "
        log.warning("%s: %s%s", consequence, kind, str(error).strip().partition("\n")[0])


def _results(run: Run, clock: Clock, result: Result) -> dict[str, Any]:
    state, macs = run.state, None
    if result.status == "completed":
        with warned("the multiply-accumulates can't be counted"):
            from engine.run.macs import macs_of

            macs = macs_of(run.model, run.accelerator, run.data.spec.channels, run.data.img_size)
    return {
        "status": result.status,
        "why": result.why,
        "step": state.step,
        "n_steps": run.n_steps,
        "monitor": run.task.monitor,
        "best": {"step": state.best_step, **state.best_metrics},
        "last": state.last_metrics,
        "test": result.test,
        "wall_time": round(state.elapsed, 3),
        "images_per_sec": round(clock.images / clock.seconds, 1) if clock.seconds else None,
        "peak_memory_mb": peak_memory(run.accelerator.device),
        "params": _n_params(run),
        "macs": macs,
    }


def _n_params(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.model.parameters())
