"""Averages of the weights: exponential moving (train.ema), or plain over the last updates (train.average_last)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from engine.config.errors import ConfigError
from engine.config.schema import TrainConfig

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

Decay = Callable[[int], float]  # of the average, by the number of updates done


def make_average(model: nn.Module, train: TrainConfig, accelerator: Accelerator) -> "ModelEmaV3 | None":
    """Copy the model before Accelerate wraps it. The decay is a function of the step, so the average needs no further state."""
    if train.ema is None and train.average_last is None:
        return None
    if accelerator.is_fsdp2:
        key = "train.ema" if train.ema is not None else "train.average_last"
        hint = "leave one of the two out; --multi_gpu trains on several devices without sharding"
        raise ConfigError(key, "averages whole weights, and FSDP (the launcher) shards them", hint)
    from timm.utils import ModelEmaV3  # timm takes a second to import

    ema = ModelEmaV3(model, train.ema or 0.0, use_warmup=train.ema_warmup).requires_grad_(False)
    accelerator.prepare_model(ema.module, evaluation_mode=True)
    return ema


def averaging_decay(ema: "ModelEmaV3 | None", last: float | None, n_steps: int) -> Decay | None:
    """Return the decay for each number of updates. A plain average of n weights gives each of them the share 1 / n."""
    if last is None:
        return ema.get_decay if ema is not None else None
    first = n_steps - round(n_steps * last)
    return lambda n_updates: max(0.0, 1 - 1 / max(1, n_updates - first))
