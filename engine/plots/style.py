"""Colors, fonts and figures of every plot. Nothing here needs a display, unless a figure is made to be shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette, which is safe for color-blind readers. Further lines repeat it with other dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
TRAIN, VALID, WRONG = COLORS[0], COLORS[1], COLORS[1]

# Colormaps, perceptually uniform, also in print
SHADES = "cividis"  # feature maps, dark to light
HEAT = "inferno"  # heat over an image
INK = "Blues"  # tables with mostly empty cells, white to dark

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is no formula
}
DPI = 120


def new_figure(*, show: bool = False) -> Figure:
    """A figure to draw on. Only one to `show` belongs to pyplot, which looks for a display."""
    if show:
        import matplotlib.pyplot as plt

        return plt.figure(layout="constrained")
    return Figure(layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


@contextmanager
def style(font_size: float = STYLE["font.size"], label_size: float | None = None) -> Iterator[None]:
    """Draw in this project's style; `label_size` is the font size of axis labels."""
    options = {**STYLE, "font.size": font_size}
    if label_size is not None:
        options["axes.labelsize"] = label_size
    with matplotlib.rc_context(options):
        yield


def line_style(i: int) -> dict[str, Any]:
    """Color and dashes of line `i` of several."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
