"""Data in the format of YOLO is read as Ultralytics, Roboflow and others write it."""

import shutil

import numpy as np
import pytest
import torch

from datasets import Source, find_dataset
from datasets.pipeline.loaders import Workers, eval_loader
from tests import on_disk
from tests.datasets.pipeline.test_boxes import CPU, PREPARE, batches, coco, evaluation

LABEL = "labels/train/000001.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return on_disk.write_yolo(tmp_path_factory.mktemp("yolo"))


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def yolo(root, **options):
    return find_dataset("YOLO", "boxes").load(Source(root), **options)


def sizes(loaded):
    return tuple(None if split is None else len(split) for split in (loaded.train, loaded.valid, loaded.test))


def move(root, mapping):
    for old, new in mapping.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


class TestLabels:
    def test_batches_are_those_of_the_same_data_in_the_format_of_coco(self, root, tmp_path):
        loaded, same = yolo(root), coco(on_disk.write_coco(tmp_path / "coco", category_ids=(0, 1)))
        assert loaded.classes == same.classes == ("background", "red", "blue")
        assert loaded.category_ids == same.category_ids == (None, 0, 1)
        for mine, others in (
            (evaluation(loaded.test), evaluation(same.test)),
            (batches(loaded.train, workers=2), batches(same.train)),
        ):
            for (images, targets), (same_images, same_targets) in zip(mine, others, strict=True):
                assert all(map(torch.equal, images, same_images))
                for target, other in zip(targets, same_targets, strict=True):
                    assert torch.equal(target["labels"], other["labels"])
                    torch.testing.assert_close(target["boxes"], other["boxes"], atol=1e-3, rtol=0)
                    torch.testing.assert_close(target["area"], other["area"], atol=0.1, rtol=0)
        assert len(loaded.test.labels[-1]) == 0

    def test_a_polygon_is_taken_as_its_box_and_edges_are_clipped(self, root):
        (root / LABEL).write_text("\ufeff1 0.2 0.3 0.6 0.3 0.4 0.9\r\n\r\n0.0 0.05 0.5 0.2 1.004\n")
        rows = yolo(root).train.labels[1]
        np.testing.assert_allclose(rows[:, :5], [[0.2, 0.3, 0.6, 0.9, 2], [0, 0, 0.15, 1, 1]], atol=1e-6)

    def test_repeated_lines_are_dropped_with_a_warning(self, root, caplog):
        (root / LABEL).write_text("1 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.3\n")
        assert len(yolo(root).train.labels[1]) == 2
        assert "1 repeated lines" in caplog.text

    def test_boxes_without_an_area_can_be_dropped(self, root, caplog):
        (root / LABEL).write_text("1 0.5 0.5 0 0.2\n1 1.01 0.5 0.01 0.2\n1 0.5 0.5 0.2 0.2\n")
        assert len(yolo(root, drop_degenerate=True).train.labels[1]) == 1
        assert "dropped 2 boxes without an area" in caplog.text

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("2 0.5 0.5 0.2 0.2", "the class 2 is out of range; there are 2 classes, from 0"),
            ("-1 0.5 0.5 0.2 0.2", "the class -1 is out of range"),
            ("0.5 0.5 0.5 0.2 0.2", "the class 0.5 is out of range"),
            ("nan 0.5 0.5 0.2 0.2", "the class nan is out of range"),
            ("1 320 0.5 0.2 0.2", "320 is not a fraction of the image's width or height, from 0 to 1"),
            ("1 0.5 nan 0.2 0.2", "nan is not a fraction"),
            ("1 0.5 0.5 -0.2 0.2", "-0.2 is not a fraction"),
            ("1 0.5 0.5 0.2", "it has 4 values; expected class, x, y, width and height, or class and a polygon"),
            ("1 0.5 0.5 0.2 0.2 0.9", "it has 6 values"),
            ("1 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "it has 8 values"),
            ("1 0.5 0.5 0.2 wide", "could not convert string to float: 'wide'"),
            ("1 0.5 0.5 0 0.2", "the box has no area, 0.5 0.5 0 0.2; data.drop_degenerate omits such boxes"),
        ],
    )
    def test_an_invalid_line_is_an_error_that_names_file_and_line(self, root, line, expected):
        (root / LABEL).write_text(f"1 0.5 0.5 0.2 0.2\n\n{line}\n")
        with pytest.raises(OSError, match=f"{LABEL}: line 3: ") as error:
            yolo(root)
        assert expected in str(error.value)

    def test_a_file_that_is_no_text_is_an_error(self, root):
        (root / LABEL).write_bytes(b"\xff\xfe1")
        with pytest.raises(OSError, match=rf"{LABEL}: it is not text"):
            yolo(root)

    def test_a_split_without_any_label_is_an_error(self, root):
        (root / "labels" / "val").rename(root / "labels" / "vla")
        with pytest.raises(OSError, match=r"none of the 3 images in val has a file of labels, such as \S+labels/val/000000.txt"):
            yolo(root)

    def test_a_class_that_a_split_lacks_is_a_warning(self, root, caplog):
        for path in (root / "labels" / "val").iterdir():
            path.write_text(path.read_text().replace("1 0", "0 0"))
        yolo(root)
        assert "no object in val is of the class blue" in caplog.text

    def test_labels_without_an_image_are_a_warning(self, root, caplog):
        (root / "labels" / "val" / "lost.txt").touch()
        yolo(root)
        assert f"1 label files have no image, such as {root}/labels/val/lost.txt" in caplog.text

    def test_an_evaluation_shares_the_images_among_ranks(self, root):
        split = yolo(root).train
        parts = [eval_loader(split, 2, rank, 2, PREPARE, Workers(), CPU).batches() for rank in (0, 1)]
        assert sum(len(images) for part in parts for images, _ in part) == 6


class TestLayouts:
    @pytest.mark.parametrize(
        ("moved", "text", "expected"),
        [
            ({}, "train: images/train\nval: images/val\nnames: [red, blue]", (6, None, 3)),
            ({}, "train: [images/train, images/val]\nval: images/val\nnc: 2\nnames: [red, blue]", (9, None, 3)),
            ({}, "path: ../elsewhere\ntrain: images/train\nval: images/val\nnc: 2", (6, None, 3)),
            ({}, "path: images\ntrain: train\nval: val\nnames: {1: blue, 0: red}", (6, None, 3)),
            ({}, "train: images\nnames: [no, 1e3]", (7, None, 2)),
            ({}, "train: images/train\nval: images/val\ntest: images/val\nnames: [red, blue]", (6, 3, 3)),
            (
                {f"{kind}/{part}": f"{part}/{kind}" for kind in ("images", "labels") for part in ("train", "val")},
                "train: ../train/images\nval: ../val/images\ntest: ../test/images\nnc: 2\nnames: ['red', 'blue']",
                (6, None, 3),
            ),
        ],
    )
    def test_the_yaml_file_names_folders_and_classes(self, root, moved, text, expected):
        move(root, moved)
        (root / "data.yaml").write_text(text)
        loaded = yolo(root)
        assert sizes(loaded) == expected
        assert loaded.classes[1:] in (("red", "blue"), ("0", "1"), ("no", "1e3"))
        assert sum(map(len, loaded.train.labels)) > 5

    def test_the_yaml_file_may_be_above_the_folder_of_its_path(self, root):
        (root / "data.yaml").rename(root.parent / "shapes.yaml")
        (root.parent / "shapes.yaml").write_text("path: set\ntrain: images/train\nval: images/val\nnames: [red, blue]")
        assert sizes(yolo(root.parent)) == (6, None, 3)
        (root.parent / "other.yml").write_text("")
        with pytest.raises(OSError, match=r"holds other.yml, shapes.yaml; data.data_yaml names the one to use"):
            yolo(root.parent)
        assert sizes(yolo(root.parent, data_yaml="shapes.yaml")) == (6, None, 3)
        with pytest.raises(OSError, match=r"data.data_yaml: \S+shape.yaml can't be read"):
            yolo(root.parent, data_yaml="shape.yaml")

    def test_a_list_names_the_images(self, root):
        names = sorted((root / "images" / "train").iterdir())
        lines = [f"./images/train/{names[0].name}", "", str(names[1]), f"images/train/{names[2].name}"]
        (root / "train.txt").write_text("\n".join(lines))
        (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [red, blue]")
        assert sizes(yolo(root)) == (3, None, 3)
        (root / "train.txt").write_text("\n".join([*lines, "../other/x.jpg"]))
        with pytest.raises(OSError, match=r"train.txt: line 5: ../other/x.jpg isn't a file in"):
            yolo(root)

    @pytest.mark.parametrize(
        ("moved", "expected"),
        [
            ({}, (6, None, 3)),
            ({f"{k}/{p}": f"{p}/{k}" for k in ("images", "labels") for p in ("train", "val")}, (6, None, 3)),
            ({f"{k}/val": f"{k}/test" for k in ("images", "labels")}, (6, None, 3)),
            ({"images/train": "pictures", "labels/train": "more", "pictures": "images", "more": "labels"}, (5, None, 1)),
        ],
    )
    def test_without_a_yaml_file_the_usual_folders_are_found(self, root, moved, expected):
        (root / "data.yaml").unlink()
        for kind in ("images", "labels") if "pictures" in moved else ():
            shutil.rmtree(root / kind / "val")
            move(root, {f"{kind}/train": f"old_{kind}"})
            shutil.rmtree(root / kind)
            move(root, {f"old_{kind}": kind})
        move(root, {} if "pictures" in moved else moved)
        loaded = yolo(root)
        assert sizes(loaded) == expected
        assert loaded.classes == ("background", "0", "1")
        (root / "classes.txt").write_text("red\nblue\n")
        assert yolo(root).classes == ("background", "red", "blue")

    def test_labels_may_be_beside_images(self, root):
        move(root, {"images/train": "all"})
        for path in (root / "labels" / "train").iterdir():
            path.rename(root / "all" / path.name)
        (root / "data.yaml").write_text("train: all\nnames: [red, blue]")
        assert sizes(yolo(root)) == (5, None, 1)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("train: images/tain\nnames: [a]", "train names images/tain, which isn't a folder or a list of images in"),
            ("train: /etc\nnames: [a]", "train names /etc, which isn't a folder"),
            ("train: ../../other\nnames: [a]", "train names ../../other, which isn't a folder"),
            ("train: {a: b}\nnames: [a]", "train is neither a path nor a list of paths"),
            ("train: &a [*a]\nnames: [a]", "it is not YAML in line 1 (found unconstructable recursive node)"),
            ("val: images/val\nnames: [a]", "it has no train"),
            ("train: images/train", "names are not a list"),
            ("train: images/train\nnames: [a, [b]]", "names are not a list"),
            ("train: images/train\nnames: {0: a, 2: b}", "numbered from 0"),
            ("train: images/train\nnames: [a, b]\nnc: 3", "as many as nc says"),
            ("train: images/train\nnc: [3]", "names are not a list"),
            ("train: images/train\nnames: []", "it has 0 names"),
            ("train: [images", "it is not YAML in line 1"),
            ("[" * 1_000, "it is not YAML"),
            ("x", "it has no keys"),
            ("train: !!python/object/apply:os.system [ls]\nnames: [a]", "train names ls, which"),
        ],
    )
    def test_an_invalid_yaml_file_is_an_error(self, root, text, expected):
        (root / "data.yaml").write_text(text)
        with pytest.raises(OSError, match=r"data\.yaml: ") as error:
            yolo(root)
        assert expected in str(error.value)

    def test_an_empty_folder_is_an_error(self, tmp_path):
        with pytest.raises(OSError, match=r"has no data.yaml, nor images/train, train/images or images"):
            yolo(tmp_path)
        (tmp_path / "images").mkdir()
        with pytest.raises(OSError, match=r"images has no image \(.jpg"):
            yolo(tmp_path)
