"""Train, evaluate and resume by configuration.

from engine import load_config, train
result = train(load_config("configs/resnet18_cifar10.yaml", {"train.optim.type": "Adam"}))
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from engine.config.errors import ConfigError, RunError
from engine.config.resolve import load_config
from engine.plugins import load_plugin

if TYPE_CHECKING:
    from engine.config.resolve import LoadedConfig
    from engine.train import train

__all__ = ["ConfigError", "RunError", "check", "load_config", "load_plugin", "train"]


class _Engine(ModuleType):
    """Makes `engine.train` the function of that name: importing the module engine.train would replace it by the module."""

    @property
    def train(self) -> Any:
        from engine.train import train  # imports torch, which --help and reading a config do without

        return train

    @train.setter
    def train(self, module: ModuleType) -> None:
        """Called by the import system, with the module."""


sys.modules[__name__].__class__ = _Engine


def check(config: "LoadedConfig") -> None:
    """Raise ConfigError for what can be known to be wrong before data is looked for; see engine.checks.check."""
    from engine.checks import check

    check(config)
