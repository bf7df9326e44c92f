"""The study of a sweep: one file that every process of it reads and writes, and a lock for each trial that is under way.

A trial whose process has gone is taken over by the next process that looks for work: its run goes on from its checkpoint.
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
from optuna.trial import FrozenTrial, TrialState

from datasets.pipeline.counters import derive
from engine.config.errors import ConfigError, RunError
from engine.run.folder import take_lock
from tools.sweeps.space import Dimension, grid_of

FILE, LOCK = "study.log", ".lock"
SAMPLE = 9  # separates this use of the seed from the others
PAUSE = 0.2  # seconds between two looks at what another process holds
MEANING = "sweep"  # the attribute of the study that says what it searches
WHY = "why"  # the attribute of a trial that has failed
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass
class Taken:
    """A trial that is this process's own, as long as the lock is held."""

    trial: optuna.Trial
    folder: Path
    lock: IO


def name_of(number: int) -> str:
    return f"trial-{number:04d}"


def open_study(folder: Path, meaning: Mapping[str, Any], space: Sequence[Dimension]) -> optuna.Study:
    """The study in the folder, which must be of the same search; a new one where there is none."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / FILE))),
                study_name=MEANING,
                direction="minimize" if meaning["minimize"] else "maximize",
                load_if_exists=True,
            )
            there = study.user_attrs.get(MEANING)
            if there is None and (runs := sorted(folder.glob("trial-*/"))):  # a new trial would go on with one of them
                raise ConfigError(f"{runs[0]} is of a sweep whose {FILE} is gone; -o names another folder")
            if there is None:
                if meaning["search"] == "grid":
                    for values in grid_of(space):
                        study.enqueue_trial(values)
                study.set_user_attr(MEANING, dict(meaning))
    except OSError as error:
        raise RunError(f"{folder}: the study can't be opened ({error.strerror or error})") from error
    except (ValueError, KeyError, json.JSONDecodeError) as error:
        raise RunError(f"{folder / FILE} is no study of a sweep ({error})") from error
    if there is not None:
        _expect_same(folder, there, meaning)
    return study


def _expect_same(folder: Path, there: Mapping[str, Any], meaning: Mapping[str, Any]) -> None:
    for key in meaning:
        if there.get(key) != meaning[key]:
            old, new = (_differing(one, other) for one, other in ((there[key], meaning[key]), (meaning[key], there[key])))
            raise ConfigError(f"{folder} holds a sweep with {key} {old}, and this one asks for {new}; -o names another folder")


def _differing(one: Any, other: Any) -> Any:
    """Of two configs, only what is not the same."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one
    return {key: value for key, value in one.items() if other.get(key, ...) != value}


def sampler_of(search: str, seed: int, n_trials: int) -> optuna.samplers.BaseSampler:
    """A new one for each trial, so that what is drawn depends on the trials that are there, and not on who draws."""
    drawn = derive(seed, SAMPLE, n_trials) % 2**32
    if search == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=drawn, constant_liar=True)  # which knows of trials that are under way
    return optuna.samplers.RandomSampler(seed=drawn)


def take_trial(study: optuna.Study, folder: Path, n_trials: int, seed: int) -> Taken | None:
    """One that was left, or a new one; None where all are done, or under way elsewhere.

    A killed process may leave a training behind, which goes on by itself. Where nothing else is to be done, we wait for its end.
    """
    while True:
        with _alone(folder):
            trials = study.get_trials(deepcopy=False)
            left, waits = _abandoned(study, folder, trials)
            if left is not None:
                return left
            n_begun = sum(trial.state in (*ENDED, TrialState.RUNNING) for trial in trials)
            has_more = study.user_attrs[MEANING]["search"] != "grid" or any(t.state == TrialState.WAITING for t in trials)
            if n_begun < n_trials and has_more:
                return _new(study, folder, seed, len(trials))
        if not waits:
            return None
        time.sleep(PAUSE)


def _abandoned(study: optuna.Study, folder: Path, trials: Sequence[FrozenTrial]) -> tuple[Taken | None, bool]:
    """A trial that nobody holds, and whether there is one whose training goes on without its process."""
    waits = False
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        run = folder / name_of(trial.number)
        lock = take_lock(run.with_suffix(LOCK))
        if lock is None:
            continue
        if _is_in_use(run):
            lock.close()
            waits = True
            continue
        return Taken(optuna.Trial(study, trial._trial_id), run, lock), waits
    return None, waits


def _is_in_use(run: Path) -> bool:
    if not (run / LOCK).is_file():
        return False
    lock = take_lock(run / LOCK)
    if lock is not None:
        lock.close()
    return lock is None


def _new(study: optuna.Study, folder: Path, seed: int, n_there: int) -> Taken:
    study.sampler = sampler_of(study.user_attrs[MEANING]["search"], seed, n_there)
    trial = study.ask()
    run = folder / name_of(trial.number)
    lock = take_lock(run.with_suffix(LOCK))
    assert lock is not None, f"{run} is new, and nobody else is here"
    return Taken(trial, run, lock)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of the sweep at a time."""
    while (lock := take_lock(folder / LOCK)) is None:
        time.sleep(PAUSE)
    try:
        yield
    finally:
        lock.close()
