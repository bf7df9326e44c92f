"""Images and their boxes are loaded and augmented together."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Source, find_dataset
from datasets.pipeline.boxes import BoxedFiles, Unscaled, clipped
from datasets.pipeline.images import UnreadableImage
from datasets.pipeline.loaders import Preparation, Workers, eval_loader, train_loader
from datasets.pipeline.order import Order
from datasets.shapes import SHAPES, TRAIN, derive
from tests import on_disk
from tests.generated_shapes import generate

CPU = torch.device("cpu")
NAN, INFINITY = float("nan"), float("inf")
BILLION_LAUGHS = f"""<!DOCTYPE annotation [<!ENTITY a0 "ha">{
    "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
}]><annotation>&a9;"""
PREPARE = Preparation(
    img_size=32, mean=(0.5,) * 3, std=(0.3,) * 3, augment=True, crop_padding=0, padding_mode="constant", hflip=True, cutout=0
)


def shapes(**options):
    options = {"n_train": 40, "n_test": 11, "size": 48, "max_objects": 3, "difficulty": 0.0, **options}
    return find_dataset("shapes", "boxes").load(Source(None, seed=7), **options)


def coco(root, name="cocojson", **options):
    return find_dataset(name, "boxes").load(Source(root), **options)


def batches(split, prepare=PREPARE, first=0, last=6, seed=3, workers=0, batch_size=4):
    order = Order(len(split), batch_size, seed)
    return list(train_loader(split, order, prepare, Workers(workers), CPU).batches(first, last))


def evaluation(split, batch_size=4, rank=0, ranks=1, workers=0):
    return list(eval_loader(split, batch_size, rank, ranks, PREPARE, Workers(workers), CPU).batches())


def equal(a, b):
    return all(
        torch.equal(x, y) and all(torch.equal(s[k], t[k]) for k in s)
        for (xs, ss), (ys, ts) in zip(a, b, strict=True)
        for x, y, s, t in zip(xs, ys, ss, ts, strict=True)
    )


class TestShapes:
    def test_an_image_has_the_boxes_of_its_objects(self):
        same = generate(derive(7, SHAPES, TRAIN), torch.arange(40), size=48, difficulty=0.0, max_objects=3)
        loaded = shapes()
        order = Order(40, 40, 3)
        ((images, targets),) = batches(loaded.train, replace(PREPARE, augment=False), last=1, batch_size=40)
        for image, target, i in zip(images, targets, order.samples(0).tolist(), strict=True):
            there = same.labels[i] >= 0
            assert torch.equal((image * 255).round().to(torch.uint8), same.images[i])
            assert torch.equal(target["boxes"], same.boxes[i][there].float())
            assert torch.equal(target["labels"], same.labels[i][there] + 1)
            assert torch.equal(target["area"], same.masks[i][there].sum((1, 2)).float())
            assert not target["iscrowd"].any()
        assert loaded.classes[0] == "background"

    def test_boxes_are_mirrored_with_their_image(self):
        """At difficulty 0 every pixel that differs from the background is in a box."""
        n_mirrored = 0
        split = shapes(max_objects=1).train
        for step, (images, targets) in enumerate(batches(split, last=10)):
            for image, target, i in zip(images, targets, Order(40, 4, 3).samples(step).tolist(), strict=True):
                left, top, right, bottom = target["boxes"][0].int().tolist()
                outside = torch.ones(48, 48, dtype=torch.bool)
                outside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
                behind = image[:, outside]
                differs = (behind - behind.median(1).values.unsqueeze(1)).abs().amax(0) > 0.02
                assert differs.float().mean() < 0.005
                n_mirrored += not torch.equal(target["boxes"], split.labels[i, :1, :4])
        assert 8 < n_mirrored < 32

    def test_colors_change_and_boxes_do_not(self):
        split = shapes().train
        plain, colored = (batches(split, replace(PREPARE, color_jitter=strength)) for strength in (0.0, 0.5))
        for (images, targets), (others, same) in zip(plain, colored, strict=True):
            assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, same, strict=True))
            assert any((a - b).abs().mean() > 0.02 for a, b in zip(images, others, strict=True))

    def test_ranks_together_evaluate_every_image_once(self):
        split = shapes().test
        both = [evaluation(split, rank=rank, ranks=2) for rank in (0, 1)]
        both, alone = (
            [pair for images, targets in given for pair in zip(images, targets, strict=True)]
            for given in ([*both[0], *both[1]], evaluation(split))
        )
        assert len(both) == len(alone) == 11
        assert all(torch.equal(a, b) and torch.equal(s["boxes"], t["boxes"]) for (a, s), (b, t) in zip(both, alone, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return on_disk.write_coco(tmp_path_factory.mktemp("coco"), n_train=12, n_val=5)


class TestCoco:
    def test_every_image_has_the_objects_of_the_annotation_file(self, folder):
        loaded = coco(folder)
        content = json.loads((folder / "annotations" / "val.json").read_text())
        assert loaded.classes == ("background", "red", "N/A", "blue")
        seen = [pair for images, targets in evaluation(loaded.test, workers=2) for pair in zip(images, targets, strict=True)]
        assert len(seen) == 5
        for (image, target), entry in zip(seen, content["images"], strict=True):
            of_image = [one for one in content["annotations"] if one["image_id"] == entry["id"]]
            expected = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in of_image)]
            assert target["boxes"].tolist() == expected
            assert target["labels"].tolist() == [one["category_id"] for one in of_image]
            assert target["area"].tolist() == [one["area"] for one in of_image]
            pixels = np.asarray(Image.open(folder / "val" / entry["file_name"]))
            assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        assert len(seen[-1][1]["boxes"]) == 0

    def test_boxes_are_mirrored_with_their_image(self, folder):
        for images, targets in batches(coco(folder).train):
            for image, target in zip(images, targets, strict=True):
                for (left, top, right, bottom), label in list(
                    zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True)
                )[-1:]:  # the object in front
                    inside = image[:, top:bottom, left:right].mean((1, 2))
                    assert inside.argmax() == (0 if label == 1 else 2)
                    assert inside.max() > 0.6

    def test_a_batch_is_a_function_of_seed_epoch_and_sample_with_any_number_of_workers(self, folder):
        split, prepare = coco(folder).train, replace(PREPARE, color_jitter=0.3)
        whole = batches(split, prepare)
        assert equal(whole[4:], batches(split, prepare, first=4))
        assert equal(whole, batches(split, prepare, workers=2))
        assert not torch.equal(whole[0][0][0], batches(split, prepare, seed=4)[0][0][0])

    def test_images_without_objects_are_optional_in_training(self, folder):
        assert len(coco(folder).train) == 12
        kept = coco(folder, keep_empty=False)
        assert (len(kept.train), len(kept.test)) == (11, 5)
        assert all(len(objects) for objects in kept.train.labels)

    @pytest.mark.parametrize(
        ("ids", "classes"),
        [
            ((1, 2), ("background", "red", "blue")),
            ((2, 9_999), ("background", "N/A", "red", *["N/A"] * 9_996, "blue")),
            ((0, 1), ("background", "red", "blue")),
            ((7, 0), ("background", "blue", "red")),
            ((-5, 10**20), ("background", "red", "blue")),
            ((1, 10_000), ("background", "red", "blue")),
        ],
    )
    def test_category_ids_from_1_to_9999_are_the_classes_and_others_are_mapped_in_their_order(
        self, tmp_path, caplog, ids, classes
    ):
        caplog.set_level("INFO")
        unchanged = coco(on_disk.write_coco(tmp_path / "unchanged"))
        loaded = coco(on_disk.write_coco(tmp_path / "changed", category_ids=ids))
        assert loaded.classes == classes
        is_mapped = not all(0 < i < 10_000 for i in ids)
        assert loaded.category_ids == ((None, *sorted(ids)) if is_mapped else None)
        assert ("category ids are not all from 1 to 9,999: the classes 1 to 2 are in their order" in caplog.text) == is_mapped
        for objects, others in zip(loaded.train.labels, unchanged.train.labels, strict=True):
            names, expected = ([of.classes[int(c)] for c in o[:, 4]] for of, o in ((loaded, objects), (unchanged, others)))
            assert names == expected

    def test_symlinked_images_are_found(self, tmp_path):
        root = on_disk.write_coco(tmp_path / "set")
        image = (root / "train" / "000000.jpg").rename(tmp_path / "elsewhere.jpg")
        (root / "train" / "000000.jpg").symlink_to(image)
        assert len(evaluation(coco(root).train)) == 2

    def test_the_published_layout_is_read(self, tmp_path):
        on_disk.write_coco(tmp_path, parts=("train2017", "val2017"))
        loaded = coco(tmp_path, "COCO")
        assert (len(loaded.train), len(loaded.test)) == (6, 3)
        assert find_dataset("coco", "boxes").n_classes == 91


class TestVoc:
    def test_pixels_are_counted_from_one_and_difficult_objects_are_crowds(self, tmp_path):
        on_disk.write_voc(tmp_path)
        loaded = find_dataset("VOC", "boxes").load(Source(tmp_path))
        assert (len(loaded.train), len(loaded.test), len(loaded.classes)) == (6, 3, 21)
        for images, targets in evaluation(loaded.train):
            for image, target in zip(images, targets, strict=True):
                assert target["boxes"].tolist() == [[0, 2, image.shape[-1], 20]]
                assert loaded.classes[target["labels"].item()] == "cat"
        assert [bool(objects[0, 5]) for objects in loaded.train.labels] == [False, True] * 3


class TestErrors:
    """Errors are found when the dataset is read, before training."""

    @pytest.fixture
    def changed(self, tmp_path):
        root = on_disk.write_coco(tmp_path)
        path = root / "annotations" / "train.json"

        def change(edit):
            content = json.loads(path.read_text())
            edit(content)
            path.write_text(json.dumps(content))
            return root

        return change

    @pytest.mark.parametrize(
        ("edit", "expected"),
        [
            (
                lambda c: c["annotations"][2].update(bbox=[60, 60, 30, 5]),
                r"annotation 3 has a box outside its image: from 60 60 to 90",
            ),
            (lambda c: c["annotations"][2].update(bbox=[-9, 5, 30, 5]), r"annotation 3 has a box outside its image: from -9 5"),
            (lambda c: c["annotations"][1].update(bbox=[5, 5, 0, 9]), r"annotation 2 has a box without an area, \[5, 5, 0, 9\]"),
            (lambda c: c["annotations"][0].update(image_id=7), r"annotation 1 is of the image 7, which isn't among"),
            (lambda c: c["annotations"][0].update(category_id=2), r"annotation 1 has the category 2, which isn't declared"),
            (lambda c: c["annotations"][0].update(category_id=0), r"annotation 1 has the category 0, which isn't declared"),
            (lambda c: c["annotations"][0].update(category_id=99), r"annotation 1 has the category 99, which isn't declared"),
            (
                lambda c: c["images"][1].update(file_name="gone.jpg"),
                r"train/gone.jpg is missing; \S+train.json has it as image 101",
            ),
            (lambda c: c["categories"].pop(), r"the category 3, which isn't declared"),
            (lambda c: c["categories"][0].update(name="green"), r"val.json: declares other categories than"),
            (lambda c: c["categories"][0].update(id="1"), r"train.json: category number 1: id is '1'; expected a whole number"),
            (lambda c: c["categories"].append(c["categories"][0]), r"train.json: categories have the same id twice"),
            (lambda c: c["categories"].clear(), r"train.json: it has no categories"),
            (lambda c: c["images"].clear(), r"train.json: it has no images"),
            (lambda c: c["images"].append(c["images"][0]), r"train.json: images have the same id twice"),
            (lambda c: c.pop("images"), r"train.json: it is not a file of COCO annotations: it has no list 'images'"),
            (lambda c: c.update(images={"1": 2}), r"it has no list 'images'"),
            (lambda c: c["annotations"].append(7), r"train.json: number \d+ of its annotations is not an object"),
            (lambda c: c["annotations"][0].pop("bbox"), r"annotation 1: bbox is missing; expected left, top, width and height"),
            (lambda c: c["annotations"][0].update(bbox=None), r"annotation 1: bbox is None"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1: bbox is \[1, 2, 3\]"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, NAN, 4]), r"annotation 1: bbox is \[1, 2, nan, 4\]"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, INFINITY]), r"annotation 1: bbox is \[1, 2, 3, inf\]"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, True, "4"]), r"annotation 1: bbox is \[1, 2, True, '4'\]"),
            (lambda c: c["annotations"][0].update(bbox=[9, 9, 1e-9, 5]), r"annotation 1 has a box without an area"),
            (lambda c: c["annotations"][0].update(category_id=1.0), r"annotation 1: category_id is 1.0; expected a whole number"),
            (lambda c: c["annotations"][0].update(id=[], image_id="100"), r"annotation number 1: image_id is '100'"),
            (lambda c: c["annotations"][0].update(iscrowd="no"), r"annotation 1: iscrowd is 'no'; expected 0 or 1"),
            (lambda c: c["annotations"][0].update(area=NAN), r"annotation 1: area is nan; expected a number of pixels"),
            (lambda c: c["images"][0].update(width=INFINITY), r"image 100: width is inf; expected a number of pixels"),
            (lambda c: c["images"][0].update(height=NAN), r"image 100: height is nan"),
            (lambda c: c["images"][0].update(height=10**400), r"image 100: height is 1000"),
            (lambda c: c["images"][0].update(file_name=None), r"image 100: file_name is None; expected a path inside"),
            (lambda c: c["images"][0].update(file_name="../val/000000.jpg"), r"image 100: file_name is '../val/000000.jpg'"),
            (lambda c: c["images"][0].update(file_name="/etc/passwd"), r"image 100: file_name is '/etc/passwd'; expected a path"),
            (lambda c: c["images"][0].update(file_name="\ud800"), r"image 100: file_name is '\\ud800'"),
        ],
    )
    def test_an_invalid_annotation_is_an_error(self, changed, edit, expected):
        with pytest.raises(OSError, match=expected):
            coco(changed(edit))

    def test_a_missing_or_broken_annotation_file_is_an_error(self, tmp_path):
        with pytest.raises(OSError, match=r"annotations/train.json can't be read"):
            coco(tmp_path)
        root = on_disk.write_coco(tmp_path / "set")
        (root / "annotations" / "val.json").write_text("{")
        with pytest.raises(OSError, match=r"val.json: it is not JSON \(Expecting"):
            coco(root)

    def test_boxes_without_an_area_can_be_omitted(self, changed, tmp_path):
        root = changed(lambda c: c["annotations"][1].update(bbox=[5, 5, 0, 9]))
        kept = coco(root, drop_degenerate=True)
        assert (
            sum(map(len, kept.train.labels))
            == len(json.loads((root / "annotations" / "train.json").read_text())["annotations"]) - 1
        )

    def test_a_box_that_exceeds_its_image_by_a_rounding_error_is_clipped(self):
        assert clipped((-0.4, 0, 10.6, 5), 10, 6) == [0, 0, 10, 5]
        for box in ((0, 0, 12, 5), (0, 0, NAN, 5), (NAN, 0, 1, 5)):
            with pytest.raises(ValueError, match="outside its image"):
                clipped(box, 10, 6)

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            (
                "<name>cat</name>",
                "<name>unicorn</name>",
                "0002.xml: unicorn is not a class of VOC; data.classes names the classes",
            ),
            ("<ymax>20</ymax>", "<ymax>900</ymax>", "0002.xml: cat has a box outside its image"),
            ("<ymax>20</ymax>", "<ymax>1</ymax>", "0002.xml: cat has a box without an area"),
            ("<ymax>20</ymax>", "", "0002.xml: cat has no bndbox/ymax"),
            ("<ymax>20</ymax>", "<ymax>nan</ymax>", "0002.xml: cat has bndbox/ymax nan, which is not a number of pixels"),
            ("<ymax>20</ymax>", "<ymax>-inf</ymax>", "0002.xml: cat has bndbox/ymax -inf, which is not a number of pixels"),
            ("<width>", "<width>inf</width><width>", "0002.xml: has size/width inf, which is not a number of pixels"),
            ("<width>", "<width>0</width><width>", "0002.xml: has size/width 0, which is not a number of pixels"),
            ("<name>cat</name>", "", "0002.xml: an object without a name is not a class of VOC"),
            ("<difficult>0", "<difficult>7", "0002.xml: cat has difficult 7, which is neither 0 nor 1"),
            ("</annotation>", "", r"0002.xml: this annotation can't be read \(no element found"),
            (
                "<annotation>",
                "<?xml version='1.0' encoding='x'?><annotation>",
                "0002.xml: this annotation can't",
            ),
            ("<annotation>", BILLION_LAUGHS, "0002.xml: it declares a document type"),
        ],
    )
    def test_an_invalid_annotation_of_voc_is_an_error(self, tmp_path, old, new, expected):
        on_disk.write_voc(tmp_path)
        path = tmp_path / "VOCdevkit" / "VOC2012" / "Annotations" / "0002.xml"
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(OSError, match=expected):
            find_dataset("VOC", "boxes").load(Source(tmp_path))

    def test_a_missing_image_of_voc_is_an_error(self, tmp_path):
        on_disk.write_voc(tmp_path)
        (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "0001.jpg").unlink()
        with pytest.raises(OSError, match=r"0001.jpg is missing; ImageSets/Main/train.txt names it"):
            find_dataset("VOC", "boxes").load(Source(tmp_path))


def test_images_of_different_sizes_are_padded_to_one_batch():
    shown = Unscaled().undo([torch.zeros(3, 4, 6), torch.zeros(3, 5, 2)])
    assert shown.shape == (2, 3, 5, 6)
    assert (shown[0].sum(), shown[1].sum()) == (3 * 6, 3 * 5 * 4)


def test_a_subset_of_boxed_files_keeps_paths_and_boxes_together(folder):
    split = coco(folder).train
    some = split.subset(torch.tensor([4, 1]))
    assert [os.path.basename(path) for path in some.paths.tolist()] == [b"000004.jpg", b"000001.jpg"]
    assert np.array_equal(some.labels[1], split.labels[1])


def test_boxes_are_those_of_the_turned_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    pixels = np.full((60, 40, 3), 200, dtype=np.uint8)
    pixels[35:55, 4:14] = (220, 30, 30)
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "0.png", exif=exif)
    rows = np.array([[4, 35, 14, 55, 1, 0, 200]], np.float32)
    split = BoxedFiles(np.array([os.fsencode(tmp_path / "0.png")]), [rows])
    turning = replace(PREPARE, exif_rotate=True)
    loader = eval_loader(split, 1, 0, 1, turning, Workers(), CPU)
    for images, targets in (*loader.batches(), *batches(split, turning, last=4, batch_size=1)):
        left, top, right, bottom = targets[0]["boxes"][0].int().tolist()
        assert images[0].shape == (3, 60, 40)
        assert (images[0][1, top:bottom, left:right] < 0.2).all()
    for prepare in (PREPARE, turning):  # the other way round, the box is outside of the image, which only the turned one knows
        beyond = replace(split, labels=[rows[:, [1, 0, 3, 2, 4, 5, 6]]])
        loader = eval_loader(beyond, 1, 0, 1, prepare, Workers(), CPU)
        if prepare is turning:
            with pytest.raises(UnreadableImage, match=r"0\.png is 40x60 after data\.exif_rotate turned it, and a box .* 55 14$"):
                list(loader.batches())
        else:
            assert len(list(loader.batches())) == 1
