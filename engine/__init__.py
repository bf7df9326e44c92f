"""Train, evaluate and resume by configuration.

from engine import load_config, train
result = train(load_config("configs/resnet18_cifar10.yaml", {"train.optim.type": "Adam"}))
"""

from typing import TYPE_CHECKING, Any

from engine.config import load_config
from engine.errors import ConfigError, RunError
from engine.plugins import load_plugin

if TYPE_CHECKING:
    from engine.config import LoadedConfig
    from engine.session import Result

__all__ = ["ConfigError", "RunError", "check", "load_config", "load_plugin", "train"]


# Both import torch only when they are called: reading a config, and --help, do without it.


def check(config: "LoadedConfig") -> None:
    """Raise ConfigError for what can be known to be wrong before data is looked for; see engine.checks.check."""
    from engine.checks import check

    check(config)


def train(config: "LoadedConfig", **options: Any) -> "Result":
    """Train as `config` says; see engine.session.train for the options."""
    from engine.session import train

    return train(config, **options)
