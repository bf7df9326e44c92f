"""Every config of configs/ builds, trains two steps and evaluates, on small data in the real format."""

import re

import pytest

from engine import load_config
from tests.running import ROOT, run_main

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
# Large networks and large images take many seconds each, so they run with the slow tests.
LARGE = re.compile(r"101_|152_|vgg16_224|_voc$|_coco$|(?<!resnet50)_imagenet")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if LARGE.search(n) else n for n in CONFIGS])
def test_a_dry_run_succeeds(name, data_root, capsys):
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(path)
    argv = ["--data.dataroot", data_root / config.data.name, "--data.verify", "false", "--dataloader.num_workers", 0]
    argv += ["--model.pretrained", "false"] if config.model.pretrained is True else []  # tests have no network
    argv += ["--data.img_size", 128] if config.task in ("segmentation", "detection") and config.data.name != "shapes" else []
    argv += ["--train.batch_size", 2 * config.augment.repeats, "--train.micro_batch_size", 0, "--eval.batch_size", 2]
    argv += ["--train.optim.lr", 1e-4]  # batches of two can diverge at a learning rate meant for hundreds
    assert run_main("-c", path, *argv, "--dry_run") == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_begins_with_its_paper_and_its_command(name):
    head = [line for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any("http" in line for line in head), "no link to the paper"
    assert any(f"main.py -c configs/{name}.yaml" in line for line in head)
    model, _, dataset = name.partition("_")
    assert model
    assert dataset


def test_there_are_few_configs():
    """A config that differs from another one only in the model's name is unnecessary: use --model.name."""
    assert len(CONFIGS) <= 55
