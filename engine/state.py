"""All that a run must remember. The learning rate, the position in the data and all randomness follow from `step`."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.devices.sharding import divided_state

COUNTERS = (
    "evaluations_since_best",
    "skipped",
    "step",
    "best_step",
    "best_metrics",
    "last_metrics",
    "open_line",
    "elapsed",
    "metrics_bytes",
)


@dataclass
class TrainState:
    model: nn.Module
    optimizer: Optimizer
    ema: nn.Module | None = None  # timm's ModelEmaV3, whose `module` is the averaged model
    scaler: torch.amp.GradScaler | None = None
    configured: tuple[str, ...] = ()  # options of the optimizer that the config gives; a checkpoint doesn't bring back older ones
    step: int = 0  # updates done
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation whose monitored metric is the highest
    last_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluations_since_best: int = 0
    skipped: int = 0  # updates left out in a row, since a gradient was no number
    open_line: dict[str, float] | None = None  # training metrics of this step, while its line isn't written
    elapsed: float = 0.0  # seconds since the run began, without the time between its sessions
    metrics_bytes: int = 0  # length of metrics.jsonl
    window: dict[str, Tensor] = field(default_factory=dict)  # sums since the last log line, on this rank

    def add_to_window(self, sums: dict[str, Tensor | float]) -> None:
        """Sums stay on the device, in double precision where the device has it."""
        for name, value in sums.items():
            if isinstance(value, Tensor):
                value = value.detach()
                value = value.double() if value.device.type != "mps" else value.float()
            self.window[name] = self.window[name] + value if name in self.window else torch.as_tensor(value, dtype=torch.float64)

    def note_evaluation(self, metrics: dict[str, float], monitor: str) -> bool:
        """Remember an evaluation; true if it is the best so far."""
        self.last_metrics = metrics
        is_best = all(map(math.isfinite, metrics.values())) and (
            not self.best_metrics or metrics[monitor] > self.best_metrics[monitor]
        )
        self.evaluations_since_best += 1
        if is_best:
            self.best_step, self.best_metrics, self.evaluations_since_best = self.step, metrics, 0
        return is_best

    def counters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COUNTERS}

    def state_dict(self, optimizer: dict[str, Any], windows: dict[str, Tensor]) -> dict[str, Any]:
        """Everything but the weights; the optimizer's state in whole tensors, and in `windows` the sums of every rank."""
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        return {"optimizer": optimizer, "scaler": scaler, "windows": windows, **self.counters()}

    def load_state_dict(self, saved: dict[str, Any], rank: int, world_size: int) -> None:
        options = [{name: group[name] for name in self.configured} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(divided_state(self.optimizer, saved["optimizer"]))
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])
        for name in COUNTERS:
            setattr(self, name, saved[name])
        for name, sums in saved["windows"].items():
            if len(sums) == world_size:
                self.window[name] = sums[rank].clone()
            else:  # another number of ranks: the first takes all that was summed up
                self.window[name] = sums.sum() if rank == 0 else torch.zeros((), dtype=sums.dtype)
