"""Images with the predicted class, its probability and the true class of mistakes; or with labels, masks or boxes."""

from argparse import Namespace
from typing import Any

import torch

from engine.config.errors import ConfigError
from engine.evaluate import readable
from engine.inference.trained import Trained
from engine.plots.images import Row, class_titles, draw_images
from engine.plots.style import new_figure
from engine.tasks.detection import Detection
from engine.tasks.multilabel import MultiLabel
from engine.tasks.segmentation import Segmentation
from tools.pictures.output import save_pictures
from tools.pictures.subject import model_title, open_source, read_images, read_samples, require_classification, require_positive


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    if args.wrong and (args.images or args.samples):
        raise ConfigError("--wrong searches the whole split: not with images or --samples")
    trained = open_source(args, overrides)
    task = trained.task
    draws_targets = isinstance(task, (Detection, MultiLabel, Segmentation))
    if not draws_targets:
        require_classification(task, trained.config, "predictions")
    elif args.wrong:
        raise ConfigError(f"--wrong: only for classification, and task is {trained.config.task}")
    if args.wrong:
        wrong = find_mistakes(trained, args.split, require_positive("--n", args.n))
        if not wrong:
            print(f"no mistake in {args.split}: there is nothing to draw")
            return
        samples = read_samples(trained, args.split, wrong)
    else:
        samples = read_images(args, trained)
    with torch.no_grad():
        predictions = task.predict(trained.model, samples.batch)
    figure = new_figure(show=args.show)
    if isinstance(task, (Detection, MultiLabel, Segmentation)):
        task.draw(samples.images, samples.batch, predictions, figure)
    else:
        titles, colors = class_titles(predictions.cpu(), trained.classes, samples.batch[1], samples.names)
        draw_images(figure, [Row("", samples.images, titles, colors)])
    figure.suptitle(f"{model_title(trained)}: {'surest mistakes' if args.wrong else 'predictions'}", fontsize=10)
    save_pictures({"mistakes" if args.wrong else "predictions": figure}, args, trained.run_dir, trained.step)


def find_mistakes(trained: Trained, split: str, n: int) -> list[int]:
    """The indices, in the split, of the n most confident mistakes, most confident first."""
    trained.require_same_classes()
    confidences = []
    with torch.no_grad():
        for batch in readable(trained.loader(split).batches()):
            confidence, predicted = trained.task.predict(trained.model, batch).max(1)
            confidences.append(torch.where(predicted == batch[1], -1.0, confidence).cpu())
    confidence = torch.cat(confidences)
    return confidence.argsort(descending=True, stable=True)[: min(n, int((confidence >= 0).sum()))].tolist()
