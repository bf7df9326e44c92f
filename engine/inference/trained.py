"""A trained model, which the tools work on: from a run folder, a checkpoint, or by name with published weights.

Its data are read on first use, so that it can be used on machines without them.
"""

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
from engine import load_config
from engine.build import Data, blank_model, build_model, dataset_spec, described_data, load_data, preparation, task_kind
from engine.config.errors import ConfigError, RunError
from engine.config.schema import Config
from engine.devices.accelerator import make_accelerator
from engine.evaluate import evaluate
from engine.plugins import require_run_plugins
from engine.run.checkpoint import read_checkpoint
from engine.run.folder import CATEGORY_IDS, CLASSES, CONFIG, THRESHOLDS, find_checkpoint, read_replaceable
from engine.tasks import HasThresholds, Task
from models import model_signature, published_with
from models.loading.files import MalformedFile, read_json
from models.loading.pretrained import label_names, n_classes_in, published_classes, set_as_published

FOR_TRAINING_ONLY: dict[str, Any] = {"distill.teacher": None, "tracking.to": []}  # overrides for using a trained model


@dataclass(frozen=True)
class Trained:
    config: Config
    accelerator: Accelerator
    model: nn.Module
    task: Task
    classes: tuple[str, ...]  # the model's; its data may have others, as CIFAR-10 has for a model of ImageNet
    weights: str  # where they came from, for people
    checkpoint: Path | None = None  # None for a model by name
    step: int = 0
    category_ids: Sequence[int | None] | None = None  # of the classes in the files it was trained on, where they aren't 0, 1, ...

    @property
    def run_dir(self) -> Path | None:
        return self.checkpoint.parent.parent if self.checkpoint is not None else None

    @cached_property
    def data(self) -> Data:
        return load_data(self.config, self.accelerator)

    @cached_property
    def prepare(self) -> Preparation:
        """How images are prepared for an evaluation."""
        spec = dataset_spec(self.config)
        return preparation(self.config, spec, self.config.eval.img_size or self.config.data.img_size or spec.img_size)

    @cached_property
    def normalize(self) -> Normalize | Unscaled:
        if dataset_spec(self.config).targets == "boxes":  # a detector normalizes images itself
            return Unscaled()
        prepare = self.prepare
        return Normalize(prepare.mean, prepare.std, prepare.img_size, self.accelerator.device)

    def loader(self, split: str) -> EvalLoader:
        """Return the loader of a split, with a progress bar; `test` is the validation split if there is no separate one."""
        return Shown(self.data.loader(split if split in self.data.splits else "valid"), split)

    def evaluate(self, split: str) -> dict[str, Any]:
        self.require_same_classes()
        return evaluate(self.model, self.loader(split), self.task, self.accelerator)

    def require_same_classes(self) -> None:
        """Raise RunError unless the data have the model's classes, which telling right from wrong needs."""
        own, given = len(self.classes), len(self.data.classes)
        if own != given:
            raise RunError(f"{self.weights}: the model has {own:,} classes, and {self.data.spec.name} has {given:,}")


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
    """Load a run folder's best checkpoint, a checkpoint, or a model by name.

    For a name, `config` describes the data (default: ImageNet), and the weights are the published ones or those of the file
    `model.pretrained`. With `averaged`, the weights are a run's moving average (train.ema).
    """
    name = str(source)
    is_path = Path(name).expanduser().exists() or isinstance(source, Path)  # an existing file or folder is a path
    is_path |= not name.startswith("timm/") and (os.sep in name or name.startswith((".", "~")))
    if not is_path:
        try:
            model_signature(name)
        except ValueError as error:
            raise RunError(f"{name} is neither a run folder with a checkpoint, nor a checkpoint, and an {error}") from error
        if averaged:
            raise ConfigError(f"averaged weights belong to a run, and {source} is the name of a model")
        return _by_name(name, overrides, config)
    folder = find_checkpoint(Path(source))
    if config is not None:
        raise ConfigError(f"-c {config}", f"{source} is a run, which has a config", "options such as --data.dataroot change it")
    return _from_run(folder, overrides, averaged)


def _from_run(folder: Path, overrides: Mapping[str, Any], averaged: bool) -> Trained:
    run_dir = folder.parent.parent
    require_run_plugins(run_dir)
    config = load_config(run_dir / CONFIG, {**FOR_TRAINING_ONLY, **overrides})
    checkpoint = read_checkpoint(folder)
    weights = checkpoint.ema_weights if averaged else checkpoint.weights
    if weights is None:
        raise RunError(f"{folder} has no averaged weights; train.ema makes them")
    accelerator = make_accelerator(config.train, deterministic=config.deterministic)
    written = read_replaceable(run_dir, CLASSES, list)
    classes = list(map(str, written)) or load_data(config, accelerator).classes
    model = blank_model(config, classes)
    if config.model.pretrained is True:
        set_as_published(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder} doesn't fit the config: {str(error).splitlines()[1].strip()}") from error
    trained = _trained(config, accelerator, model, classes, str(folder))
    if isinstance(trained.task, HasThresholds):
        thresholds = read_replaceable(run_dir, THRESHOLDS, dict)
        if not all(isinstance(value, float) and 0 <= value <= 1 for value in thresholds.values()):
            raise RunError(f"{run_dir / THRESHOLDS}: a threshold is not a number from 0 to 1")
        trained.task.set_thresholds(thresholds)
    ids, path = None, run_dir / CATEGORY_IDS
    try:
        ids = read_json(path)
        if not isinstance(ids, list) or len(ids) != len(classes) or not all(type(i) is int or i is None for i in ids):
            raise MalformedFile(path, f"it is not a list of {len(classes)} whole numbers")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RunError(str(error)) from error
    return replace(trained, checkpoint=folder, step=checkpoint.step, category_ids=ids)


def _by_name(name: str, overrides: Mapping[str, Any], path: str | Path | None) -> Trained:
    """Load a model by name.

    For published weights images are prepared as they were trained with, unless options say otherwise; for a file of weights, as
    the config says.
    """
    published, source = published_with(name), overrides.get("model.pretrained", True)
    if published is None and (path is None or source is True):
        hint = "--model.pretrained FILE names some, and -c CONFIG says for which data"
        raise ConfigError(name, "there are no published weights", hint)
    imagenet = {"data.name": "ImageNet", "data.img_size": None} if path is None else {}
    given = {**overrides, "model.name": name, "model.pretrained": source}
    config = load_config(path, {**imagenet, **given})
    if published is not None and (path is None or source is True):
        spec = dataset_spec(config)
        prepared: dict[str, Any] = {"data.img_size": published.img_size}
        if spec.channels == len(published.mean):
            prepared |= {"data.mean": list(published.mean), "data.std": list(published.std)}
        if spec.in_files:
            prepared |= {"augment.crop_pct": published.crop_pct, "augment.interpolation": published.interpolation}
        config = load_config(path, {**imagenet, **prepared, **given})
    accelerator = make_accelerator(config.train, deterministic=config.deterministic)
    classes, category_ids = _classes_of(config, accelerator, has_data=path is not None)
    pretrained = config.model.pretrained
    weights = f"the {'published' if pretrained else 'initial'} weights of {name}" if isinstance(pretrained, bool) else pretrained
    trained = _trained(config, accelerator, build_model(config, described_data(config, classes)), classes, weights)
    return replace(trained, category_ids=category_ids)


def _classes_of(config: Config, accelerator: Accelerator, *, has_data: bool) -> tuple[Sequence[str], Sequence[int | None] | None]:
    """Return the classes of a model by name, and their category ids: those of its data, or of the published weights."""
    category_ids = None
    file, published = config.model.pretrained, published_with(config.model.name)
    try:
        named = label_names(Path(file)) if isinstance(file, str) else None
    except OSError as error:
        raise RunError(f"model.pretrained: {error}") from error
    if named:
        classes: Sequence[str] = named
    elif (has_data and file is not True) or published is None:
        data = load_data(config, accelerator)
        classes = data.classes
        category_ids = data.category_ids
    else:
        classes = published_classes(published.n_classes)
    if isinstance(file, str):
        try:
            n_classes = n_classes_in(Path(file), blank_model(config, classes))
        except OSError as error:
            raise RunError(f"model.pretrained: {error}") from error
        except ValueError as error:
            raise ConfigError("model.pretrained", str(error)) from error
        if n_classes != len(classes):
            if named:
                raise ConfigError("model.pretrained", f"{file}: {len(named)} names in config.json for {n_classes} classes")
            return published_classes(n_classes), None
    return classes, category_ids


def _trained(config: Config, accelerator: Accelerator, model: nn.Module, classes: Sequence[str], weights: str) -> Trained:
    accelerator.prepare_model(model, evaluation_mode=True)
    task = task_kind(config).make(config, described_data(config, classes))
    return Trained(config, accelerator, model.eval(), task, tuple(classes), weights)
