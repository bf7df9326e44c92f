"""Boxes of a person's own classes in the layout of Pascal VOC."""

import pytest
from PIL import Image

from datasets import Source, find_dataset
from tests import on_disk


def voc(root, **options):
    return find_dataset("VOC", "boxes").load(Source(root), **options)


@pytest.fixture
def cells(tmp_path):
    """A folder like BCCD: JPEGImages/, Annotations/ and ImageSets/Main/ with train, val, trainval and test."""
    folder = tmp_path / "cells"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (60, 40)).save(folder / "JPEGImages" / f"Blood {i}{('.jpg', '.png', '.JPG')[i % 3]}")
        size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
        boxes = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>{x + 9}</xmax><ymax>{y}</ymax></bndbox>"
            "</object>"
            for name, x, y in (("WBC", 1, 40), ("RBC", 20, 9), ("RBC", 30, 1))
        )
        text = f"<annotation><filename>other.jpg</filename>{size}{boxes if i else boxes.replace('WBC', 'Platelets')}</annotation>"
        (folder / "Annotations" / f"Blood {i}.xml").write_text(text)
    for part, numbers in (("train", range(5)), ("val", (5, 6)), ("trainval", range(7)), ("test", (7, 8, 9))):
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"Blood {i}\n" for i in numbers))
    return folder


def sizes(loaded):
    return tuple(None if split is None else len(split) for split in (loaded.train, loaded.valid, loaded.test))


def edit(folder, name, old, new):
    path = folder / "Annotations" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_classes_are_found_in_the_annotations_and_sorted(cells, caplog):
    loaded = voc(cells)
    assert loaded.classes == ("background", "Platelets", "RBC", "WBC")
    assert sizes(loaded) == (5, 2, 3)
    assert loaded.train.labels[0][:, :5].tolist() == [[0, 0, 10, 40, 1], [19, 0, 29, 9, 2], [29, 0, 39, 1, 2]]
    assert [rows[:, 4].tolist() for rows in loaded.test.labels] == [[3, 2, 2]] * 3
    assert "no object in val is of the class Platelets" in caplog.text


def test_classes_can_be_given_in_another_order(cells, caplog):
    loaded = voc(cells, classes=["WBC", "RBC", "Platelets", "Bacteria"])
    assert loaded.classes == ("background", "WBC", "RBC", "Platelets", "Bacteria")
    assert loaded.test.labels[0][:, 4].tolist() == [1, 2, 2]
    assert "no object in train is of the class Bacteria" in caplog.text
    with pytest.raises(
        OSError, match=r"Blood 0.xml: Platelets is not a class of \['WBC', 'RBC'\]; data.classes names the classes"
    ):
        voc(cells, classes=["WBC", "RBC"])
    with pytest.raises(ValueError, match="expected different names"):
        voc(cells, classes=["WBC", "WBC"])


def test_lists_that_are_missing_are_replaced_by_a_part_of_the_images(cells):
    lists = cells / "ImageSets" / "Main"
    assert sizes(voc(cells, train_set="trainval", val_set="test")) == (7, None, 3)
    (lists / "val.txt").unlink()
    assert sizes(voc(cells)) == (5, None, 3)
    with pytest.raises(OSError, match=r"vall.txt can't be read .* there are test, train, trainval"):
        voc(cells, val_set="vall")
    (lists / "test.txt").unlink()
    assert sizes(voc(cells)) == (4, None, 1)
    (lists / "train.txt").unlink()
    with pytest.raises(OSError, match=r"train.txt can't be read .* there are trainval"):
        voc(cells)
    (lists / "trainval.txt").unlink()
    lists.rmdir()
    assert sizes(voc(cells, test_ratio=0.3)) == (7, None, 3)
    assert voc(cells).test.paths.tolist() == voc(cells).test.paths.tolist()


def test_the_published_folders_may_be_above_own_classes(cells, tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    cells.rename(tmp_path / "VOCdevkit" / "VOC2012")
    assert sizes(voc(tmp_path, classes=["WBC", "RBC", "Platelets"])) == (5, 2, 3)


def test_boxes_without_an_area_are_an_error_or_dropped_with_a_warning(cells, caplog):
    edit(cells, "Blood 2.xml", "<xmax>10</xmax>", "<xmax>0</xmax>")
    with pytest.raises(
        OSError, match=r"Blood 2.xml: WBC has a box without an area, from 1 1 to 0 40; data.drop_degenerate omits"
    ):
        voc(cells)
    assert len(voc(cells, drop_degenerate=True).train.labels[2]) == 2
    assert "1 boxes without an area are dropped" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("<name>WBC</name>", "<name> </name>", "an object without a name"),
        ("<xmax>10</xmax>", "<xmax>90</xmax>", "WBC has a box outside its image"),
        ("<xmax>10</xmax>", "<xmax>ten</xmax>", "WBC could not convert string to float: 'ten'"),
    ],
)
def test_an_invalid_object_is_an_error(cells, old, new, expected):
    edit(cells, "Blood 3.xml", old, new)
    with pytest.raises(OSError, match=rf"Blood 3.xml: {expected}"):
        voc(cells)


def test_an_annotation_without_its_image_is_an_error(cells):
    (cells / "ImageSets").rename(cells / "more")
    (cells / "JPEGImages" / "Blood 4.png").unlink()
    with pytest.raises(OSError, match=r"JPEGImages/Blood 4.jpg is missing; Annotations names it"):
        voc(cells)


def test_the_published_data_uses_train_and_val_only(tmp_path):
    lists = on_disk.write_voc(tmp_path) / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    (lists / "test.txt").write_text("0000\n")
    loaded = voc(tmp_path)
    assert sizes(loaded) == (6, None, 3)
    assert len(loaded.classes) == 21
    (lists / "val.txt").unlink()
    with pytest.raises(OSError, match=r"val.txt can't be read"):
        voc(tmp_path)
