"""A fingerprint changes with the data, and only with them."""

import json
import os
import time

import numpy as np
import pytest
import torch

from datasets import Files, Images
from datasets.pipeline.boxes import COLUMNS, BoxedFiles
from datasets.pipeline.fingerprint import fingerprint, fingerprint_differences
from datasets.pipeline.masks import MaskedFiles
from datasets.pipeline.places import part_of

CLASSES = ("cat", "dog")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=generator), torch.arange(20) % 2)


def files_in(root, n=4, ending=".jpg"):
    root.mkdir(parents=True, exist_ok=True)
    paths = [root / f"{i}{ending}" for i in range(n)]
    for path in paths:
        path.write_bytes(b"x" * 10)
    return np.array([os.fsencode(path) for path in paths])


def difference(before, after, root, classes=CLASSES):
    old, new = (fingerprint({"train": split}, names, root) for split, names in ((before, CLASSES), (after, classes)))
    return fingerprint_differences(json.loads(json.dumps(old)), new)


def test_a_pixel_a_label_and_a_class_name_count(images, tmp_path):
    assert difference(images, Images(images.images.clone(), images.labels.clone()), tmp_path) == []
    pixels, labels = images.images.clone(), images.labels.clone()
    pixels[3, 1, 2, 2] ^= 1
    labels[5] ^= 1
    assert difference(images, Images(pixels, images.labels), tmp_path) == ["train: other pixels"]
    assert difference(images, Images(images.images, labels), tmp_path) == ["train: other labels"]
    assert difference(images, images, tmp_path, ("cat", "cow")) == ["train: other labels"]
    fewer = images.subset(torch.arange(15))
    assert difference(images, fewer, tmp_path) == ["train: 15 images instead of 20; other pixels, labels"]


def test_names_sizes_and_labels_of_files_count(tmp_path):
    paths, labels = files_in(tmp_path / "a"), torch.tensor([0, 0, 1, 1])
    split, root = Files(paths, labels), tmp_path / "a"
    before = fingerprint({"train": split}, CLASSES, root)
    assert fingerprint_differences(before, fingerprint({"train": Files(paths, 1 - labels)}, CLASSES, root)) == [
        "train: other labels"
    ]
    swapped = Files(paths[[1, 0, 2, 3]], labels)
    assert fingerprint_differences(before, fingerprint({"train": swapped}, CLASSES, root)) == ["train: other names"]
    (root / "2.jpg").write_bytes(b"x" * 11)
    assert fingerprint_differences(before, fingerprint({"train": split}, CLASSES, root)) == ["train: other sizes"]
    (root / "2.jpg").unlink()  # reading it says so
    assert fingerprint_differences(before, fingerprint({"train": split}, CLASSES, root)) == ["train: other sizes"]


def test_the_data_folder_may_move(tmp_path):
    masks = [files_in(tmp_path / name, ending=".png") for name in ("here", "elsewhere")]
    splits = [MaskedFiles(files_in(tmp_path / name), of, 255) for name, of in zip(("here", "elsewhere"), masks, strict=True)]
    here, there = (
        fingerprint({"train": split}, CLASSES, tmp_path / name) for split, name in zip(splits, ("here", "elsewhere"), strict=True)
    )
    assert here == there


def test_boxes_and_parts_of_files_count(tmp_path):
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"x" * 100)
    places = np.array([part_of(str(shard), 10 * i, 10, f"{i}.jpg") for i in range(2)])
    boxes = [np.ones((2, COLUMNS), np.float32), np.zeros((0, COLUMNS), np.float32)]
    split = BoxedFiles(places, boxes)
    assert difference(split, BoxedFiles(places, [boxes[0].copy(), boxes[1]]), tmp_path) == []
    assert difference(split, BoxedFiles(places, boxes[::-1]), tmp_path) == ["train: other labels"]
    moved = np.array([part_of(str(shard), 10 * i + 1, 10, f"{i}.jpg") for i in range(2)])
    assert difference(split, BoxedFiles(moved, boxes), tmp_path) == ["train: other names"]


def test_many_files_take_a_fraction_of_a_second(tmp_path):
    paths = np.array([b"%b/n%08d/n%08d_%06d.JPEG" % (os.fsencode(tmp_path), i // 1000, i // 1000, i) for i in range(200_000)])
    split = Files(paths, torch.arange(200_000) // 1000)
    start = time.process_time()
    found = fingerprint({"train": split}, CLASSES, tmp_path)
    assert time.process_time() - start < 1
    assert found["train"]["images"] == 200_000


def test_labels_of_any_type_count(tmp_path):
    paths = files_in(tmp_path)
    assert difference(Files(paths, [0, 1, 2, 3]), Files(paths, [0, 1, 2, 3]), tmp_path) == []
    assert difference(Files(paths, [0, 1, 2, 3]), Files(paths, [0, 1, 2, 4]), tmp_path) == ["train: other labels"]


@pytest.mark.parametrize("old", [None, {}, [], {"train": 1}, {"train": None}, "text"])
def test_a_run_without_a_fingerprint_differs_from_none(old, images, tmp_path):
    assert fingerprint_differences(old, fingerprint({"train": images}, CLASSES, tmp_path)) == []


def test_a_hostile_fingerprint_stays_on_its_line(images, tmp_path):
    old = {"train\n\x1b[31m": {"images": "\x1b[31m", "a\nb": 1}, "train": {"images": "\n", "a\nb": 2}}
    for line in fingerprint_differences(old, fingerprint({"train": images}, CLASSES, tmp_path)):
        assert line.isprintable()


def test_a_split_that_is_new_or_missing_is_named(images, tmp_path):
    both, one = (
        fingerprint({"train": images, "test": images}, CLASSES, tmp_path),
        fingerprint({"train": images}, CLASSES, tmp_path),
    )
    assert fingerprint_differences(one, both) == ["test: is new"]
    assert fingerprint_differences(both, one) == ["test: is missing"]
