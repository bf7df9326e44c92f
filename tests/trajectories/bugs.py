"""Bugs that real projects had, planted where this one could have them. The curves must show each of them."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any
from unittest import mock

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from datasets.pipeline import augment, order
from datasets.pipeline.mixing import Mixing
from engine import build as builder
from engine.optim import distillation, optimizer
from engine.optim.sharpness import Sharpness
from engine.state import TrainState
from engine.tasks import classification, multilabel, segmentation
from engine.tasks.detection import Detection
from engine.update import Update

Bug = Callable[[], AbstractContextManager[Any]]


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Replace a function by what `make` makes of it."""
    return mock.patch.object(owner, name, make(getattr(owner, name)))


def schedule(change: Callable[..., float]) -> AbstractContextManager[Any]:
    """Replace the schedule by `change(schedule, config, step, lr)`."""
    return replaced(builder, "make_schedule", lambda make: lambda sched, *rest: partial(change, make(sched, *rest), sched))


def lr_late() -> AbstractContextManager[Any]:
    return schedule(lambda planned, sched, step, lr: planned(max(0, step - 1), lr))


def warmup_from_zero() -> AbstractContextManager[Any]:
    return schedule(
        lambda planned, sched, step, lr: lr * step / sched.warmup_steps if step < sched.warmup_steps else planned(step, lr)
    )


def decay_of_norms() -> AbstractContextManager[Any]:
    def everywhere(make):
        return lambda model, optim, **options: make(model, replace(optim, decay_norm_and_bias=True), **options)

    return replaced(optimizer, "parameter_groups", everywhere)


def coupled_decay() -> AbstractContextManager[Any]:
    return replaced(builder, "make_optimizer", lambda make: lambda optim, *rest: make(replace(optim, type="Adam"), *rest))


def nesterov() -> AbstractContextManager[Any]:
    def make_nesterov(make):
        def made(optim, *rest):
            optimizer, names = make(optim, *rest)
            for group in optimizer.param_groups:
                group["nesterov"] = True
            return optimizer, names

        return made

    return replaced(builder, "make_optimizer", make_nesterov)


def wrong_std() -> AbstractContextManager[Any]:
    """CIFAR-10's std as many repositories copy it: the mean of the images' own."""
    wrong = lambda prepared: replace(prepared, std=(0.2023, 0.1994, 0.2010)[: len(prepared.std)])  # noqa: E731
    return replaced(builder, "preparation", lambda prepare: lambda *args: wrong(prepare(*args)))


def smoothing_twice() -> AbstractContextManager[Any]:
    def twice(loss):
        return lambda logits, targets, smoothing=0.0, *rest: loss(logits, targets, 1 - (1 - smoothing) ** 2, *rest)

    return replaced(classification, "cross_entropy", twice)


def nothing_frozen() -> AbstractContextManager[Any]:
    return mock.patch.object(builder, "freeze", return_value=[])


def no_momentum_restored() -> AbstractContextManager[Any]:
    def without_state(load):
        return lambda self, saved, *rest: load(self, {**saved, "optimizer": {**saved["optimizer"], "state": {}}}, *rest)

    return replaced(TrainState, "load_state_dict", without_state)


def data_replayed() -> AbstractContextManager[Any]:
    def from_the_start(batches):
        return lambda run, first: islice(batches(run, 0), run.n_steps - first)

    return replaced(import_module("engine.train"), "train_batches", from_the_start)


def ema_late() -> AbstractContextManager[Any]:
    before: dict[ModelEmaV3, nn.Module] = {}

    def late(apply):
        def update(self, model, decay):
            apply(self, before.get(self, model), decay)
            before[self] = copy.deepcopy(model)

        return update

    return replaced(ModelEmaV3, "apply_update_", late)


def crop_one_short() -> AbstractContextManager[Any]:
    """The last position of a crop is never drawn."""
    return replaced(augment, "below", lambda below: lambda bits, n: below(bits, n - 1 if n % 2 else n))


def flip_rate() -> AbstractContextManager[Any]:
    return replaced(augment, "below", lambda below: lambda bits, n: (below(bits, 20) < 9).long() if n == 2 else below(bits, n))


def same_augmentation() -> AbstractContextManager[Any]:
    return replaced(augment, "draws", lambda draws: lambda seed, epoch, *rest: draws(seed, 0, *rest))


def same_order() -> AbstractContextManager[Any]:
    return replaced(order, "_permutation", lambda shuffle: lambda n, *counters: shuffle(n, *counters[:-1], 0))


def tensors_clipped_apart() -> AbstractContextManager[Any]:
    def clip(self):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        for parameter in self.model.parameters() if self.clip_grad_norm else ():
            torch.nn.utils.clip_grad_norm_([parameter], self.clip_grad_norm)
        return norm

    return mock.patch.object(Update, "_clip", clip)


def mean_of_means() -> AbstractContextManager[Any]:
    """Each micro-batch counts the same, also a smaller one."""

    def equally(gradients):
        def accumulate(self, step, batch):
            parts = math.ceil(len(batch[0]) / (self.micro_batch_size or len(batch[0])))
            full, task = self.task.weight(batch), self.task

            def loss_sum(model, part):
                loss, sums = task.loss_sum(model, part)
                return loss * full / parts / task.weight(part), sums

            with mock.patch.object(self, "task", mock.Mock(wraps=task, loss_sum=loss_sum)):
                return gradients(self, step, batch)

        return accumulate

    return replaced(Update, "_gradients", equally)


def share_swapped() -> AbstractContextManager[Any]:
    def swapped(mix):
        def mixed(self, step, batch):
            images, soft = mix(self, step, batch)
            hard = torch.nn.functional.one_hot(batch[1], self.n_classes).to(soft)
            return images, hard + hard.flip(0) - soft

        return mixed

    return replaced(Mixing, "__call__", swapped)


def sam_not_restored() -> AbstractContextManager[Any]:
    def stay(perturbed):
        @contextmanager
        def without_restoring(self, model) -> Iterator[None]:
            with perturbed(self, model):
                yield
                there = [parameter.detach().clone() for parameter in model.parameters()]
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), there, strict=True):
                    parameter.copy_(value)

        return without_restoring

    return replaced(Sharpness, "perturbed", stay)


def dropout_off() -> AbstractContextManager[Any]:
    return mock.patch.object(nn.Dropout, "forward", lambda self, x: x)


def no_squared_temperature() -> AbstractContextManager[Any]:
    def unscaled(loss):
        return lambda student, teacher, temperature: loss(student, teacher, temperature) / temperature**2

    return replaced(distillation, "distillation_loss", unscaled)


def batchnorm_momentum() -> AbstractContextManager[Any]:
    def slow(build):
        def built(*args):
            model = build(*args)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.01
            return model

        return built

    return replaced(builder, "build_model", slow)


def positives_not_weighted() -> AbstractContextManager[Any]:
    return mock.patch.object(multilabel, "class_weights", return_value=None)


def ignored_pixels_counted() -> AbstractContextManager[Any]:
    def all_pixels(self, batch) -> Tensor:
        return torch.tensor(float(batch[1].numel()))

    return mock.patch.object(segmentation.Segmentation, "weight", all_pixels)


def boxes_twice() -> AbstractContextManager[Any]:
    def heavier(loss_sum):
        def weighted(self, *args):
            loss, sums = loss_sum(self, *args)
            return loss + sums["loss_bbox_regression"], sums

        return weighted

    return replaced(Detection, "loss_sum", heavier)


# Each with a recipe that must show it.
BUGS: dict[str, tuple[Bug, str]] = {
    "the learning rate is one update late": (lr_late, "sam"),
    "the warm-up begins at 0": (warmup_from_zero, "vit_tiny"),
    "norms and biases are decayed": (decay_of_norms, "vit_tiny"),
    "AdamW's decay goes through the gradient": (coupled_decay, "vit_tiny"),
    "Nesterov's momentum instead of the plain one": (nesterov, "lenet"),
    "momentum is not restored on resume": (no_momentum_restored, "sam"),
    "a resumed run reads the data from the start": (data_replayed, "distillation"),
    "a frozen stage is trained": (nothing_frozen, "resnet18"),
    "BatchNorm's momentum is 0.01": (batchnorm_momentum, "resnet18"),
    "the average is one update late": (ema_late, "mixup_ema"),
    "normalization with another std": (wrong_std, "mixup_ema"),
    "crops miss the last position": (crop_one_short, "sam"),
    "images are flipped with probability 0.45": (flip_rate, "distillation"),
    "augmentation is the same in every epoch": (same_augmentation, "sam"),
    "the order is the same in every epoch": (same_order, "sam"),
    "mixup's shares of the labels are swapped": (share_swapped, "mixup_ema"),
    "labels are smoothed twice": (smoothing_twice, "lenet"),
    "dropout is off": (dropout_off, "vit_tiny"),
    "each tensor's gradient is clipped alone": (tensors_clipped_apart, "lenet"),
    "a smaller micro-batch counts as much as the others": (mean_of_means, "lenet"),
    "SAM does not restore the weights": (sam_not_restored, "sam"),
    "the distillation loss lacks temperature squared": (no_squared_temperature, "distillation"),
    "labels of rare classes are not weighted": (positives_not_weighted, "multilabel"),
    "ignored pixels count in the mean": (ignored_pixels_counted, "segmentation"),
    "the loss of boxes counts twice": (boxes_twice, "detection"),
}
