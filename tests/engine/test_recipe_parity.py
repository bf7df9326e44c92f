"""Each recipe matches timm: 100 steps compared with a plain loop of torch and timm components."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from engine import load_config
from engine.build import Run, build
from engine.devices.accelerator import make_accelerator
from engine.train import train_batches
from tests.running import ROOT

N_STEPS, BATCH_SIZE, LR = 100, 16, 0.05
WARMUP = 10
TOLERANCE = {"loss": 1e-6, "lr": 1e-9, "weights": 1e-6}  # largest difference between equal steps
MIN_DIFFERENCE = 1e-4  # different trainings exceed it in at least one step

SGD = {"opt": "momentum", "lr": LR, "momentum": 0.9, "weight_decay": 5e-4, "filter_bias_and_bn": False}
ADAMW = {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.3, "layer_decay": 0.7}
COSINE = {"t_initial": N_STEPS}
# our first update is one warm-up step above train.sched.warmup_lr, which may be 0; timm's first update uses warmup_lr_init
WARM_COSINE = {"t_initial": N_STEPS - WARMUP, "warmup_t": WARMUP, "warmup_lr_init": LR / (WARMUP + 1), "warmup_prefix": True}


class Step(NamedTuple):
    """The values compared after each update."""

    loss: float
    lr: float  # the highest of the parameter groups
    weights: dict[str, Tensor]  # the averaged weights, if the recipe averages


@dataclass
class Recipe:
    ours: dict[str, Any]  # config overrides
    theirs: dict[str, Any] = field(default_factory=dict)  # arguments of plain_training
    without: dict[str, dict[str, Any]] = field(default_factory=dict)  # arguments that drop one part of the recipe
    smoothing: float | None = None  # label smoothing for batches mixed by timm; None: use our batches


def plain_training(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    optimizer: dict[str, Any] = SGD,
    schedule: dict[str, Any] = COSINE,
    criterion: nn.Module | None = None,
    clip: float | None = None,
    ema: dict[str, Any] | None = None,
    micro_batch_size: int = BATCH_SIZE,
) -> Iterator[Step]:
    """The loop of a timm user. It averages the mean losses of micro-batches, which is right for equal sizes only."""
    optimizer = create_optimizer_v2(model, **optimizer)
    scheduler = CosineLRScheduler(optimizer, t_in_epochs=False, **schedule)
    average = ModelEmaV3(model, **ema) if ema else None
    criterion = criterion or nn.CrossEntropyLoss()
    model.train()
    for step, (images, targets) in enumerate(batches):
        parts = list(zip(images.split(micro_batch_size), targets.split(micro_batch_size), strict=True))
        losses = [criterion(model(part), labels) for part, labels in parts]
        loss = torch.stack(losses).mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        lr = max(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(step + 1)
        if average:
            average.update(model, step=step + 1)  # as timm's training script counts
        yield Step(loss.item(), lr, (average.module if average else model).state_dict())


def our_training(run: Run, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Step]:
    state = run.state
    for batch in batches:
        run.update(state, batch, measure=True)
        loss = (state.window["loss"] / state.window["weight"]).item()
        state.window.clear()
        lr = max(group["lr"] for group in state.optimizer.param_groups)
        yield Step(loss, lr, (state.ema.module if state.ema else run.model).state_dict())


def mix_with_timm(run: Run, mixed: Iterable[tuple[Tensor, Tensor]], smoothing: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Mix batches as timm does, with the mixing ratio of our batches and labels smoothed by timm."""
    for (_, soft), (images, labels) in zip(mixed, run.train_loader.batches(0, N_STEPS), strict=True):
        differs = labels != labels.flip(0)
        share = soft[differs, labels[differs]][0].item()
        yield images * share + images.flip(0) * (1 - share), mixup_target(labels, soft.shape[1], share, smoothing)


def in_double(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        yield images.double(), targets.double() if targets.is_floating_point() else targets


def differences(recipe: Recipe, *, mixed: bool = True, **changed: Any) -> Iterator[dict[str, float]]:
    """Yield the differences between our training and timm's for each step; `changed` overrides arguments of timm's.

    Both train in double precision. In single precision, micro-batches are summed in a different order than a whole batch,
    and within 100 steps that alone moves the losses of two correct trainings 1e-2 apart.
    """
    options = {
        "train.n_steps": N_STEPS,
        "train.batch_size": BATCH_SIZE,
        "train.num_threads": 1,
        "train.optim.lr": LR,
        "train.optim.weight_decay": SGD["weight_decay"],
    }
    config = load_config(ROOT / "configs" / "lenet_digits.yaml", options | recipe.ours)
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    for model in (run.model, run.state.ema):
        if model is not None:
            model.double()
    batches = list(train_batches(run, 0))
    assert len(batches) == N_STEPS
    smoothing = changed.pop("smoothing", recipe.smoothing)
    if smoothing is None:
        timm_batches = batches
    else:
        timm_batches = mix_with_timm(run, batches, smoothing) if mixed else run.train_loader.batches(0, N_STEPS)
    theirs = plain_training(copy.deepcopy(run.model), in_double(timm_batches), **recipe.theirs | changed)
    for mine, plain in zip(our_training(run, in_double(batches)), theirs, strict=True):
        assert mine.weights.keys() == plain.weights.keys()
        gaps = [(mine.weights[name] - value).abs().max().item() for name, value in plain.weights.items()]
        yield {"loss": abs(mine.loss - plain.loss), "lr": abs(mine.lr - plain.lr), "weights": max(gaps)}


RECIPES = {
    "SGD with momentum": Recipe(
        {},
        {},
        {
            "momentum": {"optimizer": SGD | {"momentum": 0.0}},
            "plainness, with Nesterov's momentum": {"optimizer": SGD | {"opt": "sgd"}},
            "weight decay": {"optimizer": SGD | {"weight_decay": 0.0}},
            "decay of biases": {"optimizer": SGD | {"filter_bias_and_bn": True}},
        },
    ),
    "AdamW with layer decay and no decay of norms and biases": Recipe(
        {
            "model.name": "timm/test_vit",
            "data.img_size": 32,
            "train.optim.type": "AdamW",
            "train.optim.lr": ADAMW["lr"],
            "train.optim.weight_decay": ADAMW["weight_decay"],
            "train.optim.layer_decay": ADAMW["layer_decay"],
            "train.optim.decay_norm_and_bias": False,
        },
        {"optimizer": ADAMW},
        {
            "layer decay": {"optimizer": ADAMW | {"layer_decay": None}},
            "sparing norms and biases": {"optimizer": ADAMW | {"filter_bias_and_bn": False}},
            "weight decay": {"optimizer": ADAMW | {"weight_decay": 0.0}},
        },
    ),
    "mixup and label smoothing": Recipe(
        {"augment.mixup": 0.8, "train.label_smoothing": 0.1},
        {"criterion": SoftTargetCrossEntropy()},
        {"label smoothing": {"smoothing": 0.0}, "mixup": {"mixed": False, "criterion": LabelSmoothingCrossEntropy(0.1)}},
        smoothing=0.1,
    ),
    "label smoothing alone": Recipe(
        {"train.label_smoothing": 0.1},
        {"criterion": LabelSmoothingCrossEntropy(0.1)},
        {"label smoothing": {"criterion": nn.CrossEntropyLoss()}},
    ),
    "an average of the weights": Recipe(
        {
            "model.name": "timm/test_resnet",
            "data.img_size": 32,
            "train.batch_size": 8,
            "train.ema": 0.9,
            "train.ema_warmup": False,
        },
        {"ema": {"decay": 0.9}},
        {"the average": {"ema": None}, "its decay": {"ema": {"decay": 0.95}}},
    ),
    "an average with a warm-up": Recipe(
        {"train.ema": 0.95},
        {"ema": {"decay": 0.95, "use_warmup": True}},
        {"the average": {"ema": None}, "its warm-up": {"ema": {"decay": 0.95}}},
    ),
    "micro-batches of which the last is smaller": Recipe(
        {"train.micro_batch_size": 6},
        {},
        {"weighting by the number of images": {"micro_batch_size": 6}},
    ),
    "clipping by norm": Recipe({"train.clip_grad_norm": 0.5}, {"clip": 0.5}, {"clipping": {"clip": None}}),
    "BCE with a threshold, of smoothed labels": Recipe(
        {"train.loss": "bce", "train.bce_threshold": 0.4, "train.label_smoothing": 0.1, "augment.mixup": 1.0},
        {"criterion": BinaryCrossEntropy(target_threshold=0.4)},
        {"the threshold": {"criterion": BinaryCrossEntropy()}, "label smoothing": {"smoothing": 0.0}},
        smoothing=0.1,
    ),
    "BCE with smoothing alone": Recipe(
        {"train.loss": "bce", "train.label_smoothing": 0.1},
        {"criterion": BinaryCrossEntropy(smoothing=0.1)},
        {"label smoothing": {"criterion": BinaryCrossEntropy(smoothing=0.0)}},
    ),
    "a warm-up and a cosine": Recipe(
        {"train.sched.warmup_steps": WARMUP},
        {"schedule": WARM_COSINE},
        {
            "the warm-up": {"schedule": COSINE},
            "the cosine": {"schedule": WARM_COSINE | {"lr_min": LR}},
            "the cosine's beginning after the warm-up": {
                "schedule": WARM_COSINE | {"t_initial": N_STEPS, "warmup_prefix": False}
            },
        },
    ),
}
PARTS = [(name, part) for name, recipe in RECIPES.items() for part in recipe.without]


@pytest.mark.parametrize("name", RECIPES)
def test_losses_learning_rates_and_weights_of_100_steps_match_timm(name):
    steps = list(differences(RECIPES[name]))
    assert len(steps) == N_STEPS
    largest = {quantity: max(step[quantity] for step in steps) for quantity in TOLERANCE}
    assert all(largest[quantity] <= TOLERANCE[quantity] for quantity in TOLERANCE), largest


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_plain_loop_without_a_part_of_the_recipe_differs(name, part):
    recipe = RECIPES[name]
    quantity = "weights" if "train.ema" in recipe.ours else "loss"  # averaging does not affect the training
    assert any(step[quantity] > MIN_DIFFERENCE for step in differences(recipe, **recipe.without[part]))
