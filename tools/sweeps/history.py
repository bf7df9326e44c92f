"""What a sweep has found: a table of its trials, and a picture of them."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tools.comparison.runs import is_run, read_run
from tools.sweeps.space import Dimension
from tools.sweeps.study import WHY, name_of
from tools.tables import IN_PERCENT, duration, markdown, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
}
COLUMNS = 3  # of panels in the picture


@dataclass(frozen=True)
class History:
    trials: Sequence[FrozenTrial]  # the best first, then what has no value
    space: Sequence[Dimension]
    metric: str
    minimize: bool
    folder: Path

    @property
    def best(self) -> FrozenTrial | None:
        return next((trial for trial in self.trials if trial.state == TrialState.COMPLETE), None)

    @property
    def scale(self) -> float:
        return 100 if self.metric.rpartition("/")[2] in IN_PERCENT else 1

    def said_end(self, number: int) -> str:
        """How a trial has ended."""
        trial = next(trial for trial in self.trials if trial.number == number)
        value = self.said(value_of(trial, minimize=self.minimize))
        return f"{STATES[trial.state]}, {trial.user_attrs.get(WHY, f'{self.metric} {value}')}"

    def said(self, value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.2f} %" if self.scale == 100 else f"{value:.4g}"


def history_of(study: optuna.Study, space: Sequence[Dimension], metric: str, folder: Path) -> History:
    minimize = study.direction == optuna.study.StudyDirection.MINIMIZE
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state in STATES]

    def rank(trial: FrozenTrial) -> tuple[int, float, int]:
        value = value_of(trial, minimize=minimize)
        worth = 0.0 if value is None else value if minimize else -value
        return list(STATES).index(trial.state) if value is None else trial.state != TrialState.COMPLETE, worth, trial.number

    return History(sorted(trials, key=rank), space, metric, minimize, folder)


def value_of(trial: FrozenTrial, *, minimize: bool) -> float | None:
    """Of a trial that hasn't ended as it should, the best of what it has reported."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return (min if minimize else max)(trial.intermediate_values.values(), default=None)


def as_text(history: History) -> str:
    rows, right = _rows(history)
    return plain(rows, right)


def as_markdown(history: History) -> str:
    rows, right = _rows(history)
    return markdown(rows, right) + "\n"


def _rows(history: History) -> tuple[list[tuple[str, ...]], set[int]]:
    keys = [dimension.key for dimension in history.space]
    rows: list[tuple[str, ...]] = [("trial", "status", history.metric, "step", "time", *keys, WHY)]
    for trial in history.trials:
        value, facts = value_of(trial, minimize=history.minimize), _facts(history.folder, trial)
        time = duration(facts["time"]) if facts["time"] is not None else ""
        params = [_param(trial.params.get(key)) for key in keys]
        rows.append((name_of(trial.number), STATES[trial.state], history.said(value), facts["step"], time, *params, facts[WHY]))
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return rows, {2, 3, 4}


def _param(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(folder: Path, trial: FrozenTrial) -> dict[str, Any]:
    path = folder / name_of(trial.number)
    run = read_run(path, path.name) if is_run(path) else None
    why = trial.user_attrs.get(WHY, "")
    return {"step": str(run.step) if run else "", "time": run.wall_time if run else None, WHY: why}


def as_csv(history: History) -> str:
    """With unrounded numbers."""
    keys, text = [dimension.key for dimension in history.space], io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "status", history.metric, "step", "time", *keys, WHY, "run"])
    for trial in history.trials:
        value, facts = value_of(trial, minimize=history.minimize), _facts(history.folder, trial)
        params, run = [trial.params.get(key) for key in keys], history.folder / name_of(trial.number)
        table.writerow([trial.number, STATES[trial.state], value, facts["step"], facts["time"], *params, facts[WHY], run])
    return text.getvalue()


def draw(figure: "Figure", history: History) -> None:
    """The values in the order of the trials with the best so far, and against each key."""
    from engine.plots.style import COLORS, style

    panels = 1 + len(history.space)
    rows = -(-panels // COLUMNS)
    trials = sorted(history.trials, key=lambda trial: trial.number)
    label = f"{history.metric} (%)" if history.scale == 100 else history.metric
    with style(font_size=9):
        figure.set_size_inches(4 * min(panels, COLUMNS), 3.2 * rows + 0.5)
        axes = figure.subplots(rows, min(panels, COLUMNS), squeeze=False, sharey=True).flat
        looks = {
            TrialState.COMPLETE: {"marker": "o", "color": COLORS[0]},
            TrialState.PRUNED: {"marker": "x", "color": COLORS[1]},
        }
        for state, look in looks.items():
            there = [trial for trial in trials if trial.state == state and value_of(trial, minimize=history.minimize) is not None]
            values = [history.scale * value_of(trial, minimize=history.minimize) for trial in there]
            axes[0].scatter([trial.number for trial in there], values, label=STATES[state], s=22, **look)
            for panel, dimension in zip(axes[1:panels], history.space, strict=True):
                at = [trial.params[dimension.key] for trial in there]
                panel.scatter([str(value) for value in at] if dimension.values else at, values, s=22, **look)
        completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        best = _best_so_far([history.scale * trial.value for trial in completed], minimize=history.minimize)
        axes[0].step([trial.number for trial in completed], best, where="post", color=COLORS[2], label="the best so far")
        axes[0].set(xlabel="trial", ylabel=label)
        axes[0].legend(loc="best", fontsize=8)
        for panel, dimension in zip(axes[1:panels], history.space, strict=True):
            panel.set_xlabel(dimension.key)
            if dimension.log:
                panel.set_xscale("log")
        for panel in axes[panels:]:
            panel.set_axis_off()


def _best_so_far(values: Sequence[float], *, minimize: bool) -> list[float]:
    best: list[float] = []
    for value in values:
        best.append(value if not best else (min if minimize else max)(best[-1], value))
    return best
