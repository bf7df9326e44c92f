"""The results of a sweep: a table of its trials, and a plot of them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from engine.plots.metrics import IN_PERCENT
from engine.plots.style import COLORS, style
from tools.comparison.runs import is_run, read_run
from tools.sweeps.space import Dimension
from tools.sweeps.study import REASON, metric_name, trial_name
from tools.tables import csv_text, duration, markdown, plain

STATUS = {  # from the best to the worst
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
}
N_COLUMNS = 3  # of panels in the plot
RIGHT_ALIGNED = {2, 3, 4}


class History:
    """The trials of a sweep: completed ones first, then others with a value, then those without; the best first."""

    def __init__(self, study: optuna.Study, space: Sequence[Dimension], metric: str | None, folder: Path) -> None:
        self.keys, self.space, self.folder = [dimension.key for dimension in space], space, folder
        self.metric = metric_name(metric, sorted(folder.glob("trial-*/")))
        self.in_percent = self.metric.rpartition("/")[2] in IN_PERCENT
        self.better = min if study.direction == StudyDirection.MINIMIZE else max

        def rank(trial: FrozenTrial) -> tuple[int, float, int]:
            value = self.value(trial)
            if value is None:
                return list(STATUS).index(trial.state), 0.0, trial.number
            return int(trial.state != TrialState.COMPLETE), value if self.better is min else -value, trial.number

        self.trials = sorted((t for t in study.get_trials(deepcopy=False) if t.state in STATUS), key=rank)

    @property
    def best(self) -> FrozenTrial | None:
        return next((trial for trial in self.trials if trial.state == TrialState.COMPLETE), None)

    def value(self, trial: FrozenTrial) -> float | None:
        """Return the value of a completed trial, and the best value that another trial has reported."""
        if trial.state == TrialState.COMPLETE:
            return trial.value
        return self.better(trial.intermediate_values.values(), default=None)

    def formatted(self, value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.2f} %" if self.in_percent else f"{value:.4g}"

    def outcome(self, number: int) -> str:
        """Describe how a trial has ended."""
        trial = next(trial for trial in self.trials if trial.number == number)
        return f"{STATUS[trial.state]}, {trial.user_attrs.get(REASON, f'{self.metric} {self.formatted(self.value(trial))}')}"

    @cached_property
    def rows(self) -> list[list[Any]]:
        """Trial, status, value, step, seconds, the value of each key, reason, and run of each trial."""
        rows = []
        for trial in self.trials:
            path = self.folder / trial_name(trial.number)
            run = read_run(path, path.name) if is_run(path) else None
            progress = [run.step, run.wall_time] if run is not None else [None, None]
            params = [trial.params.get(key) for key in self.keys]
            reason = trial.user_attrs.get(REASON, "")
            rows.append([trial.number, STATUS[trial.state], self.value(trial), *progress, *params, reason, path])
        return rows

    def as_csv(self) -> str:
        """Write the table with unrounded numbers."""
        return csv_text([["trial", "status", self.metric, "step", "time", *self.keys, REASON, "run"], *self.rows])

    def as_text(self, *, as_markdown: bool = False) -> str:
        cells = [["trial", "status", self.metric, "step", "time", *self.keys, REASON]]
        for number, status, value, step, seconds, *params, reason, _ in self.rows:
            progress = ["" if step is None else str(step), "" if seconds is None else duration(seconds)]
            rounded = [f"{param:.4g}" if isinstance(param, float) else str(param) for param in params]
            cells.append([trial_name(number), status, self.formatted(value), *progress, *rounded, reason])
        if not any(row[-1] for row in cells[1:]):
            cells = [row[:-1] for row in cells]
        return markdown(cells, RIGHT_ALIGNED) + "\n" if as_markdown else plain(cells, RIGHT_ALIGNED)

    def draw(self, figure: Figure) -> None:
        """Plot the values by trial, with the best so far, and against each key."""
        n_panels, scale = 1 + len(self.space), 100 if self.in_percent else 1
        n_rows, n_columns = -(-n_panels // N_COLUMNS), min(n_panels, N_COLUMNS)
        with style(font_size=9):
            figure.set_size_inches(4 * n_columns, 3.2 * n_rows + 0.5)
            first, *others = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flat
            for state, marker, color in ((TrialState.COMPLETE, "o", COLORS[0]), (TrialState.PRUNED, "x", COLORS[1])):
                valued = [(trial, self.value(trial)) for trial in self.trials if trial.state == state]
                points = sorted((trial.number, scale * value, trial.params) for trial, value in valued if value is not None)
                numbers, values, params = [list(column) for column in zip(*points, strict=True)] or ([], [], [])
                first.scatter(numbers, values, label=STATUS[state], s=22, marker=marker, color=color)
                if state == TrialState.COMPLETE:
                    best = list(accumulate(values, self.better))
                    first.step(numbers, best, where="post", color=COLORS[2], label="the best so far")
                for panel, dimension in zip(others, self.space, strict=False):
                    at = [param[dimension.key] for param in params]
                    panel.scatter([str(x) for x in at] if dimension.values else at, values, s=22, marker=marker, color=color)
            first.set(xlabel="trial", ylabel=f"{self.metric} (%)" if self.in_percent else self.metric)
            first.legend(loc="best", fontsize=8)
            for panel, dimension in zip(others, self.space, strict=False):
                panel.set_xlabel(dimension.key)
                if dimension.log:
                    panel.set_xscale("log")
            for panel in others[len(self.space) :]:
                panel.set_axis_off()
