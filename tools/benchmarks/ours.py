"""This project's side of what is compared: its own engine, told only to say when a step begins."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.train import evaluate_split, train_batches
from tools.benchmarks.sides import Turns

if TYPE_CHECKING:
    from datasets.pipeline.splits import Loaded, Source
    from engine.build import Run
    from engine.config.resolve import ResolvedConfig

EXAMPLES_OF_A_TENSOR = 1000  # numbers that are compared of each tensor of weights
UNKNOWN_CLASSES = 1000  # where only the files of a data set would say how many there are


def train(config: str, overrides: Mapping[str, Any], exp_dir: Path, turns: Turns | None) -> None:
    """A training with all that belongs to it. Of several ranks only the first has turns; the others wait for it by themselves."""
    from engine import load_config
    from engine import train as train_as_configured

    if turns is not None:
        _count_steps(turns)
    train_as_configured(load_config(config, overrides), exp_dir=exp_dir)


def resume(run_dir: Path, overrides: Mapping[str, Any], turns: Turns) -> None:
    """A training that goes on from its latest checkpoint."""
    from engine import load_config
    from engine import train as train_as_configured

    _count_steps(turns)
    train_as_configured(load_config(run_dir / "config.yaml", overrides), exp_dir=run_dir, resume="latest")


def _count_steps(turns: Turns) -> None:
    from engine.build import Run

    batches = Run.train_batches
    Run.train_batches = lambda run, first: turns.counted(batches(run, first), run.batch_size)


def evaluate(config: str, overrides: Mapping[str, Any], turns: Turns) -> None:
    """Evaluations of the validation split, one after the other."""
    from engine import load_config
    from engine.build import build
    from engine.devices.accelerator import make_accelerator

    loaded = load_config(config, overrides)
    run = build(loaded, make_accelerator(loaded.train, deterministic=loaded.deterministic))
    loader = run.data.loader("valid")
    batches = loader.batches
    loader.batches = lambda: turns.counted(batches(), loaded.eval.batch_size)
    while True:
        evaluate_split(run, "valid")


def update(config: str, overrides: Mapping[str, Any], turns: Turns) -> None:
    """The engine's updates alone, on random images; notes what the first one did to the weights."""
    run = built_on_random_images(config, overrides)
    run.n_steps = sys.maxsize
    run.model.train()
    before = _some_of(run)
    for batch in turns.counted(train_batches(run, 0), run.batch_size):
        run.update(run.state, batch, measure=False)
        if run.state.step == 1:
            turns.note = {
                "loss": float(run.state.window["loss"] / run.state.window["weight"]),
                "change": (_some_of(run) - before).tolist(),
            }


def infer(config: str, overrides: Mapping[str, Any], turns: Turns) -> None:
    """The model as it would train, on one batch of random images."""
    import torch

    run = built_on_random_images(config, overrides)
    images, _ = next(iter(train_batches(run, 0)))
    model = run.update.model.eval()
    with torch.inference_mode():
        for batch in turns.counted(repeat(images), len(images)):
            model(batch)


def built_on_random_images(config: str, overrides: Mapping[str, Any]) -> "Run":
    """As the config says but for its data, which are held in memory and have the same shape."""
    from datasets.pipeline.catalog import DATASETS
    from datasets.pipeline.splits import DatasetSpec
    from engine import load_config
    from engine.build import build, dataset_spec
    from engine.devices.accelerator import make_accelerator

    loaded = load_config(config, overrides)
    accelerator = make_accelerator(loaded.train, deterministic=loaded.deterministic)
    spec: DatasetSpec = dataset_spec(loaded)
    n_images = 4 * loaded.train.batch_size

    def load(source: "Source") -> "Loaded":
        return _random_images(n_images, spec, source, loaded)

    DATASETS.register([replace(spec, name="random images", load=load, in_files=False)], "the benchmark")
    loaded.data.name, loaded.data.args = "random images", {}
    return build(loaded, accelerator)


def _random_images(n: int, spec: Any, source: "Source", config: "ResolvedConfig") -> "Loaded":
    import torch

    from datasets.pipeline.splits import Images, Loaded

    size = source.img_size or spec.img_size
    n_classes = spec.n_classes or source.n_classes or UNKNOWN_CLASSES
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randint(0, 256, (n, spec.channels, size, size), dtype=torch.uint8, generator=generator)
    split = Images(images, torch.arange(n) % n_classes)
    return Loaded(split, split, tuple(f"class {i}" for i in range(n_classes)))


def _some_of(run: "Run") -> Any:
    """Numbers from all over the weights."""
    import torch

    parameters = [p.detach().flatten() for p in run.model.parameters() if p.requires_grad]
    return torch.cat([p[:: max(1, len(p) // EXAMPLES_OF_A_TENSOR)] for p in parameters]).double().cpu()
