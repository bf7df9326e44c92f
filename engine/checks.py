"""What can be known to be wrong with a config before its data are looked for."""

import inspect

from datasets import DatasetSpec
from engine.config.arguments import check_arguments
from engine.config.errors import ConfigError
from engine.config.resolve import LoadedConfig, flatten, to_dict
from engine.config.schema import AugmentConfig, Config
from engine.data import check_n_classes, crop_padding, dataset_of, task_kind
from engine.optim.optimizer import find_optimizer, optimizer_arguments
from engine.optim.teacher import check_teacher
from engine.run.trackers import check_trackers
from engine.tasks import TaskKind
from models import model_signature

SECTIONS_OF_TASKS = ("segmentation", "detection")
SET_BY_ENGINE = ("n_classes", "in_channels", "img_size", "pretrained", "features_only", "out_indices")


def check(config: LoadedConfig) -> None:
    """Names, and arguments against signatures."""
    kind = task_kind(config)
    _check_keys_of_other_tasks(config, kind)
    try:
        signature = model_signature(config.model.name)
    except ValueError as error:
        raise ConfigError(f"model.name: {error} ({config.origin('model.name').name})") from error
    if signature is not None:
        check_arguments(config.model.args, signature, "model", config, SET_BY_ENGINE)
    spec = dataset_of(config)
    check_arguments(config.data.args, _options_of(spec), "data", config)
    if spec.n_classes is not None:
        check_n_classes(config, spec.n_classes)
    _check_channels(config, spec)
    _check_augmentation(config, spec)
    check_teacher(config)
    check_trackers(config)
    optimizer_arguments(config, find_optimizer(config.train.optim.type, config))
    if config.dataloader.num_workers == 0 and "dataloader.prefetch_factor" in config.origins:
        origin = config.origins["dataloader.prefetch_factor"].name
        if config.origin("dataloader.prefetch_factor").rank == config.origin("dataloader.num_workers").rank:
            config.notes.append(f"warning: dataloader.prefetch_factor ({origin}) has no effect with dataloader.num_workers 0")


def _check_keys_of_other_tasks(config: LoadedConfig, kind: TaskKind) -> None:
    now, default = flatten(to_dict(config)), flatten(to_dict(Config()))
    own_section = f"{config.task}."
    if config.eval.tta == "flip_and_shift" and kind.targets != "classes":
        origin, task = config.origin("eval.tta").name, config.origin("task").name
        raise ConfigError(f"eval.tta flip_and_shift ({origin}) is for classification, not for task {config.task} ({task})")
    for key in now.keys() & default.keys():
        is_of_another = key in kind.other_keys or (key.partition(".")[0] in SECTIONS_OF_TASKS and not key.startswith(own_section))
        if is_of_another and now[key] != default[key]:
            raise ConfigError(
                f"{key} {now[key]} ({config.origin(key).name}) means nothing for task {config.task} "
                f"({config.origin('task').name}); leave it out, or choose the task that it is for"
            )


def _check_channels(config: LoadedConfig, spec: DatasetSpec) -> None:
    for name in ("mean", "std"):
        asked = getattr(config.data, name)
        if asked is not None and len(asked) != spec.channels:
            origin = config.origin(f"data.{name}").name
            raise ConfigError(f"data.{name}: {len(asked)} numbers ({origin}); {spec.name} has {spec.channels} channels")


def _check_augmentation(config: LoadedConfig, spec: DatasetSpec) -> None:
    """What is asked of images in files can't be had of images in memory, and the other way round."""
    in_files = spec.in_files and not config.data.args.get("in_memory")
    elsewhere = ("cutout", "crop_padding") if in_files else ("auto", "erasing", "repeats", "zoom")
    asked = [name for name in elsewhere if getattr(config.augment, name) != getattr(AugmentConfig(), name)]
    if in_files and config.augment.hflip == "alternating":
        asked.append("hflip")
    if asked:
        key = f"augment.{asked[0]}"
        raise ConfigError(
            f"{key} {getattr(config.augment, asked[0])} ({config.origin(key).name}) is for images "
            f"{'in memory' if in_files else 'in files'}, and those of {spec.name} are {'in files' if in_files else 'in memory'}"
        )
    if not in_files and config.augment.padding_mode != "constant" and not crop_padding(config, spec):
        origin = config.origin("augment.padding_mode").name
        config.notes.append(f"warning: augment.padding_mode ({origin}) has no effect with augment.crop_padding 0")
    for name in () if in_files else ("scale", "crop_pct", "interpolation"):
        if f"augment.{name}" in config.origins and getattr(config.augment, name) != getattr(AugmentConfig(), name):
            origin = config.origins[f"augment.{name}"].name
            config.notes.append(f"warning: augment.{name} ({origin}) has no effect on {spec.name}, which is held in memory")


def _options_of(spec: DatasetSpec) -> inspect.Signature:
    """The parameters of a data set's loading function that a config may give."""
    signature = inspect.signature(spec.load)
    bound = getattr(spec.load, "keywords", {})
    return signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "source" and name not in bound])
