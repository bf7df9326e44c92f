"""The study of a sweep: Optuna's journal, which all processes of the sweep share, and a lock file for each running trial.

A trial is a training in its own process and run folder, whose metrics are reported to Optuna while it runs. When the process of a
trial dies, its lock is released, and the next process that needs work continues the trial from its checkpoint. Optuna's heartbeat
would serve, but only its SQL storage has one, and it restarts a trial under another number.
"""

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.pruners import MedianPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from datasets.pipeline.counters import derive
from engine.config.errors import ConfigError, RunError
from engine.config.schema import flatten
from engine.run.folder import take_lock
from engine.run.metrics import read_metrics
from tools.comparison.rows import differences
from tools.comparison.runs import read_run
from tools.comparison.training import PAUSE, Child, Variant, collect_signals
from tools.sweeps.space import Dimension, grid_points, storable

JOURNAL, LOCK = "study.log", ".lock"
DEFINITION = "sweep"  # the study's attribute that holds what it searches, and the study's name
REASON = "why"  # the attribute of a failed trial
SAMPLE = 9  # separates this use of the seed from the others


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


def open_study(folder: Path, definition: Mapping[str, Any], space: Sequence[Dimension]) -> optuna.Study:
    """Open the study in the folder, which must have the same definition, or create it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    definition = json.loads(json.dumps(definition))  # as the journal returns it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
            direction = StudyDirection.MINIMIZE if definition["minimize"] else StudyDirection.MAXIMIZE
            study = optuna.create_study(storage=storage, study_name=DEFINITION, direction=direction, load_if_exists=True)
            stored = study.user_attrs.get(DEFINITION)
            if stored is None:
                if runs := sorted(folder.glob("trial-*/")):  # a new trial would resume one of them
                    raise ConfigError(f"{runs[0]} is of a sweep whose {JOURNAL} is gone; choose another folder with -o")
                for point in grid_points(space) if definition["search"] == "grid" else ():
                    study.enqueue_trial(point, skip_if_exists=True)
                study.set_user_attr(DEFINITION, definition)
    except OSError as error:
        raise RunError(f"{folder}: the study can't be opened ({error.strerror or error})") from error
    except (ValueError, KeyError) as error:
        raise RunError(f"{folder / JOURNAL} is no study of a sweep ({error})") from error
    changed = differences([flatten(stored or definition), flatten(definition)])
    if changed:
        changes = ", ".join(f"{key} {was}, not {now}" for key, (was, now) in changed.items())
        raise ConfigError(f"{folder} holds a sweep with {changes}; choose another folder with -o")
    return study


def take_trial(study: optuna.Study, folder: Path, n_trials: int, seed: int) -> tuple[optuna.Trial, Path, IO] | None:
    """Take over an abandoned trial or start the next one; None if all are finished or running elsewhere.

    The trial, whose run folder and lock are returned, too, belongs to this process until it closes the lock. A killed process may
    leave its training running. If there is nothing else to do, wait for the training to end.
    """
    search = study.user_attrs[DEFINITION]["search"]
    while True:
        is_orphan_running = False
        with _exclusive(folder):
            trials = study.get_trials(deepcopy=False)
            for abandoned in (trial for trial in trials if trial.state == TrialState.RUNNING):
                run = folder / trial_name(abandoned.number)
                lock = take_lock(run.with_suffix(LOCK))
                if lock is None:
                    continue
                if not _is_in_use(run):
                    study.sampler = _make_sampler(search, seed, abandoned.number)
                    return optuna.Trial(study, abandoned._trial_id), run, lock
                lock.close()
                is_orphan_running = True
            n_started = sum(trial.state != TrialState.WAITING for trial in trials)
            if n_started < n_trials and (search != "grid" or n_started < len(trials)):
                study.sampler = _make_sampler(search, seed, len(trials))
                trial = study.ask()
                run = folder / trial_name(trial.number)
                lock = take_lock(run.with_suffix(LOCK))
                assert lock is not None, f"{run} is new, so no other process has its lock"
                return trial, run, lock
        if not is_orphan_running:
            return None
        time.sleep(PAUSE)


def _make_sampler(search: str, seed: int, n_trials: int) -> optuna.samplers.BaseSampler:
    """Seed a sampler for one trial, so that its values depend on the trials before it and not on the process."""
    trial_seed = derive(seed, SAMPLE, n_trials) % 2**32
    if search != "tpe":
        return optuna.samplers.RandomSampler(seed=trial_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=trial_seed, constant_liar=True)  # avoids the values of running trials


def _is_in_use(run: Path) -> bool:
    """Return whether a training holds the lock of the run folder."""
    if not (run / LOCK).is_file():
        return False
    if (lock := take_lock(run / LOCK)) is not None:
        lock.close()
    return lock is None


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process of the sweep in at a time."""
    while (lock := take_lock(folder / LOCK)) is None:
        time.sleep(PAUSE)
    with lock:
        yield


def suggested(trial: optuna.Trial, space: Sequence[Dimension]) -> dict[str, Any]:
    """Return the trial's value for each key; Optuna chooses it the first time, and stores it."""
    found: dict[str, Any] = {}
    for one in space:
        if one.values:
            stored = [storable(value) for value in one.values]
            found[one.key] = one.values[stored.index(trial.suggest_categorical(one.key, stored))]
        elif isinstance(one.low, int) and isinstance(one.high, int):
            found[one.key] = trial.suggest_int(one.key, one.low, one.high, log=one.log, step=int(one.step or 1))
        else:
            found[one.key] = trial.suggest_float(one.key, one.low, one.high, log=one.log, step=one.step)
    return found


def run_trial(
    study: optuna.Study, trial: optuna.Trial, variant: Variant, metric: str | None, plugins: Sequence[str], *, may_prune: bool
) -> int:
    """Train, and tell the study how the trial ended. Return the signal that interrupted the sweep, or 0.

    An interrupted trial keeps the state RUNNING, so the next process continues it. A trial is pruned if the others' median was
    better at the same step, but not in the first quarter of the training, where luck decides.
    """
    run = variant.folder
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    n_steps = max(completed[0].intermediate_values, default=0) if completed else 0
    study.pruner = MedianPruner(n_startup_trials=4, n_warmup_steps=n_steps // 4)
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    is_pruned, is_over, signum = False, False, 0
    with collect_signals() as signals:
        child = Child(variant, {}, plugins)
        try:
            while not is_over:
                time.sleep(PAUSE)
                is_over = child.process.poll() is not None  # before reading, so that the last values are read as well
                for step, value in read_values(run, metric):
                    if step in reported:
                        continue
                    reported.add(step)
                    trial.report(value, step)
                    if may_prune and not (is_over or is_pruned or signum) and trial.should_prune():
                        is_pruned = True
                        child.process.terminate()
                while signals:
                    signum = signals.popleft()
                    child.process.send_signal(signum)
        finally:
            if child.process.poll() is None:
                child.process.terminate()
            child.process.wait()
    if is_pruned:
        study.tell(trial, state=TrialState.PRUNED)
    elif signum:
        pass
    elif (reason := child.why_not_complete()) is not None:
        trial.set_user_attr(REASON, reason)
        study.tell(trial, state=TrialState.FAIL)
    else:
        values = [value for _, value in read_values(run, metric)]
        if not values:
            known = ", ".join(sorted({name for line in read_metrics(run) for name in line if "/" in name}))
            raise ConfigError(f"--metric {metric_name(metric, [run])}: {run} has no such value; it has {known}")
        study.tell(trial, min(values) if study.direction == StudyDirection.MINIMIZE else max(values))
    return signum


def read_values(run: Path, metric: str | None) -> list[tuple[int, float]]:
    """Return the steps at which the metric has been written so far, with its values."""
    lines = read_metrics(run)
    name = metric_name(metric, [run]) if lines else ""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def metric_name(metric: str | None, runs: Iterable[Path]) -> str:
    """Return `metric` or, by default, what the first of the runs that has metrics monitors."""
    monitors = (f"valid/{read_run(run, run.name).monitor}" for run in runs if (run / "metrics.jsonl").is_file())
    return metric or next(monitors, "value")
