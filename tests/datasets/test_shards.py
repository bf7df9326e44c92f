"""Tar shards in WebDataset's layout, their index, and the mistakes that people and strangers make."""

import gzip
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from datasets import Source, find_dataset, shards
from datasets.pipeline.images import ImageFile
from datasets.pipeline.places import shown
from tests import on_disk


@pytest.fixture
def root(tmp_path, monkeypatch):
    """train-000000.tar to train-000002.tar and val-000000.tar, of 24 and 9 samples, and classes.txt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return on_disk.write_shards(tmp_path / "set", on_disk.write_image_folder(tmp_path / "folder"))


def load(root, targets="classes", **options):
    return find_dataset("shards", targets).load(Source(root), **options)


def index(root, shard="train-000001.tar"):
    return root / f".{shard}.index"


def content(split, i):
    return ImageFile(os.fsdecode(split.paths[i])).data


def test_a_place_is_that_of_the_image_in_its_shard(root):
    loaded = load(root)
    assert content(loaded.train, 9) == (root.parent / "folder" / "train" / "class_1" / "0001.jpg").read_bytes()
    assert shown(os.fsdecode(loaded.train.paths[10])) == f"{root}/train-000001.tar: 000010.jpg"
    assert loaded.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(loaded.test) == 9
    (root / "classes.txt").unlink()
    assert load(root).classes == ("0", "1", "2")


def test_shards_are_found_by_folder_by_pattern_and_without_a_split(root):
    first = load(root)
    by_pattern = load(root, train_shards="train-{000000..000001}.tar", val_shards="val*.tar", test_shards="train-000002.tar")
    assert [len(part) for part in (by_pattern.train, by_pattern.valid, by_pattern.test)] == [20, 9, 4]
    for part in ("train", "val"):
        (root / part).mkdir()
        for path in root.glob(f"{part}-*.tar"):
            path.rename(root / part / path.name[len(part) + 1 :])
    assert load(root).train.labels.tolist() == first.train.labels.tolist()
    unsplit = load(root / "train", test_ratio=0.25)
    assert unsplit.test.labels.bincount().tolist() == [2, 2, 2]


def test_the_index_is_made_once(root, monkeypatch):
    first = load(root)
    monkeypatch.setattr(shards, "read_samples", lambda *_: pytest.fail("the index was made again"))
    assert np.array_equal(load(root).train.paths, first.train.paths)
    assert torch.equal(load(root).train.labels, first.train.labels)


def test_an_index_that_is_older_than_its_shard_is_made_again(root, caplog):
    caplog.set_level("INFO")
    load(root)
    on_disk.write_tar(root / "train-000001.tar", [("x.jpg", b"new"), ("x.cls", b"2"), ("y.cls", b"1"), ("y.jpg", b"other")])
    loaded = load(root)
    assert loaded.train.labels.tolist() == [0] * 8 + [1, 1, 2, 1, 2, 2, 2, 2]
    assert f"{index(root)} is of another state of its shard; it is made again" in caplog.text
    assert shown(os.fsdecode(loaded.train.paths[10])).endswith("train-000001.tar: x.jpg")


def changed(part, i, value):
    def change(content):
        parts = json.loads(content)
        parts[part][i] = value
        return json.dumps(parts).encode()

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: b"[]",
        lambda content: b"{}",
        lambda content: b"[" * 10_000,
        changed(2, 0, 10**6),
        changed(2, 0, -512),
        changed(2, 0, "1024"),
        changed(2, 0, 1e3),
        changed(2, 1, 1024),
        changed(3, 9, 10**9),
        changed(3, 9, 10**40),
        changed(3, 0, 5),
        changed(1, 0, "../passwd"),
        changed(1, 0, 3),
        changed(1, 0, "\ud800"),
    ],
)
def test_a_damaged_or_hostile_index_is_made_again(root, damage, caplog):
    first = load(root)
    whole = index(root).read_bytes()
    index(root).write_bytes(damage(whole))
    assert np.array_equal(load(root).train.paths, first.train.paths)
    assert index(root).read_bytes() == whole
    assert ".train-000001.tar.index is damaged (" in caplog.text


def test_the_index_is_in_the_users_cache_folder_if_the_data_folder_is_not_writable(root, tmp_path, monkeypatch):
    index(root).mkdir()  # root may write anywhere, but not over a folder
    load(root)
    assert len(list((tmp_path / "home").rglob("*.index"))) == 1
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").touch()
    assert len(load(root).train) == 24


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    long = "folder/" * 12 + "n" * 90 if format == tarfile.USTAR_FORMAT else "folder/" * 30 + "größe" * 10
    names = ["a.jpg", f"{long}.jpg", "./b.c.png", "b.cls"]
    path = on_disk.write_tar(tmp_path / "x.tar", [(name, os.urandom(100 * i)) for i, name in enumerate(names)], format)
    with tarfile.open(path) as tar, path.open("rb") as file:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
        assert list(shards.members(path, file)) == expected
    assert [name for name, *_ in expected] == names


def test_a_large_size_is_binary():
    assert (
        shards.number_in(
            tarfile.TarInfo().create_gnu_header(
                {"name": "x", "size": 10**11, **dict.fromkeys(("mode", "uid", "gid", "mtime"), 0), "type": b"0", "linkname": ""},
                "utf-8",
                "strict",
            )[124:136]
        )
        == 10**11
    )


PICTURE = ("x.jpg", b"picture")


def test_labels_are_numbers_names_or_values_in_json(tmp_path):
    names = [
        ("1.jpg", b"a"),
        ("1.cls", b"dog\n"),
        ("2.jpg", b"b"),
        ("2.cls", b"cat"),
        ("2.txt", b"a caption"),
        ("._2.jpg", b"mac"),
    ]
    on_disk.write_tar(tmp_path / "train.tar", names * 1)
    on_disk.write_tar(tmp_path / "val.tar", names)
    loaded = load(tmp_path)
    assert (loaded.classes, loaded.train.labels.tolist()) == (("cat", "dog"), [1, 0])
    for part in ("train", "val"):
        values = {"1": ["red", "big"], "2": [], "3": ["red"]}
        members = [(f"{key}.json", json.dumps({"tags": value, "n": 7}).encode()) for key, value in values.items()]
        on_disk.write_tar(tmp_path / f"{part}.tar", members + [(f"{key}.jpg", b"x") for key in values])
    several = load(tmp_path, "labels", label_key="tags")
    assert (several.classes, several.train.labels.tolist()) == (("big", "red"), [[1, 1], [0, 0], [0, 1]])
    assert load(tmp_path, label_key="n").train.labels.tolist() == [7, 7, 7]
    with pytest.raises(OSError, match=r"train\.tar: sample 1\.jpg: it has a list of labels, which only task: multilabel reads"):
        load(tmp_path, label_key="tags")
    with pytest.raises(OSError, match=r"train\.tar: 1\.json: the label can't be read; expected JSON with the key 'x'"):
        load(tmp_path, label_key="x")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([PICTURE], r"the sample x has no label \(\.cls\); 1 such"),
        ([("x.cls", b"1")], r"the sample x has no image \(\.jpg or .*\); 1 such"),
        ([PICTURE, ("x.cls", b"1"), PICTURE], r"x\.jpg: the sample has this image twice"),
        ([PICTURE, ("x.png", b"1")], r"x\.png: the sample has this image twice"),
        ([PICTURE, ("x.cls", b"1"), ("x.cls", b"1")], r"x\.cls: the sample has this label twice"),
        ([PICTURE, ("x.cls", b" ")], r"sample x\.jpg: the label is missing"),
        ([PICTURE, ("x.cls", b"\xff")], r"x\.cls: the label can't be read; expected a whole number or a name"),
        ([PICTURE, ("x.cls", b"-1")], r"sample x\.jpg: the label -1 is not one of the"),
        ([("x.jpg", b""), ("x.cls", b"1")], r"x\.jpg: it is empty"),
        ([("notes.md", b"1")], r"it holds no sample, such as 0001\.jpg and 0001\.cls"),
        ([], "it holds no sample"),
    ],
)
def test_a_mistake_in_a_shard_is_named(root, members, message):
    on_disk.write_tar(root / "train-000002.tar", members)
    with pytest.raises(OSError, match=rf"train-000002\.tar: {message}"):
        load(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: data.rindex(b"000023.jpg") + 600], r"byte [0-9,]+: 000023\.jpg is truncated"),
        (lambda data: data[:512], r"byte 0: 000020.cls is truncated"),
        (lambda data: data[:1024], r"byte 1,024: it ends without the end mark"),
        (lambda data: data[:1100], r"byte 1,024: it ends without the end mark"),
        (lambda data: b"", r"byte 0: it ends without the end mark"),
        (lambda data: data[:1024] + b"x" + data[1025:], r"byte 1,024: there is no header of an uncompressed tar file"),
        (gzip.compress, r"byte 0: there is no header of an uncompressed tar file"),
        (lambda data: data + data, r"byte 12,288: there is more after the end mark; it was made of several tar files"),
    ],
)
def test_a_broken_shard_is_named(root, damage, message):
    shard = root / "train-000002.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(OSError, match=rf"train-000002\.tar: {message}"):
        load(root)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_special_members_are_refused(root, kind):
    info = tarfile.TarInfo("x.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(root / "train-000002.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(OSError, match=r"train-000002\.tar: byte 0: x\.jpg is a link, a sparse or a special file"):
        load(root)


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\x80" + b"\xff" * 11, b"7" * 12])
def test_a_member_that_would_go_back_or_past_the_end_is_refused(root, size):
    shard = root / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"000022.cls")
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512]))
    shard.write_bytes(data)
    with pytest.raises(OSError, match=r"train-000002\.tar: byte [0-9,]+: 000022\.cls is truncated"):
        load(root)


@pytest.mark.parametrize(
    ("pattern", "kind", "message"),
    [
        ("pipe:curl x", ValueError, "a URL or a command is not run"),
        ("https://example.org/{0..9}.tar", ValueError, "a URL or a command is not run"),
        ("../other/*.tar", ValueError, "leads out of the data folder"),
        ("{0..99999999999}.tar", ValueError, "more than 100,000 shards"),
        ("{3..1}.tar", ValueError, "the range is empty"),
        ("train-{000001..000004}.tar", OSError, r"train-000003\.tar is missing \(2 of the 4 shards"),
        ("no*.tar", OSError, r"there is no shard 'no\*\.tar'"),
    ],
)
def test_a_pattern_is_of_files_in_the_data_folder(root, pattern, kind, message):
    with pytest.raises(kind, match=message):
        load(root, train_shards=pattern)


def test_a_folder_without_shards_says_what_is_expected(tmp_path):
    with pytest.raises(OSError, match=r"no shard; expected train-\*\.tar and val-\*\.tar"):
        load(tmp_path)
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(OSError, match=r"train-0\.tar\.gz: a compressed shard can't be read in any order; decompress it"):
        load(tmp_path)


@pytest.mark.parametrize("names", ["a\na\n", "", '{"a": 1}', '["a", 1]'])
def test_a_list_of_class_names_is_checked(root, names):
    (root / "classes.txt").unlink()
    path = root / ("classes.json" if names.startswith(("{", "[")) else "classes.txt")
    path.write_text(names)
    with pytest.raises(OSError, match=rf"{path.name}: it is not a list of different names"):
        load(root)
