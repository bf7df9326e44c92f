"""The learning rate as a function of the update, counted from 0. It has no state, so a resumed run needs none.

A run is a warm-up, then the schedule that `type` names, then a cool-down; warm-up and cool-down are optional.
"""

import math
from collections.abc import Callable

from engine.config.rules import check_t_max, phases_too_long
from engine.config.schema import SchedConfig

Schedule = Callable[[int, float], float]  # (update, base learning rate) -> learning rate of this update


def make_schedule(sched: SchedConfig, n_steps: int, steps_per_epoch: int) -> Schedule:
    """Return the learning rate as a function of the update and the base rate.

    A schedule with an end runs from the end of the warm-up to t_max, and restarts count from the end of the warm-up; milestones
    and step_size count from the run's first update.
    """
    warmup, cooldown = warmup_and_cooldown(sched, n_steps, steps_per_epoch)
    cooldown_begins = n_steps - cooldown
    last = sched.t_max or cooldown_begins

    def schedule(step: int, lr: float) -> float:
        if step < warmup:
            return _between(sched.warmup_lr, lr, (step + 1) / (warmup + 1))
        if not cooldown or step < cooldown_begins:
            return _main_phase(sched, warmup, last, step, lr)
        start = _main_phase(sched, warmup, last, cooldown_begins, lr)
        return _between(start, sched.cooldown_lr, (step - cooldown_begins) / cooldown)

    return schedule


def warmup_and_cooldown(sched: SchedConfig, n_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return the lengths of both phases in updates."""
    warmup = sched.warmup_steps or round(sched.warmup_epochs * steps_per_epoch)
    cooldown = sched.cooldown_steps or round(sched.cooldown_epochs * steps_per_epoch)
    if cooldown and warmup + cooldown > n_steps:
        names = [f"{phase}_{unit}" for phase in ("warmup", "cooldown") for unit in ("steps", "epochs")]
        given = {f"train.sched.{name}": getattr(sched, name) for name in names}
        raise phases_too_long(given, f"the run's {n_steps} updates")
    key = "train.sched.warmup_steps" if sched.warmup_steps else "train.sched.warmup_epochs"
    check_t_max(sched.type, sched.t_max, warmup, key, sched.warmup_steps or sched.warmup_epochs)
    return warmup, cooldown


def _main_phase(sched: SchedConfig, first: int, last: int, step: int, lr: float) -> float:
    """Return the rate between warm-up and cool-down. `last` is one update beyond the end of a schedule with an end."""
    progress = (step - first) / max(1, last - first)  # beyond 1 where the run is longer than t_max
    match sched.type:
        case "CosineAnnealingLR":
            return _between(sched.eta_min, lr, _half_wave(progress))
        case "LinearLR":
            return _between(sched.eta_min, lr, max(0.0, 1 - progress))
        case "PolynomialLR":
            return _between(sched.eta_min, lr, max(0.0, 1 - progress) ** sched.power)
        case "OneCycleLR":  # as in torch: the peak may lie between two updates, and the end is the last update
            peak, end = sched.pct_start * last - 1, last - 1
            start = lr / sched.div_factor
            if step < peak:
                return _between(lr, start, _half_wave(step / peak))
            return _between(start / sched.final_div_factor, lr, _half_wave(min(1.0, (step - peak) / (end - peak))))
        case "CosineAnnealingWarmRestarts":
            cycle, since = sched.t_0 or 1, step - first  # the rules require t_0
            if sched.t_mult == 1:
                since %= cycle
            while since >= cycle:
                since -= cycle
                cycle *= sched.t_mult
            return _between(sched.eta_min, lr, _half_wave(since / cycle))
        case "MultiStepLR":
            return lr * sched.gamma ** sum(step >= milestone for milestone in sched.milestones)
        case "StepLR":
            return lr * sched.gamma ** (step // (sched.step_size or 1))  # the rules require step_size
        case "constant":
            return lr


def _between(start: float, end: float, part: float) -> float:
    return start + (end - start) * part


def _half_wave(progress: float) -> float:
    """Return half a cosine wave, from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2
