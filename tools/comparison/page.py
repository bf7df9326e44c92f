"""A page that holds the whole comparison in one file."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from engine.plots.style import line_style
from tools.comparison.differences import differences, differing_machines
from tools.comparison.interactive import BLACK, library, make_charts
from tools.comparison.mistakes import mistakes_of
from tools.comparison.table import Row, reasons, shown_columns

TEMPLATE = Path(__file__).with_name("template")
DASH_LENGTHS = {"-": "none", "--": "6 3", ":": "2 3"}


def make_page(rows: Sequence[Row], n_mistakes: int, overrides: Mapping[str, Any]) -> str:
    """`overrides` say where the data of the mistakes are, if not where they were in the training."""
    columns = sorted(shown_columns(rows), key=lambda column: not (column.name == "run" or column.is_in_percent))
    looks = [line_style(i) for i in range(len(rows))]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # the order of Bokeh's models counts: what is referred to comes first
    return environment.get_template("page.html").render(
        title=rows[0].name if len(rows) == 1 else f"{len(rows)} trainings compared",
        date=time.strftime("%Y-%m-%d %H:%M"),
        columns=columns,
        rows=[
            {
                "color": "currentColor" if how["color"] == BLACK else how["color"],
                "dashes": DASH_LENGTHS[how["linestyle"]],
                "completed": row.first.is_completed,
                "cells": [(column, column.cell(row), column.mean_and_deviation(row)[0]) for column in columns],
            }
            for row, how in zip(rows, looks, strict=True)
        ],
        reasons=reasons(rows),
        library=library(),
        data=make_charts(rows),
        mistakes=mistakes_of(rows, n_mistakes, overrides) if n_mistakes else [],
        names=[row.name for row in rows],
        n_runs=sum(len(row.runs) for row in rows),
        differences={
            "config": differences([{**row.first.config, "seed": row.seeds} for row in rows]),
            "versions and machine": differing_machines([row.first for row in rows]),
        },
    )
