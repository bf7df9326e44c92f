"""This project's sides. No other benchmark module calls the engine's training code. Each side runs until it is stopped."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from datasets.pipeline.catalog import DATASETS
from datasets.pipeline.splits import Images, Loaded, Source
from engine import load_config
from engine import train as train_by_config
from engine.build import Run, build, dataset_spec
from engine.config.resolve import ResolvedConfig
from engine.config.schema import TrainConfig
from engine.devices.accelerator import make_accelerator
from engine.devices.memory import peak_memory
from engine.run.checkpoint import Checkpoints
from engine.train import evaluate_split, train_batches
from tools.benchmarks.report import ROOT
from tools.benchmarks.rivals import N_STEPS, Job, resnet_states
from tools.benchmarks.sides import Turns

Keys = Mapping[str, Any]  # overrides of a config

DEFAULT_BATCH_SIZE = TrainConfig().batch_size
VALUES_PER_TENSOR = 1000  # how many weights of each tensor are compared
UNKNOWN_CLASSES = 1000  # of a dataset that has to be read to count them


def config_of(job: Job) -> Path:
    return ROOT / "configs" / ("lenet_mnist.yaml" if job.channels == 1 else f"{job.model}_cifar10.yaml")


def keys_of(job: Job) -> dict[str, Any]:
    """Return the overrides that make the engine train this job, without an evaluation or checkpoint on the way."""
    length = {"train.n_epochs": None, "train.n_steps": N_STEPS, "train.eval_freq": N_STEPS, "train.save_freq": N_STEPS}
    data = {"data.dataroot": str(job.root), "data.verify": False, "data.download": False}
    return {**data, **length, "train.batch_size": job.batch_size}


def train(job: Job, keys: Keys, exp_dir: Path, turns: Turns | None, *, resume: bool = False) -> None:
    """Run a complete training. Of several ranks only rank 0 has turns; the others wait for it in each collective operation."""
    config = load_config(exp_dir / "config.yaml" if resume else config_of(job), {**keys_of(job), **keys})
    loop = import_module("engine.train")  # `engine.train` is the function
    counted = turns.counted if turns is not None else lambda batches, _: batches
    with patch.object(loop, "train_batches", lambda run, first: counted(train_batches(run, first), run.batch_size)):
        train_by_config(config, exp_dir=exp_dir, resume="latest" if resume else None)


def read(job: Job, keys: Keys, split: str, turns: Turns) -> None:
    """Read the batches of a training or a validation, without a model."""
    run = _build(load_config(config_of(job), {**keys_of(job), **keys}))
    while True:
        batches = train_batches(run, first=0) if split == "train" else run.data.loader(split).batches()
        for _ in turns.counted(batches, job.batch_size):
            pass


def evaluate(job: Job, turns: Turns) -> None:
    """Evaluate the validation split again and again."""
    run = _build(load_config(config_of(job), {**keys_of(job), "eval.batch_size": job.batch_size}))
    loader = run.data.loader("valid")
    batches = loader.batches
    with patch.object(loader, "batches", lambda: turns.counted(batches(), job.batch_size)):
        while True:
            evaluate_split(run, "valid")


def update(config: str | Path | None, keys: Keys, turns: Turns) -> None:
    """Run only the engine's updates, on random images. The note describes the first one: its loss and the change of weights."""
    run = _build_on_random_images(config, keys)
    run.model.train()
    before = _sample_weights(run)
    for batch in turns.counted(train_batches(run, first=0), run.batch_size):
        run.update(run.state, batch, measure=False)
        if run.state.step == 1:
            loss = float(run.state.window["loss"] / run.state.window["weight"])
            turns.note = {"loss": loss, "change": (_sample_weights(run) - before).tolist()}


def peak_of_updates(config: str | Path | None, keys: Keys, n: int) -> float:
    """Return the peak memory in MiB after `n` updates on random images."""
    run = _build_on_random_images(config, keys)
    run.model.train()
    for batch in islice(train_batches(run, first=0), n):
        run.update(run.state, batch, measure=False)
    return peak_memory(run.accelerator.device)


def infer(config: str | Path | None, keys: Keys, turns: Turns) -> None:
    """Call the model, prepared as for training, on one batch of random images."""
    run = _build_on_random_images(config, keys)
    images, model = next(iter(train_batches(run, first=0)))[0], run.update.model.eval()
    with torch.inference_mode():
        for batch in turns.counted(repeat(images), len(images)):
            model(batch)


def save(run_dir: Path, keep_last: int, turns: Turns) -> None:
    """Save a checkpoint of ResNet-18 again and again; one step per save."""
    (weights, optimizer), checkpoints = resnet_states(), Checkpoints(run_dir, keep_last=keep_last)
    for step in turns.counted(count(), 1):
        checkpoints.save(step, weights, {"optimizer": optimizer, "step": step}, best_step=None)


def _build_on_random_images(path: str | Path | None, keys: Keys) -> Run:
    """Build the run of a config, with random images of the dataset's shape in memory instead of the dataset."""
    config = load_config(path, keys)
    spec = dataset_spec(config)

    def load(source: Source, **_: Any) -> Loaded:
        size, n_images = source.img_size or spec.img_size, 4 * config.train.batch_size
        n_classes = spec.n_classes or source.n_classes or UNKNOWN_CLASSES
        torch.manual_seed(config.seed)
        images = torch.randint(0, 256, (n_images, spec.channels, size, size), dtype=torch.uint8)
        split = Images(images, torch.arange(n_images) % n_classes)
        return Loaded(split, split, tuple(f"class {i}" for i in range(n_classes)))

    DATASETS.register([replace(spec, name="random images", load=load, in_files=False)], "the benchmark")
    return _build(load_config(path, {**keys, "data.name": "random images"}))


def _build(config: ResolvedConfig) -> Run:
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    run.n_steps = sys.maxsize
    return run


def _sample_weights(run: Run) -> Tensor:
    """Return evenly spaced values of every trainable tensor."""
    parameters = [p.detach().flatten() for p in run.model.parameters() if p.requires_grad]
    return torch.cat([p[:: max(1, len(p) // VALUES_PER_TENSOR)] for p in parameters]).double().cpu()
