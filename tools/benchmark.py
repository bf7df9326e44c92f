#!/usr/bin/env python
"""Measure the speed of this project, each time against what people would use otherwise, in the same run."""

import json
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any, get_args

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import ConfigError, RunError
from engine.config.schema import Precision
from engine.plugins import Parser
from tools.benchmarks.report import LAYOUTS, N_CORES, RESNET_BATCH, Options, Ratio, Report, report

EXAMPLES = """
Speeds are compared by CPU time per image: of the process and its workers, on all cores. Other programs change it less than the
images/s by the clock in the last column. The sides take turns. Their ratio is the median over the rounds; above 1, this project
needs less CPU time. `benchmark.py WHAT --help` describes each measurement and its options.

examples:
  python tools/benchmark.py all --quick                                       `make bench`, which takes half an hour, in short
  python tools/benchmark.py model -c configs/resnet18_cifar10.yaml --tune     the fastest precision, layout, compile, threads
  python tools/benchmark.py training --only lenet --busy 2                    also beside two busy processes
  python tools/benchmark.py data --images ~/pictures --output docs/measured   the input pipelines, on pictures of your own
"""
COMMANDS = {  # a description and details
    "all": "Run all other benchmarks, as one table; `make bench` writes it to docs/measured/.",
    "model": """Measure a model by batch size, precision, layout and torch.compile, or find its fastest setting.

Images are random, of the size of the config's dataset. Memory is the peak of the process, or of the GPU. --tune tries precisions
and layouts, then torch.compile (not with --quick), numbers of threads, and train.keep_memory. It keeps a setting that is
clearly faster and agrees with fp32: in the loss of the first update, and in its change of the weights. Its last lines go into
the config.""",
    "batch": """Find the largest micro-batch that fits the device; the global batch and its updates stay the same.

For each size, a separate process makes three updates on random images of the size of the config's dataset; it may run out of
memory. Sizes divide the batch into equal parts. On a CPU, memory is what is free, or --max_memory.""",
    "training": """Compare training by the engine with a bare loop, a plain script, and the trainers of other packages.

All train the same model on the same random images in CIFAR-10's files, by SGD with momentum and a cosine schedule. "steady"
counts neither the start nor the first steps; "cold" is everything from the start of the process on. This project does all that it
does by default: augmentation, metrics, lines, TensorBoard. Of the plain scripts, with 0 and 2 workers, the faster one counts.
Config keys are the setting that `model --tune` found for ResNet-18; it is then measured as well.""",
    "data": """Compare input pipelines: this project's and those of other packages, on generated images or your own.

Packages of requirements-rivals.txt that are not installed are left out. --images reads all JPEGs of a folder and of the folders
in it, as one class, under as many names as are needed.""",
    "start": "Compare the first training step, up to its line in metrics.jsonl, and --help with importing torch and others.",
    "evaluation": "Compare the evaluation of 10,000 CIFAR-sized images with a loop that only calls the model on preloaded ones.",
    "memory": """Compare the peak memory of training ResNet-18, without the dataset, with that of a bare loop.

With large batches, train.keep_memory is compared with the variables of glibc that do the same, and with the default.""",
    "ranks": "Compare training on two ranks with a bare loop of DistributedDataParallel; on a CPU, each rank has one thread.",
    "growth": "Compare training and its start with more samples and after more steps with few; write 2 GB of temporary files.",
    "checkpoint": "Compare a verified checkpoint of ResNet-18 and its momentum with a bare save, and with the time of an epoch.",
}
IN_OWN_MODULE = ("model", "batch", "training", "data")  # the others are in tools/benchmarks/loops.py
WITHOUT_THREADS = ("all", "batch", "start", "ranks")
WITH_BUSY = ("training", "data", "evaluation")
WITH_KEYS = ("model", "batch", "training")  # config keys as options


def main(argv: Sequence[str] | None = None) -> int:
    result, args = run(sys.argv[1:] if argv is None else argv)
    result.show("benchmark" if args.what == "all" else args.what, as_json=args.json, folder=args.output)
    if failed := result.json.get("failed"):
        raise RunError(f"these failed, and are not in the report: {', '.join(failed)}")
    return 0


def run(argv: Sequence[str]) -> tuple[Report, Namespace]:
    """Run a command line, and return its report and options."""
    parser = Parser(prog="benchmark.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in COMMANDS.items():
        description, _, details = text.partition("\n")
        command = commands.add_parser(name, description=description, epilog=details, help=description)
        command.set_defaults(what=name)
        add_options(command, name)
    overrides = dict[str, object]()
    if argv and argv[0] in WITH_KEYS:
        args, overrides = commands.choices[argv[0]].parse_with_overrides(list(argv[1:]))
    else:
        args = parser.parse_args(argv)
    place = f"{args.what}:measure" if args.what in IN_OWN_MODULE else f"loops:{args.what}"
    measure = everything if args.what == "all" else resolve_name(f"tools.benchmarks.{place}")  # imports torch: --help needn't
    with TemporaryDirectory(prefix="benchmark-") as folder:
        return measure(Options(**vars(args), overrides=overrides, folder=Path(folder))), args


def everything(options: Options) -> Report:
    """Run all benchmarks. One that fails is left out of the report."""
    begin, measured, tuned, failed = time.time(), dict[str, dict[str, Any]](), list[str](), list[str]()
    tune = ["--tune", "-c", "configs/resnet18_cifar10.yaml", "--train.batch_size", str(options.choose(*RESNET_BATCH))]
    for what in [name for name in COMMANDS if name not in ("all", "batch")]:
        print(f"{what}, after {(time.time() - begin) / 60:.1f} minutes ...", file=sys.stderr, flush=True)
        words = {"model": tune, "training": tuned}.get(what, []) + (["--busy", "2"] if what in WITH_BUSY else [])
        try:
            measured[what] = run([what, *words, *(["--quick"] if options.quick else [])])[0].json
        except (ConfigError, RunError) as error:
            print(f"{what} failed: {error}", file=sys.stderr, flush=True)
            failed.append(what)
            continue
        if what == "model":
            keys = measured[what]["keys"].items()
            tuned = [word for key, value in keys for word in (f"--{key}", json.dumps(value).strip('"'))]
    setting = f"in {(time.time() - begin) / 60:.0f} minutes{', roughly (--quick)' if options.quick else ''}"
    ratios = [Ratio(**row) for one in measured.values() for row in one["ratios"]]
    left_out = sorted({name for one in measured.values() for name in one["left_out"]}) + [
        f"{what}, which failed" for what in failed
    ]
    return report(ratios, setting, left_out, measured=measured, failed=failed)


def add_options(command: ArgumentParser, name: str) -> None:
    add = command.add_argument
    add("--quick", action="store_true", help="take seconds instead of minutes; the figures are then rough")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--output", type=Path, metavar="FOLDER", help=f"write {'benchmark' if name == 'all' else name}.md and .json there")
    if name not in WITHOUT_THREADS:
        add("--num_threads", type=int, default=N_CORES, metavar="N", help="torch threads, on all sides (default: one per core)")
    if name in WITH_BUSY:
        add("--busy", type=int, default=0, metavar="N", help="measure also beside so many busy processes")
    if name == "training":
        add("--only", choices=["lenet", "resnet"], help="one of the models (default: both)")
    elif name == "data":
        add("--images", type=Path, metavar="FOLDER", help="JPEGs of your own (default: generated images)")
        add("--num_workers", type=int, default=2, help="for images in files (default: 2)")
    if name in ("model", "batch"):
        add("-c", "--config", help="a YAML of configs/; without it, LeNet on digits")
    if name == "batch":
        add("--max_memory", type=float, metavar="GIB", help="of the training (default: what is free)")
    elif name == "model":
        add("--batch_sizes", type=int, nargs="+", metavar="N", help="default: 1, and train.batch_size")
        add("--precisions", nargs="+", choices=get_args(Precision), help="default: all that this machine has instructions for")
        add("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="default: both")
        add("--compile", action=BooleanOptionalAction, help="with torch.compile too (default: with --tune alone)")
        add("--tune", action="store_true", help="find the setting in which training is fastest")


if __name__ == "__main__":
    sys.exit(run_tool(main))
