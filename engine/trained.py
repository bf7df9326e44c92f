"""A trained model with the data it was trained on, from a run folder: what the tools work on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from engine.builder import Data, build_model, check, load_data, make_task
from engine.checkpoint import InvalidCheckpoint, read_checkpoint
from engine.config import LoadedConfig, load_config
from engine.environment import make_accelerator
from engine.errors import RunError
from engine.evaluate import evaluate
from engine.plugins import expect_those_of
from engine.run_folder import find_checkpoint
from engine.tasks import Task


@dataclass(frozen=True)
class Trained:
    config: LoadedConfig
    accelerator: Accelerator
    data: Data
    task: Task
    model: nn.Module
    checkpoint: Path
    step: int

    def evaluate(self, split: str) -> dict[str, float]:
        """`test` is the validation split where none was kept apart."""
        known = split if split in self.data.splits else "valid"
        return evaluate(self.model, self.data.loader(known), self.task, self.accelerator)


def load_trained(path: Path, overrides: Mapping[str, Any], *, averaged: bool = False) -> Trained:
    """With `averaged`, the moving average of the weights (train.ema)."""
    folder = find_checkpoint(path)
    expect_those_of(folder.parent.parent)
    config = load_config(folder.parent.parent / "config.yaml", overrides)
    check(config)
    try:
        checkpoint = read_checkpoint(folder)
    except InvalidCheckpoint as error:
        raise RunError(str(error)) from error
    if averaged and checkpoint.ema_weights is None:
        raise RunError(f"{folder} holds no averaged weights; train.ema makes them")
    accelerator = make_accelerator(config)
    data = load_data(config, accelerator)
    model = build_model(config, data)
    try:
        model.load_state_dict(checkpoint.ema_weights if averaged else checkpoint.weights)
    except RuntimeError as error:
        raise RunError(f"{folder} doesn't fit the config: {str(error).splitlines()[0]}") from error
    accelerator.prepare_model(model, evaluation_mode=True)
    return Trained(config, accelerator, data, make_task(config, data), model, folder, checkpoint.step)
