#!/usr/bin/env python
"""Read every image of a config's data set, say which can't be read, and list them for data.exclude."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.plugins import Parser

EXAMPLES = """
The exit code is 1 if something is wrong.

examples:
  python tools/verify_dataset.py -c configs/resnet50_imagenet.yaml
  python tools/verify_dataset.py -c configs/resnet50_imagenet.yaml -o bad.txt --data.dataroot /data/imagenet
  python main.py -c configs/resnet50_imagenet.yaml --data.exclude bad.txt
"""
AT_ONCE = 64  # files that a process is given


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="verify_dataset.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("-c", "--config", required=True, help="the config whose data set is read")
    parser.add_argument("-o", "--output", default="exclude.txt", help="where the list is written (default: exclude.txt)")
    args, overrides = parser.parse_with_overrides(argv)

    from datasets import Files
    from engine import load_config
    from engine.build import data_source, read_data

    config = load_config(args.config, overrides)
    config.data.args.pop("in_memory", None)  # the files are what is looked at
    loaded, root = read_data(config), data_source(config).root
    splits = (loaded.train, loaded.test)
    n = sum(map(len, splits))
    if not all(isinstance(split, Files) for split in splits):
        print(f"{config.data.name}: all of its {n:,} images can be read")
        return 0
    for path in _without_an_image_ending(root, loaded.classes):
        print(f"{path}: not used, since its name doesn't end like an image's")
    wrong = _unreadable([os.fsdecode(path) for split in splits for path in split.paths])
    print(f"{len(wrong):,} of {n:,} images can't be read")
    if not wrong:
        return 0
    names = [os.path.relpath(path, root) for path in wrong]
    try:
        text = "\n".join(["# written by tools/verify_dataset.py, for data.exclude", *names, ""])
        Path(args.output).write_bytes(os.fsencode(text))
    except OSError as error:
        raise RunError(f"{args.output} can't be written: {error.strerror}") from error
    print(f"{args.output} lists them; --data.exclude {args.output} trains without them")
    return 1


def _unreadable(paths: Sequence[str]) -> list[str]:
    from tqdm import tqdm

    found = []
    with ProcessPoolExecutor() as pool:
        answers = tqdm(pool.map(what_is_wrong, paths, chunksize=AT_ONCE), total=len(paths), unit="image", unit_scale=True)
        for path, why in zip(paths, answers, strict=True):
            if why is not None:
                found.append(path)
                tqdm.write(why)
    return found


def what_is_wrong(path: str) -> str | None:
    from datasets.pipeline.images import ImageFile, UnreadableImage

    try:
        ImageFile(path).decode()
    except UnreadableImage as error:
        return str(error)
    return None


def _without_an_image_ending(root: Path, classes: Sequence[str]) -> Iterator[Path]:
    from datasets.pipeline.images import IMAGE_ENDINGS

    for part in ("train", "val"):
        for name in classes:
            folder = root / part / name
            if folder.is_dir():
                yield from sorted(path for path in folder.iterdir() if not path.name.lower().endswith(IMAGE_ENDINGS))


if __name__ == "__main__":
    sys.exit(run_tool(main))
