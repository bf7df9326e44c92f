"""The learning rate as a function of the update, counted from 0. It has no state, so a resumed run needs none.

A run is a warm-up, then the schedule that `type` names, then a cool-down; warm-up and cool-down are optional.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from engine.config.rules import check_t_max, phases_too_long
from engine.config.schema import SchedConfig

PHASES = ("warmup", "cooldown")
Schedule = Callable[[int, float], float]  # (update, base learning rate) -> learning rate of this update


class Span(NamedTuple):
    """The updates of a run between warm-up and cool-down."""

    first: int
    last: int  # one beyond its last update

    def progress(self, step: int) -> float:
        """Return the progress from 0 to 1, and beyond 1 where the run is longer than t_max."""
        return (step - self.first) / max(1, self.last - self.first)


def make_schedule(sched: SchedConfig, n_steps: int, steps_per_epoch: int) -> Schedule:
    """Return the learning rate as a function of the update and the base rate.

    A schedule with an end runs from the end of the warm-up to t_max, and restarts count from the end of the warm-up; milestones
    and step_size count from the run's first update.
    """
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
    """Return the lengths of both phases in updates."""
    warmup = sched.warmup_steps or round(sched.warmup_epochs * steps_per_epoch)
    cooldown = sched.cooldown_steps or round(sched.cooldown_epochs * steps_per_epoch)
    if cooldown and warmup + cooldown > n_steps:
        given = {
            f"train.sched.{phase}_{unit}": getattr(sched, f"{phase}_{unit}") for phase in PHASES for unit in ("steps", "epochs")
        }
        raise phases_too_long(given, f"the run's {n_steps} updates")
    key = "train.sched.warmup_steps" if sched.warmup_steps else "train.sched.warmup_epochs"
    check_t_max(sched.type, sched.t_max, warmup, key, sched.warmup_steps or sched.warmup_epochs)
    return warmup, cooldown


# The shapes of schedules


def _cosine(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return _between(sched.eta_min, lr, _half_wave(span.progress(step)))


def _warm_restarts(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    cycle, since = sched.t_0 or 1, step - span.first  # the rules require t_0
    if sched.t_mult == 1:
        since %= cycle
    while since >= cycle:
        since -= cycle
        cycle *= sched.t_mult
    return _between(sched.eta_min, lr, _half_wave(since / cycle))


def _multi_step(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return lr * sched.gamma ** sum(step >= milestone for milestone in sched.milestones)


def _regular_steps(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return lr * sched.gamma ** (step // (sched.step_size or 1))  # the rules require step_size


def _linear(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return _between(sched.eta_min, lr, max(0.0, 1 - span.progress(step)))


def _polynomial(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    return _between(sched.eta_min, lr, max(0.0, 1 - span.progress(step)) ** sched.power)


def _one_cycle(sched: SchedConfig, span: Span, step: int, lr: float) -> float:
    """Rise and fall as in torch: the peak may lie between two updates, and the end is the last update, not the one after it."""
    peak, end = sched.pct_start * span.last - 1, span.last - 1
    start = lr / sched.div_factor
    if step < peak:
        return _between(lr, start, _half_wave(step / peak))
    return _between(start / sched.final_div_factor, lr, _half_wave(min(1.0, (step - peak) / (end - peak))))


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
    """Return half a cosine wave, from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2
