#!/usr/bin/env python
"""Predict classes, masks or boxes of any number of images: files, folders, globs."""

import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import ConfigError, RunError
from engine.config.text import printable
from engine.plugins import Parser
from tools.pictures.output import SOURCE_HELP, add_source
from tools.tables import print_lines

if TYPE_CHECKING:  # functions import what needs torch, so that --help doesn't
    from engine.inference.images import ReadBatch
    from engine.inference.trained import Trained

EXAMPLES = """
Images are prepared as in an evaluation. Classes are printed as lines; with --top_k, an image has a line for each of its classes,
the most probable first; of a multi-label model, a line for each label that reaches its threshold. Masks are written into a
folder of PNGs, given by -o; boxes as JSON in COCO's format. Unreadable images are listed at the end, and the exit code is then 1.

examples:
  python tools/predict.py runs/first photo.jpg
  python tools/predict.py runs/first photos/ 'more/**/*.jpg' --top_k 5 -o predictions.csv
  python tools/predict.py timm/convnext_tiny photos/ --json --batch_size 64
  python tools/predict.py runs/segmentation photos/ -o masks
  python tools/predict.py runs/detection photos/ -o boxes.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="predict.py",
        description=__doc__,
        epilog=SOURCE_HELP + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL IMAGE [IMAGE ...] [--top_k K] [--json] [-o PATH] [--batch_size N] [-c CONFIG] [--ema] "
        "[--key.sub value ...]",
    )
    add_source(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (with everything in them), globs")
    parser.add_argument("--top_k", type=int, default=1, metavar="K", help="classes of each image (default: 1)")
    parser.add_argument("--json", action="store_true", help="JSON instead of CSV; also if the name in -o ends in .json")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="a file instead of stdout; for masks, a folder")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    args, overrides = parser.parse_with_overrides(argv)
    for name in ("top_k", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")

    from engine.inference.images import image_names
    from tools.pictures.subject import open_source

    names = image_names(args.images)
    trained = open_source(args, overrides)
    unreadable: list[str] = []
    write(trained, args, names, predict(trained, names, args.batch_size, unreadable))
    if args.output is not None:
        print_lines(f"wrote {args.output}")
    for reason in unreadable:
        print_lines(reason, file=sys.stderr)
    if unreadable:
        raise RunError(f"{len(unreadable):,} of {len(names):,} images can't be read; the others are predicted")
    return 0


def predict(
    trained: "Trained", names: Sequence[str], batch_size: int, unreadable: list[str]
) -> Iterator[tuple["ReadBatch", Any]]:
    """Batches and their predictions. Why an image can't be read is appended to `unreadable`."""
    import torch
    from tqdm import tqdm

    from engine.inference.images import read_images

    with torch.no_grad(), tqdm(total=len(names), unit="image", leave=False, disable=not sys.stderr.isatty()) as progress:
        for read in read_images(trained, names, batch_size):
            unreadable += read.unreadable
            if read.places:
                yield read, trained.task.predict(trained.model, read.batch)
            progress.update(len(read.places) + len(read.unreadable))


def write(trained: "Trained", args: Namespace, names: Sequence[str], predictions: Iterator[tuple["ReadBatch", Any]]) -> None:
    """Write predictions in the format of the task."""
    from engine.tasks.classification import Classification
    from engine.tasks.detection import Detection
    from engine.tasks.multilabel import MultiLabel
    from engine.tasks.segmentation import Segmentation
    from tools.predictions.formats import present_labels, top_classes, write_coco, write_csv, write_json, write_masks

    task, kind = trained.task, trained.config.task
    write_rows = write_json if args.json or (args.output is not None and args.output.suffix == ".json") else write_csv
    if isinstance(task, Classification):
        if args.top_k > len(trained.classes):
            raise ConfigError(f"--top_k {args.top_k}: {trained.weights} has {len(trained.classes)} classes")
        is_on_terminal = args.output is None and sys.stdout.isatty()  # elsewhere, names are kept as they are
        names, classes = ([printable(name) for name in of] if is_on_terminal else of for of in (names, trained.classes))
        with opened(args.output) as file:
            write_rows(file, top_classes(names, predictions, classes, args.top_k))
    elif args.top_k > 1:
        raise ConfigError(f"--top_k {args.top_k}: only for classification, and {trained.weights} is for {kind}")
    elif isinstance(task, MultiLabel):
        with opened(args.output) as file:
            write_rows(file, present_labels(names, predictions, task))
    elif isinstance(task, Detection):
        with opened(args.output) as file:
            write_coco(file, names, predictions, task, trained.category_ids)
    elif isinstance(task, Segmentation):
        if args.output is None or args.json or args.output.is_file():
            raise ConfigError("masks are written as PNGs into a folder; give it with -o FOLDER")
        write_masks(args.output, names, predictions, trained.classes)
    else:
        raise ConfigError(f"predict.py does not support task {kind!r} ({trained.weights})")


@contextmanager
def opened(path: Path | None) -> Iterator[IO[str]]:
    """The file, or stdout. File names that aren't valid UTF-8 are written as their bytes."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout at exit
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_tool(main))
