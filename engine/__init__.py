"""Train, evaluate and resume image backbones by configuration.

from engine import load_config, train
result = train(load_config("configs/resnet18_cifar10.yaml", {"train.optim.type": "Adam"}))
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from engine.config.errors import ConfigError, RunError
from engine.config.layers import read_layers
from engine.plugins import load_plugin

if TYPE_CHECKING:
    from engine.config.resolve import ResolvedConfig
    from engine.run.report import Result
    from engine.train import train

# Read by GNU OpenMP, which torch loads: a thread that waits for others spins this often, some tens of microseconds, then sleeps.
# By default it spins 60 times as long, and small operations run ten times slower as soon as another process wants the cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__all__ = ["ConfigError", "RunError", "load_config", "load_plugin", "train"]

# Imports inside the functions below save start-up time: --help needs neither torch nor OmegaConf.


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> "ResolvedConfig":
    """Return the config at `path` (LeNet on digits without one) with `overrides`, checked as far as possible without the data.

    Overrides are a mapping, {"train.optim.lr": 0.01}, or words of a command line, ["--train.optim.lr", "0.01"].
    """
    layers = read_layers(path, overrides)
    from engine.build import Catalog
    from engine.config.resolve import resolve

    return resolve(layers, Catalog())


def _train(config: "ResolvedConfig", **options: Any) -> "Result":
    """Train as `config` says; engine/train.py has the options."""
    from engine.train import train

    return train(config, **options)


class _Engine(ModuleType):
    """Keeps `engine.train` the function of that name, which importing the module engine.train would replace by the module."""

    @property
    def train(self) -> Any:
        return _train

    @train.setter
    def train(self, module: ModuleType) -> None:
        """Ignore the module, which the import system sets here."""


sys.modules[__name__].__class__ = _Engine
