"""A table of images and labels: CSV files or parquet, also of the Hugging Face Hub.

The data folder is a table, or holds train.csv, val.csv and test.csv (or some of them), or train-00000-of-00002.parquet and others
as on the Hub, or tables of no split. A column holds paths, relative to the folder of the table, or (in parquet) the bytes of the
images. As parquet is compressed, these are copied once into a file of which the workers can read any part.
"""

import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
import struct
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from datasets.pipeline.cache import cache_paths, write_first
from datasets.pipeline.labels import TRAIN, WORDS, Labels, make_splits, part_of_name
from datasets.pipeline.places import part_of
from datasets.pipeline.splits import PHOTOGRAPHS, Files, Loaded, Source
from models.loading.files import MalformedFile, first_line, one_line, open_regular, stays_inside
from models.loading.registry import did_you_mean

log = logging.getLogger(__name__)

ENDINGS = (".csv", ".tsv", ".parquet")
PATHS = ("path", "image_path", "img_path", "file_path", "filepath", "file_name", "filename", "file", "image", "img", "image_id")
LABELS = ("label", "labels", "class", "classes", "target", "category", "class_name", "fine_label", "tags")
SPLITS = ("split", "subset")
YES_OR_NO = dict.fromkeys(("1", "1.0", "true"), True) | dict.fromkeys(("0", "0.0", "false"), False)
MAX_LINE, MAX_PATH = 1 << 20, 1000  # characters
SUSPICIOUS = re.compile(r"[/\\]|.*(\.\.|:|\0)", re.DOTALL)  # what a path that leaves its folder begins with
TAIL = struct.Struct("<32sqI")  # of a file of copied images: stamp, number, checksum of the offsets before the tail
N_READ = 64  # images at a time
RESERVE = 1 << 28  # bytes of a disk that the copy leaves free


def load(
    source: Source,
    *,
    several: bool,
    path_column: str | None = None,
    path_format: str = "{}",
    label_columns: str | list[str] | None = None,
    label_separator: str = "|",
    split_column: str | None = None,
    test_ratio: float = 0.2,
) -> Loaded:
    """Columns that are null are found by their names. `path_format` makes a path of a value, for example photos/{}.jpg.

    For the task multilabel, one of `label_columns` holds lists, or text with `label_separator`; several hold 0 and 1. Without a
    split for validation or testing, `test_ratio` of the samples are held out, the same ones for the same seed.
    """
    root = downloaded(source) if source.root.parts[:1] == ("hf:",) else source.root  # Path has merged the slashes of hf://
    tables = [(part, (Parquet if file.suffix.lower() == ".parquet" else Csv)(file)) for part, file in find_tables(root)]
    first = tables[0][1]
    of_images = first.choose("path_column", path_column, PATHS)
    chosen, of_split = first.choose("label_columns", label_columns, LABELS), split_column or first.find(SPLITS)
    of_labels = [chosen] if isinstance(chosen, str) else list(chosen)
    if len(of_labels) > 1 and not several:
        raise MalformedFile(first.file, "data.label_columns names several columns, which only task: multilabel reads")
    labels, places, parts = Labels(several, first.place), [], array("b")
    for part, table in tables:
        in_table = table.holds_images(of_images)
        names = [*of_labels, *([of_split] if of_split else []), *([] if in_table else [of_images])]
        paths, found = Paths(table.file, path_format), []
        for place, cells in table.rows(names):
            try:
                if not in_table:
                    found.append(paths.checked(place, cells.pop()))
                parts.append(_part(cells.pop()) if of_split else part)
                labels.add(_labels_in(cells, several, label_separator), table.file, place)
            except ValueError as error:
                raise labels.error(table.file, place, str(error)) from error
        places.append(copied_images(table, of_images) if isinstance(table, Parquet) and in_table else np.array(found))
        if not len(places[-1]):
            raise MalformedFile(table.file, "it has no rows")
        if paths.n_missing:
            raise OSError(f"{paths.missing}; {paths.n_missing:,} such")
    class_names = of_labels if len(of_labels) > 1 else first.class_names(of_labels[0])
    targets, classes = labels.targets(class_names, source.n_classes)
    splits = f", splits from {of_split}" if of_split else ""
    log.info("%s: images from the column %s, labels from %s%s", root, of_images, ", ".join(of_labels), splits)
    files = Files(np.concatenate(places), targets)
    return make_splits(files, np.frombuffer(parts, np.int8), classes, source, test_ratio, root)


def find_tables(root: Path) -> list[tuple[int, Path]]:
    """Return the tables with the split of each. OSError if it isn't clear which files are meant."""
    if root.suffix.lower() in ENDINGS and not root.is_dir():
        return [(TRAIN, root)]
    below = sorted({file.parent for file in root.glob("*/*.parquet")} - {root / "data"})
    for folder in (root, root / "data", *below):
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [file for file in there if file.name.lower().endswith(ENDINGS) and not file.name.startswith(".")]
        if files:
            break
    else:
        expected = f"a file that ends in {', '.join(ENDINGS)}, or a folder with train.csv, val.csv ..."
        raise OSError(f"{root}: no table; expected {expected}")
    if folder in below[:-1]:
        raise OSError(f"{root}: tables are in {', '.join(one.name for one in below[:5])}; name one folder with data.dataroot")
    tables = sorted((part, file) for file in files if (part := part_of_name(file.name)) is not None)
    if not tables:
        tables = [(TRAIN, file) for file in files]
    elif unused := [file.name for file in files if part_of_name(file.name) is None]:
        log.warning("%s: not used, as their names begin with no split's: %s", folder, ", ".join(map(one_line, unused)))
    if len({file.suffix.lower() == ".parquet" for _, file in tables}) > 1:
        raise OSError(f"{folder} holds tables in CSV and parquet; name one of them with data.dataroot")
    return tables


def downloaded(source: Source) -> Path:
    """Return the folder of a dataset of the Hub, hf://owner/name[@revision][/folder], after the download of its parquet files."""
    from huggingface_hub import snapshot_download

    parts = source.root.parts[1:]
    owner, name, *folders = (*parts[parts[:1] == ("datasets",) :], "", "")
    name, _, revision = name.partition("@")
    inside = "/".join(filter(None, folders))
    try:
        if not stays_inside(inside):
            raise ValueError("the folder is outside of the dataset")
        found = snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            revision=unquote(revision) or None,
            allow_patterns=f"{inside}/*.parquet" if inside else "*.parquet",
            local_files_only=not source.download,
        )
    except Exception as error:  # the client's HTTP library has exceptions of many types
        problem = first_line(str(error).partition(". ")[0]) or type(error).__name__
        advice = f"put its parquet files into a folder and name that with data.dataroot (https://huggingface.co/datasets/{owner}/{name})"
        raise OSError(f"hf://{owner}/{name} can't be downloaded ({problem}); {advice}") from error
    log.info("hf://%s/%s is in %s", owner, name, found)
    return Path(found) / inside


class Table(ABC):
    """A file with named columns. `place` is the word for the place of a sample."""

    place = ""
    header: list[str]

    def __init__(self, file: Path) -> None:
        self.file = file

    @abstractmethod
    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """Yield each row's place and its cells of the named columns."""

    def holds_images(self, name: str) -> bool:
        """Return whether a column holds the bytes of images, not paths."""
        return False

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Return the names of the classes 0, 1, ... in a column, where the file has them."""
        return None

    def require(self, name: str) -> str:
        if self.header.count(name) == 1:
            return name
        if name in self.header:
            raise MalformedFile(self.file, f"it has several columns {name!r}")
        there = ", ".join(self.header) or "none"
        hint = did_you_mean(name, {one: one for one in self.header}, f"there are {there}")
        raise MalformedFile(self.file, f"it has no column {name!r}; {hint}")

    def find(self, usual: Sequence[str]) -> str | None:
        by_lower = {name.lower(): name for name in reversed(self.header)}
        return next((by_lower[name] for name in usual if name in by_lower), None)

    def choose(self, key: str, given: Any, usual: Sequence[str]) -> Any:
        """Return the given columns, or the first with a usual name. `key` is the option that names them."""
        if found := given or self.find(usual):
            return found
        there = f"name one of these with data.{key}: {', '.join(self.header) or 'none'}"
        raise MalformedFile(self.file, f"it has no column named {', '.join(usual[:3])} ...; {there}")


def _labels_in(cells: list[Any], several: bool, separator: str) -> Sequence[Any]:
    if not several:
        if isinstance(cells[0], list):
            raise ValueError("it has a list of labels, which only task: multilabel reads")
        return cells
    if len(cells) == 1:
        value = "" if cells[0] is None else cells[0]
        if isinstance(value, str):
            return [label for label in value.split(separator) if label.strip()]
        return value if isinstance(value, list) else [value]
    answers = [YES_OR_NO.get(str(cell).strip().lower()) for cell in cells]
    if None in answers:
        raise ValueError(f"the label {cells[answers.index(None)]!r} is neither 0 nor 1")
    return [i for i, answer in enumerate(answers) if answer]


def _part(cell: Any) -> int:
    part = WORDS.get(str(cell).strip().lower())
    if part is None:
        raise ValueError(f"the split {cell!r} is none of {', '.join(WORDS)}")
    return part


class Paths:
    """Checks the paths in a table. Each folder is listed once, which is faster than a look at each file."""

    def __init__(self, table: Path, path_format: str) -> None:
        if "{}" not in path_format:
            raise ValueError(f"path_format {path_format!r} has no {{}}, which stands for the value of the path column")
        self.path_format, self._table, self._folder = path_format, table, str(table.parent)
        self._there: dict[str, set[str]] = {}
        self.missing, self.n_missing = "", 0  # a message about the first, and their number

    def checked(self, place: int, value: Any) -> bytes:
        """Return the whole path. ValueError unless it is in the folder of the table."""
        if value is None or value == "":
            raise ValueError("the path is missing")
        if not isinstance(value, (str, int)):
            raise ValueError(f"{first_line(repr(value))} is neither a path nor the bytes of an image")
        path = self.path_format.replace("{}", str(value))
        if len(path) > MAX_PATH:
            raise ValueError(f"the path has more than {MAX_PATH} characters")
        if SUSPICIOUS.match(path) and not stays_inside(path):
            raise ValueError(f"the path {path} leads out of {self._folder}, the table's folder, which paths are relative to")
        whole = f"{self._folder}{os.sep}{path}"
        folder, name = os.path.split(whole)
        there = self._there.get(folder)
        if there is None:
            entries = os.scandir(folder) if os.path.isdir(folder) else ()
            there = self._there[folder] = {entry.name for entry in entries if entry.is_file()}
        if name not in there and not os.path.isfile(whole):  # a disk may ignore case
            self.missing = self.missing or f"{one_line(whole)} is missing; {self._table} names it ({place})"
            self.n_missing += 1
        return os.fsencode(whole)


class Csv(Table):
    place = "line"

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        with self._reader() as reader:
            self.header = [name.strip() for name in next(reader, [])]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        chosen = [self.header.index(self.require(name)) for name in names]
        with self._reader() as reader:
            next(reader)
            for row in reader:
                if len(row) == len(self.header):
                    yield reader.line_num, [row[i] for i in chosen]
                elif row:
                    raise csv.Error(f"it has {len(row)} cells, and the header {len(self.header)}")

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        def lines() -> Iterator[str]:
            while line := text.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise csv.Error(f"it has more than {MAX_LINE:,} characters")
                yield line

        reader = None
        try:
            with open_regular(self.file) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
                header = text.readline(MAX_LINE)
                text.seek(0)
                semicolon = ";" in header and "," not in header  # as spreadsheets write it where the comma is for decimals
                delimiter = "\t" if self.file.suffix.lower() == ".tsv" else ";" if semicolon else ","
                reader = csv.reader(lines(), delimiter=delimiter, strict=True)
                yield reader
        except csv.Error as error:
            raise MalformedFile(self.file, f"line {reader.line_num if reader else 1}: {error}") from error
        except UnicodeDecodeError as error:
            raise MalformedFile(self.file, f"it is not text in UTF-8 ({error.reason})") from error


class Parquet(Table):
    place = "row"

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        with self._opened() as parquet:
            self.metadata, self.schema, self.header = parquet.metadata, parquet.schema_arrow, list(parquet.schema_arrow.names)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        distinct = list(dict.fromkeys(map(self.require, names)))
        counter = count(1)
        for columns in self.batches(distinct):
            cells = dict(zip(distinct, columns, strict=True))
            for row in zip(*(cells[name] for name in names), strict=True):
                yield next(counter), list(row)

    def batches(self, names: Sequence[str], n_rows: int = 10_000) -> Iterator[list[list[Any]]]:
        """Yield the cells of each column, a number of rows at a time; of images, their bytes."""
        with self._opened() as parquet:
            for batch in parquet.iter_batches(n_rows, columns=list(names)):
                columns = [batch.column(name) for name in names]
                yield [(of.field("bytes") if _has_bytes(of.type) else of).to_pylist() for of in columns]

    def holds_images(self, name: str) -> bool:
        kind = self.schema.field(self.require(name)).type
        return "binary" in str(kind.field("bytes").type if _has_bytes(kind) else kind)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Return those that the Hub's library writes into the schema."""
        try:
            feature = json.loads(self.schema.metadata[b"huggingface"])["info"]["features"][name]
            feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # of a list of labels
            names = feature["names"]
        except (TypeError, KeyError, ValueError, AttributeError, IndexError, RecursionError):
            return None
        if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
            raise MalformedFile(self.file, f"the class names of the column {name} are not a list of different names")
        return tuple(map(str, names))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow
            from pyarrow import parquet

            if int(pyarrow.__version__.partition(".")[0]) < 15:  # before, a file could run code
                raise ImportError
        except ImportError as error:
            raise OSError(f"{self.file}: parquet needs a package that is not installed: pip install 'pyarrow>=15'") from error
        with open_regular(self.file) as binary:
            try:
                yield parquet.ParquetFile(binary)
            except MalformedFile:
                raise
            except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
                raise MalformedFile(self.file, f"it can't be read as parquet ({error})") from error


def _has_bytes(kind: Any) -> bool:
    """Return whether a column is of the Hub's images: bytes and path."""
    return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]


def copied_images(table: Parquet, column: str) -> np.ndarray:
    """Return the places of a column's images in a file that holds them one after the other. It is written unless it is there."""
    facts = os.stat(table.file)
    with open_regular(table.file) as file:
        file.seek(max(0, facts.st_size - (1 << 16)))  # the end describes the rest
        known = [column.encode(), struct.pack("<qq", facts.st_size, facts.st_mtime_ns), file.read()]
    stamp, caches = hashlib.sha256(b"\0".join(known)).digest(), cache_paths(table.file, ".images")
    for cache in caches:
        if (offsets := _offsets(cache, stamp)) is not None:
            break
    else:
        errors = write_first(caches, partial(_copy_images, table, column, stamp))
        problems = [f"{cache.parent}: {error.strerror or error}" for cache, error in zip(caches, errors, strict=False)]
        cache = caches[min(len(errors), 1)]
        if len(errors) == len(caches) or (offsets := _offsets(cache, stamp)) is None:
            raise OSError(f"{table.file}: there is no folder to copy its images to ({'; '.join(problems)})")
    spans = enumerate(pairwise(offsets.tolist()), start=1)
    return np.array([part_of(str(cache), first, end - first, f"row {row} of {table.file.name}") for row, (first, end) in spans])


def _offsets(cache: Path, stamp: bytes) -> np.ndarray | None:
    """Return where each image begins, and the end; None unless the file is whole and has this stamp."""
    try:
        with open_regular(cache) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL.size))
            found, n, checksum = TAIL.unpack(file.read())
            if found == stamp and 0 <= 8 * (n + 1) <= size - TAIL.size:
                file.seek(size - TAIL.size - 8 * (n + 1))
                content = file.read(8 * (n + 1))
                offsets = np.frombuffer(content, "<i8")
                ends = offsets[0] == 0 and offsets[-1] == size - TAIL.size - len(content)
                if ends and (np.diff(offsets) > 0).all() and zlib.crc32(content) == checksum:
                    return offsets
    except FileNotFoundError:
        return None
    except (OSError, struct.error) as error:
        log.info("%s: %s", cache, error)
    log.warning("%s is damaged or older than its table; the images are copied again", cache)
    return None


def _copy_images(table: Parquet, column: str, stamp: bytes, path: Path) -> None:
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    n_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    _require_space(path.parent, n_bytes)
    log.info("%s: copying its images, once, to %s (%.1f GB)", table.file, path.parent, n_bytes / 1e9)
    offsets = array("q", [0])
    with path.open("wb") as out:
        for (images,) in table.batches([column], N_READ):
            for image in images:
                if not image:
                    raise MalformedFile(table.file, f"row {len(offsets)}: the image is missing")
                offsets.append(offsets[-1] + len(image))
            content = b"".join(images)
            _require_space(path.parent, len(content))  # a small file can hold the same large image many times
            out.write(content)
        content = np.frombuffer(offsets, np.int64).astype("<i8").tobytes()
        out.write(content + TAIL.pack(stamp, len(offsets) - 1, zlib.crc32(content)))


def _require_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes + RESERVE:
        raise OSError(f"{n_bytes / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")


_TABLE = partial(PHOTOGRAPHS, name="table", img_size=224)

DATASETS = [
    _TABLE(load=partial(load, several=False, label_separator="")),
    _TABLE(load=partial(load, several=True), targets="labels"),
]
