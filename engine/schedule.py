"""The learning rate as a function of the update, counted from 0. No state: a resumed run needs none."""

import math
from collections.abc import Callable

from engine.schema import SchedConfig

Schedule = Callable[[int, float], float]  # (update, base learning rate) -> learning rate of this update


def make_schedule(sched: SchedConfig, n_steps: int, steps_per_epoch: int) -> Schedule:
    """Where there is a warm-up, the cosine falls over what is left of t_max; milestones count from the run's first update."""
    warmup = sched.warmup_steps or round(sched.warmup_epochs * steps_per_epoch)
    t_max = sched.t_max or n_steps

    def cosine(step: int, lr: float) -> float:
        progress = (step - warmup) / max(1, t_max - warmup)
        return sched.eta_min + (lr - sched.eta_min) * (1 + math.cos(math.pi * progress)) / 2

    def multi_step(step: int, lr: float) -> float:
        return lr * sched.gamma ** sum(step >= milestone for milestone in sched.milestones)

    def regular_steps(step: int, lr: float) -> float:
        return lr * sched.gamma ** (step // sched.step_size)

    def constant(step: int, lr: float) -> float:
        return lr

    after = {"CosineAnnealingLR": cosine, "MultiStepLR": multi_step, "StepLR": regular_steps, "constant": constant}[sched.type]

    def schedule(step: int, lr: float) -> float:
        if step < warmup:
            return sched.warmup_lr + (lr - sched.warmup_lr) * (step + 1) / (warmup + 1)
        return after(step, lr)

    return schedule
