"""Options that tools share: which model, which images."""

from argparse import ArgumentParser

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
