#!/usr/bin/env python
"""Read every image of a config's dataset, print which can't be read, and list them for data.exclude."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.config.text import printable
from engine.plugins import Parser
from tools.tables import print_lines

EXAMPLES = """
The exit code is 1 if an image can't be read.

examples:
  python tools/verify_dataset.py -c configs/resnet50_imagenet.yaml
  python tools/verify_dataset.py -c configs/resnet50_imagenet.yaml -o bad.txt --data.dataroot /data/imagenet
  python main.py -c configs/resnet50_imagenet.yaml --data.exclude bad.txt
"""
CHUNK = 64  # files per task of a process


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="verify_dataset.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("-c", "--config", required=True, help="the config of the dataset")
    parser.add_argument("-o", "--output", default="exclude.txt", help="the list to write (default: exclude.txt)")
    args, overrides = parser.parse_with_overrides(argv)

    from datasets import Files
    from engine import load_config
    from engine.build import data_source, read_data
    from models.loading.files import replace_file

    config = load_config(args.config, overrides)
    # in memory, all files would be decoded before they can be checked
    options = {name: value for name, value in config.data.args.items() if name != "in_memory"}
    config = replace(config, data=replace(config.data, args=options))
    loaded, root = read_data(config), data_source(config).root
    splits = (loaded.train, loaded.test)
    n = sum(map(len, splits))
    in_files = [split for split in splits if isinstance(split, Files)]
    if len(in_files) < len(splits):
        print_lines(f"{config.data.name}: all of its {n:,} images can be read")
        return 0
    for path in _other_files(root, loaded.classes):
        print_lines(f"{path}: not used, since it doesn't have the suffix of an image")
    unreadable = _find_unreadable([os.fsdecode(path) for split in in_files for path in split.paths])
    print(f"{len(unreadable):,} of {n:,} images can't be read")
    if not unreadable:
        return 0
    names = [os.path.relpath(path, root) for path in unreadable]
    try:
        text = "\n".join(["# written by tools/verify_dataset.py, for data.exclude", *names, ""])
        replace_file(Path(args.output), os.fsencode(text))
    except OSError as error:
        raise RunError(f"{args.output} can't be written: {error.strerror}") from error
    print_lines(f"{args.output} lists them; --data.exclude {args.output} trains without them")
    return 1


def _find_unreadable(paths: Sequence[str]) -> list[str]:
    from tqdm import tqdm

    unreadable = []
    with ProcessPoolExecutor() as pool:
        reasons = tqdm(pool.map(check_image, paths, chunksize=CHUNK), total=len(paths), unit="image", unit_scale=True)
        for path, reason in zip(paths, reasons, strict=True):
            if reason is not None:
                unreadable.append(path)
                tqdm.write(printable(reason))
    return unreadable


def check_image(path: str) -> str | None:
    """Why an image can't be read; None if it can."""
    from datasets.pipeline.images import ImageFile, UnreadableImage

    try:
        ImageFile(path).decode()
    except UnreadableImage as error:
        return str(error)
    return None


def _other_files(root: Path, classes: Sequence[str]) -> Iterator[Path]:
    """Files in the folders of an image folder dataset that aren't named as images."""
    from datasets.pipeline.images import IMAGE_ENDINGS

    for part in ("train", "val"):
        for name in classes:
            folder = root / part / name
            if folder.is_dir():
                yield from sorted(path for path in folder.iterdir() if not path.name.lower().endswith(IMAGE_ENDINGS))


if __name__ == "__main__":
    sys.exit(run_tool(main))
