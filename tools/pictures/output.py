"""Options that tools share, and where a picture goes: a file, the run's TensorBoard, a window."""

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.errors import ConfigError, RunError
from tools.tables import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SOURCE_HELP = """
RUN_OR_MODEL is a run folder (its best checkpoint is used), a checkpoint, or the name of a model of this project or of timm. A
name means its published weights or, with --model.pretrained FILE, those of a file; -c names the config of the data, default:
ImageNet.
"""


def add_source(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_MODEL")
    parser.add_argument("-c", "--config", help="for a model by its name: the config of its data")
    parser.add_argument("--ema", action="store_true", help="a run's averaged weights (train.ema)")


def add_split(parser: ArgumentParser) -> None:
    parser.add_argument("--split", default="valid", choices=("train", "valid", "test"), help="default: valid")


def add_images(parser: ArgumentParser, n: int) -> None:
    add_split(parser)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders or globs; default: samples of the split")
    parser.add_argument("--n", type=int, default=n, help=f"how many samples, spread over the split (default: {n})")
    parser.add_argument("--samples", type=int, nargs="+", metavar="I", help="these samples of the split, counted from 0")


def add_output(parser: ArgumentParser, default: str) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=f"default: {default}")
    parser.add_argument("--show", action="store_true", help="open a window, too")


def check_picture_path(path: Path | None, option: str = "-o") -> None:
    """Refuse a file name that isn't a picture's, before any long computation."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path is not None and path.suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError(f"{option} {path}: the name of a picture ends in .png, .svg or .pdf")


def save_pictures(figures: "Mapping[str, Figure]", args: Namespace, run_dir: Path | None = None, step: int = 0) -> None:
    """Write figures to args.output, or into figures/ of the run, and into the run's TensorBoard; with args.show, show them.

    TensorBoard's images have a folder next to the run's event file. In the same folder, TensorBoard would follow the newest file
    and stop reading the file of a running training.
    """
    from matplotlib.image import imread

    from engine.plots.style import DPI

    for i, (name, figure) in enumerate(figures.items()):
        path = (run_dir / "figures" if run_dir is not None else Path()) / f"{name}.png"
        if args.output is not None:
            path = args.output if i == 0 else args.output.with_name(f"{args.output.stem}-{name}{args.output.suffix}")
        save_picture(figure, path)
        if run_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            figure.savefig(png := io.BytesIO(), format="png", dpi=DPI)
            png.seek(0)
            folder = run_dir / "tensorboard" / "pictures"
            with writing(folder, say=False), SummaryWriter(str(folder)) as tensorboard:
                tensorboard.add_image(name, imread(png)[..., :3], step, dataformats="HWC")
    if args.show:
        import matplotlib.pyplot as plt

        if plt.get_backend().lower() == "agg":
            raise RunError("--show: there is no display; open the written file instead")
        plt.show()


def save_picture(figure: "Figure", path: Path) -> None:
    from engine.plots.style import save_figure

    with writing(path):
        save_figure(figure, path)
