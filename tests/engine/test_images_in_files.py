"""Training on an image folder through the command line."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from datasets.pipeline.loaders import FileTraining
from engine import build as builder
from engine import load_config
from engine.build import MAX_WORKERS, workers
from engine.devices.accelerator import make_accelerator
from tests import on_disk
from tests.faults import children
from tests.running import ROOT, assert_same_weights, metrics, results, run_main, untimed, weights
from tools.predict import main as predict

SMALL = ("--model.name", "lenet", "--data.name", "imagefolder", "--data.img_size", 32, "--train.n_epochs", "null")
SMALL += ("--train.batch_size", 6, "--train.optim.lr", 0.01, "--train.sched.type", "constant")
AUGMENTATION = ("--augment.auto", "trivialaugment", "--augment.color_jitter", 0.2, "--augment.erasing", 0.5)
AUGMENTATION += ("--augment.repeats", 3, "--augment.interpolation", "bicubic", "--augment.crop_pct", 0.9)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return on_disk.write_image_folder(tmp_path_factory.mktemp("data") / "set")


def train(root, folder, *argv, n_steps=8):
    return run_main("-e", folder, *SMALL, "--data.dataroot", root, "--train.n_steps", n_steps, *argv)


def test_run_is_the_same_with_any_number_of_workers_and_after_a_resume(root, tmp_path):
    lines = []
    for n in (0, 1, 2):
        assert train(root, tmp_path / str(n), *AUGMENTATION, "--dataloader.num_workers", n) == 0
        lines.append(untimed(metrics(tmp_path / str(n))))
        assert_same_weights(weights(tmp_path / "0"), weights(tmp_path / str(n)))
    assert lines[0] == lines[1] == lines[2]
    assert train(root, tmp_path / "parts", *AUGMENTATION, n_steps=5) == 0
    assert run_main("-r", "latest", "-e", tmp_path / "parts", "--train.n_steps", 8) == 0
    assert_same_weights(weights(tmp_path / "0"), weights(tmp_path / "parts"))


def test_two_ranks_train_on_an_image_folder(root, tmp_path):
    argv = (*SMALL, "--data.dataroot", root, "--train.n_steps", 4, "--augment.repeats", 3, "--dataloader.num_workers", 1)
    ended = children.train(tmp_path / "run", *argv, ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert metrics(tmp_path / "run")[-1]["valid/count"] == 9


def as_held_sideways(root, into):
    """Copy an image folder without its splits, as PNGs that EXIF data turn by 90 degrees; those in `into`/upright are turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in sorted(root.glob("train/*/*.jpg")):
        image = Image.open(path)
        for kind, pixels, options in (
            ("upright", image, {}),
            ("held", image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        ):
            to = into / kind / path.parent.name / f"{path.stem}.png"
            to.parent.mkdir(parents=True, exist_ok=True)
            pixels.save(to, **options)
    return into / "upright", into / "held"


@pytest.mark.parametrize("in_memory", ["false", "true"])
def test_exif_rotate_trains_and_predicts_as_on_upright_images(root, tmp_path, capsys, in_memory):
    upright, held = as_held_sideways(root, tmp_path)
    argv = ("--data.valid_ratio", 0.3, "--data.in_memory", in_memory, "--dataloader.num_workers", 0)
    rates = {}
    for name, data, turn in (("a", upright, "true"), ("b", held, "true"), ("c", held, "false")):
        assert train(data, tmp_path / name, *argv, "--data.exif_rotate", turn, n_steps=2) == 0
        hint = "data.exif_rotate true turns such images" in capsys.readouterr().out
        assert hint == (name == "c")
        table = tmp_path / f"{name}.csv"
        assert predict([str(tmp_path / name), str(held / "class_1"), "-o", str(table)]) == 0
        rates[name] = table.read_text()
    losses = [next(line["test/loss"] for line in metrics(tmp_path / name) if "test/loss" in line) for name in "abc"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # turned before or after it is scaled
    assert losses[0] != losses[2]
    if in_memory == "true":
        assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    on_upright = tmp_path / "upright.csv"
    assert predict([str(tmp_path / "b"), str(upright / "class_1"), "-o", str(on_upright)]) == 0
    assert on_upright.read_text().replace(str(upright), "") == rates["b"].replace(str(held), "")
    assert predict([str(tmp_path / "c"), str(upright / "class_1"), "-o", str(on_upright)]) == 0
    assert on_upright.read_text().replace(str(upright), "") != rates["c"].replace(str(held), "")


def test_a_batch_larger_than_the_set_is_an_error_that_names_the_largest(root, tmp_path, capsys):
    assert train(root, tmp_path / "run", "--train.batch_size", 75, "--augment.repeats", 3) == 2
    problem = "75 is more than the 24 training samples of imagefolder: an epoch would have no step"
    assert f"{problem} (--train.batch_size); the largest here is 72" in capsys.readouterr().err
    assert train(root, tmp_path / "run", "--train.batch_size", 72, "--augment.repeats", 3, n_steps=1) == 0


def test_a_class_that_a_split_lacks_is_a_warning(tmp_path, capsys):
    root = on_disk.write_image_folder(tmp_path / "set")
    shutil.rmtree(root / "val" / "class_1")
    assert train(root, tmp_path / "run", "--dry_run") == 0
    assert "warning: the valid split has no image of 1 of the 3 classes: class_1\n" in capsys.readouterr().out
    for part, labels in (("train", "class_0|class_2"), ("val", "class_0")):
        rows = [f"{path.relative_to(root)},{labels}" for path in sorted((root / part).glob("*/*.jpg"))]
        (root / f"{part}.csv").write_text("\n".join(["path,tags", *rows]))
    assert train(root, tmp_path / "run", "--dry_run", "--data.name", "table", "--task", "multilabel") == 0
    assert "warning: the valid split has no image of 1 of the 2 classes: class_2\n" in capsys.readouterr().out


def test_own_classes_trains_on_twenty_unsplit_images(tmp_path, capsys):
    root = on_disk.write_image_folder(tmp_path / "set", n_classes=2, n_train=10) / "train"
    argv = ("-c", "configs/own_classes.yaml", "--model.pretrained", "false", "--data.img_size", 32, "--dataloader.num_workers", 0)
    argv += ("--data.dataroot", root, "--train.n_epochs", 2)
    assert run_main("-e", tmp_path / "run", *argv) == 0, capsys.readouterr().err
    assert [metrics(tmp_path / "run")[-1][key] for key in ("step", "valid/count")] == [4, 4]
    assert run_main(*argv, "--data.valid_ratio", 0.2, "--dry_run") == 0
    for name in ("finetune_resnet50", "finetune_linear_resnet50"):
        assert load_config(ROOT / "configs" / f"{name}_imagefolder.yaml").train.batch_size <= 16


@pytest.mark.parametrize("n_workers", [0, 2])
def test_broken_image_is_a_one_line_error_with_its_path(tmp_path, n_workers, capsys):
    root = on_disk.write_image_folder(tmp_path / "set")
    broken = root / "train" / "class_1" / "0003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert train(root, tmp_path / "run", "--dataloader.num_workers", n_workers) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {broken}: this image can't be read (")
    assert "tools/verify_dataset.py" in message
    (root / "val" / "class_0" / "0001.jpg").write_bytes(b"")
    broken.unlink()
    assert train(root, tmp_path / "other", "--dataloader.num_workers", n_workers) == 1
    assert "val/class_0/0001.jpg: this image can't be read" in capsys.readouterr().err


def test_image_folder_in_memory_trains_without_workers(root, tmp_path):
    assert train(root, tmp_path / "run", "--data.in_memory", "true", "--augment.crop_padding", 4, "--augment.cutout", 8) == 0
    assert metrics(tmp_path / "run")[-1]["valid/count"] == 9


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (("--augment.cutout", 8), ["augment.cutout: 8", "in memory", "imagefolder", "in files"]),
        (("--augment.hflip", "alternating"), ["augment.hflip: alternating", "in memory"]),
        (("--data.in_memory", "true", "--augment.auto", "augmix"), ["augment.auto: augmix", "in files", "in memory"]),
        (("--data.in_memory", "true", "--augment.repeats", 2), ["augment.repeats: 2", "in files"]),
        (("--data.name", "digits", "--augment.erasing", 0.5), ["augment.erasing: 0.5", "digits", "in memory"]),
        (("--augment.repeats", 4), ["train.batch_size: 6", "augment.repeats 4"]),
        (("--data.mean", "[0.5]"), ["data.mean", "1 numbers", "3 channels"]),
        (("--data.std", "[0.5,0,0.5]"), ["data.std", "above 0"]),
        (("--dataloader.num_workers", "many"), ["dataloader.num_workers", "a whole number or auto", "'many'"]),
        (("--dataloader.num_workers", -1), ["dataloader.num_workers", "at least 0"]),
        (("--augment.auto", "randaugmnt"), ["augment.auto", "randaugment or trivialaugment or augmix"]),
        (("--data.excluded", "x.txt"), ["data.excluded", "did you mean data.exclude"]),
        (("--data.n_classes", 5), ["data.n_classes: 5", "3 classes"]),
        (("--data.n_classes", 2), ["data.n_classes: 2", "3 classes"]),
        (("--train.batch_size", 30), ["train.batch_size: 30", "24 training samples"]),
    ],
)
def test_conflicting_options_are_a_one_line_error_before_training(root, tmp_path, argv, fragments, capsys):
    assert train(root, tmp_path / "run", *argv) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "run").exists()


def test_options_without_effect_are_warnings(root, tmp_path, capsys):
    argv = ("--data.in_memory", "true", "--augment.interpolation", "bicubic", "--augment.auto_magnitude", 5)
    assert train(root, tmp_path / "run", *argv, n_steps=2) == 0
    output = capsys.readouterr()
    for key in ("augment.interpolation", "augment.auto_magnitude"):
        assert f"{key} (--{key}) has no effect" in output.out + output.err


def build_run(root, *overrides):
    options = [f"--data.dataroot={root}", "--train.n_steps=2", *map(str, SMALL), *map(str, overrides)]
    config = load_config(None, options)
    return builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))


def test_config_is_passed_to_the_image_pipeline(root):
    run = build_run(
        root, "--data.mean", "[0.5,0.5,0.5]", "--data.std", "[0.25,0.25,0.25]", *AUGMENTATION, "--augment.auto_magnitude", 3
    )
    assert isinstance(run.train_loader, FileTraining)
    images = run.train_loader.read.read
    assert (images.erasing, images.interpolation, len(images.distortions)) == (0.5, "bicubic", 2)
    assert torch.equal(run.train_loader.normalize.std.flatten(), torch.full((3,), 0.25))
    assert run.steps_per_epoch == 24 // 2
    assert run.data.loader("valid").read.read.shorter_side == 35


def test_auto_uses_one_worker_per_core_of_the_rank(root, monkeypatch):
    config = load_config(None, ["--dataloader.num_workers", "auto"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert workers(config).num_workers == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers(config).num_workers == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert workers(config).num_workers == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)), raising=False)
    assert workers(config).num_workers == MAX_WORKERS


def test_ctrl_c_also_sent_to_the_workers_saves_and_stops(root, tmp_path):
    argv = [*SMALL, "-e", tmp_path / "run", "--data.dataroot", root, "--train.n_steps", 100_000, "--dataloader.num_workers", 2]
    command = [sys.executable, "main.py", *map(str, (*argv, "--train.print_freq", 5))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert results(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "ckpt" / "latest").exists()
