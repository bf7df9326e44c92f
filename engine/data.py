"""The data of a run: found, read, parted into splits, and how their images are prepared."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from accelerate import Accelerator

from datasets import DatasetSpec, Loaded, Source, Split, find_dataset
from datasets.pipeline.loaders import EvalLoader, Growth, Preparation, Workers, eval_loader
from datasets.pipeline.splits import hold_out
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import LoadedConfig
from engine.devices.agreement import on_main
from engine.tasks import TaskKind, find_task

log = logging.getLogger(__name__)

MOST_WORKERS = 16  # that `auto` starts


@dataclass
class Data:
    """The splits of a data set, by the part that they play in a run."""

    spec: DatasetSpec
    classes: tuple[str, ...]
    img_size: int
    splits: dict[str, Split]  # train, valid and, where it is kept apart, test
    loader: Callable[[str], EvalLoader]  # evaluates a split on this rank


def task_kind(config: LoadedConfig) -> TaskKind:
    try:
        return find_task(config.task)
    except ValueError as error:
        raise ConfigError(f"task: {error} ({config.origin('task').name})") from error


def dataset_of(config: LoadedConfig) -> DatasetSpec:
    try:
        return find_dataset(config.data.name, task_kind(config).targets)
    except ValueError as error:
        raise ConfigError(f"data.name: {error} ({config.origin('data.name').name})") from error


def source_of(config: LoadedConfig) -> Source:
    data = config.data
    root = Path(data.dataroot or f"~/data/{dataset_of(config).name}").expanduser()
    return Source(root, data.verify, data.download, config.seed, data.img_size, data.n_classes)


def read_data(config: LoadedConfig) -> Loaded:
    spec = dataset_of(config)
    try:
        return spec.load(source_of(config), **config.data.args)
    except OSError as error:
        raise RunError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"data: {spec.name} refuses its options: {error}") from error


def load_data(config: LoadedConfig, accelerator: Accelerator) -> Data:
    spec = dataset_of(config)
    by_main: list[Loaded] = []
    on_main(accelerator, lambda: by_main.append(read_data(config)))  # it downloads what the others then read
    loaded = by_main[0] if by_main else read_data(config)
    check_n_classes(config, len(loaded.classes))
    img_size = config.data.img_size or spec.img_size
    splits = _assign(config, loaded)
    prepare, evaluation_workers = preparation(config, spec, config.eval.img_size or img_size), workers(config)
    per_device = (
        config.eval.batch_size or config.train.micro_batch_size or -(-config.train.batch_size // accelerator.num_processes)
    )

    @cache
    def loader(split: str) -> EvalLoader:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        return eval_loader(splits[split], per_device, rank, world_size, prepare, evaluation_workers, accelerator.device)

    return Data(spec, loaded.classes, img_size, splits, loader)


def _assign(config: LoadedConfig, loaded: Loaded) -> dict[str, Split]:
    if config.data.valid_ratio is None:
        log.info("validation uses the test split (data.valid_ratio is null): the best checkpoint is chosen on it")
        return {"train": loaded.train, "valid": loaded.test}
    try:
        train, valid = hold_out(loaded.train, config.data.valid_ratio, config.seed)
    except ValueError as error:
        raise ConfigError(f"data.valid_ratio: {error}") from error
    log.info(
        "validation uses %d of the %d training samples; the test split is used once, at the end", len(valid), len(loaded.train)
    )
    return {"train": train, "valid": valid, "test": loaded.test}


def preparation(config: LoadedConfig, spec: DatasetSpec, img_size: int, growth: Growth | None = None) -> Preparation:
    augment = config.augment
    return Preparation(
        img_size=img_size,
        mean=tuple(config.data.mean or spec.mean),
        std=tuple(config.data.std or spec.std),
        augment=augment.enabled,
        crop_padding=crop_padding(config, spec),
        padding_mode=augment.padding_mode,
        hflip=spec.hflip if augment.hflip is None else augment.hflip,
        cutout=augment.cutout,
        color_jitter=augment.color_jitter,
        scale=tuple(augment.scale),
        zoom=tuple(augment.zoom),
        crop_pct=augment.crop_pct,
        interpolation=augment.interpolation,
        policy=augment.auto,
        magnitude=augment.auto_magnitude,
        erasing=augment.erasing,
        repeats=augment.repeats,
        growth=growth,
    )


def crop_padding(config: LoadedConfig, spec: DatasetSpec) -> int:
    return spec.crop_padding if config.augment.crop_padding is None else config.augment.crop_padding


def workers(config: LoadedConfig) -> Workers:
    loading = config.dataloader
    n = _cores_of_this_rank() if loading.num_workers == "auto" else loading.num_workers
    return Workers(n, loading.pin_memory, loading.prefetch_factor, config.train.timeout)


def _cores_of_this_rank() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_n_classes(config: LoadedConfig, of_data: int) -> None:
    asked = config.data.n_classes
    if asked is not None and asked != of_data:
        raise ConfigError(
            f"data.n_classes {asked} ({config.origin('data.n_classes').name}) contradicts {config.data.name}, "
            f"which has {of_data} classes; leave it out, or null, to follow the data"
        )
