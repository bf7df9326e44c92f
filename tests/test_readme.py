"""The README says what the programs print."""

import json
import re

import pytest

from engine.config.command_line import run_tool
from tests.running import ROOT
from tools.count_macs import main as count_macs

README = (ROOT / "README.md").read_text()
TABLE = README.partition("<!-- python tools/count_macs.py: begin -->\n")[2].partition(
    "\n<!-- python tools/count_macs.py: end -->"
)[0]


def cells(table):
    return {row[0]: row for row in ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:])}


def counted(capsys, *names):
    argv = [word for name in names for word in ("-c", str(ROOT / "configs" / f"{name}.yaml"))]
    assert run_tool(lambda: count_macs(argv)) == 0
    return cells(capsys.readouterr().out)


def test_the_table_of_models_has_every_config():
    assert sorted(cells(TABLE)) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_rows_of_the_table_of_models_are_what_the_tool_counts(capsys):
    names = ["lenet_digits", "resnet18_cifar10", "mobilenet_cifar10", "vit_tiny_cifar10"]
    table = cells(TABLE)
    assert counted(capsys, *names) == {name: table[name] for name in names}


@pytest.mark.slow
def test_the_table_of_models_is_what_the_tool_prints(capsys):
    assert counted(capsys, *cells(TABLE)) == cells(TABLE)


PUBLISHED_PARAMETERS = {  # in millions, as printed beside the accuracies that are quoted
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
def test_parameters_agree_with_those_published_beside_the_accuracy(name, capsys):
    argv = ["-c", str(ROOT / "configs" / f"{name}.yaml"), "--json"]
    assert run_tool(lambda: count_macs(argv)) == 0
    params = json.loads(capsys.readouterr().out)[0]["params"] / 1e6
    published = PUBLISHED_PARAMETERS[name]
    assert round(params, len(published.partition(".")[2])) == float(published)


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for command in re.findall(r"(?:configs/\w+\.yaml|tools/\w+\.py)", README):
        assert (ROOT / command).exists(), command


def test_the_table_of_faults_names_what_the_campaign_tries_and_nothing_failed():
    block = README.partition("<!-- make faults: begin -->\n")[2].partition("\n<!-- make faults: end -->")[0]
    rows = cells("\n".join(line for line in block.splitlines() if line.startswith("|")))
    assert len(rows) == 6
    assert [row[-1] for row in rows.values()] == ["0"] * 6
    kills = sum(int(row[1]) for name, row in rows.items() if name.startswith("killed"))
    assert kills >= 100
    assert int(rows["interrupted twice in an epoch"][1]) >= 24
    assert int(rows["a byte of a checkpoint flipped"][1]) >= 200
