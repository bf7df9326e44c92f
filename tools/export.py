#!/usr/bin/env python
"""Make of a trained model what other programs load: ONNX, torch.export's file, a folder for timm and the Hugging Face Hub."""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import require_packages, run_tool
from engine.config.errors import ConfigError
from engine.plugins import Parser

if TYPE_CHECKING:
    from engine.inference.trained import Trained

EXAMPLES = """
A run folder stands for its best checkpoint. Each export is compared with the model that it was made of before it is put in its
place, on batches of other sizes than the one it was traced with.

examples:
  python tools/export.py onnx runs/first
  python tools/export.py onnx runs/first --fold_bn --input float32 -o first.onnx
  python tools/export.py torch runs/first/ckpt/latest --ema
  python tools/export.py timm runs/first --license cc-by-4.0
"""
DEFAULT_OPSET = 18  # the one that torch's exporter is written for


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="export.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="FORMAT")
    onnx = _add(commands, "onnx", to_onnx, "an ONNX file for any number of images at a time")
    onnx.add_argument("--opset", type=int, default=DEFAULT_OPSET, help=f"of ONNX (default: {DEFAULT_OPSET})")
    torch = _add(commands, "torch", to_torch, "a file of torch.export (.pt2) for any number of images at a time")
    for graph in (onnx, torch):
        graph.add_argument(
            "--input",
            choices=("uint8", "float32"),
            default="uint8",
            help="uint8: the graph takes bytes and normalizes them itself; float32: it takes normalized images (default: uint8)",
        )
        graph.add_argument("--fold_bn", action="store_true", help="fold BatchNorm into the layers before it")
    timm = _add(commands, "timm", to_timm, "a folder with weights, timm's config.json, and a model card")
    timm.add_argument("--license", help="of the weights, as the Hugging Face Hub calls it; without it, the card names none")

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in commands.choices:
        parser.parse_args(argv[:1])  # answers --help, and refuses everything else
    args, overrides = commands.choices[argv[0]].parse_with_overrides(argv[1:])
    return args.run(args, overrides)


def _add(commands: Any, name: str, run: Any, what: str) -> ArgumentParser:
    command = commands.add_parser(name, help=what, description=f"Export {what}.", epilog=EXAMPLES)
    command.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="or a model's name, for its published weights")
    command.add_argument("-o", "--output", type=Path, help="default: the folder `export` of the run")
    command.add_argument("--ema", action="store_true", help="the averaged weights of train.ema")
    command.set_defaults(run=run)
    return command


def to_onnx(args: Namespace, overrides: dict[str, Any]) -> int:
    require_packages("onnx", "onnxscript", "onnxruntime", needed_by="export.py onnx")
    trained = _load(args, overrides)
    from tools.exports.exportable import exportable_from
    from tools.exports.graph import trace, write_onnx

    path = _output(args, trained, ".onnx")
    graph = trace(exportable_from(trained), args.input, fold_bn=args.fold_bn)
    print(f"wrote {path}: {write_onnx(graph, path, args.opset)}")
    return 0


def to_torch(args: Namespace, overrides: dict[str, Any]) -> int:
    trained = _load(args, overrides)
    from tools.exports.exportable import exportable_from
    from tools.exports.graph import trace, write_torch

    path = _output(args, trained, ".pt2")
    graph = trace(exportable_from(trained), args.input, fold_bn=args.fold_bn)
    print(f"wrote {path}: {write_torch(graph, path)}")
    return 0


def to_timm(args: Namespace, overrides: dict[str, Any]) -> int:
    trained = _load(args, overrides)
    from tools.exports.card import model_card
    from tools.exports.exportable import exportable_from
    from tools.exports.folder import write_folder

    exportable, path = exportable_from(trained), _output(args, trained, "")

    def card(in_timm: bool) -> str:
        return model_card(trained, exportable, averaged=args.ema, license=args.license, in_timm=in_timm)

    print(f"wrote {path}: {write_folder(exportable, path, card)}")
    return 0


def _load(args: Namespace, overrides: dict[str, Any]) -> "Trained":
    from engine.inference.trained import load_trained

    return load_trained(args.source, overrides, averaged=args.ema)


def _output(args: Namespace, trained: "Trained", ending: str) -> Path:
    if args.output is not None:
        if ending and args.output.suffix != ending:
            raise ConfigError(f"-o {args.output}: the name of this file ends in {ending}")
        return args.output
    folder = trained.run_dir / "export" if trained.run_dir is not None else Path("export")
    return folder / (re.sub(r"\W+", "-", trained.config.model.name) + ending)


if __name__ == "__main__":
    sys.exit(run_tool(main))
