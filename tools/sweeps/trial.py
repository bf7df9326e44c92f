"""One trial: a training in a process and a run folder of its own, watched as it goes."""

import math
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from engine.config.errors import ConfigError
from engine.run.metrics import read_metrics
from tools.comparison.runs import read_run
from tools.comparison.training import PAUSE, Child, noted_signals
from tools.comparison.variants import Variant
from tools.sweeps.study import WHY, Taken, name_of


def run_trial(
    study: optuna.Study,
    taken: Taken,
    config: Path,
    overrides: Mapping[str, Any],
    metric: str | None,
    plugins: Sequence[str],
    *,
    may_prune: bool,
) -> int:
    """Train, and tell the study how it ended; gives the signal by which we were told to stop, 0 for none.

    After such a signal the trial stays under way in the study, so that the next process goes on with it.
    """
    trial, variant = taken.trial, Variant(taken.folder.name, config, overrides, taken.folder)
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    is_pruned = False
    with noted_signals() as noted:
        child = Child.start(variant, 0, {}, plugins)
        try:
            ended_by = _watch(child, trial, metric, noted, reported, may_prune=may_prune)
            is_pruned = ended_by is None
        finally:
            if child.process.poll() is None:
                child.process.terminate()
            child.process.wait()
    if ended_by:
        return ended_by
    why = None if is_pruned else child.why_not_complete()
    if is_pruned:
        study.tell(trial, state=TrialState.PRUNED)
    elif why is not None:
        trial.set_user_attr(WHY, why)
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, best_of(taken.folder, metric, minimize=study.direction == optuna.study.StudyDirection.MINIMIZE))
    return 0


def _watch(
    child: Child, trial: optuna.Trial, metric: str | None, noted: deque[int], reported: set[int], *, may_prune: bool
) -> int | None:
    """Until it ends: 0, or the signal that was passed on to it; None where it was ended because it is hopeless."""
    ended_by = 0
    while True:
        is_over = child.process.poll() is not None
        for step, value in evaluations(child.variant.folder, metric):
            if step not in reported and math.isfinite(value):
                reported.add(step)
                trial.report(value, step)
                if may_prune and not is_over and not ended_by and trial.should_prune():
                    child.process.send_signal(signal.SIGTERM)
                    child.process.wait()
                    return None
        if is_over:
            return ended_by
        while noted:
            ended_by = noted.popleft()
            child.process.send_signal(ended_by)
        time.sleep(PAUSE)


def pruner_of(study: optuna.Study, sweep: Path) -> optuna.pruners.BasePruner:
    """A trial ends early if the median of the others was better at the same step; in the first quarter luck would decide."""
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    runs = (read_run(sweep / name_of(trial.number), name_of(trial.number)) for trial in completed[:1])
    n_steps = next((run.results.get("n_steps", 0) for run in runs), 0)
    return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=n_steps // 4)


def metric_of(folder: Path, metric: str | None) -> str:
    return metric or f"valid/{read_run(folder, folder.name).monitor}"


def metric_in(sweep: Path, metric: str | None) -> str:
    """The same, of any of its runs that has come so far."""
    begun = next((path for path in sorted(sweep.glob("trial-*/")) if (path / "metrics.jsonl").is_file()), None)
    return metric_of(begun, metric) if begun is not None else metric or "value"


def evaluations(folder: Path, metric: str | None) -> list[tuple[int, float]]:
    """Steps and values, as far as they are written."""
    lines = read_metrics(folder)
    if not lines:
        return []
    name = metric_of(folder, metric)
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def best_of(folder: Path, metric: str | None, *, minimize: bool) -> float:
    values = [value for _, value in evaluations(folder, metric)]
    if not values:
        known = sorted({name for line in read_metrics(folder) for name in line if "/" in name})
        raise ConfigError(f"--metric {metric_of(folder, metric)}: {folder} has no such value; it has {', '.join(known)}")
    return min(values) if minimize else max(values)
