"""Objects in the format of YOLO: a text file of boxes for each image, and a YAML file with the folders and the classes.

Joseph Redmon, Santosh Divvala, Ross Girshick, Ali Farhadi (2016): You Only Look Once. CVPR. https://arxiv.org/abs/1506.02640
The YAML file is that of Ultralytics, https://docs.ultralytics.com/datasets/detect/, which Roboflow, CVAT and others export.

The labels of a/images/b/c.jpg are in a/labels/b/c.txt, or beside an image that is in no folder `images`; an image without that
file has no objects. A line is `class x y width height`, with the box's center, or `class x1 y1 x2 y2 ...`, a polygon, whose box
is used. Coordinates are fractions of the image's sides. The background is class 0, so class i of the files is i + 1.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datasets.pipeline.boxes import CLASS, COLUMNS, BoxedFiles, check_classes
from datasets.pipeline.images import IMAGE_ENDINGS
from datasets.pipeline.splits import PARTS, PHOTOGRAPHS, Loaded, Source, from_parts
from models.loading.files import MalformedFile, one_line, read_limited

log = logging.getLogger(__name__)

MAX_CLASSES = 9_999
MAX_YAML, MAX_LIST = 200_000, 100_000_000  # bytes
TOLERANCE = 0.01  # by which a value may be outside 0 to 1, as in Ultralytics
MIN_SIDE = 1e-6  # a box has an area if its sides are longer; float32 still holds the difference at any size of the image


def load(source: Source, *, data_yaml: str | None = None, test_ratio: float = 0.2, drop_degenerate: bool = False) -> Loaded:
    """`data_yaml` is relative to the data folder; null: data.yaml or the only YAML file there. Without one, the images are in
    images/train and images/val, or train/images and val/images, or in images/, and classes.txt names the classes.

    Without val and test, `test_ratio` of the images are held out, the same ones for the same seed. `drop_degenerate` omits boxes
    without an area instead of raising an error."""
    root = Path(os.path.abspath(source.root))
    found = [root / data_yaml] if data_yaml else []
    if not data_yaml:
        found = sorted(path for path in root.glob("*") if path.suffix in (".yaml", ".yml") and not path.name.startswith("."))
        found = [path for path in found if path.stem in ("data", "dataset")] or found
    if len(found) > 1:
        raise OSError(f"{root} holds {', '.join(one_line(path.name) for path in found)}; data.data_yaml names the one to use")
    images, names = _described(root, found[0]) if found else _laid_out(root)
    labels = _Labels(root, names, drop_degenerate)
    parts = {part: labels.read(part, paths) for part, paths in images.items()}
    labels.warn_of_others(chain(*images.values()))
    if labels.n_dropped or labels.n_repeated:
        log.warning("dropped %d boxes without an area and %d repeated lines", labels.n_dropped, labels.n_repeated)
    if names is None:
        highest = max(int(rows[:, CLASS].max(initial=0)) for part in parts.values() for rows in part.labels)
        names = [str(number) for number in range(highest)]
    classes = ("background", *names)
    check_classes(parts, classes)
    return from_parts(parts, classes, test_ratio, source.seed, category_ids=(None, *range(len(names))))


def _described(root: Path, file: Path) -> tuple[dict[str, list[str]], list[str] | None]:
    """Return the images of each part and the names of the classes in a YAML file. All scalars are read as text."""
    try:
        content = yaml.load(read_limited(file, MAX_YAML), yaml.BaseLoader)
    except FileNotFoundError as error:
        raise OSError(f"data.data_yaml: {file} can't be read ({error.strerror})") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise MalformedFile(file, f"it is not YAML{where} ({getattr(error, 'problem', None) or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise MalformedFile(file, "it has no keys; expected train, val and names")
    given = {key: value for key, value in content.items() if value not in ("", "null", "~")}
    path = given.get("path", "")
    bases = [base for base in (_inside(root, root, path), str(file.parent)) if base] if isinstance(path, str) else [str(root)]
    images = {}
    for part in PARTS:
        entries = given.get(part, [])
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise MalformedFile(file, f"{part} is neither a path nor a list of paths")
        places = [_find(root, bases, entry) for entry in entries]
        if None in places:
            missing = f"{part} names {one_line(entries[places.index(None)])}, which isn't a folder or a list of images in {root}"
            if part != "test":
                raise MalformedFile(file, missing)
            log.warning("%s: %s; there is no test split", file, missing)  # Roboflow names one in any case
        elif entries:
            images[part] = [image for place in places if place for image in _images_at(root, bases, place)]
    if "train" not in images:
        raise MalformedFile(file, "it has no train; expected a folder of images, a list of folders, or a .txt list of images")
    return images, _names(file, given)


def _inside(root: Path, base: Path | str, name: str) -> str | None:
    """Return the path of a name from a file, if it stays inside the data folder."""
    path = os.path.abspath(os.path.join(base, name))
    return path if "\0" not in name and os.path.commonpath((root, path)) == str(root) else None


def _find(root: Path, bases: Sequence[str], name: str) -> str | None:
    """Look a name up in the bases, also without a leading ../, as Ultralytics does: Roboflow writes ../train/images."""
    candidates = (_inside(root, base, given) for given in (name, name.removeprefix("../")) for base in bases)
    return next((path for path in candidates if path and os.path.exists(path)), None)


def _images_at(root: Path, bases: Sequence[str], place: str) -> list[str]:
    if os.path.isdir(place):
        found = [os.path.join(at, name) for at, _, names in os.walk(place) for name in names]
        found = sorted(path for path in found if path.lower().endswith(IMAGE_ENDINGS))
    else:
        found = []
        for number, line in enumerate(_lines(Path(place)), 1):
            if line.strip():
                path = _find(root, (os.path.dirname(place), *bases), line.strip())
                if path is None:
                    raise MalformedFile(place, f"line {number}: {line.strip()} isn't a file in {root}")
                found.append(path)
    if not found:
        raise OSError(f"{one_line(place)} has no image ({', '.join(IMAGE_ENDINGS)})")
    return found


def _lines(path: Path | str) -> list[str]:
    try:
        return read_limited(path, MAX_LIST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise MalformedFile(path, f"it is not text ({error})") from error


def _names(file: Path, given: dict[str, Any]) -> list[str]:
    names, n = given.get("names"), given.get("nc")
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    elif names is None and isinstance(n, str) and n.isdecimal() and len(n) < 6:
        names = [str(number) for number in range(int(n))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or n not in (None, str(len(names))):
        raise MalformedFile(file, "names are not a list, or numbered from 0, or as many as nc says")
    if not 0 < len(names) <= MAX_CLASSES:
        raise MalformedFile(file, f"it has {len(names):,} names; from 1 to {MAX_CLASSES:,} are supported")
    return names


def _laid_out(root: Path) -> tuple[dict[str, list[str]], list[str] | None]:
    """Return the images of each part and the names of the classes in a folder without a YAML file."""
    images = {}
    for part, names in PARTS.items():
        folders = (folder for name in names for folder in (root / "images" / name, root / name / "images"))
        if found := next(filter(Path.is_dir, folders), None):
            images[part] = _images_at(root, (), str(found))
    if not images and (root / "images").is_dir():
        images["train"] = _images_at(root, (), str(root / "images"))
    if "train" not in images:
        raise OSError(f"{root} has no data.yaml, nor images/train, train/images or images")
    file = next(filter(Path.exists, (root / "classes.txt", root / "labels" / "classes.txt")), None)
    return images, [line.strip() for line in _lines(file) if line.strip()] if file else None


class _Labels:
    """Reads files of labels to the rows of boxes.py."""

    def __init__(self, root: Path, names: Sequence[str] | None, drop_degenerate: bool) -> None:
        self.root, self.drop_degenerate = str(root), drop_degenerate
        self.n_classes = len(names) if names is not None else MAX_CLASSES
        self.n_dropped = self.n_repeated = 0

    def read(self, part: str, images: Sequence[str]) -> BoxedFiles:
        objects, n_missing = [], 0
        for file in map(self._file_of, images):
            lines, rows = list[str](), []
            try:
                lines = _lines(file)
            except FileNotFoundError:
                n_missing += 1
            for number, line in enumerate(lines, 1):
                try:
                    if values := line.split():
                        rows.append(self._row(values))
                except ValueError as error:
                    raise MalformedFile(file, f"line {number}: {error}") from error
            kept = dict.fromkeys(row for row in rows if row is not None)
            self.n_dropped += rows.count(None)
            self.n_repeated += len(rows) - rows.count(None) - len(kept)
            objects.append(np.array([*kept], np.float32).reshape(-1, COLUMNS))
        if n_missing == len(images):
            such = one_line(self._file_of(images[0]))
            raise OSError(f"none of the {len(images)} images in {part} has a file of labels, such as {such}")
        if n_missing:
            log.info("%d of the %d images in %s have no file of labels, so no objects", n_missing, len(images), part)
        return BoxedFiles(np.array([os.fsencode(path) for path in images]), objects, normalized=True)

    def warn_of_others(self, images: Iterable[str]) -> None:
        """Warn of label files without an image."""
        read = {self._file_of(image) for image in images}
        folders = {folder for folder in map(os.path.dirname, read) if f"{os.sep}labels" in folder and os.path.isdir(folder)}
        present = {entry.path for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".txt")}
        if others := sorted(path for path in present - read if os.path.basename(path) != "classes.txt"):
            log.warning("%d label files have no image, such as %s", len(others), one_line(others[0]))

    def _file_of(self, image: str) -> str:
        before, is_in_images, after = image[len(self.root) :].rpartition(f"{os.sep}images{os.sep}")
        name = f"{before}{os.sep}labels{os.sep}{after}" if is_in_images else after
        return f"{self.root}{os.path.splitext(name)[0]}.txt"

    def _row(self, values: Sequence[str]) -> tuple[float, ...] | None:
        number, *place = map(float, values)
        if len(place) < 4 or len(place) == 5 or len(place) % 2:
            raise ValueError(f"it has {len(values)} values; expected class, x, y, width and height, or class and a polygon")
        if not number.is_integer() or not 0 <= number < self.n_classes:
            raise ValueError(f"the class {values[0]} is out of range; there are {self.n_classes:,} classes, from 0")
        if wrong := next((value for value in place if not -TOLERANCE <= value <= 1 + TOLERANCE), None):
            raise ValueError(f"{wrong:g} is not a fraction of the image's width or height, from 0 to 1")
        if len(place) == 4:
            x, y, width, height = place
            box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        else:
            box = [min(place[::2]), min(place[1::2]), max(place[::2]), max(place[1::2])]
        left, top, right, bottom = (min(max(0.0, edge), 1.0) for edge in box)
        if min(right - left, bottom - top) > MIN_SIDE:
            return (left, top, right, bottom, number + 1, 0.0, 0.0)
        if self.drop_degenerate:
            return None
        raise ValueError(f"the box has no area, {' '.join(values[1:5])}; data.drop_degenerate omits such boxes")


DATASETS = [PHOTOGRAPHS(name="YOLO", load=load, img_size=640, targets="boxes")]
