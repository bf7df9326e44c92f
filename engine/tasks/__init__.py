"""What differs between tasks, and nothing else does: how a batch becomes a loss, a metric, a picture.

A file here holds a table TASKS, name -> TaskKind, and is found by being here. Instead of a TaskKind there may be a bare function
that makes the task of a config and its data: such a task has the models and the data of classification.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from engine.config.resolve import LoadedConfig
from models import create_model
from models.loading.registry import Registry, did_you_mean


class Metric(Protocol):
    """What an evaluation counts, batch by batch."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def sums(self) -> Tensor | list[Any]:
        """What was counted on this rank: a tensor, which is added up over ranks, or a list, which is joined."""

    def compute(self, sums: Any) -> dict[str, Any]:
        """Numbers by name and, from a task `with_tables`, those tables."""


class Task(Protocol):
    monitor: str  # the metric by which the best checkpoint is chosen; higher is better
    shown: tuple[str, ...]  # metrics that are parts of 1, in percent in a line of the log

    def weight(self, batch: Any) -> int | Tensor:
        """What the loss is divided by: a number that is the same on every rank, or a tensor that is added up over them."""

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch, and the sums that the log shows divided by the weight."""

    def metric(self, device: Any) -> Metric: ...

    def with_tables(self, *tables: str) -> "Task":
        """A task whose metric also gives these, such as per_class: what is no single number, and goes into no log."""

    def predict(self, model: nn.Module, batch: Any) -> Tensor: ...

    def draw(self, images: Tensor, batch: Any, predictions: Tensor) -> Any:
        """A figure of images with truth and prediction."""


MakeTask = Callable[..., Task]  # make(config: LoadedConfig, data: Data) -> Task


def create_classifier(config: LoadedConfig, **options: Any) -> nn.Module:
    return create_model(config.model.name, **options, **config.model.args)


@dataclass(frozen=True)
class TaskKind:
    """A task before its data are there: what it is made of."""

    make: MakeTask
    create_model: Callable[..., nn.Module] = create_classifier  # create_model(config, n_classes=..., in_channels=..., ...)
    targets: str = "classes"  # of a data set: classes, masks, boxes
    other_keys: tuple[str, ...] = ()  # keys that are for other tasks only


def _entries(table: Mapping[str, TaskKind | MakeTask]) -> dict[str, TaskKind]:
    return {name: kind if isinstance(kind, TaskKind) else TaskKind(kind) for name, kind in table.items()}


TASKS: Registry[str, TaskKind] = Registry("task", "engine.tasks", "TASKS", _entries)


def find_task(name: str) -> TaskKind:
    if name not in TASKS.entries:
        names = {known: known for known in TASKS.entries}
        hint = did_you_mean(name, names, f"there are {', '.join(sorted(names))}")
        raise ValueError(f"unknown task {name!r}: {hint}")
    return TASKS.entries[name]
