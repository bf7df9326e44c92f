"""Training images as the data set has them, as they are after augmentation, and as they are mixed, with their labels: classes,
masks or boxes."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import load_config
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import ResolvedConfig
from engine.train import train_batches
from tools.pictures import scenes
from tools.pictures.columns import Row, draw_columns
from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.scenes import is_of_scenes
from tools.pictures.subject import expect_classes, expect_positive

if TYPE_CHECKING:
    from torch import Tensor

    from engine.build import Run

EXAMPLES = """
These are the first images of the batch that update --step trains with, the very same ones.

examples:
  python tools/visualize.py data -c configs/resnet18_shapes.yaml
  python tools/visualize.py data -c configs/resnet18_cifar10.yaml --augment.cutout 16 --augment.mixup 0.8 --augment.cutmix 1
  python tools/visualize.py data runs/first --step 1000 --n 16
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="training images before and after augmentation",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s RUN | -c CONFIG [--step STEP] [--n N] [-o PATH.png] [--show] [--key.sub value ...]",
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN")
    parser.add_argument("-c", "--config", help="a config instead of a run")
    parser.add_argument("--step", type=int, default=0, help="the update whose batch it is, counted from 0 (default: 0)")
    parser.add_argument("--n", type=int, default=8, help="how many images of it (default: 8)")
    add_output(parser, "data.png, in figures/ of a run")
    parser.set_defaults(run=run)


# Of a config that is only asked for its images
NOT_ASKED = {"model.pretrained": False, "train.precision": None, "train.compile": False, "train.sync_batchnorm": False}


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    from engine.build import build
    from engine.devices.accelerator import make_accelerator

    config, run_dir = _config_of(args, overrides)
    built = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    if not 0 <= args.step < built.n_steps:
        raise ConfigError(f"--step {args.step}: this run has the updates 0 to {built.n_steps - 1}")
    rows = rows_of(built, config, args.step, expect_positive("--n", args.n))
    draw_columns(figure := new_figure(args), rows, f"{config.data.name}: images of update {args.step:,}")
    deliver({"data": figure}, args, run_dir, args.step)
    return 0


def _config_of(args: Namespace, overrides: dict[str, Any]) -> tuple[ResolvedConfig, Path | None]:
    from engine.inference.trained import FOR_TRAINING_ONLY
    from engine.plugins import require_run_plugins

    if (args.run_dir is None) == (args.config is None):
        raise ConfigError("data: give either a run or -c CONFIG")
    overrides = {**FOR_TRAINING_ONLY, **NOT_ASKED, **overrides}
    if args.run_dir is None:
        return load_config(args.config, overrides), None
    run_dir = Path(args.run_dir).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir} is no run folder (it has no config.yaml)")
    require_run_plugins(run_dir)
    return load_config(run_dir / "config.yaml", overrides), run_dir


def rows_of(run: "Run", config: ResolvedConfig, step: int, n: int) -> list[Row]:
    """The same images as the data set has them, augmented and, where the batch is mixed, mixed."""
    if not is_of_scenes(run.task):
        expect_classes(run.task, config, "data")
    from datasets.pipeline.loaders import Workers, eval_loader
    from engine.build import preparation
    from engine.evaluate import readable

    data, loader = run.data, run.train_loader
    samples = loader.order.samples(step).cpu().repeat_interleave(config.augment.repeats)[:n]
    plain = preparation(config, data.spec, data.img_size)
    originals = eval_loader(data.splits["train"].subset(samples), n, 0, 1, plain, Workers(), run.accelerator.device)
    batches = {
        "original": next(readable(originals.batches())),
        "augmented": next(readable(loader.batches(step, step + 1))),
    }
    if run.mix is not None and (mixed := next(train_batches(run, step)))[1].ndim > 1:
        batches["mixed"] = mixed
    rows = []
    for name, batch in batches.items():
        images, targets = (part[:n] for part in batch)
        pictures = loader.normalize.undo(images)
        if is_of_scenes(run.task):
            rows += scenes.rows_of(run.task, name, pictures, (images, targets))
        else:
            titles = [label_of(target, data.classes) for target in targets] if name != "augmented" else ()  # it changes no label
            rows.append(Row(name, pictures, titles))
    return rows


def label_of(target: "Tensor", classes: Sequence[str]) -> str:
    """The name of a class or, of a mixed image, the classes with their shares."""
    from engine.plots.images import short

    if target.ndim == 0:
        return short(classes[target])
    shares = sorted(((share, name) for share, name in zip(target.tolist(), classes, strict=True) if share > 0.005), reverse=True)
    return "\n".join(f"{100 * share:.0f} % {short(name, 14)}" for share, name in shares)
