"""What differs between tasks, and nothing else does: how a batch becomes a loss, a metric, a picture."""

from collections.abc import Sequence
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


__all__ = ["Metric", "Sequence", "Task"]
