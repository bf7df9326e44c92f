"""The model and the images of a picture, or of another tool."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import Split
from datasets.pipeline.loaders import Workers, eval_loader
from engine.build import workers
from engine.config.errors import ConfigError, RunError
from engine.config.schema import Config
from engine.evaluate import readable
from engine.inference.images import batches_of, find_images
from engine.inference.trained import Shown, Trained, load_trained
from engine.tasks import Task
from engine.tasks.classification import Classification


def open_source(args: Namespace, overrides: dict[str, Any]) -> Trained:
    return load_trained(args.source, overrides, config=args.config, averaged=args.ema)


def open_classifier(args: Namespace, overrides: dict[str, Any]) -> Trained:
    trained = open_source(args, overrides)
    require_classification(trained.task, trained.config, args.picture)
    return trained


def require_classification(task: Task, config: Config, what: str) -> None:
    if not isinstance(task, Classification):
        raise ConfigError(f"{what}: only for classification, and task is {config.task}")


def model_title(trained: Trained) -> str:
    return f"{trained.config.model.name} on {trained.config.data.name}"


def evaluate_with(trained: Trained, split: str, *tables: str) -> dict[str, Any]:
    """Evaluate a split. The result contains the tables, such as per_class or confusion, too."""
    return replace(trained, task=trained.task.with_tables(*tables)).evaluate(split)


@dataclass(frozen=True)
class Samples:
    batch: Any  # inputs and targets, for the task; targets are None for files, and for classes other than the model's
    images: Tensor  # the inputs without normalization: N C H W, from 0 to 1
    names: Sequence[str]  # true classes or, for files, file names


def read_images(args: Namespace, trained: Trained) -> Samples:
    """Read the images that the options of `add_images` select."""
    if args.images:
        return read_files(trained, args.images)
    n = require_positive("--n", args.n)
    return read_samples(trained, args.split, args.samples or spread(n, len(find_split(trained, args.split))))


def read_files(trained: Trained, patterns: Sequence[str]) -> Samples:
    paths = find_images(patterns)
    (batch,) = batches_of(trained, paths, batch_size=len(paths))
    return Samples(batch, trained.normalize.undo(batch[0]), [path.name for path in paths])


def read_samples(trained: Trained, split: str, indices: Sequence[int]) -> Samples:
    (batch,) = read_batches(trained, split, indices, batch_size=len(indices))
    inputs, targets = batch
    images, names = trained.normalize.undo(inputs), [f"sample {i}" for i in indices]
    if trained.data.spec.targets == "classes":
        names = [trained.data.classes[label] for label in targets.tolist()]
        if len(trained.data.classes) != len(trained.classes):
            targets = None
    return Samples((inputs, targets), images, names)


def read_batches(trained: Trained, split: str, indices: Sequence[int], batch_size: int) -> Iterator[Any]:
    """Read samples of a split, prepared as in an evaluation."""
    whole = find_split(trained, split)
    for sample in indices:
        if not 0 <= sample < len(whole):
            raise ConfigError(f"there is no sample {sample}: the split {split} has {len(whole):,}, counted from 0")
    part = whole.subset(torch.tensor(indices))
    # for a single batch, starting workers takes longer than reading
    loading = workers(trained.config) if len(indices) > batch_size else Workers()
    loader = eval_loader(part, batch_size, 0, 1, trained.prepare, loading, trained.accelerator.device)
    return readable(Shown(loader, split).batches())


def penultimate(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the inputs of the classifier layer, N x `num_features`, and moves them to the CPU."""
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise RunError(f"{type(model).__name__} has no forward_features or no forward_head, which split off the classifier")
    return lambda inputs: model.forward_head(model.forward_features(inputs), pre_logits=True).flatten(1).float().cpu()


def find_split(trained: Trained, name: str) -> Split:
    """The split of this name; `test` is the validation split if there is no separate one."""
    return trained.data.splits.get(name, trained.data.splits["valid"])


def spread(n: int, total: int) -> list[int]:
    """n of `total` indices, evenly spaced, since a folder of images is sorted by class."""
    n = min(n, total)
    return [i * total // n for i in range(n)]


def require_positive(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, got {value}")
    return value


def short_labels(paths: Sequence[str]) -> list[str]:
    """Label each config or run by the last part of its path, or by all of it if two last parts are the same."""
    names = [Path(path).name.removesuffix(".yaml") for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
