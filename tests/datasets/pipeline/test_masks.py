"""Images and their masks are loaded and augmented together."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets import Source, find_dataset
from datasets.pairs import pairs_in
from datasets.pipeline.images import UnreadableImage
from datasets.pipeline.loaders import Preparation, Workers, eval_loader, train_loader
from datasets.pipeline.masks import IGNORED, MaskedFiles, MaskedImages, check_masks, fitted
from datasets.pipeline.order import Order
from datasets.shapes import SHAPES, TRAIN, derive
from tests import on_disk
from tests.generated_shapes import generate

CPU = torch.device("cpu")
PREPARE = Preparation(
    img_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, augment=True, crop_padding=4, padding_mode="constant", hflip=True, cutout=0
)


def pairs_of(folder):
    return pairs_in(folder / "images", folder / "masks")


def in_memory(n=40, size=32):
    """Images in which the color of a pixel of class c is 20 * c + 1."""
    masks = torch.randint(0, 12, (n, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks[:, 5:7] = IGNORED
    images = torch.where(masks == IGNORED, 255, masks * 20 + 1).to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    return MaskedImages(images.contiguous(), masks)


def classes_of(images: Tensor) -> Tensor:
    """Compute the masks from the colors; black pixels are padding."""
    levels = (images[:, 0] * 255).round().to(torch.int64)
    return torch.where((levels == 0) | (levels == 255), IGNORED, (levels - 1) // 20).to(torch.uint8)


def batches(split, prepare=PREPARE, first=0, last=6, seed=3, workers=0, batch_size=8):
    order = Order(len(split), batch_size, seed)
    return list(train_loader(split, order, prepare, Workers(workers), CPU).batches(first, last))


class TestInMemory:
    @pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
    def test_a_mask_is_cropped_and_mirrored_with_its_image_and_padding_is_ignored(self, padding_mode):
        split = in_memory()
        made = batches(split, replace(PREPARE, padding_mode=padding_mode))
        for images, masks in made:
            assert torch.equal(classes_of(images), masks)
        assert any(not torch.equal(masks, split.labels[Order(40, 8, 3).samples(i)]) for i, (_, masks) in enumerate(made))
        padded = sum(int((images == 0).all(1).sum()) for images, _ in made)
        assert (padded > 1000) == (padding_mode == "constant")

    def test_colors_change_and_masks_do_not(self):
        split = in_memory()
        plain, colored = (batches(split, replace(PREPARE, color_jitter=strength)) for strength in (0.0, 0.5))
        for (images, masks), (other, same) in zip(plain, colored, strict=True):
            assert torch.equal(masks, same)
            assert (images - other).abs().mean() > 0.02

    def test_without_augmentation_images_and_masks_are_unchanged(self):
        split = in_memory()
        for step, (images, masks) in enumerate(batches(split, replace(PREPARE, augment=False))):
            samples = Order(40, 8, 3).samples(step)
            assert torch.equal(masks, split.labels[samples])
            assert torch.equal((images * 255).round().to(torch.uint8), split.images[samples])

    def test_training_resizes_both_and_evaluation_only_the_image(self):
        split, prepare = in_memory(), replace(PREPARE, img_size=64, augment=False)
        images, masks = batches(split, prepare)[0]
        assert images.shape[-2:] == masks.shape[-2:] == (64, 64)
        original = split.labels[Order(40, 8, 3).samples(0)]
        assert torch.equal(masks, original.repeat_interleave(2, 1).repeat_interleave(2, 2))
        images, masks = next(iter(eval_loader(split, 8, 0, 1, prepare, Workers(), CPU).batches()))
        assert images.shape[-2:] == (64, 64)
        assert torch.equal(masks, split.labels[:8])

    def test_ranks_together_evaluate_every_image_once(self):
        split = in_memory(n=11)
        parts = [[masks for _, masks in eval_loader(split, 4, rank, 2, PREPARE, Workers(), CPU).batches()] for rank in (0, 1)]
        assert torch.equal(torch.cat([*parts[0], *parts[1]]), split.labels)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Files in a lossless format, in which the color of a pixel determines its class."""
    return pairs_of(on_disk.write_pairs(tmp_path_factory.mktemp("pairs"), n=12, ending=".png"))


def agreement(images, masks):
    """Return the fraction of valid pixels that have the color of their class."""
    levels = (images[:, 0] * 255 / 83).round().to(torch.uint8)
    valid = masks != IGNORED
    return float((levels == masks)[valid].float().mean())


class TestInFiles:
    def test_a_mask_is_scaled_cropped_and_mirrored_with_its_image(self, pairs):
        made = batches(pairs, replace(PREPARE, crop_padding=0), batch_size=4)
        assert all(images.shape == (4, 3, 32, 32) and masks.shape == (4, 32, 32) for images, masks in made)
        assert min(agreement(*batch) for batch in made) > 0.93  # except at borders, where colors mix
        epochs = [torch.cat([masks for _, masks in made[i : i + 3]]) for i in (0, 3)]
        assert not torch.equal(*epochs)

    def test_an_image_smaller_than_the_crop_is_padded_with_the_mean_and_ignored_labels(self, pairs):
        prepare = replace(PREPARE, zoom=(0.5, 0.5), mean=(0.2, 0.4, 0.6))
        for images, masks in batches(pairs, prepare, batch_size=4):
            filled = masks[:, 20:] == IGNORED  # the longer side is not twice as long as the shorter one, which is 16
            assert filled[:, -1].all()
            assert images[:, :, -1].abs().max() < 0.5 / 255 + 1e-6

    def test_a_batch_is_a_function_of_seed_epoch_and_sample_with_any_number_of_workers(self, pairs):
        prepare = replace(PREPARE, color_jitter=0.4)
        whole = batches(pairs, prepare, batch_size=4)
        for workers, first in ((0, 4), (2, 0)):
            for (images, masks), (same_images, same_masks) in zip(
                whole[first:], batches(pairs, prepare, first=first, workers=workers, batch_size=4), strict=True
            ):
                assert torch.equal(images, same_images)
                assert torch.equal(masks, same_masks)
        other = batches(pairs, prepare, seed=4, batch_size=4)
        assert not torch.equal(whole[0][0], other[0][0])

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_evaluation_has_the_original_masks_and_the_whole_images(self, pairs, workers):
        given = list(eval_loader(pairs, 5, 0, 1, replace(PREPARE, img_size=48), Workers(workers), CPU).batches())
        images, masks = torch.cat([images for images, _ in given]), [mask for _, masks in given for mask in masks]
        assert images.shape == (12, 3, 48, 48)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            assert torch.equal(mask, torch.from_numpy(np.array(Image.open(os.fsdecode(pairs.labels[i])))))
            height, width = fitted(*mask.shape, 48)
            assert max(height, width) == 48
            assert height / width == pytest.approx(mask.shape[0] / mask.shape[1], rel=0.05)
            assert image[:, height:].abs().sum() == image[:, :, width:].abs().sum() == 0
            assert image[:, height - 1, width - 1].sum() > 0.5

    def test_ranks_together_evaluate_every_image_once(self, pairs):
        seen = [
            mask
            for rank in (0, 1)
            for _, masks in eval_loader(pairs, 5, rank, 2, PREPARE, Workers(), CPU).batches()
            for mask in masks
        ]
        assert len(seen) == 12
        assert all(
            torch.equal(mask, torch.from_numpy(np.array(Image.open(os.fsdecode(name)))))
            for mask, name in zip(seen, pairs.labels, strict=True)
        )

    def test_another_ignored_label_is_replaced_by_the_usual_one(self, pairs):
        own = replace(pairs, ignored=1)
        _, masks = next(iter(eval_loader(own, 12, 0, 1, PREPARE, Workers(), CPU).batches()))
        assert all(not (mask == 1).any() for mask in masks)
        assert any((mask == IGNORED).sum() > 200 for mask in masks)


class TestShapes:
    def test_a_mask_shows_every_object_where_it_is_visible(self):
        loaded = find_dataset("shapes", "masks").load(Source(None, seed=7), n_train=60, n_test=2, size=48, max_objects=3)
        same = generate(derive(7, SHAPES, TRAIN), torch.arange(60), size=48, max_objects=3)
        assert torch.equal(loaded.train.images, same.images)
        for i in range(60):
            expected = torch.zeros(48, 48, dtype=torch.uint8)
            for label, mask in zip(same.labels[i].tolist(), same.masks[i], strict=True):
                expected[mask] = label + 1
            assert torch.equal(loaded.train.labels[i], expected)
        assert loaded.classes[0] == "background"
        assert len(loaded.classes) == 11
        assert set(loaded.train.labels.unique().tolist()) == set(range(11))


class TestLayouts:
    def test_voc_is_read_as_its_archive_unpacks(self, tmp_path):
        on_disk.write_voc(tmp_path)
        spec = find_dataset("voc", "masks")
        for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
            loaded = spec.load(Source(root), train_set="trainaug")
            assert (len(loaded.train), len(loaded.test), len(loaded.classes)) == (6, 3, 21)
        (tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClassAug").mkdir()
        of_train = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "0001.png"
        moved = of_train.rename(of_train.parent.parent / "SegmentationClassAug" / "0001.png")
        assert os.fsencode(moved) in spec.load(Source(tmp_path), train_set="trainaug").train.labels

    def test_pairs_are_read_with_and_without_a_val_folder(self, tmp_path):
        on_disk.write_pairs(tmp_path / "one", n=10)
        spec = find_dataset("pairs", "masks")
        loaded, again = (spec.load(Source(tmp_path / "one", seed=5), test_ratio=0.3) for _ in range(2))
        assert (len(loaded.train), len(loaded.test)) == (7, 3)
        assert list(loaded.test.paths) == list(again.test.paths)
        assert loaded.classes == ("class 0", "class 1", "class 2")
        for part, n in (("train", 4), ("val", 2)):
            on_disk.write_pairs(tmp_path / "two" / part, n=n)
        loaded = spec.load(Source(tmp_path / "two"), classes=["sky", "sea", "sand", "ship"])
        assert (len(loaded.train), len(loaded.test), loaded.classes[3]) == (4, 2, "ship")
        assert len(spec.load(Source(tmp_path / "two", n_classes=9)).classes) == 9


class TestErrors:
    """Errors are found when the dataset is read, before training."""

    @pytest.fixture
    def folder(self, tmp_path):
        return on_disk.write_pairs(tmp_path, n=6)

    def load(self, folder, **options):
        return find_dataset("pairs", "masks").load(Source(folder, n_classes=3), **options)

    def test_a_label_out_of_range_is_an_error(self, folder):
        mask = np.array(Image.open(folder / "masks" / "0003.png"))
        mask[-1, -1] = 7
        Image.fromarray(mask).save(folder / "masks" / "0003.png")
        with pytest.raises(OSError, match=r"masks/0003.png: the label 7 is out of range; there are 3 classes, 0 to 2, and 255"):
            self.load(folder)
        assert self.load(folder, ignore_label=7, classes=["a"] * 256)

    def test_a_mask_of_another_size_than_its_image_is_an_error(self, folder):
        mask = Image.open(folder / "masks" / "0002.png")
        mask.resize((20, 30), Image.Resampling.NEAREST).save(folder / "masks" / "0002.png")
        with pytest.raises(OSError, match=r"masks/0002.png is 20x30, and its image \S+images/0002.jpg is \d+x\d+"):
            self.load(folder)

    @pytest.mark.parametrize(("gone", "expected"), [("images/0004.jpg", "has no image"), ("masks/0004.png", "has no mask")])
    def test_an_image_without_a_mask_or_a_mask_without_an_image_is_an_error(self, folder, gone, expected):
        (folder / gone).unlink()
        with pytest.raises(OSError, match=expected):
            self.load(folder)

    def test_a_mask_in_colors_is_an_error(self, folder):
        Image.open(folder / "masks" / "0001.png").convert("RGB").save(folder / "masks" / "0001.png")
        with pytest.raises(OSError, match=r"masks/0001.png: this mask can't be read \(its mode is RGB"):
            self.load(folder)

    def test_a_missing_or_empty_folder_is_an_error(self, folder):
        with pytest.raises(OSError, match=r"nowhere/images: no such folder; expected images/ and masks/"):
            self.load(folder / "nowhere")
        (folder / "nothing" / "images").mkdir(parents=True)
        with pytest.raises(OSError, match=r"nothing/images holds no file that ends in .jpg"):
            self.load(folder / "nothing")

    def test_two_images_with_the_same_name_are_an_error(self, folder):
        Image.open(folder / "images" / "0001.jpg").save(folder / "images" / "0001.png")
        with pytest.raises(OSError, match="have the same name"):
            self.load(folder)

    def test_a_missing_mask_or_list_of_voc_is_an_error(self, tmp_path):
        spec, folder = find_dataset("VOC", "masks"), tmp_path / "VOCdevkit" / "VOC2012"
        with pytest.raises(OSError, match=r"VOC2012 is not in \S+; unpack"):
            spec.load(Source(tmp_path))
        on_disk.write_voc(tmp_path)
        with pytest.raises(OSError, match=r"trainval.txt can't be read .* there are train, trainaug, val"):
            spec.load(Source(tmp_path), train_set="trainval")
        (folder / "SegmentationClass" / "0002.png").unlink()
        with pytest.raises(OSError, match=r"SegmentationClass/0002.png is missing; ImageSets/Segmentation/train.txt names it"):
            spec.load(Source(tmp_path))

    def test_masks_that_passed_are_not_checked_again_until_they_change(self, folder, monkeypatch, caplog):
        def check(classes):
            check_masks({"train": pairs_of(folder)}, classes)

        check("abcd")
        monkeypatch.setattr("datasets.pipeline.masks.labels_of_mask", read_again)
        for _ in range(2):
            assert caplog.text.count("no pixel in train is of the class d") == 1
            caplog.clear()
            check("abcd")
        with pytest.raises(OSError, match="read again"):
            check("abc")
        os.utime(folder / "masks" / "0000.png", (1, 1))
        with pytest.raises(OSError, match="read again"):
            check("abcd")


def test_a_mask_is_that_of_the_turned_image(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        stored = Image.linear_gradient("L").resize((40, 60)).convert("RGB").transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / "images" / f"{i}.png", exif=exif)
        mask = np.array(Image.linear_gradient("L").resize((40, 60))) > 127  # low gray levels and class 0 at the top
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    split = pairs_in(tmp_path / "images", tmp_path / "masks")
    check_masks({"train": split}, "ab", exif_rotate=True)
    with pytest.raises(OSError, match=r"0\.png is 40x60, and its image .*0\.png is 60x40$"):
        check_masks({"train": split}, "ab")
    turning = replace(PREPARE, exif_rotate=True, hflip=False)
    ((images, (mask, _)),) = eval_loader(split, 2, 0, 1, turning, Workers(), CPU).batches()
    assert mask.shape == (60, 40)
    shown = images[0, 0, :, : images.shape[-1] * 40 // 60]
    assert shown[:10].mean() < shown[-10:].mean()
    images, masks = next(train_loader(split, Order(2, 2, seed=1), turning, Workers(), CPU).batches(0, 1))
    assert images[:, 0][masks == 0].mean() < images[:, 0][masks == 1].mean()


def test_a_note_of_an_older_version_is_replaced_by_one_with_labels(tmp_path):
    split = pairs_of(on_disk.write_pairs(tmp_path, n=3))
    note = tmp_path / "masks" / ".masks-checked"
    check_masks({"train": split}, "abc")
    written = note.read_bytes()
    note.write_bytes(written.split()[0] + b"\n")
    check_masks({"train": split}, "abc")
    assert note.read_bytes() == written


def read_again(*args):
    raise UnreadableImage("read again")


def test_a_damaged_note_on_checked_masks_is_logged_and_replaced(tmp_path, caplog, monkeypatch):
    split = pairs_of(on_disk.write_pairs(tmp_path, n=3))
    note = tmp_path / "masks" / ".masks-checked"
    note.write_bytes(b"\xff\xfe")
    check_masks({"train": split}, "abc")
    assert ".masks-checked: it is damaged; the masks are checked again" in caplog.text
    monkeypatch.setattr("datasets.pipeline.masks.labels_of_mask", read_again)
    check_masks({"train": split}, "abc")
    assert len(note.read_bytes().splitlines()) == 1


def test_the_error_of_a_dataset_without_masks_lists_those_with_masks():
    with pytest.raises(ValueError, match=r"digits gives classes, not masks; VOC, pairs, shapes do"):
        find_dataset("digits", "masks")
    with pytest.raises(ValueError, match=r"VOC gives boxes or masks, not classes"):
        find_dataset("VOC")
    with pytest.raises(ValueError, match="did you mean shapes"):
        find_dataset("shape", "masks")


def test_a_subset_of_masked_files_keeps_images_and_masks_together():
    split = MaskedFiles(np.array([b"a", b"b", b"c"]), np.array([b"x", b"y", b"z"]), ignored=9)
    some = split.subset(torch.tensor([2, 0]))
    assert (some.paths.tolist(), some.labels.tolist(), some.ignored) == ([b"c", b"a"], [b"z", b"x"], 9)
