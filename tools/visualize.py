#!/usr/bin/env python
"""Pictures of what a config asks for."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.command_line import Parser, run_tool
from engine.config import SCHEDULE_KEYS, LoadedConfig, load_config
from engine.errors import ConfigError, RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLES = """
`visualize.py WHAT --help` says what each of them takes.

examples:
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml configs/vit_tiny_cifar10.yaml -o both.png
"""
SCHEDULE_EXAMPLES = """
Configs that are given together share the picture, and the options.

A run that counts in updates is drawn over updates. Where the length of an epoch is known, from --n_images or from a data set that
is generated, epochs stand above them. Where it is not, a run that counts in epochs is drawn over epochs.

examples:
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml --n_images 50000
  python tools/visualize.py schedule -c configs/resnet50_imagenet.yaml --train.sched.cooldown_epochs 10 -o imagenet.png
  python tools/visualize.py schedule -c configs/lenet_digits.yaml --train.sched.type OneCycleLR --show
"""
# Okabe and Ito's colours, which colour-blind people tell apart; a second and a third round are told apart by their dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
BROAD = {"linewidth": 8, "alpha": 0.3, "solid_capstyle": "butt"}  # lies under a part of a line
NOMINAL_STEPS = 1000  # in an epoch of which only the data would say how long it is
IN_UPDATES = ("t_max", "t_0", "milestones", "step_size", "warmup_steps", "cooldown_steps")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="visualize.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_schedule(commands)

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in commands.choices:
        parser.parse_args(argv[:1])  # answers --help, and refuses everything else
    args, overrides = commands.choices[argv[0]].parse_with_overrides(argv[1:])
    return args.run(args, overrides)


def show_and_save(figure: "Figure", path: Path, *, show: bool) -> None:
    from engine.figures import save_figure

    if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"-o {path}: the name of a picture ends in .png, .svg or .pdf")
    try:
        save_figure(figure, path)
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error
    print(f"wrote {path}")
    if show:
        import matplotlib.pyplot as plt

        if plt.get_backend().lower() == "agg":
            raise RunError(f"--show: there is no display; the picture is in {path}")
        plt.show()


def new_figure(width: float, height: float, *, show: bool) -> "Figure":
    """Of pyplot only where it is to be shown, since that looks for a display."""
    if show:
        import matplotlib.pyplot as plt

        return plt.figure(figsize=(width, height), layout="constrained")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# schedule


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


def add_schedule(commands: Any) -> None:
    parser = commands.add_parser(
        "schedule",
        help="the learning rate over a run, without data or model",
        description="The learning rate over a run, as its config says, without data or model.",
        epilog=SCHEDULE_EXAMPLES,
        usage="%(prog)s -c CONFIG [CONFIG ...] [-o PATH.png] [--n_images N] [--show] [--key.sub value ...]",
    )
    parser.add_argument("-c", "--config", nargs="+", action="extend", required=True, help="one or several; may be repeated")
    parser.add_argument("-o", "--output", type=Path, default=Path("schedule.png"), help="default: schedule.png")
    parser.add_argument("--n_images", type=int, metavar="N", help="in the training split, where only the data would say it")
    parser.add_argument("--show", action="store_true", help="open a window, too")
    parser.set_defaults(run=schedule)


def schedule(args: Namespace, overrides: dict[str, Any]) -> int:
    if args.n_images is not None and args.n_images < 1:
        raise ConfigError(f"--n_images must be at least 1, got {args.n_images}")
    courses = [course_of(name, path, overrides, args.n_images) for name, path in _names(args.config)]
    figure = new_figure(9, 4.2 + 0.25 * (len(courses) - 1), show=args.show)
    draw_schedules(figure, courses)
    show_and_save(figure, args.output, show=args.show)
    return 0


def course_of(name: str, path: str, overrides: dict[str, Any], n_images: int | None) -> Course:
    from engine.builder import check
    from engine.schedule import base_lr, make_schedule, warmup_and_cooldown

    config = load_config(path, overrides)
    check(config)
    for note in config.notes:
        print(f"{path}: {note}", file=sys.stderr)
    train, sched = config.train, config.train.sched
    of_epoch = steps_per_epoch(config, n_images)
    if of_epoch is None:
        _expect_one_unit(config, path)
    assumed = of_epoch or NOMINAL_STEPS
    n_steps = train.n_steps or train.n_epochs * assumed
    at = make_schedule(sched, n_steps, assumed)
    rates = [at(step, base_lr(train)) for step in range(n_steps)]
    warmup, cooldown = warmup_and_cooldown(sched, n_steps, assumed)
    return Course(name, sched.type, rates, min(warmup, n_steps), cooldown, of_epoch, in_epochs=train.n_steps is None)


def steps_per_epoch(config: LoadedConfig, n_images: int | None) -> int | None:
    """None where only the data would say it."""
    import inspect

    from datasets.order import Order
    from engine.builder import dataset_of

    generated = inspect.signature(dataset_of(config).load).parameters.get("n_train")
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


def _expect_one_unit(config: LoadedConfig, path: str) -> None:
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
    import matplotlib

    from engine.figures import STYLE

    by_epoch = any(course.in_epochs and course.steps_per_epoch is None for course in courses)
    updates_only = [course.name for course in courses if not course.in_epochs and course.steps_per_epoch is None]
    if by_epoch and updates_only:
        raise ConfigError(
            f"{updates_only[0]} counts in updates and another config in epochs, and how long an epoch is, only the data say: "
            "give --n_images, or draw them apart"
        )
    with matplotlib.rc_context(STYLE):
        axes = figure.subplots()
        for i, course in enumerate(courses):
            x = [step / (course.steps_per_epoch or NOMINAL_STEPS) if by_epoch else step for step in range(len(course.rates))]
            colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            axes.plot(x, course.rates, color=colour, linestyle=dashes, linewidth=1.8, label=_label(course), zorder=3)
            for phase in (slice(0, course.warmup + 1 if course.warmup else 0), slice(len(x) - course.cooldown, len(x))):
                axes.plot(x[phase], course.rates[phase], color=colour, **BROAD)
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
            axes.plot([], [], color="grey", label="broad: warm-up and cool-down", **BROAD)
        figure.legend(loc="outside lower center", frameon=False, ncols=1)


def _label(course: Course) -> str:
    is_nominal = course.in_epochs and course.steps_per_epoch is None
    lengths = ((len(course.rates), ""), (course.warmup, "warm-up "), (course.cooldown, "cool-down "))
    said = [f"{name}{n / NOMINAL_STEPS:.4g} epochs" if is_nominal else f"{name}{n:,} updates" for n, name in lengths if n]
    return f"{course.name}: {course.kind}, {', '.join(said)}"


def _add_epochs(axes: "Axes", of_epoch: int) -> None:
    above = axes.secondary_xaxis("top", functions=(lambda step: step / of_epoch, lambda epoch: epoch * of_epoch))
    above.set_xlabel(f"epoch (of {of_epoch:,} updates)")
    above.spines["top"].set_visible(True)


def _names(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Each config by the name of its file, or by its path where two files have the same name."""
    stems = [Path(path).stem for path in paths]
    return [(stem if stems.count(stem) == 1 else path, path) for stem, path in zip(stems, paths, strict=True)]


if __name__ == "__main__":
    sys.exit(run_tool(main))
