import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from engine.plots.curves import draw_curves, smoothed
from tests.running import metrics
from tools.pictures.curves import read_history


def drawn(runs, **options):
    draw_curves(figure := Figure(), runs, **options)
    return {axes.get_ylabel(): axes for axes in figure.axes}


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def logged(run, key, x, scale=1):
    return [(line[x], line[key] * scale) for line in metrics(run) if key in line]


@pytest.mark.parametrize(("x", "key", "label"), [("step", "step", "update"), ("epoch", "epoch", "epoch")])
def test_the_lines_are_the_numbers_of_metrics_jsonl(small_runs, x, key, label):
    run = small_runs["lenet"]
    panels = drawn({"run": read_history(run)}, x=x)
    assert list(panels) == ["loss", "acc@1 (%)", "learning rate"]
    train, valid = panels["loss"].lines
    assert points(train) == logged(run, "train/loss", key)
    assert points(valid) == logged(run, "valid/loss", key)
    train, valid = panels["acc@1 (%)"].lines
    assert points(train) == logged(run, "train/acc@1", key, 100)
    assert points(valid) == logged(run, "valid/acc@1", key, 100)
    assert [text.get_text() for text in panels["loss"].get_legend().get_texts()] == ["train", "valid"]
    assert points(panels["learning rate"].lines[0]) == logged(run, "train/lr", key)
    assert panels["loss"].get_xlabel() == label


def test_the_unit_of_time_fits_the_duration(small_runs):
    history = read_history(small_runs["lenet"])
    for factor, unit, seconds in ((1, "seconds of training", 1), (1e4, "hours of training", 3600)):
        longer = [{**line, "elapsed": line["elapsed"] * factor} for line in history]
        line = drawn({"run": longer}, x="time")["loss"].lines[0]
        assert line.axes.get_xlabel() == unit
        assert line.get_xdata()[0] == longer[0]["elapsed"] / seconds


def test_the_losses_of_auxiliary_heads_have_a_panel(small_runs):
    run = small_runs["googlenet"]
    axes = drawn({"run": read_history(run)})["loss of the auxiliary heads"]
    assert [points(line) for line in axes.lines] == [logged(run, f"train/loss_aux{i}", "step") for i in (1, 2)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["head 1", "head 2"]


def test_several_runs_are_drawn_in_different_colors(small_runs):
    runs = {name: read_history(small_runs[name]) for name in ("lenet", "resnet18", "vit")}
    panels = drawn(runs)
    lines = panels["acc@1 (%)"].lines
    assert [points(line) for line in lines[1::2]] == [logged(small_runs[name], "valid/acc@1", "step", 100) for name in runs]
    assert len({line.get_color() for line in lines}) == 3
    assert all(train.get_linewidth() < valid.get_linewidth() for train, valid in zip(lines[::2], lines[1::2], strict=True))
    (legend,) = panels["loss"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)


def test_smoothing_is_the_weighted_mean_of_the_values_so_far():
    values, weight = np.random.default_rng(0).normal(size=30), 0.8
    expected = []
    for n in range(1, 31):
        weights = weight ** np.arange(n - 1, -1, -1)
        expected.append((weights * values[:n]).sum() / weights.sum())
    np.testing.assert_allclose(smoothed(values.tolist(), weight), expected)
    assert smoothed([1.0, math.nan, 1.0], weight) == pytest.approx([1.0, 1.0, 1.0])


def test_smoothed_lines_are_drawn_over_the_pale_original(small_runs):
    history = read_history(small_runs["lenet"])
    pale, line, *_ = drawn({"run": history}, smoothing=0.5)["loss"].lines
    assert points(pale) == logged(small_runs["lenet"], "train/loss", "step")
    assert list(line.get_ydata()) == smoothed(list(pale.get_ydata()), 0.5)
    assert pale.get_alpha() < 1


def test_a_non_finite_loss_is_a_gap(tmp_path):
    lines = [{"step": step, "epoch": step, "elapsed": step, "train/loss": loss} for step, loss in ((1, 2.0), (2, None), (3, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (line,) = drawn({"run": read_history(tmp_path)})["loss"].lines
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]
