"""The model that a student learns from: that of a run of this project, or one by name with a file of weights."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from engine.config.arguments import check_arguments
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import LoadedConfig, load_config
from engine.optim.layers import classifier
from engine.run.checkpoint import InvalidCheckpoint, read_checkpoint
from engine.run.folder import find_checkpoint
from engine.run.log import millions
from models import create_model, model_signature
from models.loading.pretrained import load_pretrained

log = logging.getLogger(__name__)

SET_BY_ENGINE = ("n_classes", "in_channels", "img_size", "features_only", "out_indices")


def check_teacher(config: LoadedConfig) -> None:
    """What can be known to be wrong before data is looked for."""
    distill = config.distill
    if distill.teacher is None:
        return
    origin = config.origin("distill.teacher").name
    if _is_path(distill.teacher):
        for name in ("pretrained", *distill.args):
            if getattr(distill, name, None) is not False:
                said = config.origin(f"distill.{name}").name
                raise ConfigError(
                    f"distill.{name} ({said}): the teacher is a run of this project ({origin}), which says it itself"
                )
        return
    try:
        signature = model_signature(distill.teacher)
    except ValueError as error:
        raise ConfigError(f"distill.teacher: neither a run folder nor a model ({origin}): {error}") from error
    if signature is not None:
        check_arguments(distill.args, signature, "distill", config, SET_BY_ENGINE)
    if distill.pretrained is False:
        raise ConfigError(
            f"distill.teacher {distill.teacher} ({origin}) has learned nothing; distill.pretrained names its weights"
        )


def load_teacher(config: LoadedConfig, classes: int, in_channels: int, img_size: int, accelerator: Accelerator) -> nn.Module:
    """In evaluation mode, on the device, in the precision of the training."""
    asked = config.distill.teacher
    sizes = {"n_classes": classes, "in_channels": in_channels, "img_size": img_size}
    state = torch.get_rng_state()  # its initial weights shall not change the student's
    try:
        teacher = _of_run(Path(asked).expanduser(), sizes, config) if _is_path(asked) else _by_name(asked, sizes, config)
    except OSError as error:
        raise RunError(f"distill.pretrained: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"distill.teacher {asked}: {error}") from error
    finally:
        torch.set_rng_state(state)
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    teacher.requires_grad_(False).eval().to(accelerator.device, memory_format=layout)
    log.info("the teacher is %s (%s parameters)", asked, millions(sum(p.numel() for p in teacher.parameters())))
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def _is_path(teacher: str) -> bool:
    return Path(teacher).expanduser().exists()


def _of_run(path: Path, sizes: dict[str, int], config: LoadedConfig) -> nn.Module:
    folder = find_checkpoint(path)
    own = load_config(folder.parent.parent / "config.yaml")
    try:
        weights = read_checkpoint(folder).weights
    except InvalidCheckpoint as error:
        raise RunError(f"distill.teacher: {error}") from error
    teacher = create_model(own.model.name, **sizes, **own.model.args)
    _expect_same_classes(
        config, {name: len(weights[name]) for name in classifier(teacher) if name in weights}, sizes["n_classes"]
    )
    try:
        teacher.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        shape = f"{sizes['in_channels']} channels of {sizes['img_size']}x{sizes['img_size']}"
        raise ValueError(f"its weights don't fit the images of {config.data.name}, {shape}: {first}") from error
    for name in ("mean", "std"):
        if getattr(own.data, name) != getattr(config.data, name) or own.data.name.lower() != config.data.name.lower():
            log.warning("the teacher learned from %s, normalized its way; here it sees %s", own.data.name, config.data.name)
            break
    return teacher


def _by_name(name: str, sizes: dict[str, int], config: LoadedConfig) -> nn.Module:
    teacher = create_model(name, **sizes, **config.distill.args)
    left_out = load_pretrained(teacher, name, config.distill.pretrained)
    _expect_same_classes(config, left_out, sizes["n_classes"])
    return teacher


def _expect_same_classes(config: LoadedConfig, sizes: dict[str, int], n_classes: int) -> None:
    """`sizes` are the lengths of the classifier's tensors in the file."""
    other = next((n for n in sizes.values() if n not in (0, n_classes)), None)
    if other is not None:
        raise ConfigError(
            f"distill.teacher {config.distill.teacher} ({config.origin('distill.teacher').name}) tells {other} classes apart, "
            f"{config.data.name} has {n_classes}: a teacher for these classes is needed"
        )
