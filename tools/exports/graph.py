"""The computation as one file that needs none of this project's code: ONNX, or torch.export's."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from datasets.pipeline.augment import Normalize
from engine.config.errors import RunError
from tools.exports.exportable import Exportable, complete, expect_equal
from tools.exports.fold import fold_batch_norm

INPUT, OUTPUT = "images", "logits"
DESCRIPTION = "description.json"  # in the file of torch.export
TRACED_SIZE, CHECKED_SIZES = 2, (1, 5)  # batches

InputType = Literal["uint8", "float32"]


class WithPreprocessing(nn.Module):
    """Bytes in, logits out."""

    def __init__(self, model: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", normalize.scale)
        self.register_buffer("shift", normalize.shift)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(torch.float32) * self.scale + self.shift)


@dataclass(frozen=True)
class Graph:
    """What is exported, in the form that a file holds."""

    program: ExportedProgram
    description: dict[str, Any]
    eager: Callable[[Tensor], Tensor]  # what it must equal
    batches: list[Tensor]  # to compare them on
    said: str


def trace(exportable: Exportable, input_type: InputType, *, fold_bn: bool) -> Graph:
    normalize, model = exportable.normalize, exportable.model
    traced, *batches = [exportable.images(n) for n in (TRACED_SIZE, *CHECKED_SIZES)]
    with _quiet(), _explained(f"{exportable.name} can't be traced by torch.export"):
        eager, said = model, ""
        if fold_bn:
            model, n_folded, n_left = fold_batch_norm(model, normalize(traced))
            said = f", {n_folded} BatchNorms folded, {n_left} left"
        if input_type == "uint8":
            eager, model = (WithPreprocessing(each, normalize).eval() for each in (eager, model))
        else:
            traced, *batches = map(normalize, (traced, *batches))
        program = torch.export.export(model, (traced,), dynamic_shapes=({0: Dim("batch")},))
    shape = f"{exportable.channels} x {exportable.img_size} x {exportable.img_size}"
    values = {"uint8": "0 to 255, normalized by the graph", "float32": "(value / 255 - mean) / std"}[input_type]
    description = {**exportable.describe(), "input": f"{input_type}, batch x {shape}, {values}"}
    said = f"{INPUT} {input_type} N x {shape} -> {OUTPUT} N x {len(exportable.classes)}{said}"
    return Graph(program, description, eager, batches, said)


def write_onnx(graph: Graph, path: Path, opset: int) -> str:
    """Gives what there is to say of the file."""
    with complete(path.parent) as folder, _quiet():
        with _explained(f"{graph.description['model']} can't be translated to ONNX"):
            onnx = torch.onnx.export(
                graph.program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        for key, value in graph.description.items():
            onnx.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
        onnx.save(str(folder / path.name))
        checked = expect_equal(_onnx_runtime(folder / path.name), graph.eager, graph.batches, str(path))
    return f"ONNX of opset {onnx.model.opset_imports['']}, {graph.said}; in ONNX Runtime {checked}"


def write_torch(graph: Graph, path: Path) -> str:
    """Gives what there is to say of the file."""
    with complete(path.parent) as folder, _quiet():
        description = json.dumps(graph.description, indent=2)
        torch.export.save(graph.program, folder / path.name, extra_files={DESCRIPTION: description})
        checked = expect_equal(torch.export.load(folder / path.name).module(), graph.eager, graph.batches, str(path))
    return f"torch.export's program, {graph.said}; {checked}"


def _onnx_runtime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a model that isn't made for it makes torch stumble over
        raise RunError(f"{what}: {(str(error) or type(error).__name__).strip().splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
