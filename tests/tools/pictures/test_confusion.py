import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from engine.inference.trained import load_trained
from tests.tools.pictures.answers import answers
from tools.pictures.confusion import draw
from tools.pictures.subject import evaluate_with


@pytest.mark.parametrize("name", ["lenet", "vit"])
def test_the_matrix_sums_to_the_number_of_images_and_is_sklearns(small_runs, name):
    trained = load_trained(small_runs[name], {})
    metrics = evaluate_with(trained, "valid", "confusion")
    counts = np.array(metrics["confusion"])
    labels, probabilities = answers(trained, "valid")
    assert counts.sum() == metrics["count"] == len(labels)
    np.testing.assert_array_equal(counts, confusion_matrix(labels, probabilities.argmax(1), labels=range(10)))
    assert metrics["acc@1"] == counts.trace() / counts.sum()


def test_cells_show_counts_and_percentages_and_bars_the_accuracy_of_each_class():
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 6]])
    draw(figure := Figure(), counts, ("cat", "dog", "emu"), "title")
    matrix, bars, _ = figure.axes
    texts = {text.get_position(): text.get_text() for text in matrix.texts}
    assert texts == {(0, 0): "3\n75 %", (1, 0): "1\n25 %", (1, 2): "2\n25 %", (2, 2): "6\n75 %"}  # column, row
    assert matrix.images[0].get_array()[0].tolist() == [75, 25, 0]
    assert [text.get_text() for text in matrix.get_yticklabels()] == ["cat", "dog", "emu"]
    assert [bar.get_width() for bar in bars.containers[0]] == pytest.approx([75, np.nan, 75], nan_ok=True)
    assert [text.get_text() for text in bars.texts] == ["75", "no sample", "75"]


def test_a_hundred_classes_have_names_and_numbers_that_fit_their_cells():
    counts = np.random.default_rng(0).multinomial(100, [0.8, *([0.2 / 99] * 99)], 100)
    counts = np.array([np.roll(row, i) for i, row in enumerate(counts)])
    draw(figure := Figure(layout="constrained"), counts, [f"class number {i}" for i in range(100)], "title")
    figure.draw_without_rendering()
    matrix = figure.axes[0]
    assert len(matrix.get_yticklabels()) == 100
    assert len(matrix.texts) == np.count_nonzero(counts)
    cell = matrix.get_window_extent().width / 100
    assert max(text.get_window_extent().width for text in matrix.texts) < cell


def test_the_worst_of_a_thousand_classes_are_listed():
    counts = 50 * np.eye(1000, dtype=int)
    counts[7, 7], counts[7, 3] = 20, 30
    draw(figure := Figure(), counts, [f"class {i}" for i in range(1000)], "title")
    confused, worst = figure.axes
    assert confused.get_yticklabels()[0].get_text() == "class 7 taken for class 3"
    assert confused.containers[0][0].get_width() == 30
    assert worst.get_yticklabels()[0].get_text() == "class 7"
    assert worst.containers[0][0].get_width() == pytest.approx(40)
