"""Planted copies are found, and other images are not."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.shapes import chunks
from tests.measured_duplicates import kinds, thumbnail
from tools.dataset_report.duplicates import LEAST_SIDE, find_groups, group_numbers, near_duplicates
from tools.dataset_report.facts import Facts

N = 100
KINDS = kinds(np.random.default_rng(0))


@pytest.fixture(scope="module")
def pictures():
    pixels = torch.cat([rendered[0] for _, rendered in chunks(3, torch.arange(N), 96, 0.3, 2)])
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_each_kind_are_found_and_no_other_pairs(pictures, kind):
    copies = [KINDS[kind](image) for image in pictures[:20]]
    thumbs = np.stack([thumbnail(image) for image in (*pictures, *copies)])
    groups = group_numbers(near_duplicates(thumbs), len(thumbs))
    assert (groups[N:] == groups[:20]).sum() >= (16 if "anywhere" in kind else 20)
    assert len(np.unique(groups[:N])) == N


def test_a_mirrored_copy_is_named_so(pictures):
    both = np.stack([thumbnail(image) for image in (pictures[0], KINDS["mirrored"](pictures[0]))])
    assert near_duplicates(both) == {(0, 1): "mirrored"}


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_and_flat_images_have_no_duplicates(n):
    assert near_duplicates(np.full((n, 3, 32, 32), 128, np.uint8)) == {}


def test_hundreds_of_copies_of_one_image_need_little_memory_and_are_connected(pictures):
    noise = np.random.default_rng(0).integers(-3, 4, (600, 3, 32, 32))
    copies = (thumbnail(pictures[0]).astype(int) + noise).clip(0, 255).astype(np.uint8)
    pairs = near_duplicates(copies)
    assert len({i for pair in pairs for i in pair}) == 600
    assert len(pairs) < 600 * 100


def fact(split, name, label, pixels, side=64, target=b""):
    random = np.random.default_rng(int.from_bytes(pixels, "big"))
    picture = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Facts(split, name, (label,), target, side, side, "PNG", "RGB", pixels, picture.tobytes())


def test_groups_with_other_labels_come_first_then_leaks():
    facts = [
        *(fact("train", f"{i}", i % 3, b"%d" % i) for i in range(6)),
        fact("train", "copy of 0", 0, b"0"),
        fact("test", "copy of 1", 1, b"1"),
        fact("train", "copy of 2", 0, b"2"),
        fact("valid", "copy of 3", 0, b"3"),
        fact("test", "copy of 3", 1, b"3"),
    ]
    groups = find_groups(facts, "classes")
    assert [(group.members, group.conflict, group.leak) for group in groups] == [
        ((3, 9, 10), True, True),
        ((2, 8), True, False),
        ((1, 7), False, True),
        ((0, 6), False, False),
    ]
    assert {group.kinds for group in groups} == {("same pixels",)}


def test_masks_conflict_if_images_of_the_same_pixels_have_other_masks():
    facts = [fact("train", f"{i}", 1, b"%d" % (i // 2), target=b"a" if i != 3 else b"b") for i in range(4)]
    assert [(group.members, group.conflict) for group in find_groups(facts, "masks")] == [((2, 3), True), ((0, 1), False)]


def test_tiny_images_have_exact_duplicates_only():
    same_look = [fact("train", "a", 0, b"1", side=LEAST_SIDE - 1), fact("train", "b", 0, b"1", side=LEAST_SIDE - 1)]
    other_pixels = fact("train", "c", 0, b"1", side=LEAST_SIDE - 1)
    other_pixels = Facts(**{**vars(other_pixels), "pixels": b"other"})
    assert [group.members for group in find_groups([*same_look, other_pixels], "classes")] == [(0, 1)]
    assert find_groups([same_look[0], other_pixels], "classes") == []


def test_unreadable_images_are_in_no_group():
    assert (
        find_groups([Facts("train", "a", (0,), problem="broken"), Facts("train", "b", (0,), problem="broken")], "classes") == []
    )
