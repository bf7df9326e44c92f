"""One trial: a training in its own process and run folder, whose metrics are reported to Optuna while it runs."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import MedianPruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

from engine.config.errors import ConfigError
from engine.run.metrics import read_metrics
from tools.comparison.runs import read_run
from tools.comparison.training import PAUSE, Child, Variant, collect_signals
from tools.sweeps.study import TakenTrial

REASON = "why"  # the attribute of a failed trial


def run_trial(
    study: optuna.Study,
    taken: TakenTrial,
    config: Path,
    overrides: Mapping[str, Any],
    metric: str | None,
    plugins: Sequence[str],
    *,
    may_prune: bool,
) -> int:
    """Train, and tell the study how the trial ended. Return the signal that interrupted the sweep, or 0.

    An interrupted trial keeps the state RUNNING, so the next process continues it. A trial is pruned if the others' median was
    better at the same step, but not in the first quarter of the training, where luck decides.
    """
    trial, run = taken.trial, taken.run
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    n_steps = max(completed[0].intermediate_values, default=0) if completed else 0
    study.pruner = MedianPruner(n_startup_trials=4, n_warmup_steps=n_steps // 4)
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    is_pruned, is_over, signum = False, False, 0
    with collect_signals() as signals:
        child = Child(Variant(run.name, config, overrides, run), {}, plugins)
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
