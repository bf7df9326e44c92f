"""Images with the class that a model sees in them, how sure it is, and the true class where it is another; or with the masks or
boxes that it finds, beside the true ones."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from engine.config.errors import ConfigError
from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.scenes import draw_predictions as draw_scenes
from tools.pictures.scenes import is_of_scenes
from tools.pictures.subject import (
    SOURCE,
    USAGE,
    add_images,
    add_source,
    expect_classes,
    expect_positive,
    name_of,
    open_source,
    samples_of,
    subjects_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engine.inference.trained import Trained

EXAMPLES = """
examples:
  python tools/visualize.py predictions runs/first
  python tools/visualize.py predictions runs/first --wrong --n 16 --split test
  python tools/visualize.py predictions timm/convnext_tiny photos/*.jpg
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "predictions",
        help="images with their predicted and true class",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL [IMAGE ...] [--wrong] [--n N | --samples I ...] [--split SPLIT] " + USAGE,
    )
    add_source(parser)
    add_images(parser, n=32)
    parser.add_argument("--wrong", action="store_true", help="the mistakes of the whole split that it is surest of")
    add_output(parser, "predictions.png or mistakes.png, in figures/ of a run")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    if args.wrong and (args.images or args.samples):
        raise ConfigError("--wrong looks through the split: without images and --samples")
    trained = open_source(args, overrides)
    figure = new_figure(args)
    if is_of_scenes(trained.task):
        draw_scenes(figure, args, trained)
    elif not draw_classes(figure, args, trained):
        print(f"no mistake in {args.split}: there is nothing to draw")
        return 0
    figure.suptitle(f"{name_of(trained)}: {'surest mistakes' if args.wrong else 'predictions'}", fontsize=10)
    deliver({"mistakes" if args.wrong else "predictions": figure}, args, trained.run_dir, trained.step)
    return 0


def draw_classes(figure: "Figure", args: Namespace, trained: "Trained") -> bool:
    """Whether there is anything to draw."""
    import torch

    from engine.plots.images import class_titles, draw_images

    expect_classes(trained.task, trained.config, "predictions")
    if args.wrong:
        wrong = mistakes(trained, args.split, expect_positive("--n", args.n))
        if not wrong:
            return False
        subjects = samples_of(trained, args.split, wrong)
    else:
        subjects = subjects_of(args, trained)
    with torch.no_grad():
        probabilities = trained.task.predict(trained.model, (subjects.inputs, subjects.labels)).cpu()
    titles, colors = class_titles(probabilities, trained.classes, subjects.labels, subjects.names)
    draw_images(figure, subjects.images, titles, colors)
    return True


def mistakes(trained: "Trained", split: str, n: int) -> list[int]:
    """The places in the split of its most confident mistakes, the surest first."""
    import torch

    from engine.evaluate import readable

    trained.expect_its_classes()
    confidences = []
    with torch.no_grad():
        for batch in readable(trained.loader(split).batches()):
            confidence, predicted = trained.task.predict(trained.model, batch).max(1)
            confidences.append(torch.where(predicted == batch[1], -1.0, confidence).cpu())
    sure = torch.cat(confidences)
    return sure.argsort(descending=True, stable=True)[: min(n, int((sure >= 0).sum()))].tolist()
