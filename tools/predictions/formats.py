"""Predictions, and the files that predict.py writes: classes as CSV or JSON, masks as PNGs, boxes as COCO's JSON."""

import csv
import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from engine.config.errors import ConfigError, RunError
from engine.config.text import printable
from engine.inference.images import ReadBatch, read_images
from engine.inference.trained import Trained
from engine.plots.overlays import write_mask
from engine.tasks.classification import Classification
from engine.tasks.detection import Detection
from engine.tasks.multilabel import MultiLabel
from engine.tasks.segmentation import Segmentation
from tools.tables import writing

COLUMNS = ("filename", "class", "probability")

Row = tuple[str, str, float | None]  # see COLUMNS
Predictions = Iterable[tuple[ReadBatch, Any]]  # batches, each with the predictions of its images


def predict(trained: Trained, names: Sequence[str], batch_size: int, unreadable: list[str]) -> Predictions:
    """Batches and their predictions. Why an image can't be read is appended to `unreadable`."""
    with torch.no_grad(), tqdm(total=len(names), unit="image", leave=False, disable=not sys.stderr.isatty()) as progress:
        for read in read_images(trained, names, batch_size):
            unreadable += read.unreadable
            if read.places:
                yield read, trained.task.predict(trained.model, read.batch)
            progress.update(len(read.places) + len(read.unreadable))


def write(trained: Trained, args: Namespace, names: Sequence[str], predictions: Predictions) -> None:
    """Write predictions in the format of the task."""
    task, kind = trained.task, trained.config.task
    write_rows = write_json if args.json or (args.output is not None and args.output.suffix == ".json") else write_csv
    if isinstance(task, Classification):
        if args.top_k > len(trained.classes):
            raise ConfigError(f"--top_k {args.top_k}: {trained.weights} has {len(trained.classes)} classes")
        is_on_terminal = args.output is None and sys.stdout.isatty()  # elsewhere, names are kept as they are
        names, classes = ([printable(name) for name in of] if is_on_terminal else of for of in (names, trained.classes))
        with opened(args.output) as file:
            write_rows(file, top_classes(names, predictions, classes, args.top_k))
    elif args.top_k > 1:
        raise ConfigError(f"--top_k {args.top_k}: only for classification, and {trained.weights} is for {kind}")
    elif isinstance(task, MultiLabel):
        with opened(args.output) as file:
            write_rows(file, present_labels(names, predictions, task))
    elif isinstance(task, Detection):
        with opened(args.output) as file:
            write_coco(file, names, predictions, task, trained.category_ids)
    elif isinstance(task, Segmentation):
        if args.output is None or args.json or args.output.is_file():
            raise ConfigError("masks are written as PNGs into a folder; give it with -o FOLDER")
        write_masks(args.output, names, predictions, trained.classes)
    else:
        raise ConfigError(f"predict.py does not support task {kind!r} ({trained.weights})")


@contextmanager
def opened(path: Path | None) -> Iterator[IO[str]]:
    """The file, or stdout. File names that aren't valid UTF-8 are written as their bytes."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout at exit
        return
    with writing(path, say=False), path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file


def top_classes(names: Sequence[str], predictions: Predictions, classes: Sequence[str], k: int) -> Iterator[Row]:
    """File, class and probability: k rows per image, the most probable class first."""
    for read, probabilities in predictions:
        best = probabilities.float().topk(k)
        for place, values, indices in zip(read.places, best.values.tolist(), best.indices.tolist(), strict=True):
            yield from ((names[place], classes[i], value) for value, i in zip(values, indices, strict=True))


def present_labels(names: Sequence[str], predictions: Predictions, task: MultiLabel) -> Iterator[Row]:
    """File, class and probability of every label that reaches its threshold; an image without one has a row without a class."""
    for read, probabilities in predictions:
        present = task.present(probabilities).tolist()
        for place, values, there in zip(read.places, probabilities.tolist(), present, strict=True):
            found = sorted(((value, name) for value, name, is_there in zip(values, task.classes, there, strict=True) if is_there))
            yield from ((names[place], name, value) for value, name in reversed(found))
            if not found:
                yield names[place], "", None


def write_csv(file: IO[str], rows: Iterable[Row]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)


def write_json(file: IO[str], rows: Iterable[Row]) -> None:
    """Write a list with a line for each row, as the rows come."""
    separator = "[\n"
    for row in rows:
        file.write(separator + json.dumps(dict(zip(COLUMNS, row, strict=True))))
        separator = ",\n"
    file.write("\n]\n" if separator == ",\n" else "[]\n")


def write_masks(folder: Path, names: Sequence[str], predictions: Predictions, classes: Sequence[str]) -> None:
    """Write a PNG for each image, in its size. Pixels are indices into classes.json; a palette makes them visible."""
    paths = mask_paths(folder, names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "classes.json").write_text(json.dumps(classes) + "\n")
        for read, masks in predictions:
            for place, mask in zip(read.places, masks, strict=True):
                paths[place].parent.mkdir(parents=True, exist_ok=True)
                write_mask(mask, paths[place])
    except OSError as error:
        raise RunError(f"{error.filename or folder} can't be written: {error.strerror}") from error


def mask_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Paths relative to the innermost folder of all images, with their suffixes only where two would be the same without."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    relative = [os.path.relpath(os.path.abspath(name), common) for name in names]
    stems = [os.path.splitext(name)[0] for name in relative]
    are_unique = len(set(stems)) == len(names)
    return [folder / f"{name}.png" for name in (stems if are_unique else relative)]


def write_coco(
    file: IO[str], names: Sequence[str], predictions: Predictions, task: Detection, category_ids: Sequence[int | None] | None
) -> None:
    """Write a dataset in COCO's format whose annotations have a score, too: annotations as they come, images at the end.

    `category_ids` are those of the classes in the files that the model was trained on; None: the numbers of the classes.
    """
    ids = category_ids or range(len(task.classes))
    named = ((label, name) for label, name in enumerate(task.classes) if label and name != "N/A")
    categories = {label: {"id": ids[label], "name": name} for label, name in named}
    images: list[dict[str, Any]] = []
    n_boxes, separator = 0, "\n"
    file.write('{"annotations": [')
    for read, of_batch in predictions:
        for place, (height, width), boxes in zip(read.places, read.sizes, of_batch, strict=True):
            images.append({"id": place + 1, "file_name": names[place], "width": width, "height": height})
            for entry in task.entries(boxes, place + 1):
                label = entry["category_id"]
                if label not in categories:  # FCOS has a score for the background, too
                    continue
                n_boxes += 1
                entry["category_id"] = categories[label]["id"]
                area = entry["bbox"][2] * entry["bbox"][3]
                file.write(separator + json.dumps({"id": n_boxes, **entry, "area": area, "iscrowd": 0}))
                separator = ",\n"
    file.write(f'\n],\n"images": {json.dumps(images)},\n"categories": {json.dumps(list(categories.values()))}}}\n')
