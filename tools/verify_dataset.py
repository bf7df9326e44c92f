#!/usr/bin/env python
"""Report the contents and the faults of a dataset: classes, sizes, unreadable images, duplicates, likely wrong labels."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import ConfigError, RunError
from engine.plugins import Parser
from tools.tables import plain, print_lines, write_text

EXAMPLES = """
Every image is read. Unreadable ones are listed for data.exclude. Duplicates are images with the same pixels, or that were encoded
again, resized, mirrored or cropped by up to 10 %. --run judges the labels by a trained model: a run on these data, or any model
with pretrained weights. The exit code is 1 if an image can't be read.

examples:
  python tools/verify_dataset.py -c configs/resnet50_imagenet.yaml
  python tools/verify_dataset.py -c configs/resnet50_imagenet.yaml -o bad.txt --data.dataroot /data/imagenet
  python main.py -c configs/resnet50_imagenet.yaml --data.exclude bad.txt
  python tools/verify_dataset.py -c configs/lenet_digits.yaml --html report.html --csv report.csv
  python tools/verify_dataset.py --run runs/first --html report.html
"""
MOST_CLASSES = 20  # in a table of the terminal


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="verify_dataset.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("-c", "--config", help="the config of the dataset; not needed with the run folder of --run")
    parser.add_argument("-o", "--output", default="exclude.txt", help="the list of unreadable files (default: exclude.txt)")
    parser.add_argument("--html", metavar="PATH", type=Path, help="write the report as a page that needs no network")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="write a table with a line for each image")
    parser.add_argument("--run", metavar="RUN", help="find likely wrong labels by this run, checkpoint or pretrained model")
    args, overrides = parser.parse_with_overrides(argv)
    if args.config is None and args.run is None:
        raise ConfigError("-c CONFIG or --run RUN is needed: it says which data")

    from datasets import Files
    from engine import load_config
    from engine.build import load_data
    from engine.devices.accelerator import make_accelerator
    from engine.run.log import set_up_terminal
    from tools.dataset_report.duplicates import find_groups
    from tools.dataset_report.facts import count_problems, counts, read_facts, sizes
    from tools.dataset_report.page import Report

    set_up_terminal(is_main=True)  # the files that are not read, the images that are held out
    trained = _trained(args.run, args.config, overrides) if args.run is not None else None
    config = trained.config if trained is not None else _from_files(load_config(args.config, overrides))
    data = trained.data if trained is not None else load_data(config, make_accelerator(config.train))
    facts = read_facts(data.splits, data.root, data.spec.targets)
    groups = find_groups(facts, data.spec.targets)
    report = Report(f"{data.spec.name}: {len(facts):,} images", data.splits, data.classes, facts, groups)
    n_unreadable = sum(bool(one.problem) for one in facts)
    by_class = counts(facts, data.classes, objects=data.spec.targets == "boxes")
    report.summary += [f"{n_unreadable:,} of {len(facts):,} images can't be read", *count_problems(by_class)]
    report.summary += _duplicates_in_words(groups)
    unit = "objects" if data.spec.targets == "boxes" else "images"
    report.tables[f"{unit.capitalize()} per class"] = [
        ["class", *data.splits],
        *([row["class"], *(f"{row[split]:,}" for split in data.splits)] for row in by_class),
    ]
    report.tables["Sizes and formats"] = [["", ""], *map(list, sizes(facts))]
    if trained is not None:
        from tools.dataset_report.mislabels import judge_labels

        report.judged = judge_labels(trained, facts)
        n_suspects, n_judged = len(report.judged.suspects), len(report.judged.indices)
        report.summary.append(f"{n_suspects:,} of {n_judged:,} labels are likely wrong ({'; '.join(report.judged.how)})")
    for rows in report.tables.values():
        shown = rows if len(rows) <= MOST_CLASSES + 1 else [*rows[: MOST_CLASSES + 1], ["...", *[""] * len(data.splits)]]
        print_lines(f"{plain(shown, right=range(1, len(data.splits) + 1) if rows[0][0] else ())}\n")
    print_lines("\n".join(report.summary))
    if args.csv:
        write_text(args.csv, report.as_csv())
    if args.html:
        write_text(args.html, report.as_page())
    if n_unreadable:
        places = [place for split in data.splits.values() if isinstance(split, Files) for place in split.paths]
        _write_list(Path(args.output), [place for place, one in zip(places, facts, strict=True) if one.problem], data.root)
    return 1 if n_unreadable else 0


def _from_files(config: Any) -> Any:
    """Return the config without data.in_memory: all files would be decoded before they can be checked."""
    options = {name: value for name, value in config.data.args.items() if name != "in_memory"}
    return replace(config, data=replace(config.data, args=options))


def _trained(run: str, config: str | None, overrides: dict[str, Any]) -> Any:
    from engine import load_config
    from engine.inference.trained import load_trained

    is_run = Path(run).expanduser().exists()
    trained = load_trained(run, overrides, config=None if is_run else config)
    trained = replace(trained, config=_from_files(trained.config))
    if is_run and config is not None and _from_files(load_config(config, overrides)).data != trained.config.data:
        hint = "leave out -c, or give the name of a model as --run"
        raise ConfigError(f"-c {config}", f"{run} was trained on other data", hint)
    return trained


def _duplicates_in_words(groups: Sequence[Any]) -> list[str]:
    """Say what duplicates there are, leaks first."""
    leaks, conflicts = (sum(getattr(group, what) for group in groups) for what in ("leak", "conflict"))
    lines = [f"LEAK: groups of duplicates in both train and an evaluation split: {leaks:,}"] if leaks else []
    lines += [f"groups of duplicates with conflicting labels: {conflicts:,}"] if conflicts else []
    n_extra = sum(len(group.members) - 1 for group in groups)
    return [*lines, f"duplicates: {n_extra:,} (groups: {len(groups):,})" if groups else "no duplicates"]


def _write_list(path: Path, places: Sequence[bytes], root: Path) -> None:
    """List files by their names in the data folder, byte by byte, and parts of files as messages call them."""
    from datasets.pipeline.places import SEPARATOR, shown
    from models.loading.files import replace_file

    names = [os.path.relpath(place if SEPARATOR not in place else shown(place), root) for place in map(os.fsdecode, places)]
    try:
        text = "\n".join(["# written by tools/verify_dataset.py, for data.exclude", *names, ""])
        replace_file(path, os.fsencode(text))
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error
    print_lines(f"{path} lists them; --data.exclude {path} trains without them")


if __name__ == "__main__":
    sys.exit(run_tool(main))
