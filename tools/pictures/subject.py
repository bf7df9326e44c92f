"""What a picture is of: a trained model, and images."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from datasets import Split
    from engine.config.schema import Config
    from engine.inference.trained import Trained
    from engine.tasks import Task

SOURCE = """
RUN_OR_MODEL is a run folder, whose best checkpoint counts, a checkpoint, or the name of a model of this project or of timm. A
name stands for its published weights or, with --model.pretrained FILE, for those of a file; -c says which data it is shown,
ImageNet without it.
"""
USAGE = "[-c CONFIG] [--ema] [-o PATH.png] [--show] [--key.sub value ...]"


BATCH = 64  # images that are read at a time


def add_source(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_MODEL")
    parser.add_argument("-c", "--config", help="for a model by its name: the config of its data")
    parser.add_argument("--ema", action="store_true", help="a run's averaged weights (train.ema)")


def add_split(parser: ArgumentParser) -> None:
    parser.add_argument("--split", default="valid", choices=("train", "valid", "test"), help="default: valid")


def add_images(parser: ArgumentParser, n: int) -> None:
    add_split(parser)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders or globs; without any, samples of the split")
    parser.add_argument("--n", type=int, default=n, help=f"how many samples, spread over the split (default: {n})")
    parser.add_argument("--samples", type=int, nargs="+", metavar="I", help="these samples of the split, counted from 0")


def open_source(args: Namespace, overrides: dict[str, Any]) -> "Trained":
    from engine.inference.trained import load_trained

    return load_trained(args.source, overrides, config=args.config, averaged=args.ema)


def expect_classes(task: "Task", config: "Config", what: str) -> None:
    from engine.tasks.classification import Classification

    if not isinstance(task, Classification):
        raise ConfigError(f"{what}: this picture is of classes, and task is {config.task}")


def name_of(trained: "Trained") -> str:
    return f"{trained.config.model.name} on {trained.config.data.name}"


@dataclass(frozen=True)
class Subjects:
    """Images that a model is looked at with."""

    inputs: "Tensor"  # as the model takes them
    images: "Tensor"  # as a person sees them: N C H W from 0 to 1
    names: Sequence[str]  # of the true classes, or of the files where nobody says the class
    labels: "Tensor | None"  # of the true classes, where they are the model's


def subjects_of(args: Namespace, trained: "Trained") -> Subjects:
    if args.images:
        return files_of(trained, args.images)
    return samples_of(trained, args.split, _samples_asked_for(args, trained))


def batches_asked_for(args: Namespace, trained: "Trained") -> "Iterator[Any]":
    """The same for a task whose images have no class: batches, as it takes them."""
    from engine.inference.images import batches_of as batches_of_files
    from engine.inference.images import find_images

    if args.images:
        return batches_of_files(trained, find_images(args.images), BATCH)
    return batches_of(trained, args.split, _samples_asked_for(args, trained))


def _samples_asked_for(args: Namespace, trained: "Trained") -> Sequence[int]:
    return args.samples or spread(expect_positive("--n", args.n), len(split_of(trained, args.split)))


def files_of(trained: "Trained", words: Sequence[str]) -> Subjects:
    import torch

    from engine.inference.images import batches_of, find_images

    paths = find_images(words)
    inputs = torch.cat([inputs for inputs, _ in batches_of(trained, paths, BATCH)])
    return Subjects(inputs, trained.normalize.undo(inputs), [path.name for path in paths], None)


def samples_of(trained: "Trained", split: str, indices: Sequence[int]) -> Subjects:
    import torch

    inputs, labels = map(torch.cat, zip(*batches_of(trained, split, indices), strict=True))
    names = [trained.data.classes[label] for label in labels.tolist()]
    are_its_own = len(trained.data.classes) == len(trained.classes)
    return Subjects(inputs, trained.normalize.undo(inputs), names, labels if are_its_own else None)


def batches_of(trained: "Trained", split: str, indices: Sequence[int]) -> "Iterator[Any]":
    """Some samples of a split, prepared as for an evaluation."""
    import torch

    from datasets.pipeline.loaders import Workers, eval_loader
    from engine.build import workers
    from engine.evaluate import readable
    from engine.inference.trained import Shown

    whole = split_of(trained, split)
    for sample in indices:
        if not 0 <= sample < len(whole):
            raise ConfigError(f"there is no sample {sample}: the split {split} has {len(whole):,}, counted from 0")
    part = whole.subset(torch.tensor(indices))
    several = workers(trained.config) if len(indices) > BATCH else Workers()  # one batch is there before they have started
    loader = eval_loader(part, BATCH, 0, 1, trained.prepare, several, trained.accelerator.device)
    return readable(Shown(loader, split).batches())


def split_of(trained: "Trained", name: str) -> "Split":
    """`test` is the validation split where none was kept apart."""
    return trained.data.splits.get(name, trained.data.splits["valid"])


def spread(n: int, n_there: int) -> list[int]:
    """n of n_there, evenly: a folder of images is sorted by class."""
    n = min(n, n_there)
    return [i * n_there // n for i in range(n)]


def expect_positive(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, got {value}")
    return value


def told_apart(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Each config or run by the last part of its path, or by the whole of it where two have the same."""
    lasts = [Path(path).name.removesuffix(".yaml") for path in paths]
    return [(last if lasts.count(last) == 1 else path, path) for last, path in zip(lasts, paths, strict=True)]
