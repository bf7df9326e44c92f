"""The tools with a multi-label run."""

import csv
import io
import json

import pytest
import torch
from PIL import Image

from datasets.shapes import CLASSES
from engine.config.command_line import run_tool
from engine.inference.trained import load_trained
from tests.running import run_main
from tools.evaluate import main as evaluate
from tools.predict import main as predict
from tools.visualize import main as visualize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "run"
    argv = ("--task", "multilabel", "--data.name", "shapes", "--data.n_train", 96, "--data.n_test", 40, "--train.n_steps", 6)
    assert run_main("-e", path, *argv, "--train.batch_size", 32, "--train.num_threads", 1) == 0
    return path


def tool(main, *argv):
    return run_tool(lambda: main([str(word) for word in argv]))


def test_predict_writes_every_label_above_its_threshold(run, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    assert tool(predict, run, tmp_path / "red.png") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    trained = load_trained(run, {})
    with torch.no_grad():
        from engine.inference.images import batches_of

        (batch,) = batches_of(trained, [tmp_path / "red.png"], 1)
        probabilities = trained.task.predict(trained.model, batch)[0]
    thresholds = json.loads((run / "thresholds.json").read_text())  # chosen on the validation split
    found = {
        name: value for name, value in zip(CLASSES, probabilities.tolist(), strict=True) if value >= thresholds.get(name, 0.5)
    }
    expected = found or {"": None}
    assert [row["class"] for row in rows] == sorted(expected, key=lambda name: -(expected[name] or 0))
    assert [row["probability"] for row in rows] == [str(expected[row["class"]] or "") for row in rows]


def test_labels_are_sorted_by_probability_and_an_image_without_one_has_a_row():
    from types import SimpleNamespace

    from engine.tasks.multilabel import MultiLabel
    from tools.predictions.formats import present_labels

    task, probabilities = MultiLabel(("a", "b", "c")), torch.tensor([[0.6, 0.2, 0.75], [0.1, 0.2, 0.3]])
    task.set_thresholds({"b": 0.15})
    rows = list(present_labels(["x.png", "y.png"], [(SimpleNamespace(places=[0, 1]), probabilities)], task))
    assert [(name, label) for name, label, _ in rows] == [("x.png", "c"), ("x.png", "a"), ("x.png", "b"), ("y.png", "b")]
    task.set_thresholds({})
    assert list(present_labels(["x.png", "y.png"], [(SimpleNamespace(places=[1]), probabilities[1:])], task)) == [
        ("y.png", "", None)
    ]


def test_top_k_is_refused(run, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    assert tool(predict, run, tmp_path / "black.png", "--top_k", 2) == 2
    assert "only for classification" in capsys.readouterr().err


def test_evaluate_counts_per_class(run, capsys):
    capsys.readouterr()
    assert tool(evaluate, run, "--json", "--confusion", "--per_class") == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(metrics["per_class"]) == list(metrics["confusion"]) == list(CLASSES)
    assert all(sum(map(sum, counts)) == 40 for counts in metrics["confusion"].values())


@pytest.mark.parametrize("picture", ["predictions", "confusion", "data"])
def test_pictures_can_be_drawn(run, picture, tmp_path):
    assert tool(visualize, picture, run, "-o", tmp_path / "picture.png") == 0
    assert Image.open(tmp_path / "picture.png").width > 300


@pytest.mark.parametrize("picture", ["calibration", "gradcam"])
def test_pictures_for_classification_are_refused(run, picture, tmp_path, capsys):
    assert tool(visualize, picture, run, "-o", tmp_path / "picture.png") == 2
    assert "only for classification" in capsys.readouterr().err
