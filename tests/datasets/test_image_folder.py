"""The cached list of an image folder's files, and the folder held in memory."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from datasets import Files, Images, Source, find_dataset, image_folder
from tests import on_disk


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An image folder that has not changed recently."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root = on_disk.write_image_folder(tmp_path / "set")
    age(root)
    return root


def age(root):
    for folder in (path for path in root.rglob("*") if path.is_dir()):
        past = time.time() - 100
        os.utime(folder, (past, past))


def load(root, **options):
    return find_dataset("imagefolder").load(Source(root, img_size=32), **options)


def names(split):
    return ["/".join(os.fsdecode(path).split("/")[-2:]) for path in split.paths]


def never(*args):
    pytest.fail("the folders were listed again")


def test_the_files_are_listed_once(root, monkeypatch):
    first = load(root)
    monkeypatch.setattr(image_folder, "_scan", never)
    second = load(root)
    assert np.array_equal(first.train.paths, second.train.paths)
    assert torch.equal(first.test.labels, second.test.labels)
    assert second.train.paths[9] == os.fsencode(root / "train" / "class_1" / "0001.jpg")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: shutil.copy(folder / "0001.jpg", folder / "1001.jpg"),
        lambda folder: (folder / "0001.jpg").unlink(),
        lambda folder: (folder / "0001.jpg").rename(folder / "2001.jpg"),
        lambda folder: shutil.copytree(folder, folder.parent / "class_9"),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=["a file more", "a file less", "a file renamed", "a class more", "a class less"],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_change_of_the_folder_is_noticed(root, change, part):
    if part == "val":
        shutil.copytree(root / "train" / "class_2", root / "train" / "class_9")
    age(root)
    load(root)
    change(root / part / "class_1")
    if not (root / "train" / "class_1").exists():
        shutil.rmtree(root / "val" / "class_1")
    loaded = load(root)
    for split, of_part in ((loaded.train, "train"), (loaded.test, "val")):
        assert names(split) == sorted(str(path.relative_to(root / of_part)) for path in (root / of_part).glob("*/*.jpg"))
        assert [loaded.classes[label] for label in split.labels] == [name.split("/")[0] for name in names(split)]


@pytest.fixture
def nested(root):
    """The same folder with folders and links inside of the class folders."""
    for part, name in (("train", "class_1"), ("val", "class_0")):
        of_class = root / part / name
        shutil.copytree(of_class, of_class / "b" / "deep")
        shutil.copytree(of_class / "b", of_class / "b-c")
    (root / "train" / "class_2" / "link").symlink_to(root / "val" / "class_0" / "b")
    age(root)
    return root


@pytest.mark.parametrize("is_split", [True, False])
def test_nested_and_linked_folders_are_read_as_torchvision_reads_them(nested, is_split):
    if not is_split:
        shutil.rmtree(nested / "val" / "class_1")
        shutil.rmtree(nested / "train" / "class_2")
        nested = nested.rename(nested.with_name("moved")) / "train"
    folders = image_folder.class_folders(nested)
    for _ in range(2):  # listed, then cached
        listing = image_folder._listing(nested, folders)
        for part in folders:
            theirs = ImageFolder(nested / part if is_split else nested)
            ours = [(str(nested / os.fsdecode(name)), label) for name, label in zip(*of(listing, part), strict=True)]
            assert ours == theirs.samples
            assert list(folders["train"]) == ImageFolder(nested / "train" if is_split else nested).classes
    assert (nested / ".image-list.npz").is_file()


def of(listing, part):
    return listing[f"{part}_names"].tolist(), listing[f"{part}_labels"].tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "b" / "deep" / "0001.jpg").unlink(),
        lambda folder: shutil.copy(folder / "0001.jpg", folder / "b" / "0009.jpg"),
        lambda folder: (folder / "b" / "new").symlink_to(folder.parent / "class_0"),
        lambda folder: shutil.rmtree(folder / "b-c"),
    ],
    ids=["a file less", "a file more", "a folder more", "a folder less"],
)
def test_a_change_of_a_nested_folder_is_noticed(nested, change):
    before = len(load(nested).train)
    change(nested / "train" / "class_1")
    after = load(nested)
    assert len(after.train) == len(ImageFolder(nested / "train").samples) != before


def test_the_list_is_made_again_when_other_formats_can_be_read(root, monkeypatch):
    shutil.copy(root / "train" / "class_1" / "0000.jpg", root / "train" / "class_1" / "more.heic")
    age(root)
    monkeypatch.setattr(image_folder, "IMAGE_ENDINGS", (".jpg",))
    assert len(load(root).train) == 24
    monkeypatch.setattr(image_folder, "IMAGE_ENDINGS", (".jpg", ".heic"))
    assert len(load(root).train) == 25


def test_a_list_cached_by_an_earlier_version_is_replaced(root, caplog):
    first, cache = load(root), root / ".image-list.npz"
    with np.load(cache) as file:
        arrays = dict(file)
    times = json.loads(str(arrays.pop("stamp")))["times"]
    np.savez(cache, stamp=np.array(json.dumps(times)), **arrays)
    assert np.array_equal(load(root).train.paths, first.train.paths)
    with np.load(cache) as file:
        assert "times" in str(file["stamp"])
    assert "damaged" not in caplog.text


@pytest.mark.timeout(20)
def test_links_in_a_cycle_are_followed_once(root):
    of_class = root / "train" / "class_1"
    (of_class / "inner").mkdir()
    shutil.copy(of_class / "0000.jpg", of_class / "inner" / "new.jpg")
    for name, target in (("up", root), ("train", root / "train"), ("self", of_class), ("inner/back", of_class), ("x", "x")):
        (of_class / name).symlink_to(target)
    for i in range(30):  # 2^30 paths lead to the last folder
        (of_class / f"level{i}").mkdir()
        for name in ("a", "b"):
            (of_class / f"level{i}" / name).symlink_to(of_class / f"level{i + 1}")
    loaded = load(root)
    assert loaded.train.labels.bincount().tolist() == [8, 9, 8]
    assert [name for name in names(loaded.train) if "class" not in name] == ["inner/new.jpg"]


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_validation_and_test_folders_become_splits(root, validation):
    shutil.copytree(root / "val", root / "test")
    (root / "test" / "class_1" / "0000.jpg").unlink()
    (root / "val").rename(root / validation)
    for in_memory in (False, True, True):
        loaded = load(root, in_memory=in_memory)
        assert (len(loaded.train), len(loaded.valid), len(loaded.test)) == (24, 9, 8)
        assert not loaded.by_class
        assert loaded.test.labels.tolist() == [0] * 3 + [1] * 2 + [2] * 3
    assert torch.equal(loaded.valid.images[4:], loaded.test.images[3:])
    shutil.rmtree(root / validation)
    loaded = load(root)
    assert (len(loaded.test), loaded.valid) == (8, None)
    (root / "test").rename(root / validation)
    assert len(load(root).test) == 8


@pytest.mark.parametrize("parts", [["train"], ["train", "test"], []])
def test_without_a_split_a_part_of_each_class_is_held_out(root, parts, caplog):
    caplog.set_level("INFO")
    shutil.rmtree(root / "val")
    if "test" in parts:  # as in many competitions
        (root / "test").mkdir()
        shutil.copy(root / "train" / "class_0" / "0000.jpg", root / "test")
    if not parts:
        root = (root / "train").rename(root.with_name("unsplit"))
    loaded = load(root, test_ratio=0.25)
    assert loaded.train.labels.bincount().tolist() == [6, 6, 6]
    assert loaded.test.labels.bincount().tolist() == [2, 2, 2]
    assert (loaded.valid, loaded.by_class) == (None, True)
    assert not set(loaded.train.paths) & set(loaded.test.paths)
    assert np.array_equal(load(root, test_ratio=0.25).test.paths, loaded.test.paths)
    other = find_dataset("imagefolder").load(Source(root, seed=1), test_ratio=0.25)
    assert not np.array_equal(other.test.paths, loaded.test.paths)
    assert "6 of the 24 images are held out, class by class (data.test_ratio 0.25)" in caplog.text
    assert ("folders that are neither a split nor a class are not read: test" in caplog.text) == (parts == ["train", "test"])
    in_memory = load(root, test_ratio=0.25, in_memory=True)
    assert torch.equal(in_memory.test.labels, loaded.test.labels)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    root = on_disk.write_image_folder(tmp_path / "set", n_classes=3) / "train"
    (root / "class_0").rename(root / "train")
    (root / "class_1").rename(root / "test")
    assert load(root).classes == ("class_2", "test", "train")
    shutil.rmtree(root / "class_2")
    with pytest.raises(OSError, match=r"train holds no class folders; expected .*/train/<class>/\*\.jpg"):
        load(root)


@pytest.mark.parametrize("cached", [False, True])
def test_files_that_are_not_read_are_counted(root, caplog, cached, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(image_folder, "IMAGE_ENDINGS", (".jpg", ".png"))
    for i in range(3):
        (root / "train" / "class_1" / f"{i}.HEIC").touch()
    (root / "val" / "class_1" / "notes.txt").touch()
    (root / "val" / "class_1" / "._0001.jpg").touch()
    (root / "val" / ".hidden").mkdir()
    (root / "val" / "loose.jpg").touch()
    age(root)
    for _ in range(1 + cached):
        caplog.clear()
        load(root)
    expected = "5 files not read: 3 .heic (pip install pillow-heif), 1 .jpg outside of a class, 1 .txt"
    assert [record.getMessage() for record in caplog.records] == [f"{root}: {expected}"]
    for path in (root / "train" / "class_1").glob("*.jpg"):
        path.unlink()
    with pytest.raises(OSError, match=r"class_1 holds no image \(.jpg, .png\); not read: 3 .heic \(pip install pillow-heif\)"):
        load(root)


def test_a_list_is_not_cached_right_after_a_change(root):
    os.utime(root / "train" / "class_1")
    load(root)
    assert not list(root.glob(".*"))


def test_a_moved_folder_keeps_its_cached_list(root, monkeypatch):
    load(root)
    moved = root.rename(root.with_name("moved"))
    monkeypatch.setattr(image_folder, "_scan", never)
    assert load(moved).train.paths[0] == os.fsencode(moved / "train" / "class_0" / "0000.jpg")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-50], lambda data: data[:200] + b"\xff" * 40 + data[240:], lambda data: b""]
)
def test_a_damaged_cache_is_ignored(root, damage):
    first, cache = load(root), root / ".image-list.npz"
    cache.write_bytes(damage(cache.read_bytes()))
    assert np.array_equal(load(root).train.paths, first.train.paths)


def test_a_damaged_list_is_logged_and_replaced(root, caplog, monkeypatch):
    load(root)
    (root / ".image-list.npz").write_bytes(b"no list")
    load(root)
    assert ".image-list.npz is damaged (File is not a zip file); the folders are listed again" in caplog.text
    monkeypatch.setattr(image_folder, "_scan", never)
    assert len(load(root).train) == 24
    assert [path.name for path in root.glob(".*")] == [".image-list.npz"]


def test_symlinks_to_class_folders_and_images_elsewhere_are_followed(root, tmp_path, monkeypatch):
    elsewhere = (root / "train" / "class_1").rename(tmp_path / "elsewhere")
    (root / "train" / "class_1").symlink_to(elsewhere)
    image = (root / "val" / "class_0" / "0000.jpg").rename(tmp_path / "image")
    (root / "val" / "class_0" / "0000.jpg").symlink_to(image)
    age(root)
    first = load(root, in_memory=True)
    monkeypatch.setattr(image_folder, "_scan", never)
    assert torch.equal(load(root, in_memory=True).test.images, first.test.images)
    assert (len(first.train), len(first.test)) == (24, 9)


def test_the_list_is_cached_in_the_users_cache_folder_if_the_data_folder_is_not_writable(root, monkeypatch, tmp_path):
    (root / ".image-list.npz").mkdir()  # root may write anywhere, but not over a folder
    first = load(root)
    assert list((tmp_path / "home").rglob("*.npz"))
    monkeypatch.setattr(image_folder, "_scan", never)
    assert np.array_equal(load(root).train.paths, first.train.paths)


def test_exactly_the_excluded_images_are_omitted(root, tmp_path, caplog):
    everything = load(root)
    (tmp_path / "bad.txt").write_text("# why\ntrain/class_1/0003.jpg\nval/class_0/0000.jpg\nval/class_0/7777.jpg\n")
    loaded = load(root, exclude=str(tmp_path / "bad.txt"))
    assert set(names(everything.train)) - set(names(loaded.train)) == {"class_1/0003.jpg"}
    assert set(names(everything.test)) - set(names(loaded.test)) == {"class_0/0000.jpg"}
    assert (loaded.train.labels.bincount().tolist(), loaded.test.labels.bincount().tolist()) == ([8, 7, 8], [2, 3, 3])
    assert "1 of the 3 files" in caplog.text


def test_an_exclude_file_that_empties_a_class_or_does_not_exist_is_an_error(root, tmp_path):
    (tmp_path / "bad.txt").write_text("\n".join(f"val/class_2/{i:04d}.jpg" for i in range(3)))
    with pytest.raises(OSError, match=r"bad\.txt leaves no image of val/class_2"):
        load(root, exclude=str(tmp_path / "bad.txt"))
    with pytest.raises(OSError, match=r"data\.exclude: .*other\.txt can't be read \(No such file"):
        load(root, exclude=str(tmp_path / "other.txt"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_error_names_an_empty_class_folder(root, part):
    for path in (root / part / "class_1").iterdir():
        path.unlink()
    with pytest.raises(OSError, match=rf"{part}/class_1 holds no image"):
        load(root)


def test_classes_with_wordnet_ids_get_their_words(tmp_path):
    root = on_disk.write_image_folder(tmp_path / "set", n_classes=4)
    for part in ("train", "val"):
        for i, number in enumerate(("n01440764", "n02012849", "n03126707", "n99999999")):
            (root / part / f"class_{i}").rename(root / part / number)
    loaded = image_folder.load(Source(root))
    assert loaded.classes == ("tench", "crane (n02012849)", "crane (n03126707)", "n99999999")


def test_images_in_memory_are_scaled_and_cropped_as_torchvision_does(root):
    in_files, loaded = load(root), load(root, in_memory=True)
    assert isinstance(in_files.train, Files)
    assert isinstance(loaded.train, Images)
    prepare = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.PILToTensor()])
    for split, of_files in ((loaded.train, in_files.train), (loaded.test, in_files.test)):
        assert torch.equal(split.labels, of_files.labels)
        for image, path in zip(split.images, of_files.paths, strict=True):
            assert torch.equal(image, prepare(Image.open(os.fsdecode(path)).convert("RGB")))


def test_a_folder_in_memory_is_decoded_once_for_each_size(root, monkeypatch):
    first = load(root, in_memory=True)
    monkeypatch.setattr(image_folder, "_in_memory", never)
    assert torch.equal(load(root, in_memory=True).train.images, first.train.images)
    with pytest.raises(pytest.fail.Exception):
        find_dataset("imagefolder").load(Source(root, img_size=24), in_memory=True)


def test_the_error_names_a_broken_image_when_the_folder_is_read_into_memory(root):
    (root / "train" / "class_1" / "0003.jpg").write_bytes(b"")
    with pytest.raises(OSError, match=r"class_1/0003\.jpg: this image can't be read"):
        load(root, in_memory=True)


def test_a_folder_too_large_for_memory_is_an_error_before_it_is_read(root, monkeypatch):
    monkeypatch.setattr(image_folder, "_in_memory", never)
    with pytest.raises(OSError, match=r"data\.in_memory: 33 images of 1000000x1000000 take 99000 GB; there are \d+"):
        find_dataset("imagefolder").load(Source(root, img_size=1_000_000), in_memory=True)
