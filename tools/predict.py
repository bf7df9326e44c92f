#!/usr/bin/env python
"""Predict the classes of images: files, folders, globs, as many as there are."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.command_line import Parser, run_tool
from engine.errors import ConfigError, RunError
from tools.pictures.subject import SOURCE, add_source, open_source

if TYPE_CHECKING:
    from engine.trained import Trained

EXAMPLES = """
Images are prepared as those of an evaluation. With --top_k, an image has a line for each of its classes, the likeliest first.
Those that can't be read are named at the end, and the exit code is then 1.

examples:
  python tools/predict.py runs/first photo.jpg
  python tools/predict.py runs/first photos/ 'more/**/*.jpg' --top_k 5 -o predictions.csv
  python tools/predict.py timm/convnext_tiny photos/ --json --batch_size 64
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
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="a file, instead of stdout")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    args, overrides = parser.parse_with_overrides(argv)
    for name in ("top_k", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")

    from engine.images import image_names
    from engine.tasks.classification import Classification

    names = image_names(args.images)
    trained = open_source(args, overrides)
    if not isinstance(trained.task, Classification):
        raise ConfigError(f"{trained.weights}: classes are predicted here, and its task is {trained.config.task}")
    if args.top_k > len(trained.classes):
        raise ConfigError(f"--top_k {args.top_k}: {trained.weights} tells {len(trained.classes)} classes apart")
    write = write_json if args.json or (args.output is not None and args.output.suffix == ".json") else write_csv
    unreadable: list[str] = []
    with opened(args.output) as file:
        write(file, predictions(trained, names, args.batch_size, args.top_k, unreadable))
    if args.output is not None:
        print(f"wrote {args.output}")
    for why in unreadable:
        print(why, file=sys.stderr)
    if unreadable:
        raise RunError(f"{len(unreadable):,} of {len(names):,} images can't be read; the others are predicted")
    return 0


def predictions(
    trained: "Trained", names: Sequence[str], batch_size: int, top_k: int, unreadable: list[str]
) -> Iterator[tuple[str, str, float]]:
    """File, class and probability, one batch after the other; what can't be read is noted in `unreadable`."""
    import torch
    from tqdm import tqdm

    from engine.images import read_images

    with torch.no_grad(), tqdm(total=len(names), unit="image", leave=False, disable=not sys.stderr.isatty()) as progress:
        for places, images, why in read_images(trained, names, batch_size):
            unreadable += why
            if places:
                best = trained.task.predict(trained.model, (images, None)).float().topk(top_k)
                for place, values, classes in zip(places, best.values.tolist(), best.indices.tolist(), strict=True):
                    yield from ((names[place], trained.classes[c], value) for value, c in zip(values, classes, strict=True))
            progress.update(len(places) + len(why))


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


def write_csv(file: IO[str], found: Iterator[tuple[str, str, float]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(found)


def write_json(file: IO[str], found: Iterator[tuple[str, str, float]]) -> None:
    """A list with a line for each, written as they come."""
    separator = "[\n"
    for values in found:
        file.write(separator + json.dumps(dict(zip(COLUMNS, values, strict=True))))
        separator = ",\n"
    file.write("\n]\n" if separator == ",\n" else "[]\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
