"""The network and its preprocessing in one file that needs none of this project's code: ONNX, or torch.export's format.

BatchNorm can be folded into the convolution or linear layer before it: in evaluation mode the two are one linear map.
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from datasets.pipeline.augment import Normalize
from engine.config.errors import RunError
from tools.exports.exportable import Exportable, complete, expect_equal

INPUT, OUTPUT = "images", "logits"
DESCRIPTION = "description.json"  # inside of a torch.export file
TRACED_SIZE, CHECKED_SIZES = 2, (1, 5)  # of batches
FOLDED_INTO = ("aten.conv1d.", "aten.conv2d.", "aten.conv3d.", "aten.linear.")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class WithPreprocessing(nn.Module):
    """A network whose input is uint8 images."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", normalize.scale)
        self.register_buffer("shift", normalize.shift)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(torch.float32) * self.scale + self.shift)


@dataclass(frozen=True)
class Graph:
    """A traced network, with the original to compare it with."""

    program: ExportedProgram
    description: dict[str, Any]
    eager: nn.Module
    batches: list[Tensor]  # for the comparison
    summary: str


def trace(exportable: Exportable, input_type: Literal["uint8", "float32"], *, fold_bn: bool) -> Graph:
    normalize, eager = exportable.normalize, exportable.model
    traced, *batches = [exportable.images(n) for n in (TRACED_SIZE, *CHECKED_SIZES)]
    shape = f"{exportable.channels} x {exportable.img_size} x {exportable.img_size}"
    summary = f"{INPUT} {input_type} N x {shape} -> {OUTPUT} N x {len(exportable.classes)}"
    with _quiet(), _explained(f"{exportable.name} can't be traced by torch.export"):
        model = eager
        if fold_bn:
            model, n_folded, n_left = fold_batch_norm(model, normalize(traced))
            summary += f", {n_folded} BatchNorms folded, {n_left} left"
        if input_type == "uint8":
            eager, model = (WithPreprocessing(each, normalize).eval() for each in (eager, model))
        else:
            traced, *batches = map(normalize, (traced, *batches))
        program = torch.export.export(model, (traced,), dynamic_shapes=({0: Dim("batch")},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names the folders of this machine
    values = {"uint8": "0 to 255, normalized by the graph", "float32": "(value / 255 - mean) / std"}[input_type]
    description = {**exportable.describe(), "input": f"{input_type}, batch x {shape}, {values}"}
    return Graph(program, description, eager, batches, summary)


def write_onnx(graph: Graph, path: Path, opset: int) -> str:
    """Write and check an ONNX file; return a summary."""
    with complete(path.parent) as folder, _quiet():
        with _explained(f"{graph.description['model']} can't be translated to ONNX"):
            names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": ({0: "batch"},)}
            onnx = torch.onnx.export(graph.program, dynamo=True, opset_version=opset, verbose=False, **names)
        assert onnx is not None, "with dynamo=True, torch returns the program"
        for key, value in graph.description.items():
            onnx.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
        onnx.save(str(folder / path.name))
        difference = expect_equal(_onnx_runtime(folder / path.name), graph.eager, graph.batches, str(path))
    return f"ONNX of opset {onnx.model.opset_imports['']}, {graph.summary}; in ONNX Runtime {difference}"


def write_torch(graph: Graph, path: Path) -> str:
    """Write and check a torch.export file; return a summary."""
    with complete(path.parent) as folder, _quiet():
        description = json.dumps(graph.description, indent=2)
        torch.export.save(graph.program, folder / path.name, extra_files={DESCRIPTION: description})
        difference = expect_equal(torch.export.load(folder / path.name).module(), graph.eager, graph.batches, str(path))
    return f"torch.export's program, {graph.summary}; {difference}"


def _onnx_runtime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # from requirements-extra.txt

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def fold_batch_norm(model: nn.Module, images: Tensor) -> tuple[nn.Module, int, int]:
    """Return a folded copy of the model, how many of its BatchNorms are folded, and how many are left.

    A norm is folded if the output of the layer before it is used nowhere else, and if both are used only once.
    """
    model = copy.deepcopy(model)
    n_before = _count_norms(model)
    program = torch.export.export(model, (images,))
    names = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before, mean = node.args[0], node.args[3]
        if not str(before.target).startswith(FOLDED_INTO) or len(before.users) > 1:
            continue
        weight = before.args[1]
        if any(tensor.name not in names or len(tensor.users) > 1 for tensor in (weight, mean)):
            continue  # shared, or computed from a parameter, as with weight standardization
        norm_name = names[mean.name].rpartition(".")[0]
        layer: Any = model.get_submodule(names[weight.name].rpartition(".")[0])
        norm: Any = model.get_submodule(norm_name)
        if type(norm) is BatchNormAct2d:  # timm's, which holds an activation
            replacement: nn.Module = nn.Sequential(norm.drop, norm.act)
        elif type(norm) in NORMS:
            replacement = nn.Identity()
        else:
            continue
        fuse: Callable[..., Any] = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        statistics = (norm.running_mean, norm.running_var, norm.eps)
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics, norm.weight, norm.bias)
        model.set_submodule(norm_name, replacement)
    n_left = _count_norms(model)
    return model, n_before - n_left, n_left


def _count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch raises many kinds for a model that it can't export
        raise RunError(f"{problem}: {(str(error) or type(error).__name__).strip().splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log lines, which the exporters write for their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
