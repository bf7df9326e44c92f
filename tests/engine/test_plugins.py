"""A user's model, dataset and task in one plugin file, without changes to the project."""

import json

import pytest
from matplotlib.image import imread

from engine import load_config, load_plugin, train
from tests.faults.campaign import SMALL
from tests.faults.children import run_script
from tests.running import ROOT, assert_same_weights, metrics, results, run_command, run_main, weights

pytestmark = pytest.mark.usefixtures("plugins_of_this_module")

PLUGIN = """
import torch
from torch import nn
from datasets.pipeline.splits import DatasetSpec, Images, Loaded
from engine.tasks.classification import Classification


class Stripes(nn.Sequential):
    def __init__(self, *, n_classes=10, in_channels=3, img_size=32, width: int = 8):
        trunk = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        super().__init__(*trunk, nn.Linear(4 * width, n_classes))


def load(source, *, n_train: int = 96):
    generator = torch.Generator().manual_seed(source.seed)
    labels = torch.arange(n_train + 40) % 2
    images = torch.randint(0, 100, (n_train + 40, 1, 16, 16), dtype=torch.uint8, generator=generator)
    images[labels == 1, :, ::2] += 100  # light stripes, across
    images[labels == 0, :, :, ::2] += 100  # and down
    return Loaded(Images(images[:n_train], labels[:n_train]), Images(images[n_train:], labels[n_train:]), ("down", "across"))


class Careful(Classification):
    def loss_sum(self, model, batch):
        loss, sums = super().loss_sum(model, batch)
        return loss, {**sums, "care": loss.detach()}


MODELS = {"stripes": Stripes}
DATASETS = [DatasetSpec("stripes", load, channels=1, img_size=16, mean=(0.5,), std=(0.3,), n_classes=2)]
TASKS = {"careful": lambda config, data: Careful(data.classes)}
"""
ARGV = (*SMALL, "--model.name", "stripes", "--model.width", 6, "--data.name", "stripes", "--task", "careful")
ARGV += ("--train.n_steps", 60, "--train.batch_size", 16, "--train.print_freq", 20)
ARGV += ("--train.save_freq", 30, "--train.optim.lr", 0.1)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "stripes.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def run(plugin, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert run_main("-e", path, "--plugin", plugin, *ARGV) == 0
    return path


def test_plugin_model_dataset_and_task_train_by_name(run):
    assert all("train/care" in line for line in metrics(run) if "train/loss" in line)
    assert results(run)["best"]["valid/acc@1"] > 0.9
    assert (run / "figures" / "predictions.png").exists()
    assert [path.rpartition("/")[2] for path in json.loads((run / "environment.json").read_text())["plugins"]] == ["stripes.py"]


@pytest.mark.slow
def test_run_resumes_bit_exactly_in_another_process(plugin, run, tmp_path):
    cut = tmp_path / "cut"
    assert run_script("main.py", "-e", cut, "--plugin", plugin, *ARGV, "--train.time_limit", 1e-9).returncode == 143
    assert results(cut)["status"] == "interrupted"
    without_plugin = run_script("main.py", "-e", cut, "-r", "latest")
    assert without_plugin.returncode == 2
    assert f"was trained with a plugin; add --plugin {plugin}" in without_plugin.stderr
    resumed = run_script("main.py", "-e", cut, "-r", "latest", "--plugin", plugin, "--train.time_limit", "null")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(weights(cut), weights(run))


def test_tools_accept_the_plugin(plugin, run):
    evaluated = run_script("tools/evaluate.py", run, "--plugin", plugin, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["acc@1"] == results(run)["best"]["valid/acc@1"]
    counted = run_script("tools/count_macs.py", "--plugin", plugin, "--model", "stripes", "--img_size", 16)
    assert counted.returncode == 0, counted.stderr
    assert "stripes" in counted.stdout
    assert run_script("tools/evaluate.py", run).returncode == 2


@pytest.mark.parametrize("picture", ["data", "predictions", "model"])
def test_visualize_accepts_the_plugin(plugin, run, tmp_path, picture):
    argv = ["--plugin", plugin, "-o", tmp_path / "picture.png"]
    drawn = run_script("tools/visualize.py", picture, run, *argv)
    assert drawn.returncode == 0, drawn.stderr
    height, width, _ = imread(tmp_path / "picture.png").shape
    assert min(height, width) > 150
    assert ("Conv2d" in drawn.stdout) == (picture == "model")


def test_plugin_can_be_loaded_from_python(plugin, tmp_path):
    load_plugin(plugin)
    options = dict(zip((str(word).removeprefix("--") for word in ARGV[::2]), ARGV[1::2], strict=True))
    result = train(load_config(None, options), exp_dir=tmp_path / "run")
    assert result.status == "completed"


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("import nowhere", ["doesn't import", "ModuleNotFoundError", "nowhere", "line 1"]),
        ("\n\nx = (", ["doesn't import", "SyntaxError", "line 3"]),
        ("x = 1", ["none of the tables MODELS, DATASETS, TASKS"]),
        ("MODELS = {'resnet18': dict}", ["names its model 'resnet18', which is taken", "another name"]),
        ("from datasets.digits import DATASETS", ["names its dataset 'digits', which is taken"]),
        ("TASKS = {'classification': dict}", ["names its task 'classification', which is taken"]),
        (None, ["can't be read", "No such file"]),
    ],
)
def test_unusable_plugin_is_a_one_line_error_before_training(tmp_path, capsys, text, fragments):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert run_main("-e", tmp_path / "run", "--plugin", path, "--train.n_steps", 1) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert str(path) in line
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "run").exists()


def test_config_cannot_name_a_plugin(plugin, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"plugin: {plugin}\n")
    assert run_main("-c", config) == 2
    assert "plugin: no such key" in capsys.readouterr().err


def test_unknown_task_is_an_error_with_a_suggestion(capsys):
    assert run_main("--task", "clasification", "--train.n_steps", 1) == 2
    assert "did you mean classification?" in capsys.readouterr().err


def test_help_lists_the_option():
    assert "--plugin FILE.py" in run_command("python", "main.py", "--help").stdout
    assert (ROOT / "main.py").exists()
