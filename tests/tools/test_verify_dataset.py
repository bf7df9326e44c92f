import pytest

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
    assert "notes.txt: not used" in printed.out
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
    assert "all of its 80 images can be read" in printed.out


def test_a_mistake_is_a_one_line_error(config, capsys):
    assert verify(capsys, "-c", "nowhere.yaml")[0] == 2
    code, printed = verify(capsys, "-c", config, "--data.dataroot", "/nowhere")
    assert code == 1
    assert printed.err.startswith("error: /nowhere/train: no such folder")


def test_the_program_runs_as_a_file(config, tmp_path):
    finished = run_command("python", "tools/verify_dataset.py", "-c", config, "-o", tmp_path / "bad.txt")
    assert finished.returncode == 0, finished.stderr
    assert "0 of 33 images" in finished.stdout
