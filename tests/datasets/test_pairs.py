"""Images and masks in other folders, with suffixes, and with colors for labels."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Source, find_dataset
from tests import on_disk
from tests.datasets.pipeline.test_masks import CPU, PREPARE, Workers, batches, eval_loader

COLORS = np.array([[128, 128, 128], [64, 0, 128], [0, 0, 255]], np.uint8)
PALETTE = "# of CamVid\n128 128 128\tSky\n64\t0 128 Car\n\n192 0 64, Car\nRoad line; 0; 0; 255\n0 0 0 Void\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return on_disk.write_pairs(tmp_path_factory.mktemp("pairs"), n=10, ending=".png")


@pytest.fixture
def colored(made, tmp_path):
    """The same masks in colors: one is an RGB PNG, others RGBA and with a palette; class 1 has two colors."""
    shutil.copytree(made, tmp_path / "colored")
    for i, path in enumerate(sorted((tmp_path / "colored" / "masks").glob("*.png"))):
        mask = np.array(Image.open(path))
        pixels = COLORS[mask % 255]
        pixels[mask == 255] = 0
        pixels[-5:][mask[-5:] == 1] = (192, 0, 64)
        image = Image.fromarray(pixels)
        (image, image.convert("RGBA"), image.quantize(8))[i % 3].save(path)
    (tmp_path / "colored" / "label_colors.txt").write_text(PALETTE)
    return tmp_path / "colored"


def pairs(root, **options):
    return find_dataset("pairs", "masks").load(Source(root), **options)


def sizes(loaded):
    return tuple(None if split is None else len(split) for split in (loaded.train, loaded.valid, loaded.test))


class TestFolders:
    @pytest.mark.parametrize("mask_suffix", ["", "_L"])
    def test_the_folders_of_camvid_are_read_by_two_options(self, tmp_path, mask_suffix):
        for part, n in (("train", 4), ("val", 3), ("test", 2)):
            folder = on_disk.write_pairs(tmp_path / "made", n=n)
            (folder / "images").rename(tmp_path / part)
            (folder / "masks").rename(tmp_path / f"{part}annot")
            for path in (tmp_path / f"{part}annot").iterdir():
                path.rename(path.with_stem(path.stem + mask_suffix))
            folder.rmdir()
        loaded = pairs(tmp_path, image_folder="<split>", mask_folder="<split>annot", mask_suffix=mask_suffix)
        assert sizes(loaded) == (4, 3, 2)
        shutil.rmtree(tmp_path / "test")
        assert sizes(pairs(tmp_path, image_folder="<split>", mask_folder="<split>annot", mask_suffix=mask_suffix)) == (4, None, 3)

    def test_masks_may_be_beside_images_with_a_suffix(self, made, tmp_path):
        shutil.copytree(made / "images", tmp_path / "all")
        for path in (made / "masks").glob("*.png"):
            shutil.copy(path, tmp_path / "all" / f"{path.stem}_mask.png")
        options = {"image_folder": "all", "mask_folder": "all"}
        loaded, usual = pairs(tmp_path, mask_suffix="_mask", **options), pairs(made)
        assert sizes(loaded) == sizes(usual) == (8, None, 2)
        (batch, other) = (batches(of.train)[0] for of in (loaded, usual))
        assert all(map(torch.equal, batch, other))
        with pytest.raises(ValueError, match=r"images and masks are both in \S+all; mask_suffix tells which are the masks"):
            pairs(tmp_path, **options)
        (tmp_path / "all" / "0003.png").unlink()
        with pytest.raises(OSError, match=r"0003_mask.png has no image: expected \S+all/0003\.\*"):
            pairs(tmp_path, mask_suffix="_mask", **options)
        (tmp_path / "all" / "0003_mask.png").unlink()
        (tmp_path / "all" / "0004_mask.png").unlink()
        with pytest.raises(OSError, match=r"0004.png has no mask: expected \S+all/0004_mask\.\*"):
            pairs(tmp_path, mask_suffix="_mask", **options)

    def test_without_val_and_test_a_part_of_train_is_held_out(self, tmp_path):
        on_disk.write_pairs(tmp_path / "train", n=5)
        assert sizes(pairs(tmp_path)) == (4, None, 1)
        with pytest.raises(ValueError, match=r"image_folder images and mask_folder <split>/masks"):
            pairs(tmp_path, image_folder="images")


class TestPalette:
    def test_colors_give_the_batches_of_the_same_masks_with_labels(self, made, colored):
        loaded, usual = pairs(colored, palette="label_colors.txt"), pairs(made)
        assert loaded.classes == ("Sky", "Car", "Road line")
        evaluations = (list(eval_loader(of.test, 2, 0, 1, PREPARE, Workers(), CPU).batches()) for of in (loaded, usual))
        for mine, others in ((batches(loaded.train, workers=2), batches(usual.train)), tuple(evaluations)):
            for (images, masks), (same_images, same_masks) in zip(mine, others, strict=True):
                assert torch.equal(images, same_images)
                assert all(map(torch.equal, masks, same_masks))

    def test_classes_choose_and_order_the_names_and_other_colors_are_ignored(self, colored, caplog):
        caplog.set_level("INFO")
        loaded = pairs(colored, palette="label_colors.txt", classes=["Car", "Sky"])
        assert loaded.classes == ("Car", "Sky")
        assert "pixels with the color of Road line, Void are ignored" in caplog.text
        ((_, masks),) = eval_loader(loaded.test, 10, 0, 1, PREPARE, Workers(), CPU).batches()
        assert {int(label) for mask in masks for label in mask.unique()} == {0, 1, 255}
        with pytest.raises(
            ValueError, match=r"classes has Cars, which \S+label_colors.txt doesn't name; it names Sky, Car, Road"
        ):
            pairs(colored, palette="label_colors.txt", classes=["Cars"])

    def test_a_color_that_is_not_in_the_palette_is_an_error_that_names_the_pixel(self, colored):
        path = colored / "masks" / "0003.png"
        image = Image.open(path).convert("RGB")
        image.putpixel((7, 9), (1, 2, 3))
        image.save(path)
        with pytest.raises(
            OSError, match=r"0003.png: .* \(the pixel at x=7, y=9 has the color 1 2 3, which is not in the palette"
        ):
            pairs(colored, palette="label_colors.txt")

    def test_masks_are_checked_again_with_another_palette(self, colored):
        pairs(colored, palette="label_colors.txt")
        (colored / "label_colors.txt").write_text(PALETTE.replace("192 0 64, Car\n", ""))
        with pytest.raises(OSError, match=r"has the color 192 0 64, which is not in the palette"):
            pairs(colored, palette="label_colors.txt")

    def test_a_table_with_a_heading_is_a_palette(self, colored):
        (colored / "class_dict.csv").write_text(
            "name,r,g,b\nSky,128,128,128\nCar,64,0,128\nCar,192,0,64\nLine,0,0,255\nvoid,0,0,0\n"
        )
        assert pairs(colored, palette="class_dict.csv").classes == ("Sky", "Car", "Line")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1 2 3 a\n1 2 300 b", "line 2: expected red, green and blue from 0 to 255 and a name"),
            ("1 2 3 a\n1 2 3", "line 2: expected"),
            ("1 2 3 a\n1 2 b", "line 2: expected"),
            ("1 2 3 a\n1 2 3 b", "line 2: the color of a again"),
            ("", "it names 0 classes; from 1 to 255"),
            ("0 0 0 void", "it names 0 classes"),
        ],
    )
    def test_an_invalid_palette_is_an_error(self, colored, text, expected):
        (colored / "label_colors.txt").write_text(text)
        with pytest.raises(OSError, match=rf"label_colors.txt: {expected}"):
            pairs(colored, palette="label_colors.txt")

    def test_a_palette_with_numbers_to_ignore_or_a_missing_one_is_an_error(self, colored):
        with pytest.raises(ValueError, match="ignore_label is of masks with numbers"):
            pairs(colored, palette="label_colors.txt", ignore_label=0)
        with pytest.raises(OSError, match=r"nothing.txt can't be read \(No such file"):
            pairs(colored, palette="nothing.txt")
