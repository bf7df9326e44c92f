import re

import pytest
import torch

from engine import load_config
from engine.build import build
from engine.config.command_line import run_tool
from engine.devices.accelerator import make_accelerator
from engine.train import train_batches
from tools.visualize import main

OPTIONS = {"data.name": "shapes", "data.n_train": 64, "data.n_test": 16, "data.img_size": 32, "train.batch_size": 16}
OPTIONS |= {"train.n_epochs": 2, "augment.hflip": True, "augment.cutout": 8, "train.num_threads": 1}
MIXED = {"augment.mixup": 0.8, "augment.cutmix": 1.0}


@pytest.fixture
def rows(monkeypatch):
    """Return the rows of the picture instead of drawing them."""
    seen = []

    def keep(figure, rows, title):
        seen.extend(rows)
        figure.subplots()

    monkeypatch.setattr("tools.pictures.data.draw_images", keep)
    return seen


def data(tmp_path, options, *argv):
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    return run_tool(lambda: main(["data", "-c", "configs/lenet_shapes.yaml", "-o", str(tmp_path / "x.png"), *argv, *words]))


def built(options):
    config = load_config("configs/lenet_shapes.yaml", options)
    return build(config, make_accelerator(config.train, deterministic=config.deterministic))


def test_the_images_are_those_that_the_update_trains_with(tmp_path, rows):
    assert data(tmp_path, OPTIONS, "--step", "5", "--n", "6") == 0
    original, augmented = rows
    run = built(OPTIONS)
    batch, labels = next(run.train_loader.batches(5, 6))
    torch.testing.assert_close(augmented.images, run.train_loader.normalize.undo(batch[:6]))
    samples = run.train_loader.order.samples(5)[:6]
    torch.testing.assert_close(original.images, run.data.splits["train"].images[samples] / 255, atol=1e-5, rtol=0)
    assert original.titles == [run.data.classes[label] for label in labels[:6]]
    assert not torch.equal(original.images, augmented.images)


def test_mixed_images_are_named_with_their_shares(tmp_path, rows):
    options = OPTIONS | MIXED
    assert data(tmp_path, options, "--n", "16") == 0
    mixed = rows[2]
    run = built(options)
    images, targets = next(train_batches(run, 0))
    torch.testing.assert_close(mixed.images, run.train_loader.normalize.undo(images))
    several = 0
    for title, target in zip(mixed.titles, targets, strict=True):
        shares = {name: int(share) for share, name in re.findall(r"(\d+) % (.+)", title)}
        expected = {
            name: round(100 * share) for name, share in zip(run.data.classes, target.tolist(), strict=True) if share > 0.005
        }
        assert shares == pytest.approx(expected, abs=1)
        several += len(shares) > 1
    assert several > 4
