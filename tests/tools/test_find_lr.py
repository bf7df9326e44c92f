import pytest

from tests.faults.campaign import SMALL
from tests.running import results, run_command, run_main, run_tool
from tools import find_lr
from tools.find_lr import Curve

DIGITS = ("--train.num_threads", 1)


def suggested(capsys, *argv: object) -> float:
    assert run_tool(lambda: find_lr.main([str(word) for word in argv])) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.strip().startswith("--train.optim.lr ")
    return float(line.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_suggestion_for_lenet_on_digits_trains_well(tmp_path, capsys, optimizer):
    chosen = ("--train.optim.type", optimizer)
    lr = suggested(capsys, *DIGITS, *chosen, "-o", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert run_main("-e", tmp_path / "run", *SMALL, *chosen, "--train.optim.lr", lr, "--train.n_epochs", 12) == 0
    assert results(tmp_path / "run")["best"]["valid/acc@1"] > 0.97


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    assert Curve([0.01, 0.1, 1.0, 10.0], [2.0, 1.5, 0.5, 3.0]).suggestion == pytest.approx(0.1)


def test_the_rates_rise_by_a_constant_factor_until_the_loss_diverges():
    from engine import load_config
    from engine.build import build
    from engine.devices.accelerator import make_accelerator

    config = load_config(None, {"train.num_threads": 1})
    curve = find_lr.sweep(build(config, make_accelerator(config.train, deterministic=config.deterministic)), 1e-3, 1e3, 61)
    assert [b / a for a, b in zip(curve.rates, curve.rates[1:], strict=False)] == pytest.approx(
        [10 ** (6 / 60)] * (len(curve.rates) - 1)
    )
    assert len(curve.losses) == len(curve.rates) < 61


def test_the_suggestion_is_for_the_batch_size_of_scale_lr(tmp_path, capsys):
    plain = suggested(capsys, *DIGITS, "-o", tmp_path / "a.png", "--train.batch_size", 64)
    scaled = suggested(capsys, *DIGITS, "-o", tmp_path / "a.png", "--train.batch_size", 64, "--train.scale_lr", 32)
    assert scaled == pytest.approx(plain / 2, rel=0.05)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--lowest", 1, "--highest", 0.1), "--lowest 1 and --highest 0.1"),
        (("--n_updates", 3), "--n_updates 3: at least 20"),
        (("--train.optim.typo", 3), "train.optim.typo"),
        (("-o", "curve.txt"), "-o curve.txt"),
    ],
)
def test_a_mistake_is_a_one_line_error(capsys, argv, expected):
    assert run_tool(lambda: find_lr.main([str(word) for word in (*DIGITS, *argv)])) == 2
    line = capsys.readouterr().err.strip()
    assert expected in line
    assert len(line.splitlines()) == 1


def test_help_has_examples_and_needs_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['find_lr.py', '--help']\ntry: runpy.run_path('tools/find_lr.py', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    shown = run_command("python", "-c", code)
    assert shown.returncode == 0, shown.stderr
    assert "examples:" in shown.stdout
