import json

import pytest

from datasets import list_datasets
from engine.config import yaml12
from engine.config.command_line import run_tool
from models import list_models
from tests.faults.children import run_script
from tests.running import ROOT, run_command
from tools.count_macs import PUBLISHED, main


def count(capsys, *argv):
    assert run_tool(lambda: main([str(word) for word in (*argv, "--json")])) == 0
    return json.loads(capsys.readouterr().out)


def test_resnet18_on_cifar_has_0_56_gmacs(capsys):
    (row,) = count(capsys, "-c", ROOT / "configs" / "resnet18_cifar10.yaml")
    assert row["macs"] == pytest.approx(0.56e9, rel=0.01)
    assert row["params"] == 11_173_962


def test_macs_of_lenet_equal_a_count_by_hand(capsys):
    (row,) = count(capsys, "--model", "lenet", "--img_size", 28, "--n_classes", 10, "--in_channels", 1)
    assert row["macs"] == 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert row["params"] == 6 * 26 + 16 * 151 + 401 * 120 + 121 * 84 + 85 * 10


def test_macs_of_attention_are_counted(capsys):
    argv = ("--model", "timm/vit_tiny_patch16_224", "--img_size", 224, "--n_classes", 1000)
    (row,) = count(capsys, *argv)
    tokens, width, depth = 197, 192, 12
    attention = 2 * tokens * tokens * width
    linear = tokens * width * width * (3 + 1 + 4 + 4)
    by_hand = depth * (attention + linear) + 196 * 768 * width + width * 1000
    assert row["macs"] == pytest.approx(by_hand, rel=0.01)  # fvcore also counts the norms


def test_the_stages_sum_to_the_total(capsys):
    (row,) = count(capsys, "--model", "resnet18", "--model.first_block", "cifar10", "--img_size", 32, "--n_classes", 10)
    assert sum(macs for _, macs in row["stages"].values()) == row["macs"]
    assert sum(params for params, _ in row["stages"].values()) == row["params"]
    assert row["not_counted"] == {"add": 8}


def test_the_program_prints_a_table_and_stages_from_any_folder():
    finished = run_script("tools/count_macs.py", "-c", "configs/lenet_digits.yaml", "--verbose")
    assert finished.returncode == 0, finished.stderr
    assert "| lenet_digits | lenet |" in finished.stdout
    assert "| conv2" in finished.stdout
    assert finished.stderr == ""
    as_module = run_command("python", "-m", "tools.count_macs", "-c", "configs/lenet_digits.yaml", "--verbose")
    assert as_module.stdout == finished.stdout


def test_a_configs_published_accuracy_is_printed_with_its_source(capsys):
    (row,) = count(capsys, "-c", ROOT / "configs" / "resnet50_a3_imagenet.yaml")
    assert row["published"].startswith("ImageNet 78.1 % (recipe A3: Wightman, Touvron, Jégou (2021)")


def test_published_accuracies_name_models_datasets_and_configs_that_exist():
    published = yaml12.parse(PUBLISHED.read_text())
    families = {path.stem for path in (ROOT / "models").glob("*.py")}
    assert set(published["checked_against"]) <= families | set(list_models())
    for model, entries in published["accuracies"].items():
        assert model in list_models()
        for entry in entries:
            assert entry.keys() <= {"data", "metric", "accuracy", "config", "source"}
            assert entry["data"] in list_datasets()
            assert entry["source"]
            assert "config" not in entry or (ROOT / "configs" / f"{entry['config']}.yaml").is_file()


PLUGIN = """
import torch
from torch import nn


class Gated(nn.Module):
    def __init__(self, *, n_classes=10, in_channels=3, img_size=8):
        super().__init__()
        self.head = nn.Linear(img_size, n_classes)

    def forward(self, x):
        return self.head(torch.baddbmm(x[:, 0], x[:, 1], x[:, 2]).mean(1))


MODELS = {"gated": Gated}
"""


def test_an_operation_that_only_torch_counts_is_reported(tmp_path):
    (tmp_path / "gated.py").write_text(PLUGIN)
    argv = ("--plugin", tmp_path / "gated.py", "--model", "gated", "--img_size", 8, "--n_classes", 10)
    finished = run_script("tools/count_macs.py", *argv)
    assert finished.returncode == 0, finished.stderr
    assert "Gated: fvcore counts 80 multiply-adds of convolutions, products and attention, torch 592" in finished.stderr


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model", "resnet19"], "did you mean"),
        (["-c", "nowhere.yaml"], "no such config"),
        (["--img_size", "32"], "belong to --model"),
        (["--model", "lenet", "-c", "configs/lenet_digits.yaml"], "give one of the two"),
        (["--model.first_block", "cifar10"], "needs --config or --model"),
    ],
)
def test_a_mistake_is_a_one_line_error(argv, expected, capsys):
    assert run_tool(lambda: main(argv)) == 2
    assert expected in capsys.readouterr().err
