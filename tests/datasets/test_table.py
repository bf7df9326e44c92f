"""Tables of images in CSV and parquet, with the mistakes that people and strangers make."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from datasets import Source, find_dataset, table
from datasets.pipeline.images import ImageFile
from datasets.pipeline.places import shown
from tests import on_disk


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a/0.jpg to a/11.jpg."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    made = on_disk.write_image_folder(tmp_path / "made", n_classes=1, n_train=12, n_val=1)
    (tmp_path / "set").mkdir()
    (made / "train" / "class_0").rename(tmp_path / "set" / "a")
    for i in range(12):
        (tmp_path / "set" / "a" / f"{i:04d}.jpg").rename(tmp_path / "set" / "a" / f"{i}.jpg")
    return tmp_path / "set"


def write(path, rows, header=("path", "label"), **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *rows])


def load(root, targets="classes", n_classes=None, download=False, **options):
    return find_dataset("table", targets).load(Source(Path(root), n_classes=n_classes, download=download), **options)


def of(split):
    return [(os.fsdecode(path).rpartition("/")[2], label) for path, label in zip(split.paths, split.labels.tolist(), strict=True)]


ROWS = [(f"a/{i}.jpg", "cat" if i % 3 else "dog") for i in range(12)]


def test_an_unsplit_table_is_split_class_by_class_the_same_for_the_same_seed(root):
    write(root / "all.csv", ROWS)
    loaded, again = load(root), load(root / "all.csv")
    assert loaded.classes == ("cat", "dog")
    assert loaded.test.labels.bincount().tolist() == [1, 1]
    assert sorted(of(loaded.train) + of(loaded.test)) == sorted((f"{i}.jpg", int(i % 3 == 0)) for i in range(12))
    assert of(loaded.test) == of(again.test)
    assert loaded.by_class
    assert len(load(root, test_ratio=0.5).test) == 6


def test_columns_are_found_by_name_and_logged(root, caplog):
    caplog.set_level("INFO")
    write(root / "all.csv", [(1, *row[::-1]) for row in ROWS], ("id", "Class", "File_Name"))
    assert load(root).classes == ("cat", "dog")
    assert "images from the column File_Name, labels from Class" in caplog.text


def test_a_split_column_and_files_by_split_are_read(root):
    words = ["Training", "dev", "test", "train"] * 3
    write(root / "all.csv", [(*row, word) for row, word in zip(ROWS, words, strict=True)], ("path", "label", "split"))
    by_column = load(root)
    assert [len(part) for part in (by_column.train, by_column.valid, by_column.test)] == [6, 3, 3]
    (root / "all.csv").unlink()
    for name, first in (("train_labels.csv", 0), ("validation.csv", 6)):
        write(root / name, ROWS[first : first + 6])
    write(root / "other.csv", ROWS)
    two = load(root)
    assert two.valid is None
    assert [name for name, _ in of(two.train)] == [f"{i}.jpg" for i in range(6)]
    assert [name for name, _ in of(two.test)] == [f"{i}.jpg" for i in range(6, 12)]


def test_values_become_paths_by_a_format_and_labels_that_are_numbers_keep_them(root):
    write(root / "all.csv", [(i, f"{2 * (i % 2)}.0") for i in range(12)], ("image_id", "label"))
    loaded = load(root, path_format="a/{}.jpg")
    assert loaded.classes == ("0", "1", "2")
    assert set(loaded.train.labels.tolist()) == {0, 2}
    assert len(load(root, path_format="a/{}.jpg", n_classes=5).classes) == 5


@pytest.mark.parametrize(
    "options", [{"delimiter": ";"}, {"encoding": "utf-8-sig"}, {"quoting": csv.QUOTE_ALL}, {"delimiter": "\t"}]
)
def test_csv_is_read_as_spreadsheets_write_it(root, options):
    write(
        root / ("all.tsv" if options.get("delimiter") == "\t" else "all.csv"),
        [(path, "größer, 1\n2") for path, _ in ROWS],
        **options,
    )
    assert load(root).classes == ("größer, 1\n2",)


def test_several_labels_are_columns_a_text_or_a_list(root):
    cells = [[i % 2, int(i % 3 == 0)] for i in range(12)]
    write(root / "columns.csv", [(row[0], *two) for row, two in zip(ROWS, cells, strict=True)], ("path", "cat", "dog"))
    names = [[name for name, there in zip(("cat", "dog"), two, strict=True) if there] for two in cells]
    write(root / "text.csv", [(row[0], " | ".join(found)) for row, found in zip(ROWS, names, strict=True)])
    parquet.write_table(pa.table({"path": [row[0] for row in ROWS], "label": names}), root / "list.parquet")
    loaded = [load(root / "columns.csv", "labels", label_columns=["cat", "dog"])]
    loaded += [load(root / name, "labels") for name in ("text.csv", "list.parquet")]
    for one in loaded:
        assert one.classes == ("cat", "dog")
        assert one.train.labels.dtype == torch.uint8
        found = {name: labels for split in (one.train, one.test) for name, labels in of(split)}
        assert found == {f"{i}.jpg": cells[i] for i in range(12)}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*ROWS[:2], ("a/x.jpg", "cat"), ("a/y.jpg", "cat")], {}, r"a/x\.jpg is missing; .*all\.csv names it \(4\); 2 such"),
        ([*ROWS, ("../set/a/1.jpg", "cat")], {}, r"all\.csv: line 14: the path \.\./set/a/1\.jpg leads out of .*set"),
        ([*ROWS, ("/etc/passwd", "cat")], {}, r"line 14: the path /etc/passwd leads out of"),
        ([*ROWS, ("", "cat")], {}, r"line 14: the path is missing"),
        ([*ROWS, ("x" * 2000, "cat")], {}, r"line 14: the path has more than 1000 characters"),
        ([*ROWS, ("a/1.jpg", " ")], {}, r"line 14: the label is missing"),
        ([*ROWS, ("a/1.jpg",)], {}, r"all\.csv: line 14: it has 1 cells, and the header 2"),
        ([], {}, r"all\.csv: it has no rows"),
        (ROWS, {"path_column": "paht"}, r"all\.csv: it has no column 'paht'; did you mean path\?"),
        (ROWS, {"label_columns": "zzzzz"}, r"it has no column 'zzzzz'; there are path, label"),
        (ROWS, {"label_columns": ["path", "label"]}, r"several columns, which only task: multilabel reads"),
        (ROWS, {"split_column": "label"}, r"line 2: the split 'dog' is none of train, "),
        ([("a/1.jpg", i) for i in (0, 1, -1, 2)], {}, r"line 4: the label -1 is not one of the 3 classes, 0 to 2"),
        ([("a/1.jpg", i) for i in (0, 1, 2)], {"n_classes": 2}, r"line 4: the label 2 is not one of the 2 classes"),
    ],
)
def test_a_mistake_is_named_with_its_line(root, rows, options, message):
    write(root / "all.csv", rows)
    with pytest.raises(OSError, match=message):
        load(root, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,path,label\n", "several columns 'path'"),
        (b"", "it has no column named path, image_path, img_path ...; name one of these with data.path_column: none"),
        (b"path,tag\n", "no column named label, .* with data.label_columns: path, tag"),
        (b"path,label\n\xff\xfe,1\n", "all.csv: it is not text in UTF-8"),
        (b'path,label\n"a/1.jpg"x,1\n', r"all.csv: line 2: ',' expected after '\"'"),
        (b"path,label\n" + b"x" * (2 << 20), r"all.csv: line 1: it has more than 1,048,576 characters"),
    ],
)
def test_a_malformed_csv_is_named(root, content, message):
    (root / "all.csv").write_bytes(content)
    with pytest.raises(OSError, match=message):
        load(root)


def test_a_class_that_only_the_test_split_has_is_an_error(root):
    write(root / "train.csv", ROWS)
    write(root / "val.csv", [("a/1.jpg", "cat")])
    assert load(root).classes == ("cat", "dog")
    write(root / "val.csv", [("a/1.jpg", "cow")])
    with pytest.raises(OSError, match=r"set: the val split has classes that training doesn't have: cow"):
        load(root)
    (root / "train.csv").unlink()
    with pytest.raises(OSError, match="there is no sample for training"):
        load(root)
    (root / "val.csv").unlink()
    with pytest.raises(OSError, match=r"no table; expected a file that ends in \.csv"):
        load(root)


@pytest.fixture
def hub(root):
    return on_disk.write_parquet(root / "hub", on_disk.write_image_folder(root / "folder"))


def cache(hub):
    return hub / "data" / ".train-00000-of-00001.parquet.images"


def test_the_images_of_a_parquet_file_are_copied_once(hub, monkeypatch):
    first = load(hub)
    assert first.classes == ("class_0", "class_1", "class_2")
    monkeypatch.setattr(table, "_copy_images", lambda *_: pytest.fail("the images were copied again"))
    again = load(hub)
    assert np.array_equal(first.train.paths, again.train.paths)
    assert shown(os.fsdecode(again.train.paths[9])) == f"{cache(hub)}: row 10 of train-00000-of-00001.parquet"
    assert ImageFile(os.fsdecode(again.train.paths[9])).data == (hub.parent / "folder/train/class_1/0001.jpg").read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:-60] + b"\1" + data[-59:], lambda data: b"", lambda d: b"x" + d]
)
def test_a_damaged_copy_is_made_again(hub, damage, caplog):
    load(hub)
    whole = cache(hub).read_bytes()
    cache(hub).write_bytes(damage(whole))
    load(hub)
    assert cache(hub).read_bytes() == whole
    assert "is damaged or older than its table; the images are copied again" in caplog.text


def test_a_copy_of_an_older_table_is_made_again(hub):
    load(hub)
    file = hub / "data" / "train-00000-of-00001.parquet"
    content = parquet.read_table(file)
    parquet.write_table(content.take(list(range(len(content)))[::-1]), file)
    assert load(hub).train.labels.tolist() == [2] * 8 + [1] * 8 + [0] * 8
    assert ImageFile(os.fsdecode(load(hub).train.paths[0])).data == (hub.parent / "folder/train/class_2/0007.jpg").read_bytes()


def test_the_copy_goes_to_the_users_cache_folder_or_is_refused_where_the_disk_is_full(hub, monkeypatch, tmp_path):
    cache(hub).mkdir()  # root may write anywhere, but not over a folder
    loaded = load(hub)
    assert os.fsdecode(loaded.train.paths[0]).startswith(str(tmp_path / "home"))
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        OSError, match=r"train-00000.*parquet: there is no folder to copy its images to \(.* are needed, and 0\.0 GB are free"
    ):
        load(hub)


def test_a_broken_parquet_file_is_named(root, hub):
    file = hub / "data" / "train-00000-of-00001.parquet"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:3000] + bytes(3000) + whole[6000:], b"", b"PAR1"):
        file.write_bytes(content)
        with pytest.raises(OSError, match=r"train-00000-of-00001\.parquet: it can't be read as parquet"):
            load(hub)
    for column, message in (
        (pa.array([{"bytes": None}], pa.struct([("bytes", pa.binary())])), r"row 1: the image is missing"),
        ([[1, 2]], r"row 1: \[1, 2\] is neither a path nor the bytes of an image"),
    ):
        parquet.write_table(pa.table({"image": column, "label": [0]}), root / "one.parquet")
        with pytest.raises(OSError, match=rf"one\.parquet: {message}"):
            load(root / "one.parquet")
    for labels, message in (
        ([[1]], "list of labels, which only"),
        ([{"x": 1}], "neither text nor a whole number"),
        ([None], "missing"),
    ):
        parquet.write_table(pa.table({"path": ["a/1.jpg"], "label": labels}), root / "one.parquet")
        with pytest.raises(OSError, match=rf"one\.parquet: row 1: .*{message}"):
            load(root / "one.parquet")


def test_class_names_of_the_hub_are_checked(root):
    for features in ({"label": {"names": ["a", "a"]}}, {"label": {"names": "ab"}}):
        schema = {"huggingface": json.dumps({"info": {"features": features}})}
        content = pa.table({"path": ["a/1.jpg"], "label": [0]}).replace_schema_metadata(schema)
        parquet.write_table(content, root / "one.parquet")
        with pytest.raises(OSError, match=r"one\.parquet: the class names of the column label"):
            load(root / "one.parquet")


def test_parquet_without_pyarrow_says_what_to_install(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OSError, match=r"parquet: parquet needs a package that is not installed: pip install 'pyarrow>=15'"):
        load(hub)


def test_a_dataset_of_the_hub_is_downloaded_and_offline_the_error_says_what_to_do(hub, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(hub))
    loaded = load("hf://owner/name@refs%2Fconvert%2Fparquet/data", download=True)
    assert len(loaded.train) == 24
    name, options = asked[0]
    assert (name, options["revision"], options["allow_patterns"]) == ("owner/name", "refs/convert/parquet", "data/*.parquet")
    assert (options["repo_type"], options["local_files_only"]) == ("dataset", False)
    load("hf://datasets/owner/name")
    assert asked[1][0] == "owner/name"
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        OSError, match=r"hf://owner/name can't be downloaded \(.*put its parquet files into a folder and name that with"
    ):
        load("hf://owner/name")
    for name, message in (
        ("owner/name/../x", "the folder is outside of the dataset"),
        ("owner", "hf://owner/ can't be downloaded"),
    ):
        with pytest.raises(OSError, match=message):
            load(f"hf://{name}")
