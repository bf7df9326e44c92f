"""Colors, fonts and figures that every plot shares. Nothing here needs a display."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind people tell apart; a second and a third round are told apart by their dashes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


DASHES = ("-", "--", ":")


TRAIN, VALID, WRONG = COLORS[0], COLORS[1], COLORS[1]


SHADES = "cividis"  # of maps, from dark to light: the same to every eye, and on paper


HEAT = "inferno"  # likewise, over an image


INK = "Blues"  # of tables, where most cells are nearly empty: from white to dark


STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


DPI = 120


def new_figure() -> Figure:
    return Figure(layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


@contextmanager
def style(font_size: float = STYLE["font.size"], label_size: float | None = None) -> Iterator[None]:
    """`label_size` is that of what stands beside the axes."""
    labels = {"axes.labelsize": label_size} if label_size is not None else {}
    with matplotlib.rc_context({**STYLE, "font.size": font_size, **labels}):
        yield


def line_style(i: int) -> dict[str, str]:
    """Color and dashes of the i-th of several lines."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
