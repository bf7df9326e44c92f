"""The learning rate over a run, as its config says, without data or model."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import load_config
from engine.config.errors import ConfigError
from engine.config.resolve import ResolvedConfig
from engine.config.rules import SCHEDULE_KEYS
from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import told_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLES = """
Configs that are given together share the picture, and the options.

A run that counts in updates is drawn over updates. Where the length of an epoch is known, from --n_images or from a data set that
is generated, epochs stand above them. Where it is not, a run that counts in epochs is drawn over epochs.

examples:
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml --n_images 50000
  python tools/visualize.py schedule -c configs/resnet50_imagenet.yaml --train.sched.cooldown_epochs 10 -o imagenet.png
  python tools/visualize.py schedule -c configs/lenet_digits.yaml --train.sched.type OneCycleLR --show
"""
BROAD = {"linewidth": 8, "alpha": 0.3, "solid_capstyle": "butt"}  # lies under a part of a line
NOMINAL_STEPS = 1000  # in an epoch of which only the data would say how long it is
IN_UPDATES = ("t_max", "t_0", "milestones", "step_size", "warmup_steps", "cooldown_steps")


@dataclass(frozen=True)
class Course:
    """The learning rate of a config's run."""

    name: str
    kind: str
    rates: list[float]  # of every update
    warmup: int  # updates
    cooldown: int
    steps_per_epoch: int | None  # None where only the data would say it
    in_epochs: bool  # the run's length is given in epochs


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "schedule",
        help="the learning rate over a run, without data or model",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s -c CONFIG [CONFIG ...] [-o PATH.png] [--n_images N] [--show] [--key.sub value ...]",
    )
    parser.add_argument("-c", "--config", nargs="+", action="extend", required=True, help="one or several; may be repeated")
    parser.add_argument("--n_images", type=int, metavar="N", help="in the training split, where only the data would say it")
    add_output(parser, "schedule.png")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    if args.n_images is not None and args.n_images < 1:
        raise ConfigError(f"--n_images must be at least 1, got {args.n_images}")
    courses = [course_of(name, path, overrides, args.n_images) for name, path in told_apart(args.config)]
    draw_schedules(figure := new_figure(args), courses)
    deliver({"schedule": figure}, args)
    return 0


def course_of(name: str, path: str, overrides: dict[str, Any], n_images: int | None) -> Course:
    from engine.optim.schedule import make_schedule, warmup_and_cooldown

    config = load_config(path, overrides)
    for note in config.notes:
        print(f"{path}: {note}", file=sys.stderr)
    train, sched = config.train, config.train.sched
    of_epoch = steps_per_epoch(config, n_images)
    if of_epoch is None:
        _expect_one_unit(config, path)
    assumed = of_epoch or NOMINAL_STEPS
    n_steps = train.n_steps or train.n_epochs * assumed
    at = make_schedule(sched, n_steps, assumed)
    rates = [at(step, train.base_lr) for step in range(n_steps)]
    warmup, cooldown = warmup_and_cooldown(sched, n_steps, assumed)
    return Course(name, sched.type, rates, min(warmup, n_steps), cooldown, of_epoch, in_epochs=train.n_steps is None)


def steps_per_epoch(config: ResolvedConfig, n_images: int | None) -> int | None:
    """None where only the data would say it."""
    import inspect

    from datasets.pipeline.order import Order
    from engine.build import dataset_spec

    generated = inspect.signature(dataset_spec(config).load).parameters.get("n_train")
    n = n_images or config.data.args.get("n_train", generated.default if generated else None)
    if n is None:
        return None
    n -= round(n * (config.data.valid_ratio or 0))
    found = Order(n, config.train.batch_size // config.augment.repeats, config.seed).steps_per_epoch
    if found == 0:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is more than the {n} training images: an epoch has no step"
        )
    return found


def _expect_one_unit(config: ResolvedConfig, path: str) -> None:
    """Updates and epochs can't be drawn together while the length of an epoch is unknown."""
    sched = config.train.sched
    length, others = "n_steps", ("warmup_epochs", "cooldown_epochs")
    if config.train.n_epochs is not None:
        length, others = "n_epochs", IN_UPDATES
    for name in others:
        if getattr(sched, name) and sched.type in SCHEDULE_KEYS.get(name, (sched.type,)):
            raise ConfigError(
                f"train.{length} and train.sched.{name}: one counts in updates and one in epochs, and only the data of "
                f"{config.data.name} say how long an epoch is; --n_images gives it without them ({path})"
            )


def draw_schedules(figure: "Figure", courses: Sequence[Course]) -> None:
    """In epochs where a run's length is known in nothing else, in updates otherwise."""
    from engine.plots.style import line_style, style

    by_epoch = any(course.in_epochs and course.steps_per_epoch is None for course in courses)
    updates_only = [course.name for course in courses if not course.in_epochs and course.steps_per_epoch is None]
    if by_epoch and updates_only:
        raise ConfigError(
            f"{updates_only[0]} counts in updates and another config in epochs, and how long an epoch is, only the data say: "
            "give --n_images, or draw them apart"
        )
    with style():
        figure.set_size_inches(9, 4.2 + 0.25 * (len(courses) - 1))
        axes = figure.subplots()
        for i, course in enumerate(courses):
            x = [step / (course.steps_per_epoch or NOMINAL_STEPS) if by_epoch else step for step in range(len(course.rates))]
            axes.plot(x, course.rates, linewidth=1.8, label=_label(course), zorder=3, **line_style(i))
            for phase in (slice(0, course.warmup + 1 if course.warmup else 0), slice(len(x) - course.cooldown, len(x))):
                axes.plot(x[phase], course.rates[phase], color=line_style(i)["color"], **BROAD)
        unknown = f"epoch (drawn with {NOMINAL_STEPS:,} updates each; only the data say how many there are)"
        axes.set(xlabel=unknown if by_epoch else "update", ylabel="learning rate")
        top = max(max(course.rates) for course in courses)
        axes.set_ylim(-0.02 * top, 1.04 * top)
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        lengths = {course.steps_per_epoch for course in courses}
        if not by_epoch and len(lengths) == 1 and None not in lengths:
            _add_epochs(axes, lengths.pop())
        if any(course.warmup or course.cooldown for course in courses):
            axes.plot([], [], color="gray", label="broad: warm-up and cool-down", **BROAD)
        figure.legend(loc="outside lower center")


def _label(course: Course) -> str:
    is_nominal = course.in_epochs and course.steps_per_epoch is None
    lengths = ((len(course.rates), ""), (course.warmup, "warm-up "), (course.cooldown, "cool-down "))
    said = [f"{name}{n / NOMINAL_STEPS:.4g} epochs" if is_nominal else f"{name}{n:,} updates" for n, name in lengths if n]
    return f"{course.name}: {course.kind}, {', '.join(said)}"


def _add_epochs(axes: "Axes", of_epoch: int) -> None:
    above = axes.secondary_xaxis("top", functions=(lambda step: step / of_epoch, lambda epoch: epoch * of_epoch))
    above.set_xlabel(f"epoch (of {of_epoch:,} updates)")
    above.spines["top"].set_visible(True)
