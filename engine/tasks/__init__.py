"""What differs between tasks: how a batch becomes a loss, a metric, a picture.

A module here has a table TASKS, name -> TaskKind, and is found because it lies here. Instead of a TaskKind the table may hold a
function that makes the task from the config and its data: such a task uses the models and the data of classification.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from engine.config.schema import Config
from models import create_model
from models.loading.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T", bound="BuiltInTask")


class Metric(Protocol):
    """What an evaluation counts, batch by batch."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def sums(self) -> Tensor | list[Any]:
        """Return the counts of this rank: a tensor, which is summed over ranks, or a list, which is concatenated."""

    def compute(self, sums: Any) -> dict[str, Any]:
        """Return numbers by name and, for a task `with_tables`, those tables; `samples` are the kind and values of scores."""


class Task(Protocol):
    @property
    def monitor(self) -> str:
        """The metric that chooses the best checkpoint; higher is better."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics that are shares of 1; a line of the log shows them in percent."""

    def weight(self, batch: Any) -> int | Tensor:
        """Return what the loss is divided by: a number that is the same on every rank, or a tensor that is summed over ranks."""

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch, and the sums that the log shows divided by the weight."""

    def metric(self, device: Any) -> Metric: ...

    def with_tables(self, *tables: Any) -> "Task":
        """Return a task whose metric also computes these tables, such as per_class, which no log shows."""

    def predict(self, model: nn.Module, batch: Any) -> Any: ...

    def draw(self, images: Any, batch: Any, predictions: Any) -> Any:
        """Return a figure of images with truth and prediction."""


@runtime_checkable
class HasThresholds(Protocol):
    """A task whose answers depend on a threshold for each class, which the validation split chooses at the end of a training.

    Its metric computes the table `thresholds`: class -> threshold.
    """

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None: ...


class BuiltInTask(ABC):
    """What the tasks of this folder have in common."""

    tables: tuple[str, ...] = ()  # that the metric computes in addition

    def with_tables(self: T, *tables: str) -> T:
        task = copy.copy(self)
        task.tables = tables
        return task

    def draw(self, images: Tensor, batch: Any, predictions: Any = None, figure: "Figure | None" = None) -> "Figure":
        from engine.plots.style import new_figure

        figure = figure or new_figure()
        self._draw_on(figure, images, batch, predictions)
        return figure

    @abstractmethod
    def _draw_on(self, figure: "Figure", images: Tensor, batch: Any, predictions: Any) -> None: ...


def loss_of_heads(
    outputs: Tensor | tuple[Tensor, ...], loss: Callable[[Tensor], Tensor], aux_weight: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the logits, the loss with that of auxiliary heads, and the sums of the log: the loss, and each auxiliary one."""
    logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    total, sums = loss(logits), {}
    for i, aux_logits in enumerate(auxiliary, start=1):
        sums[f"loss_aux{i}"] = loss(aux_logits)
        total = total + aux_weight * sums[f"loss_aux{i}"]
    return logits, total, {"loss": total, **sums}


MakeTask = Callable[[Any, Any], Task]  # make(config: Config, data: Data) -> Task


def summed(sums: Tensor | list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
    """Return the sums over ranks and, if each rank also kept the scores of its samples, those of all."""
    if isinstance(sums, Tensor):
        return sums, None
    parts, scores = zip(*sums, strict=True)
    return torch.stack(parts).sum(0), torch.cat(scores)


def create_classifier(config: Config, **options: Any) -> nn.Module:
    return create_model(config.model.name, **options, **config.model.args)


@dataclass(frozen=True)
class TaskKind:
    """A task before its data are read."""

    make: MakeTask
    create_model: Callable[..., nn.Module] = create_classifier  # create_model(config, n_classes=..., in_channels=..., ...)
    targets: str = "classes"  # of a dataset: classes, labels (several classes per image), masks, boxes
    other_keys: tuple[str, ...] = ()  # keys that are for other tasks only
    packages: tuple[str, ...] = ()  # that its metric imports; a training checks them before it reads data
    losses: tuple[str, ...] = ()  # accepted values of train.loss, the default first; empty: the task has a fixed loss


def _entries(table: Mapping[str, TaskKind | MakeTask]) -> dict[str, TaskKind]:
    return {name: kind if isinstance(kind, TaskKind) else TaskKind(kind) for name, kind in table.items()}


TASKS: Registry[str, TaskKind] = Registry("task", "engine.tasks", "TASKS", _entries)


def find_task(name: str) -> TaskKind:
    if name not in TASKS.entries:
        names = {known: known for known in TASKS.entries}
        hint = did_you_mean(name, names, f"there are {', '.join(sorted(names))}")
        raise ValueError(f"unknown task {name!r}: {hint}")
    return TASKS.entries[name]
