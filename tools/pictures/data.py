"""Training images in the dataset, after augmentation, and after mixing, with their labels: classes, masks or boxes."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.pipeline.loaders import Workers, eval_loader
from datasets.pipeline.masks import IGNORED
from engine import load_config
from engine.build import Run, build, preparation
from engine.config.errors import ConfigError, RunError
from engine.config.resolve import ResolvedConfig
from engine.devices.accelerator import make_accelerator
from engine.evaluate import readable
from engine.inference.trained import FOR_TRAINING_ONLY
from engine.plots.images import Row, draw_images, short
from engine.plots.overlays import box_row, mask_row
from engine.plots.style import new_figure
from engine.plugins import require_run_plugins
from engine.tasks.detection import Detection
from engine.tasks.multilabel import MultiLabel
from engine.tasks.segmentation import Segmentation
from engine.train import train_batches
from tools.pictures.output import save_pictures
from tools.pictures.subject import require_classification, require_positive

# Settings that don't change the images, and may need a download or a device that isn't here
NOT_NEEDED = {"model.pretrained": False, "train.precision": None, "train.compile": False, "train.sync_batchnorm": False}


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    if (args.run_dir is None) == (args.config is None):
        raise ConfigError("data: give either a run or -c CONFIG")
    path, run_dir = args.config, None
    if args.run_dir is not None:
        run_dir = Path(args.run_dir).expanduser()
        path = run_dir / "config.yaml"
        if not path.is_file():
            raise RunError(f"{run_dir} is not a run folder (it has no config.yaml)")
        require_run_plugins(run_dir)
    config = load_config(path, {**FOR_TRAINING_ONLY, **NOT_NEEDED, **overrides})
    built = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    if not 0 <= args.step < built.n_steps:
        raise ConfigError(f"--step {args.step}: this run has the updates 0 to {built.n_steps - 1}")
    rows = read_rows(built, config, args.step, require_positive("--n", args.n))
    draw_images(figure := new_figure(show=args.show), rows, f"{config.data.name}: images of update {args.step:,}")
    save_pictures({"data": figure}, args, run_dir, args.step)


def read_rows(run: Run, config: ResolvedConfig, step: int, n: int) -> list[Row]:
    """The same images original, augmented and, if the batch is mixed, mixed."""
    data, loader = run.data, run.train_loader
    samples = loader.order.samples(step).cpu().repeat_interleave(config.augment.repeats)[:n]
    plain = preparation(config, data.spec, data.img_size)
    originals = eval_loader(data.splits["train"].subset(samples), n, 0, 1, plain, Workers(), run.accelerator.device)
    batches = {"original": next(readable(originals.batches())), "augmented": next(readable(loader.batches(step, step + 1)))}
    if run.mix is not None and (mixed := next(train_batches(run, step)))[1].ndim > 1:
        batches["mixed"] = mixed
    rows = []
    for name, batch in batches.items():
        inputs, targets = (part[:n] for part in batch)
        rows += draw_targets(run, config, name, inputs, targets)
    return rows


def draw_targets(run: Run, config: ResolvedConfig, name: str, inputs: Any, targets: Any) -> list[Row]:
    """The images with their classes as titles, their masks below, or their boxes drawn over."""
    task, images, classes = run.task, run.train_loader.normalize.undo(inputs), run.data.classes
    if isinstance(task, Detection):
        return [box_row(name, task.visible(images, (inputs, targets)), targets, classes)]
    if isinstance(task, Segmentation):
        visible = task.visible(images, (inputs, targets))
        labels = [[label for label in mask.unique().tolist() if label not in (0, IGNORED)] for mask in targets]  # 0: background
        titles = ["\n".join(short(classes[label]) for label in of_mask) for of_mask in labels]
        return [Row(name, visible), mask_row("mask", visible, targets, classes, titles)]
    if not isinstance(task, MultiLabel):
        require_classification(task, config, "data")
    titles = [label_text(target, classes) for target in targets]
    return [Row(name, images, titles if name != "augmented" else ())]  # augmentation doesn't change labels


def label_text(target: Tensor, classes: Sequence[str]) -> str:
    """The name of a class, the names of several, or those of a mixed image with their shares."""
    if target.ndim == 0:
        return short(classes[int(target)])
    if not target.is_floating_point():
        return "\n".join(short(name, 14) for name, there in zip(classes, target.tolist(), strict=True) if there)
    shares = sorted(((share, name) for share, name in zip(target.tolist(), classes, strict=True) if share > 0.005), reverse=True)
    return "\n".join(f"{100 * share:.0f} % {short(name, 14)}" for share, name in shares)
