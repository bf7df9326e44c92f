"""Where a picture goes: a file, the run's TensorBoard, a window."""

import io
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.errors import ConfigError, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure


def add_output(parser: ArgumentParser, default: str) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=f"default: {default}")
    parser.add_argument("--show", action="store_true", help="open a window, too")


def expect_picture(path: Path | None, option: str = "-o") -> None:
    """Before anything takes long."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path is not None and path.suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError(f"{option} {path}: the name of a picture ends in .png, .svg or .pdf")


def new_figure(args: Namespace) -> "Figure":
    """Of pyplot only where it is to be shown, since that looks for a display."""
    if args.show:
        import matplotlib.pyplot as plt

        return plt.figure(layout="constrained")
    from engine.plots.style import new_figure

    return new_figure()


def deliver(figures: "Mapping[str, Figure]", args: Namespace, run_dir: Path | None = None, step: int = 0) -> None:
    """Write the pictures, into figures/ and TensorBoard where they are a run's; show them where that is asked for."""
    for i, (name, figure) in enumerate(figures.items()):
        path = (run_dir / "figures" if run_dir is not None else Path()) / f"{name}.png"
        if args.output is not None:
            path = args.output if i == 0 else args.output.with_name(f"{args.output.stem}-{name}{args.output.suffix}")
        write(figure, path)
        if run_dir is not None:
            _into_tensorboard(figure, run_dir / "tensorboard" / "pictures", name, step)
    if args.show:
        import matplotlib.pyplot as plt

        if plt.get_backend().lower() == "agg":
            raise RunError("--show: there is no display; what was written can be opened")
        plt.show()


def write(figure: "Figure", path: Path) -> None:
    from engine.plots.style import save_figure

    try:
        save_figure(figure, path)
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error
    print(f"wrote {path}")


def _into_tensorboard(figure: "Figure", folder: Path, name: str, step: int) -> None:
    """Beside the run's own files, as a run of its own: TensorBoard reads the newest file of a folder, and would read no more of a
    training that goes on."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    from engine.plots.style import DPI

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    png.seek(0)
    try:
        with SummaryWriter(str(folder)) as tensorboard:
            tensorboard.add_image(name, imread(png)[..., :3], step, dataformats="HWC")
    except OSError as error:
        raise RunError(f"{folder} can't be written: {error.strerror}") from error
