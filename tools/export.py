#!/usr/bin/env python
"""Export a trained model for other programs: as ONNX, as a torch.export file, or as a folder for timm and the Hub."""

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import require_packages, run_tool
from engine.config.errors import ConfigError
from engine.plugins import Parser
from tools.tables import print_lines

# torch and everything that needs it is imported inside a function, so that --help starts fast.

EXAMPLES = """
For a run folder, the best checkpoint is exported. Before an export is written, it is compared with the model on batches of other
sizes than the one it was traced with.

examples:
  python tools/export.py onnx runs/first
  python tools/export.py onnx runs/first --fold_bn --input float32 -o first.onnx
  python tools/export.py torch runs/first/ckpt/latest --ema
  python tools/export.py timm runs/first --license cc-by-4.0
"""
FORMATS = {
    "onnx": "an ONNX file for batches of any size",
    "torch": "a torch.export file (.pt2) for batches of any size",
    "timm": "a folder with weights, timm's config.json, and a model card",
}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "timm": ""}
DEFAULT_OPSET = 18  # the one that torch's exporter is written for


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="export.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="FORMAT")
    for name, content in FORMATS.items():
        command = commands.add_parser(name, help=content, description=f"Export {content}.", epilog=EXAMPLES)
        command.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="or the name of a model with published weights")
        command.add_argument("-o", "--output", type=Path, help="default: the folder `export` of the run")
        command.add_argument("--ema", action="store_true", help="export the averaged weights of train.ema")
        if name == "timm":
            command.add_argument("--license", help="license of the weights for the card, by its name on the Hugging Face Hub")
            continue
        types = "uint8: the graph normalizes the images itself; float32: the images are normalized already (default: uint8)"
        command.add_argument("--input", choices=("uint8", "float32"), default="uint8", help=types)
        command.add_argument("--fold_bn", action="store_true", help="fold BatchNorm into the layers before it")
        if name == "onnx":
            command.add_argument("--opset", type=int, default=DEFAULT_OPSET, help=f"ONNX opset (default: {DEFAULT_OPSET})")

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in FORMATS:
        parser.parse_args(argv[:1])  # prints --help, and rejects everything else
    name = argv[0]
    args, overrides = commands.choices[name].parse_with_overrides(argv[1:])
    if args.output is not None and not args.output.name.endswith(SUFFIXES[name]):
        raise ConfigError(f"-o {args.output}: the name of this file ends in {SUFFIXES[name]}")
    if name == "onnx":
        require_packages("onnx", "onnxscript", "onnxruntime", needed_by="export.py onnx")
    from engine.inference.trained import load_trained
    from tools.exports.exportable import exportable_from

    trained = load_trained(args.source, overrides, averaged=args.ema)
    exportable = exportable_from(trained)
    path = args.output
    if path is None:
        folder = trained.run_dir / "export" if trained.run_dir is not None else Path("export")
        path = folder / (re.sub(r"\W+", "-", exportable.name) + SUFFIXES[name])
    if name == "timm":
        from tools.exports.card import model_card
        from tools.exports.folder import write_folder

        make_card = partial(model_card, trained, exportable, averaged=args.ema, license=args.license)
        summary = write_folder(exportable, path, make_card)
    else:
        from tools.exports.graph import trace, write_onnx, write_torch

        graph = trace(exportable, args.input, fold_bn=args.fold_bn)
        summary = write_onnx(graph, path, args.opset) if name == "onnx" else write_torch(graph, path)
    print_lines(f"wrote {path}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
