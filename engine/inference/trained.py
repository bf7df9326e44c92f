"""A trained model: what the tools work on. It comes from a run folder, from a checkpoint, or by name with published weights.

Its data are read when they are first asked for, so that it can be used where they are not.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from datasets.pipeline.augment import Normalize
from datasets.pipeline.boxes import Unscaled
from datasets.pipeline.loaders import Batch, EvalLoader, Preparation
from engine.build import build_model, make_task
from engine.checks import check
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import LoadedConfig, load_config
from engine.data import Data, dataset_of, load_data, preparation
from engine.devices.accelerator import make_accelerator
from engine.evaluate import evaluate
from engine.plugins import expect_those_of
from engine.run.checkpoint import InvalidCheckpoint, read_checkpoint
from engine.run.folder import CLASSES, find_checkpoint
from engine.tasks import Task
from models import model_signature, published_with
from models.loading.pretrained import Published, n_classes_in, published_classes, set_as_published

FOR_TRAINING_ONLY = {"distill.teacher": None, "tracking.to": []}  # what a trained model must not be asked for again


@dataclass(frozen=True)
class Trained:
    config: LoadedConfig
    accelerator: Accelerator
    model: nn.Module
    task: Task
    classes: tuple[str, ...]  # that the model tells apart; its data may have others, as CIFAR-10 has for a model of ImageNet
    weights: str  # where they came from, for people
    checkpoint: Path | None = None  # None for a model by its name
    step: int = 0

    @property
    def run_dir(self) -> Path | None:
        return self.checkpoint.parent.parent if self.checkpoint is not None else None

    @cached_property
    def data(self) -> Data:
        return load_data(self.config, self.accelerator)

    @cached_property
    def prepare(self) -> Preparation:
        """How images are prepared for it when it is evaluated."""
        spec = dataset_of(self.config)
        return preparation(self.config, spec, self.config.eval.img_size or self.config.data.img_size or spec.img_size)

    @cached_property
    def normalize(self) -> Normalize | Unscaled:
        if dataset_of(self.config).targets == "boxes":  # a detector normalizes by itself
            return Unscaled()
        prepare = self.prepare
        return Normalize(prepare.mean, prepare.std, prepare.img_size, self.accelerator.device)

    def loader(self, split: str) -> EvalLoader:
        """Of a split; `test` is the validation split where none was kept apart. A progress bar shows how far it has been read."""
        return Shown(self.data.loader(split if split in self.data.splits else "valid"), split)

    def evaluate(self, split: str) -> dict[str, Any]:
        self.expect_its_classes()
        return evaluate(self.model, self.loader(split), self.task, self.accelerator)

    def expect_its_classes(self) -> None:
        """Where right and wrong are told apart, the data must have the model's classes."""
        own, given = len(self.classes), len(self.data.classes)
        if own != given:
            raise RunError(f"{self.weights}: the model tells {own:,} classes apart, and {self.data.spec.name} has {given:,}")


class Shown:
    """A loader with a progress bar."""

    def __init__(self, loader: EvalLoader, name: str) -> None:
        self.loader, self.name, self.n_common_batches = loader, name, loader.n_common_batches

    def batches(self) -> Iterator[Batch]:
        visible = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        return iter(tqdm(self.loader.batches(), self.name, self.n_common_batches, unit="batch", leave=False, disable=not visible))


def load_trained(
    source: str | Path, overrides: Mapping[str, Any], *, config: str | Path | None = None, averaged: bool = False
) -> Trained:
    """What `source` means: a run folder, a checkpoint, or the name of a model.

    For a name, `config` says with which data; without it, ImageNet is meant. Its weights are the published ones, or those of the
    file `model.pretrained`. With `averaged`, the weights are a run's moving average (train.ema).
    """
    name = _as_name(source)
    if name is not None:
        if averaged:
            raise ConfigError(f"averaged weights are a run's, and {source} is the name of a model")
        return _by_name(name, overrides, config)
    folder = find_checkpoint(Path(source))
    if config is not None:
        raise ConfigError(
            f"-c {config}: {source} is a run, which has a config of its own; options such as --data.dataroot change it"
        )
    return _of_run(folder, overrides, averaged)


def _as_name(source: str | Path) -> str | None:
    """The name of a model; None for a path. What is there as a run or a checkpoint is a path."""
    name = str(source)
    is_path = Path(name).expanduser().exists() or isinstance(source, Path)
    is_path |= not name.startswith("timm/") and (os.sep in name or name.startswith((".", "~")))
    if is_path:
        return None
    try:
        model_signature(name)
    except ValueError as error:
        raise RunError(f"{name} is no run folder with a checkpoint, no checkpoint, and an {error}") from error
    return name


# A run


def _of_run(folder: Path, overrides: Mapping[str, Any], averaged: bool) -> Trained:
    run_dir = folder.parent.parent
    expect_those_of(run_dir)
    config = load_config(run_dir / "config.yaml", {**FOR_TRAINING_ONLY, **overrides})
    check(config)
    try:
        checkpoint = read_checkpoint(folder)
    except InvalidCheckpoint as error:
        raise RunError(str(error)) from error
    if averaged and checkpoint.ema_weights is None:
        raise RunError(f"{folder} holds no averaged weights; train.ema makes them")
    accelerator = make_accelerator(config)
    written = run_dir / CLASSES
    classes = json.loads(written.read_text()) if written.is_file() else load_data(config, accelerator).classes
    model = _blank(config, classes)
    if config.model.pretrained is True:
        set_as_published(model)
    try:
        model.load_state_dict(checkpoint.ema_weights if averaged else checkpoint.weights)
    except RuntimeError as error:
        raise RunError(f"{folder} doesn't fit the config: {str(error).splitlines()[1].strip()}") from error
    trained = _trained(config, accelerator, model, classes, str(folder))
    return replace(trained, checkpoint=folder, step=checkpoint.step)


# A name


def _by_name(name: str, overrides: Mapping[str, Any], path: str | Path | None) -> Trained:
    config = _config_of(name, overrides, path)
    check(config)
    accelerator = make_accelerator(config)
    classes = _classes_of(config, accelerator, has_data=path is not None)
    weights = {True: f"the published weights of {name}", False: f"the initial weights of {name}"}
    model = build_model(config, _described(config, classes))
    return _trained(config, accelerator, model, classes, weights.get(config.model.pretrained, str(config.model.pretrained)))


def _config_of(name: str, overrides: Mapping[str, Any], path: str | Path | None) -> LoadedConfig:
    """Images are prepared as they were where the weights were published, unless the command line says otherwise; for a file of
    weights, as the config says that it was trained with."""
    published, source = published_with(name), overrides.get("model.pretrained", True)
    if published is None and (path is None or source is True):
        raise ConfigError(
            f"{name}: nobody publishes weights for it; --model.pretrained FILE gives some, and -c CONFIG says for which data"
        )
    of_imagenet = {"data.name": "ImageNet", "data.img_size": None} if path is None else {}
    config = load_config(path, {**of_imagenet, **overrides, "model.name": name, "model.pretrained": source})
    if path is not None and _model_in(path, overrides) != name:  # the arguments in there are another model's
        config.model.args = {key: value for key, value in config.model.args.items() if f"model.{key}" in overrides}
    if path is None or source is True:
        _prepare_as_published(config, published, overrides)
    return config


def _model_in(path: str | Path, overrides: Mapping[str, Any]) -> str:
    return load_config(path, {key: value for key, value in overrides.items() if not key.startswith("model.")}).model.name


def _prepare_as_published(config: LoadedConfig, published: Published, overrides: Mapping[str, Any]) -> None:
    spec = dataset_of(config)
    values: dict[str, Any] = {"data.img_size": published.img_size}
    if spec.channels == len(published.mean):
        values |= {"data.mean": list(published.mean), "data.std": list(published.std)}
    if spec.in_files:
        values |= {"augment.crop_pct": published.crop_pct, "augment.interpolation": published.interpolation}
    for key, value in values.items():
        if key not in overrides:
            section, _, last = key.partition(".")
            setattr(getattr(config, section), last, value)


def _classes_of(config: LoadedConfig, accelerator: Accelerator, *, has_data: bool) -> Sequence[str]:
    """What the outputs of a model by its name mean."""
    file, published = config.model.pretrained, published_with(config.model.name)
    of_data = has_data and file is not True
    classes = load_data(config, accelerator).classes if of_data else published_classes(published.n_classes)
    if isinstance(file, str):
        try:
            n_classes = n_classes_in(Path(file), _blank(config, classes))
        except OSError as error:
            raise RunError(f"model.pretrained: {error}") from error
        except ValueError as error:
            raise ConfigError(f"model.pretrained: {error}") from error
        if n_classes != len(classes):
            return published_classes(n_classes)
    return classes


# Either


def _blank(config: LoadedConfig, classes: Sequence[str]) -> nn.Module:
    """The model with its initial weights."""
    config = replace(config, model=replace(config.model, pretrained=False))
    return build_model(config, _described(config, classes))


def _described(config: LoadedConfig, classes: Sequence[str]) -> Data:
    """What is known of the data without reading them."""
    spec = dataset_of(config)
    return Data(spec, tuple(classes), config.data.img_size or spec.img_size, splits={}, loader={}.__getitem__)


def _trained(config: LoadedConfig, accelerator: Accelerator, model: nn.Module, classes: Sequence[str], weights: str) -> Trained:
    accelerator.prepare_model(model, evaluation_mode=True)
    task = make_task(config, _described(config, classes))
    return Trained(config, accelerator, model.eval(), task, tuple(classes), weights)
