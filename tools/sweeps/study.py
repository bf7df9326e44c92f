"""The study of a sweep: Optuna's journal, which all processes of the sweep share, and a lock file for each running trial.

When the process of a trial dies, its lock is released, and the next process that needs work continues the trial from its
checkpoint. Optuna's heartbeat would serve, but only its SQL storage has one, and it restarts a trial under another number.
"""

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from datasets.pipeline.counters import derive
from engine.config.errors import ConfigError, RunError
from engine.run.folder import take_lock
from tools.sweeps.space import Dimension, grid_points

JOURNAL, LOCK = "study.log", ".lock"
DEFINITION = "sweep"  # the study's attribute that holds what it searches, and the study's name
SAMPLE = 9  # separates this use of the seed from the others
POLL_INTERVAL = 0.2  # seconds, while another process holds a lock


@dataclass
class TakenTrial:
    """A trial that belongs to this process until it closes the lock."""

    trial: optuna.Trial
    run: Path
    lock: IO


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


def open_study(folder: Path, definition: Mapping[str, Any], space: Sequence[Dimension]) -> optuna.Study:
    """Open the study in the folder, which must have the same definition, or create it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    definition = json.loads(json.dumps(definition))  # as the journal returns it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
                study_name=DEFINITION,
                direction="minimize" if definition["minimize"] else "maximize",
                load_if_exists=True,
            )
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
    for key, new in definition.items():
        old = new if stored is None else stored.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            same = {name for name, value in new.items() if name in old and old[name] == value}
            old, new = ({name: value for name, value in config.items() if name not in same} for config in (old, new))
        raise ConfigError(f"{folder} holds a sweep with {key} {old}, not {new}; choose another folder with -o")
    return study


def take_trial(study: optuna.Study, folder: Path, n_trials: int, seed: int) -> TakenTrial | None:
    """Take over an abandoned trial or start the next one; None if all are finished or running elsewhere.

    A killed process may leave its training running. If there is nothing else to do, wait for the training to end.
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
                    return TakenTrial(optuna.Trial(study, abandoned._trial_id), run, lock)
                lock.close()
                is_orphan_running = True
            n_started = sum(trial.state != TrialState.WAITING for trial in trials)
            if n_started < n_trials and (search != "grid" or n_started < len(trials)):
                study.sampler = _make_sampler(search, seed, len(trials))
                trial = study.ask()
                run = folder / trial_name(trial.number)
                lock = take_lock(run.with_suffix(LOCK))
                assert lock is not None, f"{run} is new, so no other process has its lock"
                return TakenTrial(trial, run, lock)
        if not is_orphan_running:
            return None
        time.sleep(POLL_INTERVAL)


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
        time.sleep(POLL_INTERVAL)
    with lock:
        yield
