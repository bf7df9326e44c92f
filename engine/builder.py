"""Build a run from its config. Nothing else in the engine reads the config while it trains."""

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from datasets import DatasetSpec, Loaded, Source, Split, find_dataset
from datasets.counters import derive
from datasets.loaders import EvalLoader, Growth, Preparation, TrainLoader, Workers, eval_loader, train_loader
from datasets.mixing import Mixing
from datasets.order import Order
from datasets.splits import Images, hold_out
from engine.agreement import on_main
from engine.arguments import check_arguments
from engine.config import LoadedConfig, flatten, to_dict
from engine.errors import ConfigError, RunError
from engine.evaluate import evaluate, readable
from engine.freeze import freeze
from engine.optim import find_optimizer, make_optimizer, optimizer_arguments
from engine.recompute import recompute_blocks
from engine.schedule import Schedule, make_schedule
from engine.schema import AugmentConfig, Config, TrainConfig
from engine.sharpness import Sharpness
from engine.state import TrainState
from engine.tasks import Task, TaskKind, find_task
from engine.tasks.distillation import Distillation
from engine.teacher import check_teacher, load_teacher
from engine.trackers import check_trackers
from engine.update import Update
from models import model_signature

log = logging.getLogger(__name__)

MOST_WORKERS = 16  # that `auto` starts
FIRST_LOOK = 5000  # training images that a model with `initialise_from` begins with
LOOK = 8  # separates this use of the seed from the others
SECTIONS_OF_TASKS = ("segmentation", "detection")
SET_BY_ENGINE = ("n_classes", "in_channels", "img_size", "pretrained", "features_only", "out_indices")


@dataclass
class Data:
    """The splits of a data set, by the part that they play in a run."""

    spec: DatasetSpec
    classes: tuple[str, ...]
    img_size: int
    splits: dict[str, Split]  # train, valid and, where it is kept apart, test
    loader: Callable[[str], EvalLoader]  # evaluates a split on this rank


@dataclass
class Run:
    """All that a training needs, built."""

    accelerator: Accelerator
    data: Data
    task: Task
    model: nn.Module  # the bare one
    state: TrainState
    update: Update
    schedule: Schedule
    train_loader: TrainLoader
    mix: Mixing | None
    steps_per_epoch: int
    n_steps: int
    print_freq: int
    eval_freq: int
    save_freq: int
    batch_size: int
    mix_epochs: int | None = None
    patience: int | None = None
    eval_first: bool = False
    profile: int = 0
    max_eval_batches: int | None = None

    def train_batches(self, first: int) -> Iterator[Any]:
        for step, batch in enumerate(readable(self.train_loader.batches(first, self.n_steps)), start=first):
            is_mixed = self.mix is not None and (self.mix_epochs is None or step < self.mix_epochs * self.steps_per_epoch)
            yield self.mix(step, batch) if is_mixed else batch

    def is_over(self) -> bool:
        """Whether the evaluations have stopped getting better."""
        return self.patience is not None and self.state.evaluations_since_best >= self.patience

    def is_due(self, freq: int, step: int) -> bool:
        return step % freq == 0 or step == self.n_steps

    def evaluate(self, split: str, stop: Callable[[], int] | None = None, *, averaged: bool = False) -> dict[str, float]:
        """The metrics of a split, named as they are logged: valid/acc@1, or valid_ema/acc@1 of the averaged weights."""
        model = self.state.ema.module if averaged else self.model
        if self.accelerator.num_processes > 1:  # each rank's BatchNorm saw a last batch of its own; the first one's is saved
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        metrics = evaluate(
            model, self.data.loader(split), self.task, self.accelerator, max_batches=self.max_eval_batches, stop=stop
        )
        return {f"{split}{'_ema' if averaged else ''}/{name}": value for name, value in metrics.items()}


def check(config: LoadedConfig) -> None:
    """What can be known to be wrong before data is looked for: names, and arguments against signatures."""
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
        _check_n_classes(config, spec.n_classes)
    _check_channels(config, spec)
    _check_augmentation(config, spec)
    check_teacher(config)
    check_trackers(config)
    optimizer_arguments(config, find_optimizer(config.train.optim.type, config))
    if config.dataloader.num_workers == 0 and "dataloader.prefetch_factor" in config.origins:
        origin = config.origins["dataloader.prefetch_factor"].name
        if config.origin("dataloader.prefetch_factor").rank == config.origin("dataloader.num_workers").rank:
            config.notes.append(f"warning: dataloader.prefetch_factor ({origin}) has no effect with dataloader.num_workers 0")


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


def build(config: LoadedConfig, accelerator: Accelerator, *, model: nn.Module | None = None, task: Task | None = None) -> Run:
    train, repeats = config.train, config.augment.repeats
    if train.batch_size % (repeats * accelerator.num_processes):
        raise ConfigError(
            f"train.batch_size {train.batch_size} doesn't divide by augment.repeats {repeats} x {accelerator.num_processes} ranks"
        )
    data = load_data(config, accelerator)
    order = Order(
        len(data.splits["train"]),
        train.batch_size // repeats,
        config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device if isinstance(data.splits["train"], Images) else "cpu",
    )
    if order.steps_per_epoch == 0:
        raise ConfigError(
            f"train.batch_size {train.batch_size} is more than the {order.n_samples} training samples of {data.spec.name}: "
            "an epoch would have no step"
        )
    task = task or make_task(config, data)
    if config.distill.teacher is not None:
        teacher = load_teacher(config, len(data.classes), data.spec.channels, data.img_size, accelerator)
        task = Distillation(task, teacher, temperature=config.distill.temperature, weight=config.distill.weight)
    model = model if model is not None else build_model(config, data)
    model.to(accelerator.device, memory_format=torch.channels_last if train.channels_last else torch.preserve_format)
    _initialise(model, config, data, accelerator)
    _check_sizes(model, config, data)
    if train.sync_batchnorm:
        model = _synchronised(model, config, accelerator)
    if train.aux_weight != TrainConfig().aux_weight and len(getattr(model, "CLASSIFIERS", ())) == 1:
        origin = config.origin("train.aux_weight").name
        log.warning("train.aux_weight (%s) has no effect on %s, which has no auxiliary head", origin, config.model.name)
    _freeze(model, config)
    if train.grad_checkpointing:
        _checkpoint_gradients(model, config)
    ema = _make_ema(model, config, accelerator)
    optimizer, configured = make_optimizer(config, model)
    training_model, optimizer = accelerator.prepare(model, optimizer)
    if train.compile:
        training_model = torch.compile(training_model, mode=train.compile_mode)

    n_steps = train.n_steps or train.n_epochs * order.steps_per_epoch
    growth = _growth(config, data.img_size, n_steps / order.steps_per_epoch)
    prepare = preparation(config, data.spec, data.img_size, growth)
    schedule = make_schedule(train.sched, n_steps, order.steps_per_epoch)
    return Run(
        accelerator=accelerator,
        data=data,
        task=task,
        model=model,
        state=TrainState(model, optimizer, ema, accelerator.scaler, configured),
        update=Update(
            training_model,
            task,
            accelerator,
            schedule,
            train.micro_batch_size,
            config.seed,
            clip_grad_norm=train.clip_grad_norm,
            clip_grad_value=train.clip_grad_value,
            sharpness=Sharpness(train.sam, train.sam_adaptive) if train.sam is not None else None,
            averaging_decay=_averaging_decay(ema, config, n_steps),
            most_skipped=train.most_skipped if train.nonfinite == "skip" else 0,
        ),
        schedule=schedule,
        train_loader=train_loader(data.splits["train"], order, prepare, workers(config), accelerator.device),
        mix=make_mixing(config, len(data.classes)),
        steps_per_epoch=order.steps_per_epoch,
        n_steps=n_steps,
        print_freq=train.print_freq or order.steps_per_epoch,
        eval_freq=train.eval_freq or order.steps_per_epoch,
        save_freq=train.save_freq or order.steps_per_epoch,
        batch_size=train.batch_size,
        mix_epochs=config.augment.mix_epochs,
        patience=train.patience,
        eval_first=train.eval_first,
        profile=train.profile,
    )


def _initialise(model: nn.Module, config: LoadedConfig, data: Data, accelerator: Accelerator) -> None:
    """A model whose first weights depend on the data sees some training images, not augmented, the same ones on every rank.

    A resumed run then replaces what was found by its checkpoint.
    """
    modules = [module for module in model.modules() if hasattr(module, "initialise_from")]
    if not modules or config.model.pretrained:
        return
    split, generator = data.splits["train"], torch.Generator().manual_seed(derive(config.seed, LOOK))
    chosen = torch.randperm(len(split), generator=generator)[:FIRST_LOOK].sort().values
    prepare = preparation(config, data.spec, data.img_size)
    loader = eval_loader(split.subset(chosen), 250, 0, 1, prepare, workers(config), accelerator.device)
    for module in modules:
        module.initialise_from(batch[0] for batch in readable(loader.batches()))


@torch.no_grad()
def _check_sizes(model: nn.Module, config: LoadedConfig, data: Data) -> None:
    """Sizes other than the one that the model was built for; many have no need to know theirs, a ViT has."""
    was_training = model.training
    for key, size in (("eval.img_size", config.eval.img_size), ("augment.resize_from", config.augment.resize_from)):
        if size is None or size == data.img_size:
            continue
        image = torch.zeros(1, data.spec.channels, size, size, device=next(model.parameters()).device)
        try:
            model.eval()(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"{key} {size} ({config.origin(key).name}): model.name {config.model.name} was built for "
                f"data.img_size {data.img_size} and can't take it: {str(error).splitlines()[0]}"
            ) from error
    model.train(was_training)


def _synchronised(model: nn.Module, config: LoadedConfig, accelerator: Accelerator) -> nn.Module:
    """Before anything is frozen, since each BatchNorm is replaced by another module, of the same names."""
    from timm.layers import convert_sync_batchnorm  # torch's own loses the activation of timm's BatchNormAct2d

    origin, where = config.origin("train.sync_batchnorm").name, accelerator.device.type
    if where != "cuda":
        raise ConfigError(f"train.sync_batchnorm ({origin}) needs GPUs, and this run is on {where}: leave it out here")
    if accelerator.num_processes == 1:
        log.warning("train.sync_batchnorm (%s) has no effect on a single device", origin)
    try:
        return convert_sync_batchnorm(model)
    except TypeError as error:  # a norm whose scale isn't a parameter
        raise ConfigError(f"train.sync_batchnorm ({origin}) can't be had with the norms of {config.model.name}") from error


def _freeze(model: nn.Module, config: LoadedConfig) -> None:
    try:
        frozen = freeze(model, config.train.freeze)
    except ValueError as error:
        raise ConfigError(f"train.freeze: {error} ({config.origin('train.freeze').name})") from error
    if frozen:
        log.info("frozen: %d of %d tensors of weights", len(frozen), sum(1 for _ in model.parameters()))


def _checkpoint_gradients(model: nn.Module, config: LoadedConfig) -> None:
    if not recompute_blocks(model):
        raise ConfigError(
            f"train.grad_checkpointing ({config.origin('train.grad_checkpointing').name}): model.name {config.model.name} "
            "doesn't offer it, as it isn't made of blocks; a ResNet or a ViT is"
        )


def _make_ema(model: nn.Module, config: LoadedConfig, accelerator: Accelerator) -> nn.Module | None:
    """Made before Accelerate puts anything around the model. Its decay is a function of the step, so it needs no state."""
    train = config.train
    if train.ema is None and train.average_last is None:
        return None
    if accelerator.is_fsdp2:
        name = "ema" if train.ema is not None else "average_last"
        raise ConfigError(
            f"train.{name} ({config.origin(f'train.{name}').name}) averages whole weights, and FSDP (the launcher) divides them: "
            "leave one of the two out; --multi_gpu trains on several devices without dividing"
        )
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(model, train.ema or 0.0, use_warmup=train.ema_warmup).requires_grad_(False)
    accelerator.prepare_model(ema.module, evaluation_mode=True)
    return ema


def _averaging_decay(ema: nn.Module | None, config: LoadedConfig, n_steps: int) -> Callable[[int], float] | None:
    """By the number of updates done. A plain average over the last part weighs each of n weights by 1 / n."""
    last = config.train.average_last
    if last is None:
        return ema.get_decay if ema is not None else None
    first = n_steps - round(n_steps * last)
    return lambda n_updates: max(0.0, 1 - 1 / max(1, n_updates - first))


def build_model(config: LoadedConfig, data: Data) -> nn.Module:
    return new_model(config, len(data.classes), data.spec.channels, data.img_size)


def new_model(config: LoadedConfig, n_classes: int, in_channels: int, img_size: int) -> nn.Module:
    """The model with its initial weights, the same ones for the same seed."""
    torch.manual_seed(config.seed)
    pretrained = config.model.pretrained
    try:
        return task_kind(config).create_model(
            config,
            n_classes=n_classes,
            in_channels=in_channels,
            img_size=img_size,
            pretrained=str(Path(pretrained).expanduser()) if isinstance(pretrained, str) else pretrained,
        )
    except OSError as error:
        raise RunError(f"model.pretrained: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {config.model.name}: {error}") from error


def make_task(config: LoadedConfig, data: Data) -> Task:
    return task_kind(config).make(config, data)


def make_mixing(config: LoadedConfig, n_classes: int) -> Mixing | None:
    augment = config.augment
    if augment.mixup == augment.cutmix == 0:
        return None
    log.info("batches are mixed: train/acc@1 counts an image as right when the class of its larger share is predicted")
    return Mixing(n_classes, augment.mixup, augment.cutmix, augment.mix_switch_prob, augment.mix_prob, config.seed)


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
    _check_n_classes(config, len(loaded.classes))
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


def _growth(config: LoadedConfig, img_size: int, n_epochs: float) -> Growth | None:
    augment = config.augment
    if augment.resize_from is None:
        return None
    if augment.resize_from > img_size:
        origin = config.origin("augment.resize_from").name
        raise ConfigError(f"augment.resize_from {augment.resize_from} ({origin}) is more than data.img_size {img_size}")
    if (img_size - augment.resize_from) % augment.resize_step:
        fits = math.gcd(img_size - augment.resize_from, augment.resize_step)
        raise ConfigError(
            f"augment.resize_step {augment.resize_step} ({config.origin('augment.resize_step').name}) doesn't lead from "
            f"augment.resize_from {augment.resize_from} to data.img_size {img_size}; {fits} would"
        )
    return Growth(augment.resize_from, augment.resize_epochs or n_epochs, augment.resize_step)


def preparation(config: LoadedConfig, spec: DatasetSpec, img_size: int, growth: Growth | None = None) -> Preparation:
    augment = config.augment
    return Preparation(
        img_size=img_size,
        mean=tuple(config.data.mean or spec.mean),
        std=tuple(config.data.std or spec.std),
        augment=augment.enabled,
        crop_padding=_crop_padding(config, spec),
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


def _crop_padding(config: LoadedConfig, spec: DatasetSpec) -> int:
    return spec.crop_padding if config.augment.crop_padding is None else config.augment.crop_padding


def workers(config: LoadedConfig) -> Workers:
    loading = config.dataloader
    n = _cores_of_this_rank() if loading.num_workers == "auto" else loading.num_workers
    return Workers(n, loading.pin_memory, loading.prefetch_factor, config.train.timeout)


def _cores_of_this_rank() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


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
    if not in_files and config.augment.padding_mode != "constant" and not _crop_padding(config, spec):
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


def _check_n_classes(config: LoadedConfig, of_data: int) -> None:
    asked = config.data.n_classes
    if asked is not None and asked != of_data:
        raise ConfigError(
            f"data.n_classes {asked} ({config.origin('data.n_classes').name}) contradicts {config.data.name}, "
            f"which has {of_data} classes; leave it out, or null, to follow the data"
        )
