"""A comparison as plain text, Markdown and CSV."""

import csv
import io
import os
from collections.abc import Sequence

from engine.config.schema import flatten
from tools.comparison.rows import COLUMNS, Row, columns_for, data_notes, differences, failure_reasons, machine_of
from tools.comparison.runs import RunRecord
from tools.tables import Rows, escaped, markdown, plain


def as_text(rows: Sequence[Row], *sentences: object) -> str:
    return "\n".join([plain(*_cells(rows)), *failure_reasons(rows), *data_notes(rows), *map(str, sentences)])


def as_markdown(rows: Sequence[Row], *sentences: object) -> str:
    notes = [*failure_reasons(rows), *data_notes(rows), *map(str, sentences)]
    return "\n\n".join([markdown(*_cells(rows)), *map(escaped, notes)]) + "\n"


def _cells(rows: Sequence[Row]) -> tuple[Rows, set[int]]:
    """Return the cells, titles first, and the columns of numbers."""
    columns = columns_for(rows)
    lines = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    return lines, {i for i, column in enumerate(columns) if column.is_number}


def as_csv(rows: Sequence[Row]) -> str:
    """Write unrounded numbers: accuracies from 0 to 1, seconds, MiB. After the mean over seeds comes the deviation."""
    lines = []
    for row in rows:
        line = {}
        for column in COLUMNS.values():
            line[column.name], deviation = column.mean_and_deviation(row)
            if isinstance(column.value(row), list):
                line[f"{column.name}_std"] = deviation
        line |= {"step": row.first.step, "seeds": row.seeds, "paths": os.pathsep.join(str(run.path) for run in row.runs)}
        if row.interval is not None:
            line["interval_low"], line["interval_high"] = row.interval
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def differences_as_text(a: RunRecord, b: RunRecord) -> str:
    parts = {
        "config": differences([a.config, b.config]),
        "data": differences([flatten({"data": run.environment.get("data")}) for run in (a, b)]),
        "versions and machine": differences([machine_of(a), machine_of(b)]),
        "results": differences([flatten({**run.results, "status": run.progress}) for run in (a, b)]),
    }
    texts = []
    for title, differing in parts.items():
        lines = [(title, a.name, b.name), *((key, *values) for key, values in differing.items())]
        texts.append(plain(lines) if differing else f"{title}: no difference")
    return "\n\n".join(texts)
