from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from engine import load_config
from engine.config.command_line import run_tool
from engine.optim.schedule import make_schedule
from tests.running import ROOT
from tools.pictures.schedule import draw_schedules, read_schedule
from tools.visualize import main

CIFAR, IMAGENET, SHAPES, STEPS = (
    ROOT / "configs" / f"{name}.yaml"
    for name in ("resnet18_cifar10", "resnet50_imagenet", "lenet_shapes", "efficientnet_b0_imagenet")
)
PHASES = {"train.sched.warmup_steps": 30, "train.sched.cooldown_steps": 50, "train.sched.eta_min": 0.02}


def visualize(*argv):
    return run_tool(lambda: main([str(word) for word in argv]))


def drawn(*paths, n_images=None, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    figure = Figure()
    draw_schedules(figure, [read_schedule(Path(path).stem, str(path), overrides, n_images) for path in paths])
    figure.draw_without_rendering()  # computes the layout
    return figure.axes[0]


def test_the_picture_is_written_and_its_path_printed(tmp_path, capsys):
    path = tmp_path / "new" / "lr.png"
    assert visualize("schedule", "-c", CIFAR, SHAPES, "-c", CIFAR, "-o", path, "--train.n_steps", 300) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = imread(path).shape
    assert width > 800
    assert 400 < height < 1200


def test_the_line_is_the_schedule_of_the_run():
    axes = drawn(CIFAR, train__n_steps=400, **PHASES)
    config = load_config(CIFAR, {"train.n_steps": 400, **PHASES})
    schedule = make_schedule(config.train.sched, 400, steps_per_epoch=1)
    line, warmup, cooldown, in_legend = axes.lines
    assert list(line.get_xdata()) == list(range(400))
    assert list(line.get_ydata()) == [schedule(step, config.train.optim.lr) for step in range(400)]
    assert list(warmup.get_xdata()) == list(range(31))
    assert list(cooldown.get_xdata()) == list(range(350, 400))
    assert "warm-up and cool-down" in in_legend.get_label()
    assert axes.get_xlabel() == "update"


def test_configs_have_different_colors():
    axes = drawn(CIFAR, SHAPES, train__n_steps=400)
    lines = [line for line in axes.lines if line.get_label().startswith(("resnet18_cifar10: Cosine", "lenet_shapes: Cosine"))]
    assert len({line.get_color() for line in lines}) == 2


def test_epochs_are_at_the_top_if_their_length_is_known():
    (above,) = drawn(SHAPES).child_axes
    assert above.get_xlabel() == "epoch (of 156 updates)"
    assert above.get_xlim()[1] == pytest.approx(10, abs=0.2)
    (above,) = drawn(SHAPES, data__n_train=2000, data__valid_ratio=0.5).child_axes
    assert above.get_xlabel() == "epoch (of 7 updates)"
    (above,) = drawn(CIFAR, n_images=50000, train__n_steps=400).child_axes
    assert above.get_xlabel() == "epoch (of 195 updates)"
    assert not drawn(CIFAR, train__n_steps=400).child_axes


def test_a_run_in_epochs_of_unknown_length_is_drawn_over_epochs():
    axes = drawn(IMAGENET, train__n_epochs=9)
    line, warmup, *_ = axes.lines
    assert line.get_xdata()[-1] == pytest.approx(9, abs=0.01)
    assert warmup.get_xdata()[-1] == pytest.approx(5, abs=0.01)
    assert axes.get_xlabel().startswith("epoch (drawn with 1,000 updates each")
    assert not axes.child_axes


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["-c", CIFAR, "--train.sched.type", "OneCycleLR", "--train.sched.warmup_steps", 5],
            "warmup_steps: 5 must be 0",
        ),
        (["-c", CIFAR, "--train.sched.kind", "OneCycleLR"], "train.sched.kind: no such key"),
        (["-c", CIFAR, "--model.name", "resnet19"], "model.name"),
        (["-c", "configs/resnet19_cifar10.yaml"], "no such config"),
        ([], "-c/--config"),
        (["-c", CIFAR, "-o", "lr.xyz"], "ends in .png"),
        (["-c", CIFAR, "--n_images", 0], "--n_images must be at least 1"),
        (["-c", CIFAR, "--n_images", 100], "train.batch_size 256 is more than the 100"),
        (["-c", STEPS], "train.n_epochs and train.sched.step_size"),
        (["-c", CIFAR, "--train.sched.warmup_epochs", 5], "train.n_steps and train.sched.warmup_epochs"),
        (["-c", CIFAR, IMAGENET], "resnet18_cifar10 is in updates"),
    ],
)
def test_a_mistake_is_a_one_line_error_and_writes_nothing(tmp_path, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(tmp_path)
    assert visualize("schedule", *argv) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in message
    assert not list(tmp_path.iterdir())


def test_a_key_without_effect_is_reported(tmp_path, capsys):
    assert visualize("schedule", "-c", CIFAR, "-o", tmp_path / "lr.png", "--train.sched.gamma", 0.5) == 0
    assert "train.sched.gamma (--train.sched.gamma) has no effect" in capsys.readouterr().err


def test_show_without_a_display_is_an_error_after_the_file_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.pyplot.get_backend", lambda: "agg")
    assert visualize("schedule", "-c", CIFAR, "-o", tmp_path / "lr.png", "--train.n_steps", 300, "--show") == 1
    assert "there is no display" in capsys.readouterr().err
    assert (tmp_path / "lr.png").is_file()
