"""Images in columns: what happens to each stands below it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    name: str
    images: "Sequence[Tensor]"  # C H W, from 0 to 1
    titles: Sequence[str] = ()
    colors: Sequence[str] = ()  # of the titles; black without
    add: "Callable[[Axes, int], None] | None" = None  # draws over the i-th image


def draw_columns(figure: "Figure", rows: Sequence[Row], title: str) -> None:
    from engine.plots.images import COLUMNS, show_image
    from engine.plots.style import style

    n = len(rows[0].images)
    columns = min(COLUMNS, n)
    blocks = -(-n // columns)
    with style(font_size=8):
        height = sum(1.5 + 0.15 * max((title.count("\n") + 1 for title in row.titles), default=0) for row in rows)
        figure.set_size_inches(max(4.5, 0.5 + 1.45 * columns), 0.4 + height * blocks)
        grid = figure.subplots(blocks * len(rows), columns, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for i in range(n):
            block, column = divmod(i, columns)
            for axes, row in zip(grid[block * len(rows) :, column], rows, strict=False):
                show_image(axes, row.images[i])
                if row.add is not None:
                    row.add(axes, i)
                if row.titles:
                    axes.set_title(row.titles[i], color=row.colors[i] if row.colors else "black")
                if column == 0:
                    axes.set_ylabel(row.name, fontsize=9)
        figure.suptitle(title, fontsize=10)
