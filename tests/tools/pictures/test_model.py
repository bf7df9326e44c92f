import csv

import pytest
import torch

from engine.config.command_line import run_tool
from models import create_model
from tests.running import ROOT
from tools.visualize import main


def layers(path, *argv):
    """Return the rows of the table by layer name."""
    assert run_tool(lambda: main(["model", *map(str, argv), "-o", str(path)])) == 0
    with path.open(newline="") as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return layers(
        tmp_path_factory.mktemp("layers") / "layers.csv", "-c", ROOT / "configs" / "resnet18_cifar10.yaml", "--depth", 9
    )


def test_each_layer_has_its_parameters_and_output(resnet):
    model = create_model("resnet18", n_classes=10, in_channels=3, img_size=32, first_block="cifar10").eval()
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, given, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    model(torch.zeros(1, 3, 32, 32))
    modules = dict(model.named_modules())
    for name, row in resnet.items():
        if name in modules:
            assert int(row["parameters"]) == sum(p.numel() for p in modules[name].parameters())
            assert row["output"] == " x ".join(map(str, shapes[name]))
            assert row["kind"] == type(modules[name]).__name__
    assert {name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d)} <= resnet.keys()


def test_the_macs_of_a_layer_are_those_of_the_formula(resnet):
    assert int(resnet["conv1"]["MACs"]) == 3 * 64 * 3 * 3 * 32 * 32
    assert int(resnet["fc"]["MACs"]) == 512 * 10


def test_the_parts_add_up_to_the_whole(resnet):
    whole = resnet.pop("all")
    for column in ("parameters", "MACs"):
        assert sum(int(row[column]) for row in resnet.values()) == int(whole[column])
    resnet["all"] = whole
    assert int(whole["parameters"]) == 11_173_962  # pytorch-cifar's ResNet-18


def test_a_smaller_depth_joins_layers(tmp_path, resnet):
    coarse = layers(tmp_path / "layers.csv", "-c", ROOT / "configs" / "resnet18_cifar10.yaml", "--depth", 1)
    inside = [row for name, row in resnet.items() if name.startswith("layer3.")]
    assert int(coarse["layer3"]["parameters"]) == sum(int(row["parameters"]) for row in inside)
    assert coarse["all"]["MACs"] == resnet["all"]["MACs"]
