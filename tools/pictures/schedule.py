"""The learning rate over a run, from its config, without data or model."""

import inspect
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from datasets.pipeline.order import Order
from engine import load_config
from engine.build import dataset_spec
from engine.config.errors import ConfigError
from engine.config.rules import SCHEDULE_KEYS
from engine.optim.schedule import make_schedule, warmup_and_cooldown
from engine.plots.style import line_style, new_figure, style
from tools.pictures.output import save_pictures
from tools.pictures.subject import require_positive, short_labels
from tools.tables import print_lines

BROAD: dict[str, Any] = {"linewidth": 8, "alpha": 0.3, "solid_capstyle": "butt"}  # under the line of a warm-up or cool-down
NOMINAL_STEPS = 1000  # in an epoch of unknown length
IN_EPOCHS: tuple[str, ...] = ("warmup_epochs", "cooldown_epochs")
IN_UPDATES: tuple[str, ...] = ("t_max", "t_0", "milestones", "step_size", "warmup_steps", "cooldown_steps")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a config."""

    name: str
    kind: str
    rates: list[float]  # at every update
    warmup: int  # updates
    cooldown: int
    steps_per_epoch: int | None  # None if it depends on data that isn't read
    in_epochs: bool  # the length of the run is given in epochs

    @property
    def is_nominal(self) -> bool:
        """Whether the number of updates is unknown, so that it is drawn with NOMINAL_STEPS per epoch."""
        return self.in_epochs and self.steps_per_epoch is None


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    if args.n_images is not None:
        require_positive("--n_images", args.n_images)
    named = zip(short_labels(args.config), args.config, strict=True)
    schedules = [read_schedule(name, path, overrides, args.n_images) for name, path in named]
    draw_schedules(figure := new_figure(show=args.show), schedules)
    save_pictures({"schedule": figure}, args)


def read_schedule(name: str, path: str, overrides: dict[str, Any], n_images: int | None) -> Schedule:
    config = load_config(path, overrides)
    for note in config.notes:
        print_lines(f"{path}: {note}", file=sys.stderr)
    train, sched = config.train, config.train.sched
    n_train = inspect.signature(dataset_spec(config).load).parameters.get("n_train")  # an argument of generated datasets
    n = n_images or config.data.args.get("n_train", n_train.default if n_train else None)
    steps_per_epoch = None
    if n is not None:
        n -= round(n * (config.data.valid_ratio or 0))
        steps_per_epoch = Order(n, train.batch_size // config.augment.repeats, config.seed).steps_per_epoch
        if steps_per_epoch == 0:
            raise ConfigError(f"train.batch_size {train.batch_size} is more than the {n} training images: an epoch has no step")
    else:  # updates and epochs can't be drawn together
        length, others = ("n_steps", IN_EPOCHS) if train.n_epochs is None else ("n_epochs", IN_UPDATES)
        for key in others:
            if getattr(sched, key) and sched.type in SCHEDULE_KEYS.get(key, (sched.type,)):
                problem = f"the length of an epoch depends on the data of {config.data.name}; give --n_images ({path})"
                raise ConfigError(f"train.{length} and train.sched.{key}: one is in updates and one in epochs, and {problem}")
    assumed = steps_per_epoch or NOMINAL_STEPS
    n_steps = train.n_steps or (train.n_epochs or 0) * assumed
    at = make_schedule(sched, n_steps, assumed)
    rates = [at(step, train.base_lr) for step in range(n_steps)]
    warmup, cooldown = warmup_and_cooldown(sched, n_steps, assumed)
    return Schedule(name, sched.type, rates, min(warmup, n_steps), cooldown, steps_per_epoch, in_epochs=train.n_steps is None)


def draw_schedules(figure: Figure, schedules: Sequence[Schedule]) -> None:
    """Draw over epochs if the number of updates of a run is unknown, or else over updates."""
    by_epoch = any(schedule.is_nominal for schedule in schedules)
    updates_only = [schedule.name for schedule in schedules if not schedule.in_epochs and schedule.steps_per_epoch is None]
    if by_epoch and updates_only:
        problem = "the length of an epoch depends on the data: give --n_images, or draw them separately"
        raise ConfigError(f"{updates_only[0]} is in updates and another config in epochs, and {problem}")
    with style():
        figure.set_size_inches(9, 4.2 + 0.25 * (len(schedules) - 1))
        axes = figure.subplots()
        for i, schedule in enumerate(schedules):
            unit = (schedule.steps_per_epoch or NOMINAL_STEPS) if by_epoch else 1
            x = [step / unit for step in range(len(schedule.rates))]
            lengths = ((len(schedule.rates), ""), (schedule.warmup, "warm-up "), (schedule.cooldown, "cool-down "))
            nominal = schedule.is_nominal
            texts = [name + (f"{n / NOMINAL_STEPS:.4g} epochs" if nominal else f"{n:,} updates") for n, name in lengths if n]
            label = f"{schedule.name}: {schedule.kind}, {', '.join(texts)}"
            axes.plot(x, schedule.rates, linewidth=1.8, label=label, zorder=3, **line_style(i))
            for phase in (slice(0, schedule.warmup and schedule.warmup + 1), slice(len(x) - schedule.cooldown, len(x))):
                axes.plot(x[phase], schedule.rates[phase], color=line_style(i)["color"], **BROAD)
        in_epochs = f"epoch (drawn with {NOMINAL_STEPS:,} updates each; their number depends on the data)"
        axes.set(xlabel=in_epochs if by_epoch else "update", ylabel="learning rate")
        top = max(max(schedule.rates) for schedule in schedules)
        axes.set_ylim(-0.02 * top, 1.04 * top)
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        length, *others = {schedule.steps_per_epoch for schedule in schedules}
        if not by_epoch and not others and length is not None:
            to_epochs, to_updates = lambda step: step / length, lambda epoch: epoch * length
            above = axes.secondary_xaxis("top", functions=(to_epochs, to_updates))
            above.set_xlabel(f"epoch (of {length:,} updates)")
            above.spines["top"].set_visible(True)
        if any(schedule.warmup or schedule.cooldown for schedule in schedules):
            axes.plot([], [], color="gray", label="broad: warm-up and cool-down", **BROAD)
        figure.legend(loc="outside lower center")
