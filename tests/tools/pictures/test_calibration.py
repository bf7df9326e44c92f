import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from engine.config.command_line import run_tool
from engine.inference.trained import load_trained
from tests.tools.pictures.answers import answers
from tools.evaluate import main as evaluate
from tools.pictures.calibration import draw
from tools.pictures.subject import evaluate_with


@pytest.fixture(scope="module")
def of_lenet(small_runs):
    trained = load_trained(small_runs["lenet"], {})
    return evaluate_with(trained, "valid", "bins"), answers(trained, "valid")


def test_the_calibration_error_is_that_of_evaluate(of_lenet, small_runs, capsys):
    metrics, _ = of_lenet
    capsys.readouterr()
    assert run_tool(lambda: evaluate([str(small_runs["lenet"]), "--json"])) == 0
    assert metrics["ece"] == json.loads(capsys.readouterr().out.splitlines()[-1])["ece"]


def test_the_bins_are_those_of_numpy(of_lenet):
    metrics, (labels, probabilities) = of_lenet
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    number = np.minimum((confidence * 15).astype(int), 14)
    ece = 0.0
    for i, found in enumerate(metrics["bins"]):
        within = number == i
        if not within.any():
            assert found is None
            continue
        right = (predicted == labels)[within]
        assert found == pytest.approx({"confidence": confidence[within].mean(), "acc@1": right.mean(), "count": within.sum()})
        ece += within.mean() * abs(right.mean() - confidence[within].mean())
    assert metrics["ece"] == pytest.approx(ece)


def test_the_height_of_a_bar_is_the_accuracy_and_its_gap_ends_at_the_confidence(of_lenet):
    metrics, _ = of_lenet
    draw(figure := Figure(), metrics["bins"], "title")
    above, below = figure.axes
    filled = [found for found in metrics["bins"] if found is not None]
    accuracy, gaps = above.containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx([100 * found["acc@1"] for found in filled])
    assert [bar.get_y() + bar.get_height() for bar in gaps] == pytest.approx([100 * found["confidence"] for found in filled])
    assert sum(bar.get_height() for bar in below.containers[0]) == pytest.approx(100)


def test_predictions_include_test_time_augmentation(small_runs):
    trained = load_trained(small_runs["resnet18"], {"eval.tta": "flip"})
    images, labels = next(trained.loader("valid").batches())
    with torch.no_grad():
        logits = (trained.model(images) + trained.model(images.flip(-1))) / 2
        torch.testing.assert_close(trained.task.predict(trained.model, (images, labels)), logits.softmax(1))
