import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from engine.config.command_line import run_tool
from tests import on_disk
from tests.running import run_command, run_main
from tools.verify_dataset import main

SMALL = ("--data.img_size", 32, "--train.batch_size", 4, "--train.n_steps", 8, "--dataloader.num_workers", 0)


@pytest.fixture
def root(tmp_path):
    return on_disk.write_image_folder(tmp_path / "set")


@pytest.fixture
def config(tmp_path, root):
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{name: imagefolder, dataroot: {root}}}\nmodel: {{name: resnet18}}\ntrain: {{n_steps: 2}}\n")
    return path


def verify(capsys, *argv):
    code = run_tool(lambda: main([str(word) for word in argv]))
    return code, capsys.readouterr()


def test_without_unreadable_images_the_exit_code_is_0_and_no_list_is_written(config, tmp_path, capsys):
    code, printed = verify(capsys, "-c", config, "-o", tmp_path / "bad.txt")
    assert code == 0
    assert "0 of 33 images can't be read" in printed.out
    assert "33" in printed.err, "no progress bar"
    assert not (tmp_path / "bad.txt").exists()


def test_unreadable_images_are_listed_and_training_works_without_them(config, root, tmp_path, capsys):
    truncated = root / "train" / "class_1" / "0003.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (root / "train" / "class_2" / "0000.jpg").write_bytes(b"")
    (root / "val" / "class_0" / "0002.jpg").write_text("no image")
    (root / "val" / "class_0" / "notes.txt").write_text("not meant as one")
    bad = tmp_path / "bad.txt"
    (tmp_path / "precious").write_text("precious")
    bad.symlink_to(tmp_path / "precious")  # replaced, not written through
    code, printed = verify(capsys, "-c", config, "-o", bad)
    assert code == 1
    for name, why in (
        ("train/class_1/0003.jpg", "truncated"),
        ("train/class_2/0000.jpg", "empty"),
        ("val/class_0/0002.jpg", "not an image"),
    ):
        assert any(name in line and why in line.lower() for line in printed.out.splitlines()), printed.out
    assert "1 file not read: 1 .txt" in printed.out
    assert "3 of 33 images can't be read" in printed.out
    assert (tmp_path / "precious").read_text() == "precious"
    assert [line for line in bad.read_text().splitlines() if not line.startswith("#")] == [
        "train/class_1/0003.jpg",
        "train/class_2/0000.jpg",
        "val/class_0/0002.jpg",
    ]
    assert verify(capsys, "-c", config, "--data.exclude", bad)[0] == 0
    assert run_main("-c", config, "-e", tmp_path / "run", *SMALL, "--data.exclude", bad) == 0
    assert "3 images are left out" in capsys.readouterr().out


def test_an_in_memory_dataset_is_read_once(capsys, data_root):
    options = ("--data.name", "MNIST", "--data.dataroot", data_root / "MNIST", "--data.verify", "false", "--data.img_size", 28)
    code, printed = verify(capsys, "-c", "configs/lenet_digits.yaml", *options)
    assert code == 0
    assert "0 of 80 images can't be read" in printed.out


def test_a_mistake_is_a_one_line_error(config, capsys):
    assert verify(capsys, "-c", "nowhere.yaml")[0] == 2
    code, printed = verify(capsys, "-c", config, "--data.dataroot", "/nowhere")
    assert code == 1
    assert printed.err.startswith("error: /nowhere/train: no such folder")


def test_the_program_runs_as_a_file(config, tmp_path):
    finished = run_command("python", "tools/verify_dataset.py", "-c", config, "-o", tmp_path / "bad.txt")
    assert finished.returncode == 0, finished.stderr
    assert "0 of 33 images" in finished.stdout


def report(capsys, tmp_path, *argv, code=0):
    """Run the tool, and return what it printed, its page, and the lines of its table."""
    found, printed = verify(capsys, *argv, "--html", tmp_path / "report.html", "--csv", tmp_path / "report.csv")
    assert found == code, printed
    page = (tmp_path / "report.html").read_text()
    with (tmp_path / "report.csv").open(newline="") as file:
        return printed.out, page, list(csv.DictReader(file))


def test_a_leak_and_a_conflict_are_named_and_shown(config, root, tmp_path, capsys):
    train = root / "train"
    shutil.copy(train / "class_0" / "0000.jpg", root / "val" / "class_0" / "leak.jpg")
    Image.open(train / "class_1" / "0001.jpg").save(train / "class_2" / "other.png")
    printed, page, lines = report(capsys, tmp_path, "-c", config)
    assert "LEAK: groups of duplicates in both train and an evaluation split: 1" in printed
    assert "groups of duplicates with conflicting labels: 1" in printed
    assert page.index("conflicting labels</span>") < page.index("also in train</span>")
    assert page.count("<img") == 4
    groups = {line["path"]: line["duplicates"] for line in lines if line["duplicates"]}
    assert groups == {
        "train/class_1/0001.jpg": "1",
        "train/class_2/other.png": "1",
        "train/class_0/0000.jpg": "2",
        "val/class_0/leak.jpg": "2",
    }
    other = next(line for line in lines if line["path"] == "train/class_2/other.png")
    assert (other["split"], other["labels"], other["format"], other["mode"]) == ("train", "class_2", "PNG", "RGB")
    assert "http" not in page.replace("http-equiv", "")


def test_classes_sizes_and_formats_are_counted(config, root, tmp_path, capsys):
    for path in (root / "val" / "class_1").iterdir():
        path.unlink()
    (root / "val" / "class_1").rmdir()
    for path in sorted((root / "train" / "class_2").iterdir())[1:]:
        path.unlink()
    for i in range(8, 12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 30), dtype=np.uint8)).save(
            root / "train/class_0" / f"{i}.png"
        )
    printed, page, lines = report(capsys, tmp_path, "-c", config)
    assert "valid has no image of class_1" in printed
    assert "train is imbalanced: class_2 (1) and class_0 (12) differ by a factor of 12" in printed
    assert "30 x 9 (train: train/class_0/10.png)" in page
    assert "4 PNG, L" in page
    assert len(lines) == 12 + 8 + 1 + 6
    assert {line["height"] for line in lines if line["format"] == "PNG"} == {"9"}


def test_an_unreadable_image_is_in_the_page_and_the_table(config, root, tmp_path, capsys):
    (root / "train" / "class_2" / "=cmd.jpg").write_bytes(b"<b>")
    printed, page, lines = report(capsys, tmp_path, "-c", config, "-o", tmp_path / "bad.txt", code=1)
    (line,) = [line for line in lines if line["problem"]]
    assert "not an image" in line["problem"]
    assert "1 of 34 images can't be read" in printed
    assert "this image can&#39;t be read" in page


@pytest.mark.parametrize(
    ("write", "options", "unit", "label"),
    [
        (on_disk.write_coco, ("--task", "detection", "--data.name", "cocojson"), "Objects per class", "red"),
        (on_disk.write_voc, ("--task", "segmentation", "--data.name", "VOC"), "Images per class", "aeroplane"),
    ],
)
def test_boxes_and_masks_are_counted(write, options, unit, label, tmp_path, capsys):
    write(tmp_path / "set")
    config = tmp_path / "config.yaml"
    config.write_text("model: {name: resnet18}\ntrain: {n_steps: 2}\n")
    _, page, lines = report(capsys, tmp_path, "-c", config, *options, "--data.dataroot", tmp_path / "set")
    assert unit in page
    assert len(lines) == 9
    assert any(label in line["labels"].split("; ") for line in lines)
    assert all(line["format"] == "JPEG" and not line["problem"] for line in lines)


def test_masks_in_colors_are_read_by_their_palette(tmp_path, capsys):
    root, config = on_disk.write_pairs(tmp_path / "set"), tmp_path / "config.yaml"
    colors = np.full((256, 3), 9, np.uint8)
    colors[:3] = (128, 64, 128), (0, 0, 192), (64, 0, 128)
    for path in (root / "masks").iterdir():
        Image.fromarray(colors[np.array(Image.open(path))]).save(path)
    (root / "colors.txt").write_text("128 64 128 road\n0 0 192 sky\n64 0 128 car\n9 9 9 void\n")
    config.write_text("model: {name: resnet18}\ntrain: {n_steps: 2, batch_size: 2}\n")
    options = ("--task", "segmentation", "--data.name", "pairs", "--data.dataroot", root, "--data.palette", "colors.txt")
    _, _, lines = report(capsys, tmp_path, "-c", config, *options)
    assert len(lines) == 8
    assert {name for line in lines for name in line["labels"].split("; ")} == {"road", "sky", "car"}


@pytest.mark.parametrize("task", ["multilabel", "segmentation", "detection"])
def test_generated_targets_of_every_kind_are_reported(task, tmp_path, capsys):
    options = ("--task", task, "--data.name", "shapes", "--data.n_train", 6, "--data.n_test", 3, "--data.img_size", 64)
    config = tmp_path / "config.yaml"
    config.write_text("model: {name: resnet18}\ntrain: {n_steps: 2, batch_size: 2}\n")
    _, _, lines = report(capsys, tmp_path, "-c", config, *options)
    assert len(lines) == 9
    assert all(line["labels"] and "background" not in line["labels"].split("; ")[1:] for line in lines)


def test_labels_are_judged_for_classification_only(tmp_path, capsys):
    assert verify(capsys, "--html", tmp_path / "page.html")[0] == 2
    options = ("--task", "multilabel", "--data.name", "shapes", "--data.n_train", 8, "--data.n_test", 4, "--data.img_size", 32)
    short = ("--model.name", "lenet", "--train.n_steps", 1, "--train.batch_size", 4, "-e", tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text("model: {name: lenet}\ntrain: {n_steps: 1}\n")
    assert run_main("-c", config, *options, *short) == 0
    code, printed = verify(capsys, "--run", tmp_path / "run")
    assert code == 2
    assert "--run: only for classification, and task is multilabel" in printed.err
    code, printed = verify(capsys, "--run", tmp_path / "run", "-c", "configs/lenet_digits.yaml")
    assert code == 2
    assert "was trained on other data; leave out -c" in printed.err
