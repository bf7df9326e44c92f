#!/usr/bin/env python
"""Predict classes, masks or boxes of any number of images: files, folders, globs."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import ConfigError, RunError
from engine.plugins import Parser
from tools.pictures.output import SOURCE_HELP, add_source
from tools.tables import print_lines

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
    usage = "%(prog)s RUN_OR_MODEL IMAGE [IMAGE ...] [--top_k K] [--json] [-o PATH] [--batch_size N] [-c CONFIG] [--ema] "
    usage += "[--key.sub value ...]"
    parser = Parser(prog="predict.py", description=__doc__, epilog=SOURCE_HELP + EXAMPLES, usage=usage)
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

    from engine.inference.images import image_names  # imports torch, unlike --help
    from tools.pictures.subject import open_source
    from tools.predictions.formats import predict, write

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


if __name__ == "__main__":
    sys.exit(run_tool(main))
