"""The metrics that runs logged, as curves with few enough points for a page."""

import math
from collections.abc import Sequence

from engine.plots.metrics import IN_PERCENT, TIME_UNITS
from tools.comparison.rows import COLUMNS, Row
from tools.comparison.runs import RunRecord

MONITORED = "the monitored metric"  # the key of its curves, as runs may monitor different metrics
NO_CURVES = ("/count", "/images_per_sec")
WIDE_RANGE = 20  # the ratio of largest and smallest value from which an axis is logarithmic
MOST_POINTS = 300  # of a curve: more than a chart has pixels between them
DIGITS = 6


def y_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Return the keys that have curves, the monitored metric and validation first, with the labels of their axes."""
    runs = [run for row in rows for run in row.runs]
    monitored = list(dict.fromkeys(run.monitor for run in runs))
    logged = dict.fromkeys(key for run in runs for line in run.history for key in line)
    labels = {MONITORED: f"{' or '.join(f'valid/{name}' for name in monitored)} (%)"}
    for part in ("valid", "train"):
        for key in logged:
            if key.startswith(part) and "/" in key and not key.endswith(NO_CURVES):
                labels[key] = f"{key} (%)" if key.partition("/")[2] in (*IN_PERCENT, *monitored) else key
    return labels


def x_labels(rows: Sequence[Row]) -> tuple[dict[str, str], float]:
    """Return the labels of the x-axes, and the number of seconds in the unit of time."""
    longest = max((run.wall_time or 0 for row in rows for run in row.runs), default=0)
    seconds, unit = next((unit for unit in TIME_UNITS if longest >= 2 * unit[0]), TIME_UNITS[-1])
    return {"step": "update", "epoch": "epoch", "time": f"{unit} of training"}, seconds


def has_wide_range(rows: Sequence[Row], name: str) -> bool:
    """Return whether the values of a column need a logarithmic axis."""
    values = [value for row in rows if (value := COLUMNS[name].mean_and_deviation(row)[0])]
    return bool(values) and max(values) > WIDE_RANGE * min(values)


def curve_of(run: RunRecord, key: str, seconds: float) -> dict[str, list[float]]:
    """Return the finite values that were logged under `key` as y, and where: step, epoch, and time in units of `seconds`."""
    tag = f"valid/{run.monitor}" if key == MONITORED else key
    scale = 100 if tag.partition("/")[2] in (*IN_PERCENT, run.monitor) else 1
    lines = [line for line in run.history if line.get(tag) is not None and math.isfinite(line[tag])]
    n = min(len(lines), MOST_POINTS)
    lines = [lines[i * (len(lines) - 1) // max(1, n - 1)] for i in range(n)]  # evenly, with the first and the last one
    curve = {
        "step": [line["step"] for line in lines],
        "epoch": [line["epoch"] for line in lines],
        "time": [line["elapsed"] / seconds for line in lines],
        "y": [scale * line[tag] for line in lines],
    }
    return {name: [float(f"{value:.{DIGITS}g}") for value in values] for name, values in curve.items()}
