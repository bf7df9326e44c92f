"""COCO JSON as other programs export it."""

import json

import pytest

from datasets import Source, find_dataset
from tests import on_disk


def coco(root, **options):
    return find_dataset("cocojson", "boxes").load(Source(root), **options)


def sizes(loaded):
    return tuple(None if split is None else len(split) for split in (loaded.train, loaded.valid, loaded.test))


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def roboflow(tmp_path):
    """An export of Roboflow: images beside _annotations.coco.json, and a category 0 that no annotation uses."""
    root = on_disk.write_coco(tmp_path / "set", category_ids=(1, 2))
    on_disk.write_coco(tmp_path / "more", n_train=2, category_ids=(1, 2), seed=1)
    (root / "val").rename(root / "valid")
    (tmp_path / "more" / "train").rename(root / "test")
    (root / "annotations" / "train.json").rename(root / "train" / "_annotations.coco.json")
    (root / "annotations" / "val.json").rename(root / "valid" / "_annotations.coco.json")
    (tmp_path / "more" / "annotations" / "train.json").rename(root / "test" / "_annotations.coco.json")
    for part in ("train", "valid", "test"):
        unused = {"id": 0, "name": "cells", "supercategory": "none"}
        change(root / part / "_annotations.coco.json", lambda c, unused=unused: c["categories"].insert(0, unused))
    return root


def test_an_export_of_roboflow_is_read_and_an_unused_category_is_a_class_without_objects(roboflow, caplog):
    loaded = coco(roboflow)
    assert sizes(loaded) == (6, 3, 2)
    assert loaded.classes == ("background", "cells", "red", "blue")
    assert loaded.category_ids == (None, 0, 1, 2)
    assert {int(c) for rows in loaded.train.labels for c in rows[:, 4]} == {2, 3}
    assert "no object in train is of the class cells" in caplog.text
    (roboflow / "test" / "_annotations.coco.json").unlink()
    assert sizes(coco(roboflow)) == (6, None, 3)


@pytest.mark.parametrize(
    ("images", "annotations"), [("images", "annotations/instances_default.json"), (".", "result.json"), ("train", "all.json")]
)
def test_data_in_one_part_is_divided(tmp_path, images, annotations):
    root = on_disk.write_coco(tmp_path / "set")
    (root / "annotations" / "val.json").unlink()
    (root / "annotations" / "train.json").rename(root / annotations)
    if images != "train":
        (root / "train").rename(root / "images")
    if images == ".":
        change(root / annotations, lambda c: [one.update(file_name=f"images/{one['file_name']}") for one in c["images"]])
    options = {"train_annotations": annotations} if images == "train" else {}
    loaded, again = coco(root, test_ratio=0.34, **options), coco(root, test_ratio=0.34, **options)
    assert sizes(loaded) == (4, None, 2)
    assert loaded.test.paths.tolist() == again.test.paths.tolist()


def test_a_given_file_that_is_missing_is_an_error(tmp_path):
    root = on_disk.write_coco(tmp_path)
    for part in ("train", "val", "test"):
        with pytest.raises(OSError, match=r"gone.json can't be read"):
            coco(root, **{f"{part}_annotations": "gone.json"})


def test_an_annotation_may_have_polygons_alone(tmp_path):
    root = on_disk.write_coco(tmp_path)
    expected = coco(root).train.labels[0]

    def to_polygons(content):
        for one in content["annotations"]:
            x, y, width, height = one.pop("bbox")
            one["segmentation"] = [[x, y, x + width, y, x, y + height], [x, y, x + width, y + height, x, y]]
            del one["area"], one["iscrowd"]

    change(root / "annotations" / "train.json", to_polygons)
    assert coco(root).train.labels[0].tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [[], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, "6"]], {"counts": "x"}, 7])
def test_an_annotation_without_a_box_or_polygon_is_an_error(tmp_path, shape):
    root = on_disk.write_coco(tmp_path)
    change(root / "annotations" / "train.json", lambda c: c["annotations"][0].update(bbox=[], segmentation=shape))
    with pytest.raises(OSError, match=r"annotation 1: bbox is \[\]; expected left, top, width and height"):
        coco(root)
