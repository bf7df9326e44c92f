import numpy as np
import pytest
import torch

from engine.config.command_line import run_tool
from engine.inference.trained import load_trained
from tests.tools.pictures.answers import answers
from tools.pictures.predictions import find_mistakes
from tools.visualize import main


@pytest.fixture
def drawn(small_runs, monkeypatch):
    """Return the images, their titles and the colors of the titles instead of drawing them."""
    for name in ("lenet", "vit"):
        assert small_runs[name].is_dir()  # train it first: training also draws predictions
    seen = []

    def keep(figure, rows):
        (row,) = rows
        seen.extend(zip(row.images, row.titles, row.colors, strict=True))

    monkeypatch.setattr("tools.pictures.predictions.draw_images", keep)
    return seen


def predictions(*argv):
    return run_tool(lambda: main(["predictions", *map(str, argv)]))


def test_the_most_confident_mistakes_come_first(small_runs):
    trained = load_trained(small_runs["lenet"], {})
    labels, probabilities = answers(trained, "valid")
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    expected = wrong[np.argsort(-confidence[wrong])].tolist()
    assert len(expected) > 5
    assert find_mistakes(trained, "valid", 1000) == expected
    assert find_mistakes(trained, "valid", 3) == expected[:3]


def test_a_title_has_predicted_class_and_confidence_and_the_true_class_of_a_mistake(small_runs, tmp_path, drawn):
    trained = load_trained(small_runs["lenet"], {})
    labels, probabilities = answers(trained, "valid")
    wrong = find_mistakes(trained, "valid", 1)[0]
    right = int(np.flatnonzero(probabilities.argmax(1) == labels)[0])
    assert predictions(small_runs["lenet"], "--samples", wrong, right, "-o", tmp_path / "x.png") == 0
    (image, title_of_wrong, red), (_, title_of_right, black) = drawn
    scores = probabilities[wrong]
    assert title_of_wrong == f"{scores.argmax()}: {100 * scores.max():.0f} %\ntrue: {labels[wrong]}"
    assert title_of_right == f"{labels[right]}: {100 * probabilities[right].max():.0f} %"
    assert red != black == "black"
    original = trained.data.splits["valid"].images[wrong].float().unsqueeze(0) / 255
    resized = torch.nn.functional.interpolate(original, (28, 28), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(image, resized.clamp(0, 1), atol=1e-5, rtol=0)


def test_wrong_draws_mistakes_only(small_runs, tmp_path, drawn):
    assert predictions(small_runs["lenet"], "--wrong", "--n", 5, "-o", tmp_path / "x.png") == 0
    assert len(drawn) == 5
    assert all("true: " in title for _, title, _ in drawn)
    confidences = [int(title.partition(": ")[2].partition(" %")[0]) for _, title, _ in drawn]
    assert confidences == sorted(confidences, reverse=True)


def test_samples_are_spread_over_the_split(small_runs, tmp_path, drawn):
    assert predictions(small_runs["vit"], "--n", 4, "-o", tmp_path / "x.png") == 0
    trained = load_trained(small_runs["vit"], {})
    expected = trained.data.splits["valid"].images[[0, 16, 32, 48]].float() / 255
    torch.testing.assert_close(torch.stack([image for image, *_ in drawn]), expected, atol=1e-5, rtol=0)


def test_without_a_mistake_nothing_is_drawn(small_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.pictures.predictions.find_mistakes", lambda *args: [])
    assert predictions(small_runs["lenet"], "--wrong", "-o", tmp_path / "x.png") == 0
    assert "no mistake in valid" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()
