"""The learning rate as a function of the update, counted from 0. No state: a resumed run needs none.

A run is a warm-up, then the schedule that `type` names, then a cool-down; the first and the last may be missing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from engine.config.errors import ConfigError
from engine.config.schema import SchedConfig, TrainConfig

Schedule = Callable[[int, float], float]  # (update, base learning rate) -> learning rate of this update

FOLLOW_THE_LENGTH = ("CosineAnnealingLR", "LinearLR", "PolynomialLR", "OneCycleLR")  # the types that t_max is for


def base_lr(train: TrainConfig) -> float:
    """The learning rate that the schedule is applied to: train.optim.lr, in proportion to the batch where that is asked for."""
    return train.optim.lr * (train.batch_size / train.scale_lr if train.scale_lr else 1)


class Span(NamedTuple):
    """The updates of a schedule between warm-up and cool-down."""

    first: int
    last: int  # one beyond its last update

    def progress(self, step: int) -> float:
        """From 0 to 1, and beyond where the run is longer than t_max."""
        return (step - self.first) / max(1, self.last - self.first)


def make_schedule(sched: SchedConfig, n_steps: int, steps_per_epoch: int) -> Schedule:
    """A schedule with an end takes what a warm-up leaves of t_max, and restarts are counted from there; milestones and step_size
    count from the run's first update."""
    warmup, cooldown = warmup_and_cooldown(sched, n_steps, steps_per_epoch)
    cooldown_begins = n_steps - cooldown
    shape, span = SHAPES[sched.type], Span(warmup, sched.t_max or cooldown_begins)

    def schedule(step: int, lr: float) -> float:
        if step < warmup:
            return _between(sched.warmup_lr, lr, (step + 1) / (warmup + 1))
        if not cooldown or step < cooldown_begins:
            return shape(sched, span, step, lr)
        return _between(shape(sched, span, cooldown_begins, lr), sched.cooldown_lr, (step - cooldown_begins) / cooldown)

    return schedule


def warmup_and_cooldown(sched: SchedConfig, n_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """How many updates each of them takes."""
    warmup = sched.warmup_steps or round(sched.warmup_epochs * steps_per_epoch)
    cooldown = sched.cooldown_steps or round(sched.cooldown_epochs * steps_per_epoch)
    expect_to_fit(sched, warmup, cooldown, n_steps, f"the run's {n_steps} updates")
    expect_t_max_after_warmup(sched, warmup)
    return warmup, cooldown


def expect_to_fit(sched: SchedConfig, warmup: float, cooldown: float, length: float, run: str) -> None:
    """The lengths are all in updates, or all in epochs. A warm-up alone may be longer: a short trial of a long run ends in it."""
    if cooldown and warmup + cooldown > length:
        names = [name for name in ("warmup_steps", "warmup_epochs", "cooldown_steps", "cooldown_epochs") if getattr(sched, name)]
        asked = " and ".join(f"train.sched.{name} {getattr(sched, name):g}" for name in names)
        raise ConfigError(f"{asked} {'are' if len(names) > 1 else 'is'} more than {run}")


def expect_t_max_after_warmup(sched: SchedConfig, warmup: int) -> None:
    if sched.type in FOLLOW_THE_LENGTH and sched.t_max is not None and warmup >= sched.t_max:
        name = "warmup_steps" if sched.warmup_steps else "warmup_epochs"
        raise ConfigError(
            f"train.sched.t_max {sched.t_max} counts from the run's first update, and train.sched.{name} "
            f"{getattr(sched, name):g} leaves nothing of it"
        )


# The schedules: what lr is multiplied by, or where it stands between two rates


def _cosine(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return _between(sched.eta_min, lr, _half_wave(span.progress(step)))


def _warm_restarts(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    cycle, since = sched.t_0, step - span.first
    if sched.t_mult == 1:
        since %= cycle
    while since >= cycle:
        since -= cycle
        cycle *= sched.t_mult
    return _between(sched.eta_min, lr, _half_wave(since / cycle))


def _multi_step(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return lr * sched.gamma ** sum(step >= milestone for milestone in sched.milestones)


def _regular_steps(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return lr * sched.gamma ** (step // sched.step_size)


def _linear(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return _between(sched.eta_min, lr, max(0.0, 1 - span.progress(step)))


def _polynomial(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return _between(sched.eta_min, lr, max(0.0, 1 - span.progress(step)) ** sched.power)


def _one_cycle(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    """As in torch, the top is at a fraction of an update, and the end is the last update rather than the one after it."""
    top, end = sched.pct_start * span.last - 1, span.last - 1
    start = lr / sched.div_factor
    if step < top:
        return _between(lr, start, _half_wave(step / top))
    return _between(start / sched.final_div_factor, lr, _half_wave(min(1.0, (step - top) / (end - top))))


def _constant(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return lr


SHAPES: dict[str, Callable[[SchedConfig, Span, int, float], float]] = {
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _warm_restarts,
    "MultiStepLR": _multi_step,
    "StepLR": _regular_steps,
    "LinearLR": _linear,
    "PolynomialLR": _polynomial,
    "OneCycleLR": _one_cycle,
    "constant": _constant,
}


def _between(start: float, end: float, part: float) -> float:
    return start + (end - start) * part


def _half_wave(progress: float) -> float:
    """Half a cosine, from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2
