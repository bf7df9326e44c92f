#!/usr/bin/env python
"""Parameters and multiply-accumulates per image, by fvcore, of every config or of one model."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import load_config
from engine.config.command_line import run_tool
from engine.config.errors import ConfigError
from engine.config.resolve import ResolvedConfig
from engine.plugins import Parser
from engine.run.log import millions
from tools.tables import giga, markdown

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """
examples:
  python tools/count_macs.py                                        every config of configs/
  python tools/count_macs.py -c configs/resnet18_cifar10.yaml --verbose
  python tools/count_macs.py --model timm/convnext_tiny --img_size 224 --n_classes 1000 --json
  python tools/count_macs.py --model resnet18 --img_size 32 --n_classes 10 --model.first_block cifar10
"""
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PUBLISHED = re.compile(r"^# published: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    config: str
    model: str
    img_size: int
    n_classes: int
    params: int
    macs: int
    published: str
    stages: dict[str, tuple[int, int]]
    not_counted: dict[str, int]


UNKNOWN_CLASSES = 1000  # counted with, where only the files of a data set say how many there are


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="count_macs.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("-c", "--config", action="append", help="a config; several are possible (default: all of configs/)")
    parser.add_argument("--model", help="a model by its name, without a config")
    parser.add_argument("--img_size", type=int, help="height and width of the image, for --model (default: 224)")
    parser.add_argument("--n_classes", type=int, help="for --model (default: 1000)")
    parser.add_argument("--in_channels", type=int, help="for --model (default: 3)")
    parser.add_argument("--list", action="store_true", help="print the names of this project's models, and exit")
    parser.add_argument("--verbose", action="store_true", help="a table per stage, and the operations that count nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args, overrides = parser.parse_with_overrides(argv)
    if args.list:
        from models import list_models

        print("\n".join(list_models()))
        return 0
    if args.model is None and (args.img_size or args.n_classes or args.in_channels):
        raise ConfigError(
            "--img_size, --n_classes and --in_channels belong to --model; with a config they are --data.img_size and so on"
        )
    if args.model is not None:
        if args.config:
            raise ConfigError("--model and --config: give one of the two")
        rows = [_of_model(args.model, args.n_classes or 1000, args.in_channels or 3, args.img_size or 224, overrides)]
    else:
        rows = of_configs(args.config or sorted(str(path) for path in CONFIGS.glob("*.yaml")), overrides)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    print(table(rows))
    if args.verbose:
        for row in rows:
            print(f"\n{_stages(row)}")
    return 0


def table(rows: Sequence[Row]) -> str:
    """Markdown, so that a document can hold it."""
    head = ("config", "model", "image", "parameters", "MACs", "published accuracy")
    body = [
        (row.config, row.model, f"{row.img_size}x{row.img_size}", millions(row.params), giga(row.macs), row.published)
        for row in rows
    ]
    return markdown([head, *body], right=(2, 3, 4))


def _stages(row: Row) -> str:
    body = [(name, millions(params), giga(macs)) for name, (params, macs) in row.stages.items()]
    not_counted = ", ".join(f"{name} {n}" for name, n in row.not_counted.items()) or "none"
    rows = [("stage", "parameters", "MACs"), *body, ("all", millions(row.params), giga(row.macs))]
    return f"{row.config or row.model}\n{markdown(rows, right=(1, 2))}\noperations without a count: {not_counted}"


def of_configs(paths: Sequence[str], overrides: dict) -> list[Row]:
    from tqdm import tqdm

    configs = [(path, load_config(path, overrides)) for path in paths]
    progress = tqdm(configs, unit="config", leave=False, disable=len(configs) < 3 or not sys.stderr.isatty())
    return [_of_config(path, config) for path, config in progress]


def _of_config(path: str, config: ResolvedConfig) -> Row:
    from engine.build import dataset_spec

    spec = dataset_spec(config)
    n_classes = config.data.n_classes or spec.n_classes or UNKNOWN_CLASSES
    published = PUBLISHED.search(Path(path).read_text())
    return _row(
        Path(path).stem,
        config,
        n_classes,
        spec.channels,
        config.data.img_size or spec.img_size,
        published[1] if published else "",
    )


def _of_model(name: str, n_classes: int, in_channels: int, img_size: int, overrides: dict) -> Row:

    config = load_config(None, {**overrides, "model.name": name})
    return _row("", config, n_classes, in_channels, img_size, "")


def _row(config_name: str, config: ResolvedConfig, n_classes: int, in_channels: int, img_size: int, published: str) -> Row:
    from engine.run.macs import count

    counted = count(_without_weights(config, n_classes, in_channels, img_size), in_channels, img_size)
    return Row(
        config_name,
        config.model.name,
        img_size,
        n_classes,
        counted.params,
        counted.macs,
        published,
        counted.stages,
        counted.not_counted,
    )


def _without_weights(config: ResolvedConfig, n_classes: int, in_channels: int, img_size: int) -> "nn.Module":
    """The network with zeros for weights: initial ones take longer than counting."""
    import torch

    from engine.build import task_kind

    own = not config.model.name.startswith("timm/")  # timm computes with numbers while it builds
    try:
        with torch.device("meta" if own else "cpu"):
            model = task_kind(config).create_model(config, n_classes=n_classes, in_channels=in_channels, img_size=img_size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {config.model.name}: {error}") from error
    if not own:
        return model
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):  # a detector's proposals must be numbers
        tensor.detach().zero_()
    return model


if __name__ == "__main__":
    sys.exit(run_tool(main))
