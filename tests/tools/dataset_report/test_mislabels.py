"""Changed labels are found by confident learning on held-out predictions."""

import csv

import numpy as np
import pytest
import torch

from datasets import Source
from datasets.digits import load
from engine.config.command_line import run_tool
from tests.running import run_main
from tools.dataset_report.mislabels import confident_learning
from tools.verify_dataset import main

RATE = 0.02
PLUGIN = f'''
import torch
from datasets.digits import load as load_digits
from datasets.splits import DatasetSpec, Images, Loaded, Source

def load(source: Source) -> Loaded:
    """Digits of which 2 % have another label."""
    digits, parts = load_digits(source), []
    for part in (digits.train, digits.test):
        generator, labels = torch.Generator().manual_seed(1), part.labels.clone()
        chosen = torch.randperm(len(labels), generator=generator)[: round({RATE} * len(labels))]
        labels[chosen] = (labels[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
        parts.append(Images(part.images, labels))
    return Loaded(*parts, digits.classes)

DATASETS = [DatasetSpec("flipped_digits", load, channels=1, img_size=8, mean=(0.3,), std=(0.4,), n_classes=10, crop_padding=1)]
'''

pytestmark = pytest.mark.usefixtures("plugins_of_this_module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plugin with digits of which 2 % have a changed label, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("flipped")
    plugin = folder / "flipped.py"
    plugin.write_text(PLUGIN)
    options = ("--plugin", plugin, "-c", "configs/lenet_digits.yaml", "--data.name", "flipped_digits", "--train.n_epochs", 10)
    assert run_main(*options, "-e", folder / "run") == 0
    return folder


@pytest.fixture(scope="module")
def table(folder):
    """The lines of the report on the run."""
    plugin = folder / "flipped.py"
    words = ("--plugin", plugin, "--run", folder / "run", "--csv", folder / "report.csv", "--html", folder / "report.html")
    assert run_tool(lambda: main([str(word) for word in words])) == 0
    assert "Likely wrong labels" in (folder / "report.html").read_text()
    return list(csv.DictReader((folder / "report.csv").open()))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid"])
def test_changed_labels_are_in_the_most_suspicious_five_percent(table, split):
    truth = load(Source(root=None, seed=1234))
    right = (truth.train if split == "train" else truth.test).labels.tolist()
    lines = [line for line in table if line["split"] == split]
    is_changed = np.array([int(line["labels"]) != label for line, label in zip(lines, right, strict=True)])
    assert is_changed.sum() == round(RATE * len(right))
    order = np.argsort([-float(line["suspicion"]) for line in lines], kind="stable")
    n_found = is_changed[order[: round(0.05 * len(lines))]].sum()
    assert n_found >= 0.9 * is_changed.sum()  # measured: all of them
    suspects = np.array([line["suggested"] != "" for line in lines])
    assert (suspects & is_changed).sum() >= 0.5 * suspects.sum() > 0


@pytest.mark.slow
def test_a_model_by_name_judges_all_labels_by_its_features(folder, capsys):
    weights = ("--run", "lenet", "--model.pretrained", folder / "run", "-c", "configs/lenet_digits.yaml")
    words = ("--plugin", folder / "flipped.py", *weights, "--data.name", "flipped_digits")
    assert run_tool(lambda: main([str(word) for word in words])) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "are likely wrong" in line]
    assert "of 1,797 labels" in line
    assert line.count("5-fold cross-validation of a linear classifier") == 2


def test_thresholds_are_the_mean_confidence_of_each_class():
    probabilities = torch.tensor(
        [
            [0.9, 0.1],  # threshold of class 0: (0.9 + 0.5 + 0.1) / 3 = 0.5
            [0.5, 0.5],
            [0.1, 0.9],  # passes the threshold of class 1 only
            [0.2, 0.8],  # threshold of class 1: (0.8 + 0.4) / 2 = 0.6
            [0.6, 0.4],  # passes the threshold of class 0 only
        ]
    ).numpy()
    suspicion, is_suspect, suggested = confident_learning(probabilities, np.array([0, 0, 0, 1, 1]))
    assert is_suspect.tolist() == [False, False, True, False, True]
    assert suggested.tolist() == [1, 1, 1, 0, 0]
    assert suspicion == pytest.approx([0.1, 0.5, 0.9, 0.2, 0.6])


def test_a_class_without_a_label_suggests_nothing():
    probabilities = np.array([[0.4, 0.6, 0.0], [0.4, 0.6, 0.0]])
    _, is_suspect, _ = confident_learning(probabilities, np.array([0, 0]))
    assert not is_suspect.any()
