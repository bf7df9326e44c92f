"""Build a run from its config. Nothing else in the engine reads the config while it trains."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from datasets.pipeline.counters import derive
from datasets.pipeline.loaders import Growth, InMemoryTraining, TrainLoader, eval_loader, train_loader
from datasets.pipeline.mixing import Mixing
from datasets.pipeline.order import Order
from datasets.pipeline.splits import Images
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import LoadedConfig
from engine.config.schema import TrainConfig
from engine.data import Data, load_data, preparation, task_kind, workers
from engine.devices.memory import keep_freed_memory
from engine.devices.recompute import recompute_blocks
from engine.evaluate import evaluate, readable
from engine.optim.distillation import Distillation
from engine.optim.layers import freeze
from engine.optim.optimizer import make_optimizer
from engine.optim.schedule import Schedule, make_schedule
from engine.optim.sharpness import Sharpness
from engine.optim.teacher import load_teacher
from engine.state import TrainState
from engine.tasks import Task
from engine.update import Update

log = logging.getLogger(__name__)

FIRST_LOOK = 5000  # training images that a model with `initialize_from` begins with
LOOK = 8  # separates this use of the seed from the others


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
    _initialize(model, config, data, accelerator)
    _check_sizes(model, config, data)
    if train.sync_batchnorm:
        model = _synchronized(model, config, accelerator)
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
    loader = train_loader(data.splits["train"], order, prepare, workers(config), accelerator.device)
    if isinstance(loader, InMemoryTraining):
        data.splits["train"] = loader.split
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # from here on, as what reading the data took shall go back
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
        train_loader=loader,
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


def _initialize(model: nn.Module, config: LoadedConfig, data: Data, accelerator: Accelerator) -> None:
    """A model whose first weights depend on the data sees some training images, not augmented, the same ones on every rank.

    A resumed run then replaces what was found by its checkpoint.
    """
    modules = [module for module in model.modules() if hasattr(module, "initialize_from")]
    if not modules or config.model.pretrained:
        return
    split, generator = data.splits["train"], torch.Generator().manual_seed(derive(config.seed, LOOK))
    chosen = torch.randperm(len(split), generator=generator)[:FIRST_LOOK].sort().values
    prepare = preparation(config, data.spec, data.img_size)
    loader = eval_loader(split.subset(chosen), 250, 0, 1, prepare, workers(config), accelerator.device)
    for module in modules:
        module.initialize_from(batch[0] for batch in readable(loader.batches()))


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


def _synchronized(model: nn.Module, config: LoadedConfig, accelerator: Accelerator) -> nn.Module:
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
