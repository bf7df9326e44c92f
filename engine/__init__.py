"""Train, evaluate and resume by configuration.

from engine import load_config, train
result = train(load_config("configs/resnet18_cifar10.yaml", {"train.optim.type": "Adam"}))
"""

from typing import TYPE_CHECKING, Any

from engine.config import load_config
from engine.errors import ConfigError, RunError

if TYPE_CHECKING:
    from engine.session import Result

__all__ = ["ConfigError", "RunError", "load_config", "train"]


def train(config: "Any", **options: Any) -> "Result":
    """Train as `config` says; see engine.session.train for the options."""
    from engine.session import train as train_now  # here, so that reading a config doesn't import torch

    return train_now(config, **options)
