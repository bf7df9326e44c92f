"""Build what a config describes: its data, model, task and, from these, a run. Functions below get sections or plain values."""

import inspect
import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from datasets import DatasetSpec, Loaded, Source, Split, find_dataset
from datasets.pipeline.catalog import DATASETS
from datasets.pipeline.cores import cores_per_rank
from datasets.pipeline.counters import derive
from datasets.pipeline.fingerprint import Fingerprint, fingerprint
from datasets.pipeline.images import log_rotated
from datasets.pipeline.loaders import (
    EvalLoader,
    Growth,
    InMemoryTraining,
    Preparation,
    TrainLoader,
    Workers,
    eval_loader,
    train_loader,
)
from datasets.pipeline.mixing import Mixing
from datasets.pipeline.order import BalancedOrder, Order
from datasets.pipeline.splits import Files, Images, hold_out
from engine.config.command_line import require_packages
from engine.config.errors import ConfigError, RunError
from engine.config.rules import check_n_classes
from engine.config.schema import Config, TrainConfig
from engine.config.text import printable
from engine.devices.agreement import on_main
from engine.devices.blocks import compile_blocks, recompute_blocks
from engine.devices.memory import keep_freed_memory
from engine.devices.sharding import is_sharded
from engine.evaluate import readable
from engine.optim.averaging import averaging_decay, make_average
from engine.optim.distillation import Distillation, load_teacher
from engine.optim.layers import freeze
from engine.optim.optimizer import arguments_of_any_optimizer, find_optimizer, make_optimizer
from engine.optim.schedule import make_schedule
from engine.optim.sharpness import Sharpness
from engine.state import TrainState
from engine.tasks import Task, TaskKind, find_task
from engine.update import Update
from models import describes_network, list_models, model_signature

log = logging.getLogger(__name__)

MAX_WORKERS = 16  # that num_workers `auto` starts
MAX_GRAPHS = 1_000  # that train.compile makes, one for each size of the images and each size of a micro-batch
N_FOR_INITIALIZATION = 5000  # training images for a model with `initialize_from`
INITIALIZATION = 8  # separates this use of the seed from the others


class Catalog:
    """The signatures that a config is resolved with: `resolve(layers, Catalog())`."""

    def task(self, name: str) -> TaskKind:
        return find_task(name)

    def dataset(self, name: str, targets: str) -> tuple[DatasetSpec, inspect.Signature]:
        spec = find_dataset(name, targets)
        signature, bound = inspect.signature(spec.load), getattr(spec.load, "keywords", {})
        parameters = [p for option, p in signature.parameters.items() if option != "source" and option not in bound]
        return spec, signature.replace(parameters=parameters)

    def dataset_arguments(self) -> frozenset[str]:
        specs = DATASETS.entries.values()
        return frozenset(option for spec in specs for option in inspect.signature(spec.load).parameters)

    def model(self, name: str) -> inspect.Signature | None:
        return model_signature(name)

    def describes_network(self, argument: str) -> bool:
        return describes_network(argument)

    def model_arguments(self) -> frozenset[str]:
        return _arguments_of_any_model()

    def optimizer(self, name: str) -> inspect.Signature:
        return inspect.signature(find_optimizer(name))

    def optimizer_arguments(self) -> frozenset[str]:
        return arguments_of_any_optimizer()


@cache
def _arguments_of_any_model() -> frozenset[str]:
    signatures = (model_signature(name) for name in list_models())
    return frozenset(argument for signature in signatures if signature is not None for argument in signature.parameters)


@dataclass
class Data:
    """The splits of a dataset, by their role in a run."""

    spec: DatasetSpec
    classes: tuple[str, ...]
    img_size: int
    splits: dict[str, Split]  # train, valid and, where it is a split apart from valid, test
    loader: Callable[..., EvalLoader]  # loader(split) reads this rank's part; loader(split, n) the first n samples on every rank
    category_ids: tuple[int | None, ...] | None = None  # of each class in the files, where they aren't 0, 1, ...
    root: Path = Path()  # the folder of its files


@dataclass
class Run:
    """All that a training needs."""

    accelerator: Accelerator
    data: Data
    task: Task
    model: nn.Module  # without wrappers
    state: TrainState
    update: Update
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
    fingerprint: Future[Fingerprint] | None = None  # of the data, on rank 0


def build(config: Config, accelerator: Accelerator, *, model: nn.Module | None = None, task: Task | None = None) -> Run:
    train, repeats = config.train, config.augment.repeats
    if train.batch_size % (repeats * accelerator.num_processes):
        problem = f"{train.batch_size} is not a multiple of augment.repeats {repeats} x {accelerator.num_processes} ranks"
        raise ConfigError("train.batch_size", problem)
    require_packages(*task_kind(config).packages, needed_by=f"task {config.task}", listed_in="requirements.txt")
    data = load_data(config, accelerator)
    split = data.splits["train"]
    fingerprint_of_data = start_fingerprint(data) if accelerator.is_main_process else None
    make_order = partial(BalancedOrder, labels=split.labels) if config.data.sampler == "balanced" else Order
    order = make_order(
        len(split),
        train.batch_size // repeats,
        config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device if isinstance(split, Images) else "cpu",
    )
    if order.steps_per_epoch == 0:
        samples = f"the {order.n_samples} training samples of {data.spec.name}"
        problem = f"{train.batch_size} is more than {samples}: an epoch would have no step"
        ranks = accelerator.num_processes
        raise ConfigError("train.batch_size", problem, f"the largest here is {order.n_samples // ranks * ranks * repeats}")
    _log_absent_classes(data)
    if isinstance(split, Files) and not config.data.exif_rotate and accelerator.is_main_process:
        log_rotated(split.paths)

    task = task or task_kind(config).make(config, data)
    if config.distill.teacher is not None:
        sizes = {"n_classes": len(data.classes), "in_channels": data.spec.channels, "img_size": data.img_size}
        teacher = load_teacher(config.distill, config.data, sizes, accelerator, channels_last=train.channels_last)
        task = Distillation(task, teacher, temperature=config.distill.temperature, weight=config.distill.weight)
    model = _prepared_model(model if model is not None else build_model(config, data), config, data, accelerator)
    ema = make_average(model, train, accelerator)
    optimizer, configured = make_optimizer(train.optim, train.base_lr, model)
    training_model, optimizer = accelerator.prepare(model, optimizer)
    _check_parts(data, model, accelerator)
    if train.compile:
        training_model = _compiled(training_model, train, config.model.name, sizes_vary=data.spec.targets == "boxes")

    n_steps = train.n_steps or (train.n_epochs or 0) * order.steps_per_epoch
    growth = None
    if config.augment.resize_from is not None:
        n_epochs = config.augment.resize_epochs or n_steps / order.steps_per_epoch
        growth = Growth(config.augment.resize_from, n_epochs, config.augment.resize_step)
    prepare = preparation(config, data.spec, data.img_size, growth)
    loader = train_loader(data.splits["train"], order, prepare, workers(config), accelerator.device)
    if isinstance(loader, InMemoryTraining):
        data.splits["train"] = loader.split  # shares the loader's memory
    if accelerator.device.type == "cpu":
        keep_freed_memory(of_any_size=train.keep_memory)  # only now: memory that reading the data took goes back to the system
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
            make_schedule(train.sched, n_steps, order.steps_per_epoch),
            train.micro_batch_size,
            config.seed,
            clip_grad_norm=train.clip_grad_norm,
            clip_grad_value=train.clip_grad_value,
            sharpness=Sharpness(train.sam, train.sam_adaptive) if train.sam is not None else None,
            averaging_decay=averaging_decay(ema, train.average_last, n_steps),
            most_skipped=train.most_skipped if train.nonfinite == "skip" else 0,
        ),
        train_loader=loader,
        mix=_mixing(config, len(data.classes), accelerator),
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
        fingerprint=fingerprint_of_data,
    )


# Data


def task_kind(config: Config) -> TaskKind:
    return find_task(config.task)


def dataset_spec(config: Config) -> DatasetSpec:
    return find_dataset(config.data.name, task_kind(config).targets)


def data_source(config: Config) -> Source:
    data = config.data
    root = Path(data.dataroot or f"~/data/{dataset_spec(config).name}").expanduser()
    return Source(root, data.verify, data.download, config.seed, data.img_size, data.n_classes, data.exif_rotate)


def read_data(config: Config) -> Loaded:
    spec = dataset_spec(config)
    try:
        return spec.load(data_source(config), **config.data.args)
    except OSError as error:
        raise RunError(str(error)) from error
    except ValueError as error:
        raise ConfigError("data", f"{spec.name} refuses its options: {error}") from error


def load_data(config: Config, accelerator: Accelerator) -> Data:
    spec = dataset_spec(config)
    read_here: list[Loaded] = []
    on_main(accelerator, lambda: read_here.append(read_data(config)))  # rank 0 downloads what the others then read
    loaded = read_here[0] if read_here else read_data(config)
    check_n_classes(config.data.n_classes, config.data.name, len(loaded.classes))
    img_size = config.data.img_size or spec.img_size
    splits = _split(loaded, config.data.valid_ratio, config.seed)
    prepare, evaluation_workers = preparation(config, spec, config.eval.img_size or img_size), workers(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    per_device = config.eval.batch_size or config.train.micro_batch_size or -(-config.train.batch_size // world_size)

    @cache
    def loader(split: str, first: int | None = None) -> EvalLoader:
        part, of = splits[split], (rank, world_size)
        if first is not None:
            part, of = part.subset(torch.arange(min(first, len(part)))), (0, 1)
        return eval_loader(part, per_device, *of, prepare, evaluation_workers, accelerator.device)

    classes = tuple(printable(name) for name in loaded.classes)
    return Data(spec, classes, img_size, splits, loader, loaded.category_ids, data_source(config).root)


def start_fingerprint(data: Data) -> Future[Fingerprint]:
    """Compute the fingerprint of the data in a thread, while the model is built."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(fingerprint, dict(data.splits), data.classes, data.root)
    pool.shutdown(wait=False)
    return future


def _log_absent_classes(data: Data) -> None:
    for name, split in data.splits.items() if data.spec.targets in ("classes", "labels") else ():
        counts = split.labels.bincount(minlength=len(data.classes)) if split.labels.ndim == 1 else split.labels.sum(0)
        if absent := [of_class for of_class, n in zip(data.classes, counts.tolist(), strict=True) if n == 0]:
            some = ", ".join([*absent[:5], *(["..."] if len(absent) > 5 else [])])
            log.warning("the %s split has no image of %d of the %d classes: %s", name, len(absent), len(counts), some)


def _check_parts(data: Data, model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse a split that leaves a rank without a sample if the weights are sharded: every forward needs all ranks."""
    for name, split in data.splits.items():
        if len(split) < accelerator.num_processes and is_sharded(model):
            problem = f"the {name} split has {len(split)} samples for {accelerator.num_processes} ranks"
            raise ConfigError("data", f"{problem}; FSDP needs one on each")


def described_data(config: Config, classes: Collection[str]) -> Data:
    """Return what is known of the data without reading it; there are no splits."""
    spec = dataset_spec(config)

    def no_loader(split: str) -> EvalLoader:
        raise KeyError(split)

    return Data(spec, tuple(classes), config.data.img_size or spec.img_size, splits={}, loader=no_loader)


def _split(loaded: Loaded, valid_ratio: float | None, seed: int) -> dict[str, Split]:
    if loaded.valid is not None:
        if valid_ratio is not None:
            raise ConfigError("data.valid_ratio", "the data already has a validation split", "null uses that")
        return {"train": loaded.train, "valid": loaded.valid, "test": loaded.test}
    if valid_ratio is None:
        log.info("no separate validation split (data.valid_ratio is null): the best checkpoint is chosen on the test split")
        return {"train": loaded.train, "valid": loaded.test}
    try:
        train, valid = hold_out(loaded.train, valid_ratio, seed, by_class=loaded.by_class)
    except ValueError as error:
        raise ConfigError("data.valid_ratio", str(error)) from error
    log.info(
        "validation uses %d of the %d training samples; the test split is used once, at the end", len(valid), len(loaded.train)
    )
    return {"train": train, "valid": valid, "test": loaded.test}


def preparation(config: Config, spec: DatasetSpec, img_size: int, growth: Growth | None = None) -> Preparation:
    augment = config.augment
    return Preparation(
        img_size=img_size,
        mean=tuple(config.data.mean or spec.mean),
        std=tuple(config.data.std or spec.std),
        augment=augment.enabled,
        crop_padding=spec.crop_padding if augment.crop_padding is None else augment.crop_padding,
        padding_mode=augment.padding_mode,
        hflip=spec.hflip if augment.hflip is None else augment.hflip,
        cutout=augment.cutout,
        color_jitter=augment.color_jitter,
        scale=(augment.scale[0], augment.scale[1]),
        zoom=(augment.zoom[0], augment.zoom[1]),
        crop_pct=augment.crop_pct,
        interpolation=augment.interpolation,
        policy=augment.auto,
        magnitude=augment.auto_magnitude,
        erasing=augment.erasing,
        repeats=augment.repeats,
        growth=growth,
        exif_rotate=config.data.exif_rotate,
        resize_by_torch=config.eval.resize == "torch",
    )


def workers(config: Config) -> Workers:
    loading = config.dataloader
    automatic = min(MAX_WORKERS, cores_per_rank())
    n_workers = loading.num_workers if isinstance(loading.num_workers, int) else automatic
    return Workers(n_workers, loading.pin_memory, loading.prefetch_factor, config.train.timeout)


def _mixing(config: Config, n_classes: int, accelerator: Accelerator) -> Mixing | None:
    augment = config.augment
    if augment.mixup == augment.cutmix == 0:
        return None
    if task_kind(config).targets == "classes":
        log.info("batches are mixed: train/acc@1 counts an image as right when the class of its larger share is predicted")
    ranks = accelerator.process_index, accelerator.num_processes
    return Mixing(n_classes, augment.mixup, augment.cutmix, augment.mix_switch_prob, augment.mix_prob, config.seed, *ranks)


# The model


def build_model(config: Config, data: Data) -> nn.Module:
    """Return the model with its initial weights, the same for the same seed, or with those of model.pretrained."""
    torch.manual_seed(config.seed)
    pretrained = config.model.pretrained
    try:
        return task_kind(config).create_model(
            config,
            n_classes=len(data.classes),
            in_channels=data.spec.channels,
            img_size=data.img_size,
            pretrained=str(Path(pretrained).expanduser()) if isinstance(pretrained, str) else pretrained,
        )
    except OSError as error:
        raise RunError(f"model.pretrained: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {config.model.name}", str(error)) from error


def blank_model(config: Config, classes: Collection[str]) -> nn.Module:
    """Return the model with its initial weights, whatever model.pretrained says."""
    return build_model(replace(config, model=replace(config.model, pretrained=False)), described_data(config, classes))


def _prepared_model(model: nn.Module, config: Config, data: Data, accelerator: Accelerator) -> nn.Module:
    """Move the model to its device and apply the keys that change it, before anything wraps or copies it."""
    train = config.train
    model.to(accelerator.device)
    if train.channels_last:
        model.to(memory_format=torch.channels_last)
    _initialize_from_data(model, config, data, accelerator)
    _check_sizes(model, config, data)
    if train.sync_batchnorm:
        model = _synchronized(model, config.model.name, accelerator)
    if train.aux_weight != type(train)().aux_weight and len(getattr(model, "CLASSIFIERS", ())) == 1:
        log.warning("train.aux_weight has no effect on %s, which has no auxiliary head", config.model.name)
    try:
        frozen = freeze(model, train.freeze)
    except ValueError as error:
        raise ConfigError("train.freeze", str(error)) from error
    if frozen:
        log.info("frozen: %d of %d tensors of weights", len(frozen), sum(1 for _ in model.parameters()))
    if train.grad_checkpointing and not recompute_blocks(model):
        problem = f"model.name {config.model.name} does not offer it, because it is not made of blocks; a ResNet or a ViT is"
        raise ConfigError("train.grad_checkpointing", problem)
    return model


def _compiled(model: nn.Module, train: TrainConfig, name: str, *, sizes_vary: bool) -> Any:
    """Compile a graph for each size of the images, so that a resumed run computes with the same ones.

    By default, the second size would be compiled for all sizes, and from the ninth graph on the rest would not be compiled.
    """
    options: dict[str, Any] = {"mode": train.compile_mode}
    if sizes_vary:
        log.warning(
            "train.compile: images of many sizes share graphs that depend on the first ones, so resuming is not bit exact"
        )
    else:
        if train.compile_mode == "max-autotune":
            log.warning("train.compile_mode max-autotune chooses kernels by their speed, so resuming is not bit exact")
        import torch._dynamo.config as dynamo  # takes a second

        for limit in ("cache_size_limit", "accumulated_cache_size_limit"):
            setattr(dynamo, limit, max(MAX_GRAPHS, getattr(dynamo, limit)))
        options["dynamic"] = False
    import torch._inductor.config as inductor  # takes a second

    # Otherwise all of torch's headers are compiled for each set of the CPU's vector instructions, only to see whether it works
    if inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
    if train.compile != "regions":
        return torch.compile(model, **options)
    recomputes = train.grad_checkpointing and any(hasattr(module, "set_grad_checkpointing") for module in model.modules())
    if recomputes or not compile_blocks(model, **options):
        reason = "recomputes around its blocks, which would update BatchNorm twice per batch" if recomputes else "has no blocks"
        raise ConfigError("train.compile", f"regions: {name} {reason}", "train.compile true compiles any model")
    return model


def _initialize_from_data(model: nn.Module, config: Config, data: Data, accelerator: Accelerator) -> None:
    """Show some training images, not augmented and the same on every rank, to a model whose first weights depend on the data."""
    modules = [module for module in model.modules() if hasattr(module, "initialize_from")]
    if not modules or config.model.pretrained:
        return
    split, generator = data.splits["train"], torch.Generator().manual_seed(derive(config.seed, INITIALIZATION))
    chosen = torch.randperm(len(split), generator=generator)[:N_FOR_INITIALIZATION].sort().values
    prepare = preparation(config, data.spec, data.img_size)
    loader = eval_loader(split.subset(chosen), 250, 0, 1, prepare, workers(config), accelerator.device)
    for module in modules:
        initialize: Any = module.initialize_from
        initialize(batch[0] for batch in readable(loader.batches()))


@torch.no_grad()
def _check_sizes(model: nn.Module, config: Config, data: Data) -> None:
    """Try image sizes other than the one that the model was built for: most models accept any, a ViT does not."""
    was_training = model.training
    for key, size in (("eval.img_size", config.eval.img_size), ("augment.resize_from", config.augment.resize_from)):
        if size is None or size == data.img_size:
            continue
        image = torch.zeros(1, data.spec.channels, size, size, device=next(model.parameters()).device)
        try:
            model.eval()(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            problem = f"{size}: model.name {config.model.name} was built for data.img_size {data.img_size} and can't take it"
            raise ConfigError(key, f"{problem}: {str(error).splitlines()[0]}") from error
    model.train(was_training)


def _synchronized(model: nn.Module, name: str, accelerator: Accelerator) -> nn.Module:
    """Replace each BatchNorm by one of the same name that sees the batches of all devices."""
    from timm.layers import convert_sync_batchnorm  # torch's own loses the activation of timm's BatchNormAct2d

    if accelerator.device.type != "cuda":
        raise ConfigError(
            "train.sync_batchnorm", f"needs GPUs, and this run is on {accelerator.device.type}", "leave it out here"
        )
    if accelerator.num_processes == 1:
        log.warning("train.sync_batchnorm has no effect on a single device")
    try:
        return convert_sync_batchnorm(model)
    except TypeError as error:  # a norm whose scale is not a parameter
        raise ConfigError("train.sync_batchnorm", f"the norms of {name} can't be synchronized") from error
