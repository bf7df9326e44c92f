"""Dataset files as a stranger could make them: mutants of valid files, and inputs made by hand."""

import contextlib
import gzip
import json
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from datasets import Loaded, Source, cifar, find_dataset, mnist
from datasets.pipeline import cache
from datasets.pipeline.images import EvaluationImages, ImageFile
from datasets.pipeline.masks import CHECKED, read_mask
from tests.faults.fuzz import fuzz, in_children
from tests.faults.rows import Row
from tests.on_disk import write_coco, write_image_folder, write_pairs, write_voc
from tools.benchmarks.random_sets import write_cifar10, write_mnist

RIGHT = "read as valid data, or one clear error"


def load(name: str, root: Path, targets: str = "classes", **options: Any) -> Loaded:
    return find_dataset(name, targets).load(Source(root, verify=False, download=False, img_size=16), **options)


def uncached(*args: Any, read: Callable[[], Loaded], **options: Any) -> Loaded:
    return read()


def check_images(loaded: Loaded, channels: int) -> None:
    """Check what a training relies on: types, shapes, and the range of labels."""
    for split in (loaded.train, loaded.test):
        images, labels = split.images, split.labels
        assert images.dtype == torch.uint8
        assert images.shape[:2] == (len(labels), channels)
        assert images.numel()
        assert labels.dtype == torch.int64
        assert 0 <= labels.min() <= labels.max() < len(loaded.classes)
    assert all(isinstance(name, str) and name.isprintable() for name in loaded.classes)


def check_boxes(loaded: Loaded) -> None:
    for split in (loaded.train, loaded.test):
        assert len(split.paths) == len(split.labels) > 0
        for objects in split.labels:
            left, top, right, bottom, label, crowd, area = objects.T
            assert objects.dtype == np.float32
            assert np.isfinite(objects).all()
            assert ((left >= 0) & (top >= 0) & (left < right) & (top < bottom) & (area >= 0)).all()
            assert ((label >= 1) & (label < len(loaded.classes)) & (label % 1 == 0) & np.isin(crowd, (0, 1))).all()


# Mutants

PIXELS, MARK = b"p" * 3072, b"<pixels>"  # a template has the mark, so that mutations concern the rest


def python2_batch(n: int = 1) -> bytes:
    """Return a batch as Python 2 wrote the published ones: text for bytes."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K%cM\x00\x0c\x86" % n
    )
    array += b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T%b%btb" % (struct.pack("<i", 3072 * n), PIXELS * n)
    labels = b"U\x06labelsq\x08]q\x09(%be" % (b"K\x03" * n)
    return b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5U\x04data%b%bu." % (array, labels)


def cifar_pickles(folder: Path, n: int) -> Row:
    data = write_cifar10(folder, 5, 1) / "cifar-10-batches-py"
    batch = {"data": np.frombuffer(PIXELS, np.uint8).reshape(1, 3072), "labels": [3]}
    contents = {
        "data_batch_1": python2_batch(),
        **{f"data_batch_{protocol}": pickle.dumps(batch, protocol) for protocol in (2, 3, 4)},
        "batches.meta": pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, 0),
    }
    templates = {folder / name: content.replace(PIXELS, MARK) for name, content in contents.items()}

    def open_it() -> None:
        for template in templates:
            (data / template.name).write_bytes(template.read_bytes().replace(MARK, PIXELS))
        with mock.patch("datasets.cifar.load_cached", uncached):
            loaded = load("CIFAR-10", folder)
        check_images(loaded, 3)
        assert loaded.train.images.shape[1:] == (3, 32, 32)

    for path, content in templates.items():
        path.write_bytes(content)
    return fuzz("pickles of CIFAR", templates, open_it, (OSError,), n, RIGHT)


def idx_arrays(folder: Path, n: int) -> Row:
    """Two archives and two plain files."""
    raw = write_mnist(folder, n_train=3, n_test=3) / "MNIST" / "raw"
    files = {}
    for part, of_zip in (("train", True), ("t10k", False)):
        for kind, header in (("images-idx3", (3, 2, 2)), ("labels-idx1", (3,))):
            (raw / f"{part}-{kind}-ubyte").unlink()
            content = struct.pack(f">HBB{len(header)}I", 0, 8, len(header), *header) + bytes(int(np.prod(header)))
            path = raw / f"{part}-{kind}-ubyte{'.gz' if of_zip else ''}"
            files[path] = gzip.compress(content, mtime=0) if of_zip else content
            path.write_bytes(files[path])

    def open_it() -> None:
        with mock.patch("datasets.mnist.load_cached", uncached):
            check_images(load("MNIST", folder), 1)

    return fuzz("arrays of MNIST", files, open_it, (OSError,), n, RIGHT)


def aged_image_folder(folder: Path, n_classes: int = 2) -> Path:
    """Write an image folder that has not changed recently, and load it, which caches the list of its files."""
    root = write_image_folder(folder / "set", n_classes, n_train=2, n_val=1)
    for path in root.glob("*/*"):
        os.utime(path, (past := time.time() - 100, past))
    os.environ["XDG_CACHE_HOME"] = str(folder / "home")
    load("imagefolder", root)
    assert (root / ".image-list.npz").is_file()
    return root


def image_list_caches(folder: Path, n: int) -> Row:
    with mock.patch.dict(os.environ):
        root = aged_image_folder(folder)
        expected = load("imagefolder", root)

        def open_it() -> None:
            with mock.patch("os.fsync"):  # which takes most of the time
                loaded = load("imagefolder", root)
            for split, right in ((loaded.train, expected.train), (loaded.test, expected.test)):
                assert split.paths.tolist() == right.paths.tolist()
                assert split.labels.equal(right.labels)

        list_cache = root / ".image-list.npz"
        return fuzz("caches of image lists", {list_cache: list_cache.read_bytes()}, open_it, (), n, "the right list")


def decoded_caches(folder: Path, n: int) -> Row:
    root = write_mnist(folder, n_train=3, n_test=2)
    expected = load("MNIST", root)
    path = root / "MNIST" / "raw" / ".cache.safetensors"

    def open_it() -> None:
        with mock.patch("os.fsync"):
            loaded = load("MNIST", root)
        assert loaded.train.images.equal(expected.train.images)
        assert loaded.test.labels.equal(expected.test.labels)
        assert loaded.classes == expected.classes

    return fuzz("caches of decoded data", {path: path.read_bytes()}, open_it, (), n, "the right data")


def coco_annotations(folder: Path, n: int) -> Row:
    root = write_coco(folder, n_train=3, n_val=2)
    path = root / "annotations" / "train.json"
    return fuzz(
        "COCO JSON",
        {path: path.read_bytes()},
        lambda: check_boxes(load("cocojson", root, "boxes")),
        (OSError,),
        n,
        RIGHT,
    )


def voc_annotations(folder: Path, n: int) -> Row:
    voc = write_voc(folder, n_train=2, n_val=1) / "VOCdevkit" / "VOC2012"
    files = [voc / "Annotations" / "0000.xml", voc / "Annotations" / "0001.xml", voc / "ImageSets" / "Main" / "train.txt"]
    contents = {path: path.read_bytes() for path in files}
    return fuzz("VOC XML and lists", contents, lambda: check_boxes(load("VOC", folder, "boxes")), (OSError,), n, RIGHT)


def images_and_masks(folder: Path, n: int) -> Row:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((24, 16))
    files = {}
    for name in ("image.jpg", "image.png", "image.webp", "image.gif", "image.bmp", "mask.png", "mask.gif"):
        (image.convert("L") if name.startswith("mask") else image).save(folder / name)
        files[folder / name] = (folder / name).read_bytes()

    def open_it() -> None:
        for path in files:
            if path.name.startswith("mask"):
                mask = read_mask(str(path))
                assert mask.dtype == np.uint8
                assert mask.ndim == 2
                continue
            file = ImageFile(str(path))
            shape = (file.height, file.width, 3)
            assert file.pixels().shape == np.asarray(file.decode()).shape == shape
            assert EvaluationImages(16, 0.9, "bilinear").read(str(path)).shape == (3, 16, 16)

    return fuzz("images and masks", files, open_it, (OSError,), n, RIGHT)


# Made by hand

CASES: dict[str, Callable[[Path], None]] = {}  # each is called with an empty folder


def refused(open_it: Callable[[], Any], name: str) -> None:
    """Open a file. It must be refused, in a line that names it."""
    try:
        open_it()
    except OSError as error:
        message = str(error)
        if name in message and message.isprintable():
            return
        raise AssertionError(f"not a line that names {name}: {message!r}") from error
    raise AssertionError("it was read")


def no_regular_file(path: Path, kind: str) -> None:
    """Put something at `path` that blocks when it is read, or never ends."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


KINDS = ("pipe", "device", "folder")

_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
_BYTES = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
_OBJECTS = b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR"
PICKLES = {
    "runs a command": b"cos\nsystem\n(U\x04truetR.",
    "evaluates code": b"c__builtin__\neval\n(U\x031+1tR.",
    "imports by dotted name": b"cnumpy\nndarray.__class__\n.",
    "makes an array of objects from bytes": b"cnumpy\nndarray\n((K\x01t%bU\x08AAAAAAAAtR." % _OBJECTS,
    "fills an array of objects": b"}U\x04data%b(K\x01(K\x01t%bI00\nU\x08AAAAAAAAtbs." % (_ARRAY, _OBJECTS),
    "has a type with fields": b"cnumpy\ndtype\n((lp1\n(U\x01aU\x02u1taK\x00K\x01tR.",
    "has a type of text": b"cnumpy\ndtype\n(U\x03U99K\x00K\x01tR.",
    "declares a large shape": b"%b(K\x01(L1099511627776L\nt%bI00\nU\x01Atb." % (_ARRAY, _BYTES),
    "declares a negative shape": b"%b(K\x01(I-1\nt%bI00\nU\x01Atb." % (_ARRAY, _BYTES),
    "declares a shape of text": b"%b(K\x01U\x01A%bI00\nU\x01Atb." % (_ARRAY, _BYTES),
    "numbers a memo beyond memory": b"]r\xff\xff\xff\x7f.",
    "announces a byte array beyond memory": b"\x96" + struct.pack("<Q", 1 << 36) + b".",
    "announces bytes beyond memory": b"\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "announces a frame beyond memory": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}",
    "hashes a deep tuple": b"})" + b"\x85" * 300_000 + b"K\x01s.",
    "nests lists": b"]" * 200_000 + b"a" * 199_999 + b".",
    "sets attributes of a function": b"c_codecs\nencode\nN}U\x08__name__U\x01xs\x86b.",
    "sets attributes of a type": b"cnumpy\ndtype\n}U\x05buildU\x01xsb.",
    "calls a number": b"K\x01)R.",
    "makes an object of a class": b"cnumpy\ndtype\nU\x02u1\x85\x81.",
    "makes an instance": b"(U\x02u1inumpy\ndtype\n.",
    "has a persistent id": b"Px\n.",
    "has a copyreg extension": b"\x82\x01.",
    "encodes one text many times": b"X\x40\x42\x0f\x00"
    + b"a" * 1_000_000
    + b"q\x010"
    + b"c_codecs\nencode\nh\x01\x85Rq\x02" * 999
    + b".",
    "encodes by another codec": b"c_codecs\nencode\n(U\x01aU\x06zip_aitR.",
    "has millions of values": b"(" + b"}" * 2_000_001 + b"l.",
    "has a number of many digits": b"L" + b"9" * 10_000 + b"L\n.",
    "is a number": b"K\x01.",
    "is a dictionary with numbers as keys": b"}K\x01K\x02s.",
    "has nothing on its stack": b".",
    "pops a mark that is not there": b"}u.",
    "has an invalid float": b"Fx\n.",
    "has invalid UTF-8": b"X\x01\x00\x00\x00\xff.",
}


def _pickle_case(content: bytes, folder: Path) -> None:
    path = folder / "batch"
    path.write_bytes(content)
    refused(lambda: cifar.read_pickle(path), "batch")


CASES |= {f"a CIFAR pickle that {what}": partial(_pickle_case, content) for what, content in PICKLES.items()}

ENTRIES: dict[str, dict[str, Any]] = {
    "no data": {"labels": [1]},
    "data that are a list": {"data": [[1] * 3072], "labels": [1]},
    "data of another size": {"data": np.zeros((1, 3071), np.uint8), "labels": [1]},
    "data of other numbers": {"data": np.zeros((1, 3072), np.float32), "labels": [1]},
    "no images": {"data": np.zeros((0, 3072), np.uint8), "labels": []},
    "fewer labels": {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
    "labels that are text": {"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]},
    "labels that are a text": {"data": np.zeros((1, 3072), np.uint8), "labels": "1"},
    "labels that are true": {"data": np.zeros((1, 3072), np.uint8), "labels": [True]},
    "labels that are NaN": {"data": np.zeros((1, 3072), np.uint8), "labels": np.array([np.nan])},
    "large labels": {"data": np.zeros((1, 3072), np.uint8), "labels": [10**1000]},
    "negative labels": {"data": np.zeros((1, 3072), np.uint8), "labels": [-1]},
    "nested labels": {"data": np.zeros((1, 3072), np.uint8), "labels": [[1]]},
}


def _entry_case(entry: dict[str, Any], folder: Path) -> None:
    root = write_cifar10(folder, 5, 1)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(entry, 2))
    refused(lambda: load("CIFAR-10", root), "data_batch_2")


CASES |= {f"a CIFAR batch with {what}": partial(_entry_case, entry) for what, entry in ENTRIES.items()}


def _names_case(names: Any, folder: Path) -> None:
    root = write_cifar10(folder, 5, 1)
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    refused(lambda: load("CIFAR-10", root), "batches.meta")


for _what, _names in {"numbers": [1, 2], "a text": "ab", "nothing": None, "a terminal's controls": ["\x1b[31m"] * 10}.items():
    CASES[f"CIFAR's class names are {_what}"] = partial(_names_case, _names)


def _special_dataset_file(name: str, write: Callable[[Path], Path], file: str, kind: str, folder: Path) -> None:
    root = write(folder)
    (path,) = root.rglob(file)
    no_regular_file(path, kind)
    refused(lambda: load(name, root), file)


for _kind in KINDS:
    CASES[f"CIFAR's file is a {_kind}"] = partial(_special_dataset_file, "CIFAR-10", write_cifar10, "data_batch_1", _kind)
    CASES[f"MNIST's file is a {_kind}"] = partial(_special_dataset_file, "MNIST", write_mnist, "train-images-idx3-ubyte", _kind)


def _sparse(path: Path, n_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(n_bytes)
    return path


CASES |= {
    "a CIFAR file of 4 GB without content": lambda f: refused(lambda: cifar.read_pickle(_sparse(f / "batch", 1 << 32)), "batch"),
    "an image of 4 GB without content": lambda f: refused(lambda: ImageFile(str(_sparse(f / "x.jpg", 1 << 32))), "x.jpg"),
}


def _idx(*shape: int, data: bytes = b"", kind: bytes = b"\0\0\x08", n_dims: int | None = None) -> bytes:
    return kind + bytes([len(shape) if n_dims is None else n_dims]) + struct.pack(f">{len(shape)}I", *shape) + data


_ZEROS = gzip.compress(bytes(10_000_000), mtime=0)  # 10 kB; archives may be joined
ARRAYS = {
    "an archive that unpacks to 5 GB": ("a.gz", gzip.compress(_idx(60_000, 28, 28)) + _ZEROS * 500),
    "an archive that declares 5 GB": ("a.gz", gzip.compress(_idx(6_000_000, 28, 28)) + _ZEROS * 500),
    "an archive that declares 399 MB and holds 2": ("a.gz", gzip.compress(_idx(399_000_000, data=b"ab"))),
    "an archive with a wrong checksum": ("a.gz", gzip.compress(_idx(2, data=b"ab"))[:-8] + bytes(8)),
    "an archive cut in its header": ("a.gz", gzip.compress(_idx(2, data=b"ab"))[:5]),
    "an archive of nothing": ("a.gz", b""),
    "an array that declares more than memory": ("a", _idx(2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "an array of 255 dimensions": ("a", _idx(*[2] * 255)),
    "an array of 255 dimensions without their sizes": ("a", _idx(2, n_dims=255)),
    "an array of floats": ("a", _idx(1, data=b"abcd", kind=b"\0\0\x0d")),
    "an array of no bytes": ("a", _idx(0, 28, 28)),
    "an array with one byte too many": ("a", _idx(2, data=b"abc")),
}


def _array_case(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    refused(lambda: mnist.read_idx(folder / name), name)


def _array_without_content(folder: Path) -> None:
    (folder / "a").write_bytes(_idx(6_000_000, 28, 28))
    os.truncate(folder / "a", 16 + 6_000_000 * 28 * 28)
    refused(lambda: mnist.read_idx(folder / "a"), "declares 6000000 x 28 x 28 bytes")


CASES |= {what: partial(_array_case, *file) for what, file in ARRAYS.items()}
CASES["an array of 5 GB without content"] = _array_without_content


def _labels_of_mnist(content: bytes, folder: Path) -> None:
    root = write_mnist(folder, n_train=3, n_test=2)
    (root / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(content)
    refused(lambda: load("MNIST", root), "train-labels-idx1-ubyte")


for _what, _content in {
    "are too many": _idx(4, data=b"1234"),
    "are out of range": _idx(3, data=b"\x01\x02\xff"),
    "are a table": _idx(3, 1, data=b"\x01\x02\x03"),
}.items():
    CASES[f"MNIST's labels {_what}"] = partial(_labels_of_mnist, _content)


# Images


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """Return the start of a gray PNG."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")


def jpeg(folder: Path, width: int, height: int) -> bytes:
    """Return a JPEG whose header declares this size."""
    Image.new("RGB", (16, 16)).save(folder / "small.jpg")
    frame = b"\xff\xc0\x00\x11\x08"
    content = (folder / "small.jpg").read_bytes()
    return content.replace(frame + struct.pack(">HH", 16, 16), frame + struct.pack(">HH", height, width))


def gif(width: int, height: int) -> bytes:
    size = struct.pack("<HH", width, height)
    return b"GIF89a%b\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0%b\0\x02\x02D\x01\0;" % (size, size)


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n0 0 moveto 16 16 lineto stroke\nshowpage\n%%EOF\n"


def written(folder: Path, image: Image.Image, ending: str, **options: Any) -> bytes:
    image.save(folder / f"written{ending}", **options)
    return (folder / f"written{ending}").read_bytes()


IMAGES: dict[str, Callable[[Path], bytes]] = {
    "EPS, for which Pillow runs Ghostscript": lambda f: EPS,
    "PPM, which is not documented": lambda f: written(f, Image.new("L", (16, 16)), ".ppm"),
    "a TIFF of 20,000 x 20,000": lambda f: written(f, Image.new("1", (20_000, 20_000)), ".tif", compression="group4"),
    "a TIFF of numbers of 32 bits": lambda f: written(f, Image.new("F", (16, 16)), ".tif"),
    "a JPEG of 30,000 x 30,000": lambda f: jpeg(f, 30_000, 30_000),
    "a JPEG of 65,500 x 65,500": lambda f: jpeg(f, 65_500, 65_500),
    "a PNG of 30,000 x 30,000": lambda f: png(30_000, 30_000),
    "a PNG of 2 billion x 2 billion": lambda f: png(2**31 - 1, 2**31 - 1),
    "a PNG without pixels": lambda f: png(0, 16),
    "a PNG of which most is missing": lambda f: png(10_000, 10_000),
    "a GIF of 65,535 x 65,535": lambda f: gif(65_535, 65_535),
    "a GIF of 0 x 0": lambda f: gif(0, 0),
    "a BMP of 30,000 x 30,000": lambda f: bmp(30_000, 30_000),
    "a BMP of negative width": lambda f: bmp(-16, 16),
    "nothing": lambda f: b"",
}


def _decode_every_way(path: Path) -> None:
    """Fail unless every way to read the file fails."""
    with contextlib.suppress(OSError):
        ImageFile(str(path)).pixels()
        raise AssertionError("it was read for training")
    EvaluationImages(16, 0.9, "bilinear").read(str(path))


def _image_case(write: Callable[[Path], bytes], folder: Path) -> None:
    """No program may run for an image, here a Ghostscript that leaves a trace."""
    (folder / "x.jpg").write_bytes(write(folder))
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    (folder / "gs").chmod(0o755)
    with mock.patch.dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}"):
        refused(lambda: _decode_every_way(folder / "x.jpg"), "x.jpg")
        (folder / "x.jpg").rename(folder / "x.png")
        refused(lambda: read_mask(str(folder / "x.png")), "x.png")
    assert not (folder / "ran").exists()


def _special_image(kind: str, folder: Path) -> None:
    for name, open_it in (("x.jpg", lambda path: ImageFile(path)), ("x.png", read_mask)):
        no_regular_file(folder / name, kind)
        refused(lambda name=name, open_it=open_it: open_it(str(folder / name)), name)


def _long_image(folder: Path) -> None:
    """Scaled as a whole, it would have 17 billion pixels."""
    Image.linear_gradient("L").resize((65_500, 1)).convert("RGB").save(folder / "x.jpg")
    assert EvaluationImages(224, 0.875, "bilinear").read(str(folder / "x.jpg")).float().std() < 10


CASES |= {f"an image is {what}": partial(_image_case, write) for what, write in IMAGES.items()}
CASES |= {f"an image is a {kind}": partial(_special_image, kind) for kind in KINDS}
CASES["an image is 65,500 x 1"] = _long_image


# Lists of files

LISTS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "has names in other folders": lambda a: a.update(train_names=np.array([b"train/class_0/../../x.jpg"] * 4)),
    "has names in parent folders": lambda a: a.update(train_names=np.array([b"../class_0/a.jpg"] * 4)),
    "has absolute names": lambda a: a.update(train_names=np.array([b"/etc/x/y.jpg"] * 4)),
    "has a folder as a file": lambda a: a.update(val_names=np.array([b"val/class_0/..", b"val/class_1/.."])),
    "has empty names": lambda a: a.update(val_names=np.array([b"", b""])),
    "has names with zeros": lambda a: a.update(val_names=np.array([b"val/class_0/a\0b", b"val/class_1/a\0b"])),
    "has names of the other class": lambda a: a.update(train_names=a["train_names"][::-1]),
    "has names of the other split": lambda a: a.update(val_names=a["train_names"][::2]),
    "has names as text": lambda a: a.update(train_names=a["train_names"].astype(str)),
    "has labels out of range": lambda a: a.update(train_labels=np.array([0, 0, 1, 7])),
    "has negative labels": lambda a: a.update(train_labels=np.array([-1, 0, 1, 1])),
    "has labels that are NaN": lambda a: a.update(train_labels=np.array([0, 0, 1, np.nan])),
    "has small labels": lambda a: a.update(train_labels=a["train_labels"].astype(np.int8)),
    "has labels in a table": lambda a: a.update(train_labels=a["train_labels"].reshape(2, 2)),
    "has objects": lambda a: a.update(train_labels=np.array([0, 0, 1, {}], dtype=object)),
    "lacks a class": lambda a: a.update(train_names=a["train_names"][:2], train_labels=a["train_labels"][:2]),
    "lacks the labels": lambda a: a.pop("train_labels"),
    "has nothing": lambda a: a.update(train_names=a["train_names"][:0], train_labels=a["train_labels"][:0]),
}


def _with_list(write: Callable[[Path], Any], folder: Path) -> None:
    """Whatever is in the cache of the list: the images are those of the folder, and the cache is replaced."""
    with mock.patch.dict(os.environ):
        root = aged_image_folder(folder)
        expected = load("imagefolder", root)
        write(root / ".image-list.npz")
        loaded = load("imagefolder", root)
        assert loaded.train.paths.tolist() == expected.train.paths.tolist()
        assert loaded.test.labels.equal(expected.test.labels)


def _edited(edit: Callable[[dict[str, np.ndarray]], Any], path: Path) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    edit(arrays)
    np.savez(path, **arrays)


def _list_bomb(path: Path) -> None:
    with np.load(path) as file:
        stamp = file["stamp"]
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|S30', 'fortran_order': False, 'shape': (150000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("stamp.npy", "w") as file:
            np.save(file, stamp)
        with archive.open("train_names.npy", "w") as file:
            file.write(header)
            for _ in range(100):
                file.write(bytes(1_000_000))


CASES |= {f"a list of images {what}": partial(_with_list, partial(_edited, edit)) for what, edit in LISTS.items()}
CASES["a list of images is compressed"] = partial(_with_list, _list_bomb)
CASES |= {f"a list of images is a {kind}": partial(_with_list, partial(no_regular_file, kind=kind)) for kind in KINDS}


def _excluded(kind: str, folder: Path) -> None:
    with mock.patch.dict(os.environ):
        root = aged_image_folder(folder)
    no_regular_file(folder / "exclude.txt", kind)
    refused(lambda: load("imagefolder", root, exclude=str(folder / "exclude.txt")), "exclude.txt")


CASES |= {f"a list for data.exclude is a {kind}": partial(_excluded, kind) for kind in KINDS}


def _with_note(write: Callable[[Path], Any], folder: Path) -> None:
    """The masks are checked again, and the note is replaced."""
    root = write_pairs(folder / "set", n=4)
    Image.fromarray(np.full((10, 10), 9, np.uint8)).save(root / "masks" / "0000.png")
    write(root / "masks" / CHECKED)
    refused(lambda: load("pairs", root, "masks", classes=["a", "b", "c"]), "0000.png")


for _what, _write in {
    "is no text": lambda path: path.write_bytes(b"\xff\xfe" * 100),
    "is another text": lambda path: path.write_text("checked\n"),
    **{f"is a {kind}": partial(no_regular_file, kind=kind) for kind in KINDS},
}.items():
    CASES[f"the note on checked masks {_what}"] = partial(_with_note, _write)


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "labels out of range": lambda t: t["train_labels"].fill_(10),
    "negative labels": lambda t: t["train_labels"].fill_(-1),
    "more labels": lambda t: t.update(train_labels=torch.zeros(4, dtype=torch.int64)),
    "labels of another type": lambda t: t.update(train_labels=t["train_labels"].float()),
    "images of another type": lambda t: t.update(train_images=t["train_images"].bfloat16()),
    "more channels": lambda t: t.update({n: t[n].expand(-1, 5, -1, -1).contiguous() for n in ("train_images", "test_images")}),
    "no images": lambda t: t.update(train_images=t["train_images"][:0], train_labels=t["train_labels"][:0]),
    "splits of different sizes": lambda t: t.update(train_images=t["train_images"][..., :5].contiguous()),
    "a split missing": lambda t: t.pop("test_images"),
}


def _with_cache(write: Callable[[Path], Any], folder: Path) -> None:
    root = write_mnist(folder, n_train=3, n_test=2)
    expected = load("MNIST", root)
    write(root / "MNIST" / "raw" / ".cache.safetensors")
    assert load("MNIST", root).train.images.equal(expected.train.images)
    assert load("MNIST", root).train.labels.equal(expected.train.labels)


def _signed(edit: Callable[[dict[str, torch.Tensor]], Any], path: Path) -> None:
    """Edit the tensors of a cache, with the right checksum, as an attacker would."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in cache.TENSORS}
    edit(tensors)
    with contextlib.suppress(TypeError):  # numpy lacks the type, and so would its checksum
        facts["checksum"] = cache._checksum(tensors, facts["classes"])
    save_file(tensors, path, facts)


CASES |= {f"a cache of decoded data has {what}": partial(_with_cache, partial(_signed, edit)) for what, edit in TENSORS.items()}
CASES |= {f"a cache of decoded data is a {kind}": partial(_with_cache, partial(no_regular_file, kind=kind)) for kind in KINDS}


# Annotations

_BOXES = (
    '[null, [], {}, "1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, null], [NaN, 1, 2, 3], [1, 1, NaN, 3], [1, 1, 3, Infinity], '
)
_BOXES += (
    '[-Infinity, 1, 3, 3], [1, 1, "3", 3], [1, 1, true, 3], [1, 1, 1e999, 3], [[1], 1, 3, 3], [1, 1, 1e-30, 3], [1, 1, -3, 3]]'
)
_NAMES = '[null, 1, "", ".", "..", "../val/000000.jpg", "/etc/passwd", "a\\u0000b", "a\\nb", "\\u001b[31m", "\\ud800"]'
_CATEGORIES = '[null, [], {}, {"id": 1, "name": "red"}, {"id": "5", "name": "a"}, {"id": 5}, {"id": 5, "name": null}]'
_SIZES = f'[null, "40", [], NaN, Infinity, -40, 0, true, {10**400}]'
WRONG_VALUES: dict[tuple[str, str], str] = {  # JSON, for the first entry of a part
    ("annotations", "bbox"): _BOXES,
    **{("annotations", key): f'[null, "1", 1.5, true, [], {{}}, NaN, {10**30}]' for key in ("image_id", "category_id")},
    **{("annotations", key): f'[null, "1", [], NaN, Infinity, -1, {10**400}]' for key in ("iscrowd", "area")},
    **{("images", key): _SIZES for key in ("width", "height")},
    ("images", "file_name"): _NAMES,
}
ANNOTATIONS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{key} {value!r:.30}": lambda c, part=part, key=key, value=value: c[part][0].update({key: value})
        for (part, key), values in WRONG_VALUES.items()
        for value in json.loads(values)
    },
    **{f"category {entry!r}": lambda c, entry=entry: c["categories"].append(entry) for entry in json.loads(_CATEGORIES)},
    **{
        f"{part} {value!r}": lambda c, part=part, value=value: c.update({part: value})
        for part in ("images", "annotations", "categories")
        for value in (None, {}, "text", 3, [3], [[]])
    },
}


def _annotation_case(edit: Callable[[Any], Any], folder: Path) -> None:
    root = write_coco(folder, n_train=2, n_val=2)
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    refused(lambda: load("cocojson", root, "boxes"), "train")


def _json_case(content: bytes, folder: Path) -> None:
    root = write_coco(folder, n_train=2, n_val=2)
    (root / "annotations" / "train.json").write_bytes(content)
    refused(lambda: load("cocojson", root, "boxes"), "train.json")


CASES |= {f"a COCO file has {what}": partial(_annotation_case, edit) for what, edit in ANNOTATIONS.items()}
CASES |= {
    f"a COCO file is {what}": partial(_json_case, content)
    for what, content in {
        "nested": b"[" * 1_000_000,
        "a list": b"[]",
        "nothing": b"",
        "not UTF-8": b"\xff{}",
        "a number of many digits": b"9" * 10_000,
    }.items()
}


def _special_annotations(kind: str, folder: Path) -> None:
    coco, voc = write_coco(folder / "coco", 2, 2), write_voc(folder / "voc", 2, 1) / "VOCdevkit" / "VOC2012"
    cases = (
        ("cocojson", coco, "boxes", coco / "annotations" / "train.json"),
        ("VOC", voc, "boxes", voc / "Annotations" / "0000.xml"),
    )
    cases += tuple(
        ("VOC", voc, of, voc / "ImageSets" / part / "train.txt") for of, part in (("masks", "Segmentation"), ("boxes", "Main"))
    )
    for name, root, targets, path in cases:
        content = path.read_bytes()
        no_regular_file(path, kind)
        refused(lambda name=name, root=root, targets=targets: load(name, root, targets), path.name)
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(content)


CASES |= {f"a file of annotations is a {kind}": partial(_special_annotations, kind) for kind in KINDS}

_SIZE, _BOX = "<size><width>40</width><height>40</height></size>", "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
_CAT = f"<object><name>cat</name><bndbox>{_BOX}</bndbox></object>"
_LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
XML = {
    "entities that expand": f'<!DOCTYPE a [<!ENTITY a0 "{"ha" * 50}">{_LAUGHS}]><annotation>{_SIZE}&a11;</annotation>',
    "a long entity many times": f'<!DOCTYPE a [<!ENTITY b "{"b" * 100_000}">]><annotation>{_SIZE}{"&b;" * 100_000}</annotation>',
    "a file as an entity": f'<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd">]><annotation>{_SIZE}<object>&x;</object></annotation>',
    "an undeclared entity": f"<annotation>{_SIZE}&x;</annotation>",
    "deep elements": "<annotation>" + "<a>" * 200_000,
    "no size": f"<annotation>{_CAT}</annotation>",
    "no box": f"<annotation>{_SIZE}<object><name>cat</name></object></annotation>",
    "no name": f"<annotation>{_SIZE}{_CAT.replace('<name>cat</name>', '')}</annotation>",
    "an unknown name": f"<annotation>{_SIZE}{_CAT.replace('cat', 'unicorn')}</annotation>",
    "an infinite size": f"<annotation>{_SIZE.replace('40', 'inf')}{_CAT}</annotation>",
    "a size that is not a number": f"<annotation>{_SIZE.replace('40', 'many')}{_CAT}</annotation>",
    "a negative size": f"<annotation>{_SIZE.replace('40', '-40')}{_CAT}</annotation>",
    "a box that is NaN": f"<annotation>{_SIZE}{_CAT.replace('<xmax>9', '<xmax>nan')}</annotation>",
    "a box without an end": f"<annotation>{_SIZE}{_CAT.replace('<xmax>9', '<xmax>1e999')}</annotation>",
    "a box outside": f"<annotation>{_SIZE}{_CAT.replace('<xmax>9', '<xmax>99')}</annotation>",
    "a box turned around": f"<annotation>{_SIZE}{_CAT.replace('<xmin>1', '<xmin>10')}</annotation>",
    "another difficulty": f"<annotation>{_SIZE}{_CAT.replace('</name>', '</name><difficult>x</difficult>')}</annotation>",
    "an unknown encoding": f'<?xml version="1.0" encoding="x"?><annotation>{_SIZE}{_CAT}</annotation>',
    "nothing": "",
    "another format": '{"objects": []}',
}


def _xml_case(content: str, encoding: str, folder: Path) -> None:
    voc = write_voc(folder, 2, 1) / "VOCdevkit" / "VOC2012"
    (voc / "Annotations" / "0001.xml").write_bytes(content.encode(encoding))
    refused(lambda: load("VOC", voc, "boxes"), "0001.xml")


CASES |= {f"a VOC file has {what}": partial(_xml_case, content, "utf-8") for what, content in XML.items()}
CASES["a VOC file in UTF-16 has entities that expand"] = partial(_xml_case, XML["entities that expand"], "utf-16")


def _names_of_voc(content: bytes, folder: Path) -> None:
    voc = write_voc(folder, 2, 1) / "VOCdevkit" / "VOC2012"
    for part, targets in (("Main", "boxes"), ("Segmentation", "masks")):
        (voc / "ImageSets" / part / "train.txt").write_bytes(content)
        refused(lambda targets=targets: load("VOC", voc, targets), "train.txt")


for _what, _content in {
    "names a parent folder": b"../JPEGImages/0000\n",
    "names the root": b"/etc/passwd\n",
    "names a zero": b"0\x000\n",
    "is no text": b"\xff\xfe",
    "is empty": b"\n\n",
    "names a terminal's controls": b"\x1b[31m\n",
    "names what is not there": b"0000\n7777\n",
}.items():
    CASES[f"a VOC list {_what}"] = partial(_names_of_voc, _content)


def made_by_hand(folder: Path) -> Row:
    names = list(CASES)

    def run(number: int) -> None:
        inside = folder / f"case-{number}"
        inside.mkdir()
        CASES[names[number]](inside)

    return in_children("files made by hand", names, run, (), "refused in a line that names the file, or the right data")


PARTS: dict[str, Callable[[Path], Row]] = {
    "cifar": partial(cifar_pickles, n=3000),
    "idx": partial(idx_arrays, n=1000),
    "image lists": partial(image_list_caches, n=1000),
    "decoded caches": partial(decoded_caches, n=1000),
    "coco": partial(coco_annotations, n=1000),
    "voc": partial(voc_annotations, n=1000),
    "images": partial(images_and_masks, n=1000),
    "by hand": made_by_hand,
}
