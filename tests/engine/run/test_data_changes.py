"""A run remembers a fingerprint of its data, and says on resuming and comparing that they were changed."""

import json
import shutil

import pytest

from engine.config.command_line import run_tool
from engine.run.checkpoint import _manifest_digest, read_checkpoint
from tests import on_disk
from tests.running import run_main
from tools.compare import main as compare

FAST = ("--data.img_size", 32, "--train.batch_size", 4, "--train.save_freq", 2, "--dataloader.num_workers", 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on image files, and its data folder."""
    folder = tmp_path_factory.mktemp("changed")
    root = on_disk.write_image_folder(folder / "data")
    config = folder / "config.yaml"
    config.write_text(f"data: {{name: imagefolder, dataroot: {root}}}\nmodel: {{name: lenet}}\ntrain: {{n_steps: 2}}\n")
    assert run_main("-c", config, "-e", folder / "run", *FAST) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    for name in ("run", "data"):
        shutil.copytree(trained / name, tmp_path / name, symlinks=True)
    return tmp_path


def resume(folder, capsys, n_steps=4):
    capsys.readouterr()
    more = ("--data.dataroot", folder / "data", "--train.n_steps", n_steps)
    assert run_main("-e", folder / "run", "-r", "latest", *FAST, *more) == 0
    return capsys.readouterr().out


def test_environment_and_checkpoint_have_the_fingerprint(trained):
    environment = json.loads((trained / "run" / "environment.json").read_text())
    assert environment["data"]["train"]["images"] == 24
    assert read_checkpoint((trained / "run" / "ckpt" / "latest").resolve()).data == environment["data"]


def test_resuming_on_the_same_data_in_another_folder_says_nothing(copied, capsys):
    assert "the data are not those" not in resume(copied, capsys)


def test_resuming_on_other_data_names_split_and_difference(copied, capsys):
    (copied / "data" / "train" / "class_1" / "0000.jpg").unlink()
    (copied / "data" / "val" / "class_0" / "0000.jpg").rename(copied / "data" / "val" / "class_0" / "new.jpg")
    output = resume(copied, capsys)
    assert "the data are not those of the training so far: train: 23 images instead of 24; other names, sizes, labels" in output
    assert "the data are not those of the training so far: valid: other names, sizes; from here on" in output
    assert "the data are not those" not in resume(copied, capsys, n_steps=6)  # the new checkpoint was trained on these


def test_a_checkpoint_without_a_fingerprint_is_resumed(copied, capsys):
    for path in (copied / "run" / "ckpt").glob("step-*/manifest.json"):
        manifest = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("data", "digest")}
        path.write_text(json.dumps({**manifest, "digest": _manifest_digest(manifest)}))
    (copied / "data" / "train" / "class_1" / "0000.jpg").unlink()
    assert "the data are not those" not in resume(copied, capsys)


def test_runs_on_different_data_are_noted_under_the_table(copied, capsys):
    shutil.copytree(copied / "run", copied / "other", symlinks=True)
    path = copied / "other" / "environment.json"
    environment = json.loads(path.read_text())

    def compared():
        capsys.readouterr()
        words = [copied / "run", copied / "other", "--markdown", copied / "table.md"]
        assert run_tool(lambda: compare([str(word) for word in words])) == 0
        return capsys.readouterr().out

    assert "other data" not in compared()
    environment["data"]["train"] |= {"images": 20, "labels": "0"}
    path.write_text(json.dumps(environment))
    note = "other was trained on other data than run: train: 20 images instead of 24; other labels"
    assert note in compared()
    assert note in (copied / "table.md").read_text()
    path.write_text(json.dumps({**environment, "data": "damaged"}))
    assert "other data" not in compared()
    assert run_tool(lambda: compare(["--diff", str(copied / "run"), str(copied / "other")])) == 0
    assert "data.train.images" in capsys.readouterr().out
