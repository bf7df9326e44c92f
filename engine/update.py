"""One update of the weights: learning rate, gradients over micro-batches, optimizer step."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from datasets.counters import derive
from engine.schedule import Schedule
from engine.state import TrainState
from engine.tasks import Task

STEP = 3  # separates this use of the seed from the order's and the augmentation's


@dataclass
class Update:
    model: nn.Module  # as it trains: wrapped for several ranks, compiled
    task: Task
    accelerator: Accelerator
    schedule: Schedule
    micro_batch_size: int
    seed: int

    def __call__(self, state: TrainState, batch: Any, *, measure: bool) -> None:
        """Take one step; with `measure` the gradient's norm is left in the window."""
        torch.manual_seed(derive(self.seed, STEP, state.step, self.accelerator.process_index))
        for group in state.optimizer.param_groups:
            group["lr"] = self.schedule(state.step, group["initial_lr"]) * group["lr_scale"]
        weight = self._weight(batch)
        parts = list(self._micro_batches(batch))
        for i, part in enumerate(parts, start=1):
            with self.accelerator.no_sync(self.model) if i < len(parts) else nullcontext():
                loss_sum, sums = self.task.loss_sum(self.model, part)
                self.accelerator.backward(loss_sum / weight)
            state.add_to_window(sums)
        state.add_to_window({"weight": weight})
        if measure:
            self.accelerator.unscale_gradients(state.optimizer)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            state.window["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1

    def _weight(self, batch: Any) -> float | Tensor:
        """This rank's share of the weight of the global batch: gradients are averaged over ranks, not added."""
        weight = self.task.weight(batch)
        if isinstance(weight, Tensor):
            weight = self.accelerator.reduce(weight, reduction="sum") / self.accelerator.num_processes
        return weight

    def _micro_batches(self, batch: Any) -> Iterator[Any]:
        size = self.micro_batch_size or len(batch[0])
        for first in range(0, len(batch[0]), size):
            yield tuple(part[first : first + size] for part in batch)
