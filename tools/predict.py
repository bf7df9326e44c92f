#!/usr/bin/env python
"""Predict what is in images: files, folders, globs, as many as there are."""

import csv
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import ConfigError, RunError
from engine.plugins import Parser
from tools.pictures.subject import SOURCE, add_source, open_source
from tools.scenes import Predicted, write_coco, write_masks

if TYPE_CHECKING:
    from engine.inference.trained import Trained

EXAMPLES = """
Images are prepared as those of an evaluation. Classes come as lines; with --top_k an image has a line for each of its classes,
the likeliest first. Masks come as a folder of PNGs, which -o names; boxes as a JSON in COCO's format. Images that can't be read
are named at the end, and the exit code is then 1.

examples:
  python tools/predict.py runs/first photo.jpg
  python tools/predict.py runs/first photos/ 'more/**/*.jpg' --top_k 5 -o predictions.csv
  python tools/predict.py timm/convnext_tiny photos/ --json --batch_size 64
  python tools/predict.py runs/segmentation photos/ -o masks
  python tools/predict.py runs/detection photos/ -o boxes.json
"""
COLUMNS = ("filename", "class", "probability")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="predict.py",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL IMAGE [IMAGE ...] [--top_k K] [--json] [-o PATH] [--batch_size N] [-c CONFIG] [--ema] "
        "[--key.sub value ...]",
    )
    add_source(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (with what is in them), globs")
    parser.add_argument("--top_k", type=int, default=1, metavar="K", help="classes of each image (default: 1)")
    parser.add_argument("--json", action="store_true", help="JSON instead of CSV; so does a name in -o that ends in .json")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="a file, instead of stdout; for masks, a folder")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    args, overrides = parser.parse_with_overrides(argv)
    for name in ("top_k", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")

    from engine.inference.images import image_names

    names = image_names(args.images)
    trained = open_source(args, overrides)
    write = _writer(trained, args)
    unreadable: list[str] = []
    write(names, predictions(trained, names, args.batch_size, unreadable))
    if args.output is not None:
        print(f"wrote {args.output}")
    for why in unreadable:
        print(why, file=sys.stderr)
    if unreadable:
        raise RunError(f"{len(unreadable):,} of {len(names):,} images can't be read; the others are predicted")
    return 0


def _writer(trained: "Trained", args: Namespace) -> Callable[[Sequence[str], Iterator[Predicted]], None]:
    """What is made of the predictions depends on the task."""
    from engine.tasks.classification import Classification
    from engine.tasks.detection import Detection
    from engine.tasks.segmentation import Segmentation

    def to_file(write: Callable[..., None], names: Sequence[str], found: Iterator[Predicted]) -> None:
        with opened(args.output) as file:
            write(file, names, found, trained)

    task = trained.task
    if isinstance(task, Classification):
        if args.top_k > len(trained.classes):
            raise ConfigError(f"--top_k {args.top_k}: {trained.weights} tells {len(trained.classes)} classes apart")
        write = write_json if args.json or (args.output is not None and args.output.suffix == ".json") else write_csv
        return partial(to_file, partial(write, top_k=args.top_k))
    if args.top_k > 1:
        raise ConfigError(
            f"--top_k {args.top_k}: the classes of a whole image, and {trained.weights} is for {trained.config.task}"
        )
    if isinstance(task, Detection):
        return partial(to_file, write_coco)
    if not isinstance(task, Segmentation):
        raise ConfigError(f"{trained.weights}: nobody knows how predictions of its task {trained.config.task} are written")
    if args.output is None or args.json or args.output.is_file():
        raise ConfigError("masks are written as PNGs: -o FOLDER says where to")
    return partial(write_masks, args.output, trained=trained)


def predictions(trained: "Trained", names: Sequence[str], batch_size: int, unreadable: list[str]) -> Iterator[Predicted]:
    """One batch after the other; what can't be read is noted in `unreadable`."""
    import torch
    from tqdm import tqdm

    from engine.inference.images import read_images

    with torch.no_grad(), tqdm(total=len(names), unit="image", leave=False, disable=not sys.stderr.isatty()) as progress:
        for read in read_images(trained, names, batch_size):
            unreadable += read.unreadable
            if read.places:
                yield read, trained.task.predict(trained.model, read.batch)
            progress.update(len(read.places) + len(read.unreadable))


@contextmanager
def opened(path: Path | None) -> Iterator[IO[str]]:
    """The file, or stdout; a name that is no text in UTF-8 is written as the bytes that it is."""
    if path is None:
        sys.stdout.reconfigure(errors="surrogateescape")
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it at exit
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error


def best_classes(
    names: Sequence[str], found: Iterator[Predicted], classes: Sequence[str], top_k: int
) -> Iterator[tuple[str, str, float]]:
    """File, class and probability."""
    for read, probabilities in found:
        best = probabilities.float().topk(top_k)
        for place, values, indices in zip(read.places, best.values.tolist(), best.indices.tolist(), strict=True):
            yield from ((names[place], classes[i], value) for value, i in zip(values, indices, strict=True))


def write_csv(file: IO[str], names: Sequence[str], found: Iterator[Predicted], trained: "Trained", top_k: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(best_classes(names, found, trained.classes, top_k))


def write_json(file: IO[str], names: Sequence[str], found: Iterator[Predicted], trained: "Trained", top_k: int) -> None:
    """A list with a line for each, written as they come."""
    separator = "[\n"
    for values in best_classes(names, found, trained.classes, top_k):
        file.write(separator + json.dumps(dict(zip(COLUMNS, values, strict=True))))
        separator = ",\n"
    file.write("\n]\n" if separator == ",\n" else "[]\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
