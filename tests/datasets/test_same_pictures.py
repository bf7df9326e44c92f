"""The same pictures in a folder, a table, parquet and tar shards."""

import pytest
import torch

from datasets import Source, find_dataset
from datasets.pipeline.loaders import Preparation, Workers, eval_loader, train_loader
from datasets.pipeline.order import Order
from tests import on_disk
from tests.running import assert_same_weights, run_main, weights

CPU = torch.device("cpu")
PREPARE = Preparation(32, (0.5,) * 3, (0.25,) * 3, augment=True, crop_padding=0, padding_mode="constant", hflip=True, cutout=0)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The data folder of each dataset."""
    root = tmp_path_factory.mktemp("same")
    folder = on_disk.write_table(root / "folder")
    parquet, shards = on_disk.write_parquet(root / "hub", folder), on_disk.write_shards(root / "shards", folder)
    return {
        "imagefolder": ("imagefolder", folder),
        "csv": ("table", folder),
        "parquet": ("table", parquet),
        "shards": ("shards", shards),
    }


@pytest.mark.parametrize("kind", ["csv", "parquet", "shards"])
def test_the_batches_are_those_of_the_folder_bit_for_bit(roots, kind):
    batches = []
    for name, root in (roots["imagefolder"], roots[kind]):
        loaded = find_dataset(name).load(Source(root))
        assert loaded.classes == ("class_0", "class_1", "class_2")
        order = Order(len(loaded.train), 5, seed=3)
        training = train_loader(loaded.train, order, PREPARE, Workers(), CPU).batches(0, 9)
        evaluation = eval_loader(loaded.test, 4, 0, 1, PREPARE, Workers(1), CPU).batches()
        batches.append([*training, *evaluation])
    assert len(batches[0]) == len(batches[1]) == 12
    for (images, labels), (other_images, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "shards"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(roots, kind, tmp_path):
    name, root = roots[kind]
    argv = ("--model.name", "lenet", "--data.name", name, "--data.dataroot", root, "--data.img_size", 32, "--train.batch_size", 6)
    argv += (
        "--train.n_epochs",
        "null",
        "--train.optim.lr",
        0.01,
        "--train.sched.type",
        "constant",
        "--dataloader.num_workers",
        1,
    )
    assert run_main("-e", tmp_path / "whole", *argv, "--train.n_steps", 8) == 0
    assert run_main("-e", tmp_path / "parts", *argv, "--train.n_steps", 5) == 0
    assert run_main("-r", "latest", "-e", tmp_path / "parts", "--train.n_steps", 8) == 0
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
