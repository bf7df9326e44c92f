"""A run from its first line to its last: start or resume, train, and write down what came of it."""

import logging
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from engine.build import Run, build
from engine.checks import check
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import LoadedConfig, to_dict
from engine.devices.accelerator import asked_precision, describe, make_accelerator, precision_of
from engine.devices.agreement import EXIT_CODES, Agreement, Interrupted, on_main
from engine.devices.failures import explained
from engine.devices.memory import begin_peak_memory
from engine.devices.sharding import load_weights
from engine.journal import Journal, restore
from engine.loop import fit
from engine.run.checkpoint import Checkpoints, read_checkpoint
from engine.run.folder import Resumption, RunFolder, find_resumption, remove_tree
from engine.run.log import add_log_file, remove_log_file, set_up_terminal
from engine.run.report import Result, closing, draw, opening, predict_some, say_what_changed, write_beginning, write_results
from engine.run.trackers import Trackers
from engine.tasks import Task

log = logging.getLogger(__name__)

NOT_GUARANTEED = (
    "deterministic false: two runs get the same batches and random numbers, but kernels of a GPU may add up in another order, "
    "so that weights differ in the last bits; deterministic true allows no such kernels"
)


def train(
    config: LoadedConfig,
    *,
    exp_dir: str | Path | None = None,
    resume: str | None = None,
    dry_run: bool = False,
    model: nn.Module | None = None,
    task: Task | None = None,
) -> Result:
    """Train as `config` says.

    `exp_dir` is the run's folder, `resume` is latest, best, auto or a path; a `model` or a `task` of your own takes the place of
    the config's. A failure raises ConfigError or RunError; a run that was told to stop gives a Result that says so.
    """
    set_up_terminal(is_main=os.environ.get("RANK", "0") == "0")
    check(config)
    accelerator = make_accelerator(config)
    _, asked_by = asked_precision(config)
    config.train.precision = precision_of(accelerator)
    config.notes.append(f"precision {config.train.precision}: {asked_by}")
    config.notes += [NOT_GUARANTEED] if not config.deterministic else []
    agreement = Agreement(config.train.timeout, config.train.time_limit)
    try:
        if dry_run:
            return _dry_run(config, accelerator, agreement, model, task)
        resumption = find_resumption(resume, exp_dir)
        with _open_folder(accelerator, exp_dir, resume, resumption) as folder, explained(config, accelerator):
            return _train_in(folder, config, accelerator, agreement, resumption, model, task)
    finally:
        if accelerator.num_processes > 1:
            accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)


def _train_in(
    folder: RunFolder,
    config: LoadedConfig,
    accelerator: Accelerator,
    agreement: Agreement,
    resumption: Resumption | None,
    model: nn.Module | None,
    task: Task | None,
) -> Result:
    _log_notes(config)
    begin_peak_memory(accelerator.device)
    run = build(config, accelerator, model=model, task=task)
    checkpoints = Checkpoints(folder.path, config.train.keep_last)
    environment = describe(accelerator)
    if resumption is not None:
        restore(run, checkpoints.load(resumption.which))
    if accelerator.is_main_process:
        if resumption is not None:
            say_what_changed(folder.path, config, environment)
            checkpoints.rewind(run.state.step, run.state.best_step)
        write_beginning(folder, config, environment, run.data.classes)
    journal = Journal(run, folder, checkpoints, partial(Trackers, config, folder))
    log.info("%s", opening(config, run, folder, resumed=resumption is not None))
    result = Result(folder.path)
    try:
        with explained(config, accelerator), agreement:
            fit(run, journal, agreement)
            if "test" in run.data.splits:
                result.test = _evaluate_best(run, folder, journal, agreement)
            predictions = predict_some(run)
            if accelerator.is_main_process:
                draw(run, config, folder, *predictions)
                journal.write_hyperparameters(to_dict(config))
    except Interrupted as interruption:
        result.status, result.exit_code = "interrupted", EXIT_CODES[interruption.signum]
    except BaseException as error:
        result.status, result.why = "failed", str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        result.step, result.best, result.last = run.state.step, run.state.best_metrics, run.state.last_metrics
        journal.close(result.status)
        if accelerator.is_main_process:
            write_results(folder, run, journal, result)
    if result.status == "completed":
        log.info("%s", closing(run, result))
    else:
        log.info("interrupted at step %d, which is saved; -r %s continues the run", result.step, folder.path)
    return result


@contextmanager
def _open_folder(
    accelerator: Accelerator, exp_dir: str | Path | None, resume: str | None, resumption: Resumption | None
) -> Iterator[RunFolder]:
    """The run's folder, made or reopened by rank 0; its log also gets what goes wrong. A run that never began leaves none."""
    own: list[RunFolder] = []

    def opened() -> Path:
        if resumption is not None:
            own.append(RunFolder.reopen(resumption.run_dir))
        else:
            own.append(RunFolder.start(exp_dir, may_hold_a_run=resume == "auto"))
        return own[0].path

    path = on_main(accelerator, opened)
    if not own:  # not rank 0
        yield RunFolder(path, is_new=False)
        return
    log_file = add_log_file(path / "output.log")
    try:
        yield own[0]
    except BaseException as error:
        said = str(error) if isinstance(error, (ConfigError, RunError)) else traceback.format_exc()
        log_file.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, "%s", (said,), None))
        raise
    finally:
        remove_log_file(log_file)
        own[0].close()
        if not (path / "config.yaml").exists():
            (path / "output.log").unlink()
            own[0].discard()


def _dry_run(
    config: LoadedConfig, accelerator: Accelerator, agreement: Agreement, model: nn.Module | None, task: Task | None
) -> Result:
    """Build everything, train two steps, evaluate one batch; leave nothing."""
    _log_notes(config)
    path = Path(on_main(accelerator, lambda: tempfile.mkdtemp(prefix="dry-run-")))
    result = Result(path)
    try:
        run = build(config, accelerator, model=model, task=task)
        run.n_steps, run.print_freq, run.eval_freq, run.max_eval_batches = 2, 1, 2, 1  # the schedule stays that of the whole run
        journal = Journal(run, RunFolder(path, is_new=True), checkpoints=None)
        try:
            with explained(config, accelerator), agreement:
                fit(run, journal, agreement)
        finally:
            journal.close()
        log.info("dry run: everything was built, trained for two steps and evaluated on one batch")
    except Interrupted as interruption:
        result.status, result.exit_code = "interrupted", EXIT_CODES[interruption.signum]
    finally:
        if accelerator.is_main_process:
            remove_tree(path)
    return result


def _evaluate_best(run: Run, folder: RunFolder, journal: Journal, agreement: Agreement) -> dict[str, float]:
    """The test split, with the weights that validation chose."""
    last = {name: value.clone() for name, value in run.model.state_dict().items()}
    load_weights(run.model, read_checkpoint((folder.path / "ckpt" / "best").resolve()).weights)
    metrics = run.evaluate("test", agreement.stop)
    run.model.load_state_dict(last)
    journal.write(metrics)
    return metrics


def _log_notes(config: LoadedConfig) -> None:
    for note in config.notes:
        level = logging.WARNING if note.startswith("warning: ") else logging.INFO
        log.log(level, "%s", note.removeprefix("warning: "))
