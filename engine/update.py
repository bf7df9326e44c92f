"""One update of the weights."""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from datasets.pipeline.counters import derive
from engine.config.errors import RunError
from engine.devices.accelerator import seed_device
from engine.devices.sharding import gathered
from engine.optim.averaging import Decay
from engine.optim.schedule import Schedule
from engine.optim.sharpness import Sharpness
from engine.state import TrainState
from engine.tasks import Task

log = logging.getLogger(__name__)

STEP = 3  # separates this use of the seed from the order's and the augmentation's


@dataclass
class Update:
    """Takes one step: learning rate, gradients over micro-batches, clipping, optimizer, average."""

    model: nn.Module  # with its wrappers: for several ranks, compiled
    task: Task
    accelerator: Accelerator
    schedule: Schedule
    micro_batch_size: int
    seed: int
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    sharpness: Sharpness | None = None
    most_skipped: int = 0  # 0: gradients are not checked
    averaging_decay: Decay | None = None

    def __call__(self, state: TrainState, batch: Any, *, measure: bool) -> None:
        """Take one step; with `measure`, put the gradient's norm into the window."""
        for group in state.optimizer.param_groups:
            group["lr"] = self.schedule(state.step, group["initial_lr"]) * group["lr_scale"]
        buffers = [buffer.clone() for buffer in state.model.buffers()] if self.most_skipped else []
        window = self._gradients(state.step, batch)
        if self.sharpness is not None:
            with self.sharpness.perturbed(state.model):
                self._gradients(state.step, batch)
        if measure or self.clip_grad_norm or self.clip_grad_value or self.most_skipped:
            self.accelerator.unscale_gradients(state.optimizer)
            grad_norm = self._clip()
            if measure:
                state.window["grad_norm"] = grad_norm
        if self.most_skipped and not math.isfinite(grad_norm):
            if state.scaler is not None:
                state.optimizer.step()  # the gradient scaler skips the step itself, and lowers its scale
            self._skip(state, buffers)
        else:
            state.skipped = 0
            state.add_to_window(window)
            state.optimizer.step()
            if state.ema is not None and self.averaging_decay is not None:
                with torch.no_grad():
                    state.ema.apply_update_(state.model, self.averaging_decay(state.step + 1))
        state.optimizer.zero_grad()
        state.step += 1

    def _gradients(self, step: int, batch: Any) -> dict[str, Any]:
        """Accumulate gradients over the micro-batches; return the sums for the log."""
        seed_device(derive(self.seed, STEP, step, self.accelerator.process_index), self.accelerator.device)
        weight = self.task.weight(batch)
        if isinstance(weight, Tensor):  # this rank's share of all ranks' weight: gradients are averaged over ranks, not added
            weight = self.accelerator.reduce(weight, reduction="sum") / self.accelerator.num_processes
        window: dict[str, Any] = {"weight": weight}
        n_samples = len(batch[0])
        size = self.micro_batch_size or n_samples
        for first in range(0, n_samples, size):
            micro_batch = tuple(part[first : first + size] for part in batch)
            with self.accelerator.no_sync(self.model) if first + size < n_samples else nullcontext():
                loss_sum, sums = self.task.loss_sum(self.model, micro_batch)
                self.accelerator.backward(loss_sum / weight)
            for name, value in sums.items():
                window[name] = window[name] + value.detach() if name in window else value.detach()
        return window

    def _skip(self, state: TrainState, buffers: list[Tensor]) -> None:
        """Undo what the forward pass changed. Gradients are the same on every rank, so all ranks skip together."""
        state.skipped += 1
        state.window.pop("grad_norm", None)
        if state.skipped > self.most_skipped:
            error = RunError(
                f"at step {state.step} the gradient was not finite for {state.skipped} updates in a row "
                f"(train.most_skipped {self.most_skipped}); a lower train.optim.lr or a warm-up may help"
            )
            error.on_every_rank = True
            raise error
        log.warning("step %d: non-finite gradient; skipping this update", state.step)
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _clip(self) -> Tensor:
        """Clip the gradients; return the norm that they had before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        if self.clip_grad_value:
            torch.nn.utils.clip_grad_value_(parameters, self.clip_grad_value)
        return gathered(norm)
