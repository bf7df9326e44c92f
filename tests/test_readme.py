"""README.md is short, and docs/models.md contains what `tools/count_macs.py` prints."""

import json
import re

import pytest

from engine.config.command_line import run_tool
from engine.run.log import millions
from models import list_models
from tests.running import ROOT
from tools.count_macs import main as count_macs
from tools.document import BLOCK
from tools.tables import giga

README = (ROOT / "README.md").read_text()
COMMAND = "python tools/count_macs.py"


def block(page, command):
    return next(found["content"] for found in BLOCK.finditer(page) if found["command"] == command)


def rows(table):
    """Return the rows of all tables in a text, without headers, as lists of cells."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    heads = [i - 1 for i, row in enumerate(lines) if re.fullmatch(r"-+:?", row[0])]
    return [row for i, row in enumerate(lines) if i not in heads and i - 1 not in heads]


MODELS = rows(block((ROOT / "docs" / "models.md").read_text(), COMMAND))


def counted(capsys, *argv):
    assert run_tool(lambda: count_macs([*argv, "--json"])) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_models_md_lists_every_model_once():
    assert sorted(row[0] for row in MODELS) == list_models()
    assert all(row[6] for row in MODELS), "what is it checked against?"


@pytest.mark.parametrize("name", ["lenet_cifar10", "resnet18_cifar10", "mobilenet_cifar10", "vgg11_cifar10", "vit_tiny_cifar10"])
def test_counts_at_32x32_equal_those_of_the_cifar_config(name, capsys):
    row = counted(capsys, "-c", str(ROOT / "configs" / f"{name}.yaml"))
    printed = next(cells for cells in MODELS if cells[0] == row["model"])
    assert printed[4:6] == [millions(row["params"]), giga(row["macs"])]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny", "vgg11"])
def test_counts_at_the_default_size_equal_those_of_the_model_by_name(name, capsys):
    row = counted(capsys, "--model", name)
    printed = next(cells for cells in MODELS if cells[0] == name)
    assert printed[1:4] == ["224x224", millions(row["params"]), giga(row["macs"])]


@pytest.mark.slow
def test_models_md_has_the_output_of_count_macs(capsys, caplog):
    assert run_tool(lambda: count_macs([])) == 0
    assert block((ROOT / "docs" / "models.md").read_text(), COMMAND).rstrip() == capsys.readouterr().out.rstrip()
    assert "fvcore counts" not in caplog.text  # as much as torch does


PUBLISHED_PARAMETERS = {  # in millions, as printed next to the published accuracies
    "resnet18_cifar10": "11.2",
    "preactresnet18_cifar10": "11.2",
    "resnext29_32x4d_cifar10": "4.78",
    "se_resnet18_cifar10": "11.3",
    "cbam_resnet18_cifar10": "11.3",
    "mobilenet_cifar10": "3.22",
    "shufflenet_1_0x_g8_cifar10": "0.91",
    "vgg19_bn_cifar10": "20.0",
    "vit_tiny_cifar10": "5.36",
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_equal_those_published_with_the_accuracy(name, capsys):
    params = counted(capsys, "-c", str(ROOT / "configs" / f"{name}.yaml"))["params"] / 1e6
    published = PUBLISHED_PARAMETERS[name]
    assert round(params, len(published.partition(".")[2])) == float(published)


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000


def test_linked_and_named_files_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for command in re.findall(r"(?:configs/\w+\.yaml|tools/\w+\.py)", README):
        assert (ROOT / command).exists(), command


def test_the_table_of_faults_is_complete_and_nothing_failed():
    faults = {row[0]: row for row in rows(block((ROOT / "docs" / "reliability.md").read_text(), "make faults"))}
    assert len(faults) == 27  # 6 of faults, 14 of hostile files, 7 of hangs
    assert {row[-1] for row in faults.values()} == {"0"}
    kills = sum(int(row[1]) for name, row in faults.items() if name.startswith("killed"))
    assert kills >= 100
    assert int(faults["interrupted twice in an epoch"][1]) >= 24
    assert int(faults["a byte of a checkpoint flipped"][1]) >= 200
