import json

import pytest

from engine.command_line import run_tool
from tests.running import results, run_command, run_main
from tools.evaluate import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    argv = ("--train.n_steps", 60, "--train.eval_freq", 20, "--train.save_freq", 20, "--data.valid_ratio", 0.1)
    assert run_main("-e", path, *argv) == 0
    return path


def evaluate(capsys, *argv):
    assert run_tool(lambda: main([str(word) for word in (*argv, "--json")])) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_folder_gives_the_number_that_its_training_reported_for_the_best(run, capsys):
    evaluated, best = evaluate(capsys, run), results(run)["best"]
    assert {f"valid/{name}": evaluated[name] for name in ("loss", "acc@1", "acc@5", "count")} == {
        name: value for name, value in best.items() if name != "step"
    }


def test_the_test_split_gives_what_was_reported_at_the_end(run, capsys):
    evaluated = evaluate(capsys, run, "--split", "test")
    assert evaluated["acc@1"] == results(run)["test"]["test/acc@1"]
    assert evaluated["count"] == 360


def test_a_checkpoint_folder_is_evaluated_itself(run, capsys):
    evaluated = evaluate(capsys, run / "ckpt" / "latest")
    assert evaluated["step"] == 60
    assert evaluated["loss"] == results(run)["last"]["valid/loss"]


def test_the_training_split_is_evaluated_without_augmentation(run, capsys):
    assert evaluate(capsys, run, "--split", "train") == evaluate(capsys, run, "--split", "train")
    assert evaluate(capsys, run, "--split", "train")["count"] == 1437 - 144


def test_the_program_prints_a_line(run):
    finished = run_command("python", "tools/evaluate.py", run)
    assert finished.returncode == 0, finished.stderr
    assert f"acc@1 {100 * results(run)['best']['valid/acc@1']:.2f} %" in finished.stdout


def test_a_path_that_is_no_run_is_one_line(tmp_path, capsys):
    assert run_tool(lambda: main([str(tmp_path)])) == 1
    assert "no run folder" in capsys.readouterr().err
