import os

import numpy as np
import pytest

from datasets.pipeline.images import ImageFile, UnreadableImage
from datasets.pipeline.places import file_of, part_of, read_place, shown
from models.loading.files import MalformedFile


def test_a_place_is_a_file_or_a_part_of_one(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"0123456789")
    part = os.fsdecode(part_of(str(path), 3, 4, "cat.jpg"))
    assert read_place(part, 100) == b"3456"
    assert read_place(str(path), 100) == b"0123456789"
    assert (file_of(part), file_of(str(path))) == (str(path), str(path))
    assert (shown(part), shown(str(path))) == (f"{path}: cat.jpg", str(path))
    places = np.array([part_of(str(path), 3, 4, "cat.jpg"), os.fsencode(path)])
    assert [read_place(os.fsdecode(place), 100) for place in places] == [b"3456", b"0123456789"]


def test_a_part_that_is_too_large_or_not_there_is_named(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"0123456789")
    with pytest.raises(MalformedFile, match=r"cat\.jpg: it has more than 3 bytes"):
        read_place(os.fsdecode(part_of(str(path), 3, 4, "cat.jpg")), 3)
    with pytest.raises(MalformedFile, match=r"cat\.jpg: the file ends before it does"):
        read_place(os.fsdecode(part_of(str(path), 8, 4, "cat.jpg")), 100)
    with pytest.raises(UnreadableImage, match=r"shard\.tar: cat\.jpg: this image can't be read \(its content is not an image"):
        ImageFile(os.fsdecode(part_of(str(path), 0, 4, "cat.jpg")))
