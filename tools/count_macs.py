#!/usr/bin/env python
"""Count parameters and multiply-accumulates (MACs) per image with fvcore: of every model, of one model, or of configs."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from engine import load_config
from engine.config import yaml12
from engine.config.command_line import run_tool
from engine.config.errors import ConfigError
from engine.plugins import Parser
from engine.run.log import millions
from tools.tables import giga, markdown

# Torch and the models are imported inside functions: --help and a mistyped option shouldn't wait for them.

EXAMPLES = """
examples:
  python tools/count_macs.py                                        every model, at its own image size and at 32x32
  python tools/count_macs.py -c configs/resnet18_cifar10.yaml --verbose
  python tools/count_macs.py --model timm/convnext_tiny --img_size 224 --n_classes 1000 --json
  python tools/count_macs.py --model resnet18 --img_size 32 --n_classes 10 --model.first_block cifar10
"""
PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "published.yaml"
CITATION = re.compile(r"(?P<authors>.+?) \((?P<year>\d{4})\): (?P<title>.+?)\. (?:[^.]+\. )?(?P<link>https?://\S+)")
UNKNOWN_CLASSES = 1000  # for configs whose dataset tells its number of classes only when its files are read


@dataclass(frozen=True)
class Row:
    """The counts of one model at one image size."""

    config: str
    model: str
    img_size: int
    n_classes: int
    params: int
    macs: int
    published: str
    stages: dict[str, tuple[int, int]]
    not_counted: dict[str, int]


@dataclass(frozen=True)
class ModelRow:
    """A model with its paper, its counts with its default arguments, and those on CIFAR-10's images."""

    model: str
    family: str
    paper: str
    checked_against: str
    published: str
    own_size: Row
    at_32x32: Row


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="count_macs.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("-c", "--config", action="append", help="a config; several are possible (default: every model)")
    parser.add_argument("--model", help="a model by its name, without a config")
    parser.add_argument("--img_size", type=int, help="height and width of the image, for --model (default: 224)")
    parser.add_argument("--n_classes", type=int, help="for --model (default: 1000)")
    parser.add_argument("--in_channels", type=int, help="for --model (default: 3)")
    parser.add_argument("--list", action="store_true", help="print the names of this project's models, and exit")
    parser.add_argument("--verbose", action="store_true", help="print a table per stage, and the operations that are not counted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args, overrides = parser.parse_with_overrides(argv)
    if args.list:
        from models import list_models

        print("\n".join(list_models()))
        return 0
    if args.model is None and (args.img_size or args.n_classes or args.in_channels):
        options = "--img_size, --n_classes and --in_channels"
        raise ConfigError(f"{options} belong to --model; with a config they are --data.img_size and so on")
    if args.model is not None and args.config:
        raise ConfigError("--model and --config: give one of the two")
    if args.model is None and args.config is None and overrides:
        raise ConfigError(f"--{next(iter(overrides))} needs --config or --model: the table of all models uses their defaults")
    models: list[ModelRow] = []
    if args.model is not None:
        rows = [of_model(args.model, args.n_classes or 1000, args.in_channels or 3, args.img_size or 224, overrides)]
    elif args.config:
        rows = of_configs(args.config, overrides)
    else:
        models = of_models()
        rows = [row.own_size for row in models]
    if args.json:
        print(json.dumps([asdict(row) for row in models or rows], indent=2))
        return 0
    print(model_tables(models) if models else table(rows))
    for row in rows if args.verbose else []:
        body = [(name, millions(params), giga(macs)) for name, (params, macs) in row.stages.items()]
        stages = [("stage", "parameters", "MACs"), *body, ("all", millions(row.params), giga(row.macs))]
        print(f"\n{row.config or row.model}\n{markdown(stages, right=(1, 2))}")
        print("operations without a count:", ", ".join(f"{name} {n}" for name, n in row.not_counted.items()) or "none")
    return 0


def model_tables(rows: Sequence[ModelRow]) -> str:
    """A Markdown section per family: its paper, and a table of its models."""
    head = ("model", "image", "parameters", "MACs", "parameters, 32x32", "MACs, 32x32", "checked against", "published accuracy")
    sections: dict[tuple[str, str], list[Sequence[str]]] = {}
    for row in rows:
        counts = [cell for count in (row.own_size, row.at_32x32) for cell in (millions(count.params), giga(count.macs))]
        line = [row.model, f"{row.own_size.img_size}x{row.own_size.img_size}", *counts, row.checked_against, row.published]
        sections.setdefault((row.family, row.paper), [head]).append(line)
    return "\n\n".join(
        "\n\n".join(filter(None, (f"### {family}", paper, markdown(lines, right=range(1, 6)))))
        for (family, paper), lines in sections.items()
    )


def table(rows: Sequence[Row]) -> str:
    """One Markdown table of the given rows."""
    head = ("config", "model", "image", "parameters", "MACs", "published accuracy")
    lines = [head]
    for row in rows:
        size = f"{row.img_size}x{row.img_size}"
        lines.append((row.config, row.model, size, millions(row.params), giga(row.macs), row.published))
    return markdown(lines, right=(2, 3, 4))


def of_models() -> list[ModelRow]:
    """Count every model of this project, which takes about a minute."""
    import pkgutil

    import models
    from models import create_model, model_signature

    published = yaml12.parse(PUBLISHED.read_text())
    families = [import_module(f"models.{info.name}") for info in pkgutil.iter_modules(models.__path__) if not info.ispkg]
    rows = []
    pairs = [(family, name) for family in families for name in family.MODELS]
    for module, name in tqdm(pairs, unit="model", leave=False, disable=not sys.stderr.isatty()):
        family = module.__name__.rpartition(".")[2]
        title, _, text = (module.__doc__ or "").partition("\n")
        citation = CITATION.match(" ".join(text.split()))
        signature = model_signature(name)
        assert signature is not None, "only timm's models have none"
        defaults = {key: parameter.default for key, parameter in signature.parameters.items()}
        small: dict[str, Any] = {"first_block": "cifar10", "patch_size": 4}
        small = {key: value for key, value in small.items() if key in defaults}
        sizes = (defaults["n_classes"], defaults["in_channels"], defaults["img_size"])
        row = ModelRow(
            model=name,
            family=re.split(r"[.,]", title)[0],
            paper="{authors} ({year}): {title}. {link}".format(**citation.groupdict()) if citation else "",
            checked_against=published["checked_against"].get(name) or published["checked_against"].get(family, ""),
            published="; ".join(map(_accuracy, published["accuracies"].get(name, []))),
            own_size=_count(name, partial(create_model, name), *sizes),
            at_32x32=_count(name, partial(create_model, name, **small), 10, 3, 32),
        )
        rows.append(row)
    return rows


def of_configs(paths: Sequence[str], overrides: dict[str, Any]) -> list[Row]:
    from engine.build import dataset_spec, task_kind

    accuracies = yaml12.parse(PUBLISHED.read_text())["accuracies"].values()
    rows = []
    configs = [(Path(path), load_config(path, overrides)) for path in paths]
    for path, config in tqdm(configs, unit="config", leave=False, disable=len(configs) < 3 or not sys.stderr.isatty()):
        spec, build = dataset_spec(config), partial(task_kind(config).create_model, config)
        n_classes, img_size = config.data.n_classes or spec.n_classes or UNKNOWN_CLASSES, config.data.img_size or spec.img_size
        published = [_accuracy(entry) for entries in accuracies for entry in entries if entry.get("config") == path.stem]
        row = _count(config.model.name, build, n_classes, spec.channels, img_size)
        rows.append(replace(row, config=path.stem, published="; ".join(published)))
    return rows


def of_model(name: str, n_classes: int, in_channels: int, img_size: int, overrides: dict[str, Any]) -> Row:
    from engine.build import task_kind

    config = load_config(None, {**overrides, "model.name": name})
    return _count(name, partial(task_kind(config).create_model, config), n_classes, in_channels, img_size)


def _count(name: str, build: Callable[..., Any], n_classes: int, in_channels: int, img_size: int) -> Row:
    """Count a model whose weights are all zero: initializing them would take longer than counting."""
    import torch

    from engine.run.macs import count

    on_meta = not name.startswith("timm/")  # timm computes with weights while it builds
    try:
        with torch.device("meta" if on_meta else "cpu"):
            model = build(n_classes=n_classes, in_channels=in_channels, img_size=img_size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {name}: {error}") from error
    if on_meta:
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):  # a detector's proposals must be finite
            tensor.detach().zero_()
    counts = count(model, in_channels, img_size)
    return Row("", name, img_size, n_classes, counts.params, counts.macs, "", counts.stages, counts.not_counted)


def _accuracy(entry: dict[str, str]) -> str:
    """One figure of docs/published.yaml, as in `CIFAR-10 95.64 % (source; configs/resnet18_cifar10.yaml)`."""
    metric = f"{entry['metric']} " if "metric" in entry else ""
    config = f"; configs/{entry['config']}.yaml" if "config" in entry else ""
    return f"{entry['data']} {metric}{entry['accuracy']} ({entry['source']}{config})"


if __name__ == "__main__":
    sys.exit(run_tool(main))
