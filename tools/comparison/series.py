"""What was logged, as curves that a page can hold."""

import math
from collections.abc import Sequence
from typing import Any

from tools.comparison.runs import RunRecord
from tools.comparison.table import Row, mean_and_deviation
from tools.tables import IN_PERCENT

MONITORED = "the monitored metric"
X_AXES = {"step": "step", "epoch": "epoch", "time": "elapsed"}  # and the keys of a line that say where it stands
UNITS_OF_TIME = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
NO_CURVES = ("/count", "/images_per_sec")
WIDE = 20  # times the smallest number
MOST_POINTS = 300  # of a curve: more than there are pixels between them
DIGITS = 6


def keys_of(rows: Sequence[Row]) -> list[str]:
    """What there are curves of, validation first."""
    known = dict.fromkeys(key for row in rows for run in row.runs for line in run.history for key in line if "/" in key)
    curves = [key for key in known if not key.endswith(NO_CURVES)]
    return [MONITORED, *(key for key in curves if key.startswith("valid")), *(key for key in curves if key.startswith("train"))]


def labels_of(rows: Sequence[Row]) -> dict[str, str]:
    """What stands beside each of the curves."""
    monitors = list(dict.fromkeys(run.monitor for row in rows for run in row.runs))
    labels = {MONITORED: f"{' or '.join(f'valid/{name}' for name in monitors)} (%)"}
    for key in keys_of(rows)[1:]:
        labels[key] = f"{key} (%)" if key.partition("/")[2] in (*IN_PERCENT, *monitors) else key
    return labels


def unit_of_time(rows: Sequence[Row]) -> tuple[float, str]:
    longest = max((run.wall_time or 0 for row in rows for run in row.runs), default=0)
    return next((seconds, name) for seconds, name in UNITS_OF_TIME if longest >= 2 * seconds or seconds == 1)


def are_wide(rows: Sequence[Row], name: str) -> bool:
    """Whether the numbers of a column are too far apart for a linear axis."""
    values = [value for row in rows if (value := mean_and_deviation(row, name)[0])]
    return bool(values) and max(values) > WIDE * min(values)


def series_of(run: RunRecord, key: str, seconds: float) -> dict[str, list[float]]:
    """Where each value was logged, by step, epoch and time (of which a unit has so many seconds), and the values."""
    logged = f"valid/{run.monitor}" if key == MONITORED else key
    name = logged.partition("/")[2]
    scale = 100 if name in (*IN_PERCENT, run.monitor) else 1
    lines = _thinned([line for line in run.history if line.get(logged) is not None and math.isfinite(line[logged])])
    series = {x: [_rounded(line[of] / (seconds if x == "time" else 1)) for line in lines] for x, of in X_AXES.items()}
    return {**series, "y": [_rounded(scale * line[logged]) for line in lines]}


def _thinned(lines: Sequence[Any]) -> list[Any]:
    """Evenly, with the first and the last one."""
    n = min(len(lines), MOST_POINTS)
    return [lines[i * (len(lines) - 1) // max(1, n - 1)] for i in range(n)]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
