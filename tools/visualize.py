#!/usr/bin/env python
"""Draw data, the progress of a training, what a model has learned, or what a config means."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.plugins import Parser
from tools.pictures.output import SOURCE_HELP, add_images, add_output, add_source, add_split, check_picture_path

EXAMPLES = """
`visualize.py WHAT --help` lists the options of each. A picture of a run is written into its folder figures/ and its TensorBoard;
any other picture is written into the current folder. -o names another file, and --show opens a window too.

examples:
  python tools/visualize.py curves runs/first runs/second --x time --smooth 0.6
  python tools/visualize.py predictions runs/first --wrong
  python tools/visualize.py gradcam resnet50 photos/ -o where.png
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="visualize.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_pictures(commands)

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in commands.choices:
        parser.parse_args(argv[:1])  # prints --help, or refuses
    args, overrides = commands.choices[argv[0]].parse_with_overrides(argv[1:])
    if args.picture != "model":  # whose output may be a table
        check_picture_path(args.output)
    import_module(f"tools.pictures.{args.picture}").run(args, overrides)  # imports torch, unlike --help
    return 0


def add_pictures(commands: Any) -> None:
    """Add a command for each picture, named as the module of tools/pictures that draws it."""

    def add(name: str, summary: str, help_text: str, output: str = "") -> ArgumentParser:
        description, _, epilog = help_text.partition("\n\n")
        parser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
        add_output(parser, output or f"{name}.png, in figures/ of a run")
        parser.set_defaults(picture=name)
        return parser

    parser = add("data", "training images before and after augmentation", DATA)
    parser.add_argument("run_dir", nargs="?", metavar="RUN", help="a run folder")
    parser.add_argument("-c", "--config", help="a config, instead of a run")
    parser.add_argument("--step", type=int, default=0, help="the update that uses the batch, counted from 0 (default: 0)")
    parser.add_argument("--n", type=int, default=8, help="how many images of the batch (default: 8)")

    parser = add("curves", "loss and accuracy of one run or several", CURVES, "curves.png, in figures/ of a single run")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--x", default="step", choices=("step", "epoch", "time"), help="default: step")
    help_text = "from 0 to below 1, as in TensorBoard (default: 0)"
    parser.add_argument("--smooth", type=float, default=0.0, metavar="WEIGHT", help=help_text)

    output = "predictions.png or mistakes.png, in figures/ of a run"
    parser = add("predictions", "images with their predicted and true class", PREDICTIONS, output)
    add_source(parser)
    add_images(parser, n=32)
    parser.add_argument("--wrong", action="store_true", help="the most confident mistakes in the whole split")

    output = "features.png, in figures/ of a run, and filters.png in the same folder"
    parser = add("features", "feature maps of an image, and the filters of the first layer", FEATURES, output)
    add_source(parser)
    add_split(parser)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a file; default: a sample of the split")
    parser.add_argument("--sample", type=int, default=0, metavar="I", help="which of the split, counted from 0 (default: 0)")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="instead of the stages")
    parser.add_argument("--channels", type=int, default=8, metavar="N", help="of each layer (default: 8)")

    parser = add("embeddings", "the penultimate layer in two dimensions", EMBEDDINGS)
    add_source(parser)
    add_split(parser)
    parser.add_argument("--method", default="tsne", choices=("tsne", "pca", "umap"), help="default: tsne")
    parser.add_argument("--n", type=int, default=2000, help="how many images, spread over the split (default: 2000)")

    parser = add("gradcam", "where a model looks", GRADCAM)
    add_source(parser)
    add_images(parser, n=8)
    parser.add_argument("--method", choices=("gradcam", "rollout"), help="default: rollout for a ViT, gradcam for others")
    parser.add_argument("--target", metavar="CLASS", help="a class by its name or number (default: the predicted one)")
    parser.add_argument("--layer", metavar="NAME", help="of Grad-CAM (default: the last stage that is fine enough)")

    parser = add("confusion", "the confusion matrix and the accuracy of each class", CONFUSION)
    add_source(parser)
    add_split(parser)

    parser = add("calibration", "the reliability diagram", CALIBRATION)
    add_source(parser)
    add_split(parser)

    parser = add("schedule", "the learning rate over a run, without data or model", SCHEDULE, "schedule.png")
    parser.add_argument("-c", "--config", nargs="+", action="extend", required=True, help="one or several; may be repeated")
    parser.add_argument("--n_images", type=int, metavar="N", help="size of the training split, if only the data determine it")

    parser = add("model", "the layers of a model, as a table", MODEL)
    parser.add_argument("source", nargs="?", metavar="RUN_OR_MODEL", help="a run, a checkpoint, or a name, as timm/resnet50")
    parser.add_argument("-c", "--config", help="a config, instead of a run or model")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="levels of nested modules to list (default: 2)")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N", help="images per timed forward pass (default: 1)")
    parser.set_defaults(ema=False)

    for name, parser in commands.choices.items():
        keys = " [--key.sub value ...]" if name != "curves" else ""
        parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + keys


DATA = """\
Training images in the dataset, after augmentation, and after mixing, with their labels: classes, masks or boxes.

The images are exactly the first ones of the batch of update --step.

examples:
  python tools/visualize.py data -c configs/resnet18_shapes.yaml
  python tools/visualize.py data -c configs/resnet18_cifar10.yaml --augment.cutout 16 --augment.mixup 0.8 --augment.cutmix 1
  python tools/visualize.py data runs/first --step 1000 --n 16
"""
CURVES = """\
Loss, metric and learning rate of one run or several, from their metrics.jsonl.

One run: training and validation in two colors, and the losses of auxiliary heads, if any, as in GoogLeNet. Several runs: a color
for each; use epochs or time to compare runs with different batch sizes. Time is training time, without the pauses of a run that
was resumed.

examples:
  python tools/visualize.py curves runs/first
  python tools/visualize.py curves runs/first runs/second --x epoch -o both.png
  python tools/visualize.py curves runs/* --x time --smooth 0.6
"""
PREDICTIONS = f"""\
Images with the predicted class, its probability and the true class of mistakes; or with predicted and true masks or boxes.

{SOURCE_HELP}
examples:
  python tools/visualize.py predictions runs/first
  python tools/visualize.py predictions runs/first --wrong --n 16 --split test
  python tools/visualize.py predictions timm/convnext_tiny photos/*.jpg
"""
FEATURES = f"""\
Feature maps of an image, from the stages of a model or any of its layers; and the filters of the first layer.

{SOURCE_HELP}
A row shows the channels of a layer that vary most over the image, each scaled to its own range. `visualize.py model` lists the
layers.

examples:
  python tools/visualize.py features runs/first
  python tools/visualize.py features runs/first photo.jpg --layers layer1.0.conv1 layer4 --channels 12
  python tools/visualize.py features resnet50 photo.jpg
"""
EMBEDDINGS = f"""\
The features of the penultimate layer in two dimensions, colored by class.

t-SNE: van der Maaten, Hinton (2008): Visualizing Data using t-SNE. https://jmlr.org/papers/v9/vandermaaten08a.html
UMAP: McInnes, Healy, Melville (2018): Uniform Manifold Approximation and Projection. https://arxiv.org/abs/1802.03426
{SOURCE_HELP}
Only PCA keeps distances; t-SNE and UMAP keep neighborhoods. UMAP needs umap-learn.

examples:
  python tools/visualize.py embeddings runs/first
  python tools/visualize.py embeddings runs/first --method pca --n 5000
  python tools/visualize.py embeddings timm/resnet18 -c configs/resnet18_cifar10.yaml      images of another dataset
"""
GRADCAM = f"""\
The image regions that a prediction depends on: Grad-CAM, and the attention rollout of a Vision Transformer.

{SOURCE_HELP}
Grad-CAM explains one class, the predicted one or --target, at the last stage with at least 7x7 places, or at --layer. The rollout
follows attention through all layers to the class token, for no particular class; it is the default if every layer attends to all
patches.

examples:
  python tools/visualize.py gradcam runs/first
  python tools/visualize.py gradcam resnet50 photo.jpg --target "tabby"
  python tools/visualize.py gradcam timm/vit_small_patch16_224 photos/ --method gradcam --layer blocks.9.norm1
"""
CONFUSION = f"""\
The confusion matrix of a split, and the accuracy of each class.

{SOURCE_HELP}
Rows are true classes, columns predicted ones; the shade is the fraction of the row, the number counts images.
`tools/evaluate.py RUN --json --confusion --per_class` prints the numbers.

examples:
  python tools/visualize.py confusion runs/first
  python tools/visualize.py confusion runs/first --split test -o confusion.pdf
  python tools/visualize.py confusion resnet50 -c configs/resnet50_imagenet.yaml
"""
CALIBRATION = f"""\
The reliability diagram: how often predictions are right, by their confidence.

Guo, Pleiss, Sun, Weinberger (2017): On Calibration of Modern Neural Networks. https://arxiv.org/abs/1706.04599
{SOURCE_HELP}
The bars of a well calibrated model end on the diagonal: of its predictions with a confidence of 80 %, 80 % are right. The
expected calibration error (ECE) is the mean distance from the diagonal, as evaluate.py and the training report it.

examples:
  python tools/visualize.py calibration runs/first
  python tools/visualize.py calibration runs/first --split test -o calibration.pdf
"""
SCHEDULE = """\
The learning rate over a run, from its config, without data or model.

Several configs are drawn into one picture; options apply to all of them.

A run whose length is in updates is drawn over updates, with epochs at the top if the length of an epoch is known: from
--n_images, or because the dataset is generated. A run whose length is in epochs of unknown length is drawn over epochs.

examples:
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml --n_images 50000
  python tools/visualize.py schedule -c configs/resnet50_imagenet.yaml --train.sched.cooldown_epochs 10 -o imagenet.png
  python tools/visualize.py schedule -c configs/lenet_digits.yaml --train.sched.type OneCycleLR --show
"""
MODEL = """\
The layers of a model in execution order, with shapes, parameters, multiply-accumulates and time.

The table is printed and drawn; -o NAME.csv writes it with exact numbers instead. The time is for one image (or --batch_size) on
this machine, in the fastest of ten forward passes; for a layer that is called more than once, the sum. No weights are downloaded
and no data is read.

examples:
  python tools/visualize.py model -c configs/resnet18_cifar10.yaml
  python tools/visualize.py model timm/convnext_tiny --depth 3
  python tools/visualize.py model runs/first -o layers.csv
"""


if __name__ == "__main__":
    sys.exit(run_tool(main))
