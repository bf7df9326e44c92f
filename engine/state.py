"""All that a run must remember. The learning rate, the position in the data and all randomness follow from `step`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.config.errors import RunError
from engine.devices.sharding import gathered, load_weights, own_part, sharded_state
from engine.run.checkpoint import Checkpoint
from models.loading.files import first_line

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and _is_number(number) for name, number in value.items())


COUNTERS: dict[str, Callable[[Any], bool]] = {  # each with the test that a saved value must pass
    "evaluations_since_best": _is_count,
    "skipped": _is_count,
    "step": _is_count,
    "best_step": lambda value: value is None or _is_count(value),
    "best_metrics": _are_metrics,
    "last_metrics": _are_metrics,
    "open_line": lambda value: value is None or _are_metrics(value),
    "elapsed": lambda value: _is_number(value) and 0 <= value < math.inf,
    "metrics_bytes": _is_count,
}


@dataclass
class TrainState:
    model: nn.Module
    optimizer: Optimizer
    ema: "ModelEmaV3 | None" = None  # its `module` is the averaged model
    scaler: torch.amp.GradScaler | None = None
    configured: tuple[str, ...] = ()  # options of the optimizer that the config sets; a checkpoint does not restore older ones
    step: int = 0  # updates done
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation with the highest monitored metric
    last_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluations_since_best: int = 0
    skipped: int = 0  # updates in a row whose gradient was not finite
    open_line: dict[str, float] | None = None  # training metrics of this step until its line is written
    elapsed: float = 0.0  # seconds of training, over all sessions
    metrics_bytes: int = 0  # length of metrics.jsonl
    window: dict[str, Tensor] = field(default_factory=dict)  # sums since the last log line, on this rank

    def add_to_window(self, sums: dict[str, Tensor | float]) -> None:
        """Add to the window's sums. They stay on the device, in double precision if the device has it."""
        for name, value in sums.items():
            if isinstance(value, Tensor):
                value = value.detach()
                value = value.double() if value.device.type != "mps" else value.float()
            self.window[name] = self.window[name] + value if name in self.window else torch.as_tensor(value, dtype=torch.float64)

    def close_window(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the training metrics since the last log line, over all ranks, and start a new window."""
        grad_norm = self.window.pop("grad_norm", None)
        metrics: dict[str, float] = {}
        if names := sorted(self.window):  # empty if every update since the last line was skipped
            summed = accelerator.reduce(self._stacked(names, accelerator.device), reduction="sum").tolist()
            sums = dict(zip(names, summed, strict=True))
            weight = sums.pop("weight")
            metrics = {f"train/{name}": value / weight for name, value in sums.items()}
        self.window.clear()
        group = self.optimizer.param_groups[0]
        metrics["train/lr"] = group["lr"] / group["lr_scale"]
        if grad_norm is not None:
            metrics["train/grad_norm"] = float(grad_norm)
        return metrics

    def note_evaluation(self, metrics: dict[str, float], monitor: str) -> bool:
        """Remember an evaluation; return whether it is the best so far."""
        self.last_metrics = metrics
        is_higher = not self.best_metrics or metrics[monitor] > self.best_metrics[monitor]
        is_best = is_higher and all(map(math.isfinite, metrics.values()))
        self.evaluations_since_best += 1
        if is_best:
            self.best_step, self.best_metrics, self.evaluations_since_best = self.step, metrics, 0
        return is_best

    def is_finite(self, accelerator: Accelerator) -> bool:
        """Whether the weights, their average and the optimizer's state are, on every rank alike.

        Lion, for one, takes a NaN gradient into its state and keeps finite weights. Buffers may differ between ranks.
        """
        averaged = self.ema.module.state_dict() if self.ema is not None else {}
        values = [*self.model.state_dict().values(), *averaged.values(), *self.optimizer.state.values()]
        flags = [own_part(t).isfinite().all().to(accelerator.device) for t in _numbers(values)]
        n_bad = torch.stack(flags).logical_not().sum().float()
        return accelerator.reduce(n_bad, reduction="sum").item() == 0

    def content(self, accelerator: Accelerator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights and everything else of a checkpoint, in whole tensors. Every rank has to call it."""
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        windows: dict[str, Tensor] = {}  # the sums of every rank
        if names := sorted(name for name in self.window if name != "grad_norm"):
            every = accelerator.gather(self._stacked(names, accelerator.device).unsqueeze(0)).cpu()
            windows = {name: every[:, i].clone() for i, name in enumerate(names)}
        optimizer = gathered(self.optimizer.state_dict())
        state = {"optimizer": optimizer, "scaler": scaler, "windows": windows, **{name: getattr(self, name) for name in COUNTERS}}
        return gathered(self.model.state_dict()), state

    def restore(self, checkpoint: Checkpoint, rank: int, world_size: int) -> None:
        """Take over a verified checkpoint."""
        try:
            load_weights(self.model, checkpoint.weights)
            if self.ema is not None:  # an average that starts only now starts with the weights as they are
                self.ema.module.load_state_dict(checkpoint.ema_weights or checkpoint.weights)
            if checkpoint.train_state["step"] != checkpoint.step:
                raise ValueError(f"its training state is not of step {checkpoint.step}")
            self.load_state_dict(checkpoint.train_state, rank, world_size)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problem = first_line(str(error)) or type(error).__name__
            raise RunError(f"{checkpoint.path} doesn't fit the config: {problem}") from error

    def load_state_dict(self, saved: dict[str, Any], rank: int, world_size: int) -> None:
        for name, is_valid in COUNTERS.items():  # a value of a wrong type would end the training later
            if not is_valid(saved[name]):
                raise ValueError(f"{name} of its training state is not valid")
        windows = saved["windows"]
        if not all(isinstance(sums, Tensor) and sums.ndim == 1 and sums.is_floating_point() for sums in windows.values()):
            raise ValueError("the sums since its last log line are not valid")
        for group, restored in zip(self.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True):
            for name, value in restored.items():
                if name != "params" and not _is_alike(group.get(name), value):
                    raise ValueError(f"{first_line(name)} of its optimizer is not valid")
        options = [{name: group[name] for name in self.configured} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(sharded_state(self.optimizer, saved["optimizer"]))
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])
        for name in COUNTERS:
            setattr(self, name, saved[name])
        for name, sums in windows.items():
            if len(sums) == world_size:
                self.window[name] = sums[rank].clone()
            else:  # another number of ranks: the first one takes the whole sum
                self.window[name] = sums.sum() if rank == 0 else torch.zeros((), dtype=sums.dtype)

    def _stacked(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the window's sums as one tensor on the device, for one transfer."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.stack([self.window[name].to(device, dtype) for name in names])


def _numbers(value: Any) -> Iterator[Tensor]:
    """Yield all floating point numbers in nested values."""
    if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
        yield torch.as_tensor(value)
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _is_alike(a: Any, b: Any) -> bool:
    """Tell whether two values of an option are interchangeable. None is a value that an optimizer fills in later."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_is_alike, a, b))
    kinds = ["number" if _is_number(x) or (isinstance(x, Tensor) and x.ndim == 0) else type(x) for x in (a, b)]
    return a is None or b is None or kinds[0] == kinds[1]
