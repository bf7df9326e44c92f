"""What differs between tasks, and nothing else does: how a batch becomes a loss, a metric, a picture.

A file here holds a table TASKS, name -> what makes the task of a config and its data, and is found by being here.
"""

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Metric(Protocol):
    """Sums over batches that can be added up over ranks."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def sums(self) -> Tensor: ...

    def compute(self, sums: Tensor) -> dict[str, Any]:
        """Numbers by name and, from a task `with_tables`, those tables."""


class Task(Protocol):
    monitor: str  # the metric by which the best checkpoint is chosen; higher is better

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


@cache
def _tasks() -> dict[str, MakeTask]:
    tasks: dict[str, MakeTask] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        tasks |= getattr(importlib.import_module(f"engine.tasks.{module.name}"), "TASKS", {})
    return tasks


def find_task(name: str) -> MakeTask:
    if name not in _tasks():
        near = get_close_matches(name, list(_tasks()), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_tasks()))}"
        raise ValueError(f"unknown task {name!r}: {hint}")
    return _tasks()[name]


def register_tasks(tasks: dict[str, MakeTask], source: str) -> None:
    """Make tasks from elsewhere available by name, like those of the files here."""
    if taken := sorted(tasks.keys() & _tasks().keys()):
        raise ValueError(f"{source} names its task {taken[0]!r}, which is taken")
    _tasks().update(tasks)
