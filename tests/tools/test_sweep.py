import csv
import json
import re
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
from matplotlib.image import imread

from engine.config.command_line import run_tool
from engine.run.folder import committed_checkpoints
from tests.running import ROOT, metrics, results, run_command
from tools.sweep import main
from tools.sweeps.space import read_space

SHORT = ("--train.n_epochs", 2, "--train.num_threads", 1)
LR = ("--space", "train.optim.lr=log:0.001..0.3")
LONG = ("--train.n_steps", 120, "--train.eval_freq", 20, "--train.save_freq", 10, "--train.num_threads", 1)


def sweep(*argv):
    return run_tool(lambda: main([str(word) for word in argv]))


def table(folder):
    with (folder / "table.csv").open(newline="") as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


def start(*argv):
    command = [sys.executable, "tools/sweep.py", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run, step, process):
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if any(line["step"] >= step for line in (metrics(run) if (run / "metrics.jsonl").exists() else ())):
            return
        time.sleep(0.05)
    pytest.fail(f"{run} did not reach step {step}")


@pytest.fixture(scope="module")
def random_sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "random"
    argv = (*LR, "--space", "model.pdrop=0,0.2", "--search", "random", "--trials", 3, "-o", folder, *SHORT, "--no_prune")
    assert sweep(*argv, "--csv", folder / "table.csv", "--markdown", folder / "table.md") == 0
    return folder


@pytest.mark.slow
def test_the_table_agrees_with_the_runs(random_sweep):
    rows = table(random_sweep)
    assert sorted(rows) == [0, 1, 2]
    for number, row in rows.items():
        run = random_sweep / f"trial-{number:04d}"
        config = json.loads(json.dumps(_config(run)))
        assert float(row["valid/acc@1"]) == results(run)["best"]["valid/acc@1"]
        assert int(row["step"]) == results(run)["step"]
        assert float(row["train.optim.lr"]) == config["train"]["optim"]["lr"]
        assert float(row["model.pdrop"]) == config["model"]["pdrop"]
        assert 0.001 <= config["train"]["optim"]["lr"] <= 0.3
        assert config["train"]["n_epochs"] == 2
    best = next(iter(rows.values()))
    assert float(best["valid/acc@1"]) == max(float(row["valid/acc@1"]) for row in rows.values())
    assert "| trial-0000 |" in (random_sweep / "table.md").read_text()
    assert len({row["train.optim.lr"] for row in rows.values()}) == 3
    height, width, _ = imread(random_sweep / "history.png").shape
    assert width > height > 200


def _config(run):
    from engine.config import yaml12

    return yaml12.parse((run / "config.yaml").read_text())


@pytest.mark.slow
def test_more_trials_continue_the_sweep(random_sweep, capsys):
    argv = (*LR, "--space", "model.pdrop=0,0.2", "--search", "random", "-o", random_sweep, *SHORT, "--no_prune")
    assert sweep(*argv, "--trials", 4) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(trial-\d+): --", printed, re.MULTILINE) == ["trial-0003"]
    best = re.search(r"best: (trial-\d+), valid/acc@1 ([\d.]+) %\n  python main.py (.+)", printed)
    assert float(best[2]) == pytest.approx(100 * results(random_sweep / best[1])["best"]["valid/acc@1"], abs=0.01)
    assert "--train.n_epochs 2" in best[3]
    assert f"--train.optim.lr {_config(random_sweep / best[1])['train']['optim']['lr']}" in best[3]


@pytest.mark.slow
def test_a_grid_tries_each_combination_once(tmp_path):
    space = ("--space", "train.optim.lr=0.01..0.03..0.01", "--space", "train.optim.type=SGD,AdamW")
    folder = tmp_path / "grid"
    argv = ("--search", "grid", *space, "-o", folder, "--train.n_steps", 2, "--train.num_threads", 1)
    assert sweep(*argv, "--csv", folder / "table.csv") == 0
    tried = [(float(row["train.optim.lr"]), row["train.optim.type"]) for row in table(folder).values()]
    assert sorted(tried) == sorted(product((0.01, 0.02, 0.03), ("SGD", "AdamW")))


@pytest.mark.slow
def test_hopeless_trials_are_pruned(tmp_path, capsys):
    """With four good learning rates, and one that is too low to learn anything."""
    rates = "0.05,0.06,0.07,0.08,0.000001"
    argv = ("--search", "grid", "--space", f"train.optim.lr={rates}", "-o", tmp_path / "sweep", "--train.n_steps", 400)
    argv += ("--train.eval_freq", 20, "--train.num_threads", 1)
    assert sweep(*argv) == 0
    assert re.findall(r"^(trial-\d+): pruned", capsys.readouterr().out, re.MULTILINE) == ["trial-0004"]
    pruned = results(tmp_path / "sweep" / "trial-0004")
    assert pruned["status"] == "interrupted"
    assert 100 <= pruned["step"] < 400
    assert committed_checkpoints(tmp_path / "sweep" / "trial-0004")


@pytest.mark.slow
def test_two_processes_share_a_sweep_without_running_a_trial_twice(tmp_path):
    folder = tmp_path / "sweep"
    argv = (*LR, "--search", "random", "--trials", 4, "-o", folder, *SHORT, "--no_prune")
    processes = [start(*argv), start(*argv)]
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        printed.append(re.findall(r"^(trial-\d+): --", out, re.MULTILINE))
    assert all(printed), printed
    assert sorted(printed[0] + printed[1]) == [f"trial-{i:04d}" for i in range(4)]
    assert all(results(folder / f"trial-{i:04d}")["status"] == "completed" for i in range(4))
    assert sweep(*argv, "--csv", folder / "table.csv") == 0
    assert len({row["train.optim.lr"] for row in table(folder).values()}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_sweep_continues_its_running_trial(tmp_path, signum, capsys):
    folder, run = tmp_path / "sweep", tmp_path / "sweep" / "trial-0000"
    argv = (*LR, "--trials", 2, "-o", folder, *LONG, "--no_prune")
    process = start(*argv)
    wait_for_step(run, 20, process)
    process.send_signal(signum)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL)
    if signum == signal.SIGINT:
        assert err.strip() == "interrupted; the same command continues the sweep"
        assert results(run)["status"] == "interrupted"
    assert sweep(*argv, "--csv", folder / "table.csv") == 0
    assert sorted(table(folder)) == [0, 1]
    assert {row["status"] for row in table(folder).values()} == {"completed"}
    steps = [line["step"] for line in metrics(run) if "valid/acc@1" in line]
    assert steps == [20, 40, 60, 80, 100, 120]  # each once
    log = (folder / "trial-0000.log").read_text()
    assert log.count("training: lenet") == 1 or "resuming at step" in log


@pytest.mark.slow
def test_a_failed_trial_is_listed_with_its_reason_and_the_sweep_continues(tmp_path, capsys):
    argv = ("--search", "grid", "--space", "train.optim.lr=0.05,1e30", "-o", tmp_path / "sweep", *SHORT)
    assert sweep(*argv, "--csv", tmp_path / "table.csv") == 0
    printed = capsys.readouterr().out
    assert re.search(r"trial-0001: failed, failed with exit code 1: .*(loss|gradient)", printed), printed
    assert [row["status"] for row in table(tmp_path).values()] == ["completed", "failed"]


@pytest.mark.slow
def test_without_a_completed_trial_the_sweep_fails(tmp_path, capsys):
    argv = ("--space", "train.optim.lr=1e30,1e31", "--search", "grid", "-o", tmp_path / "sweep", *SHORT)
    assert sweep(*argv) == 1
    assert "no trial of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "--space KEY=VALUES says what to search"),
        (("--space", "train.optim.lr"), "expected KEY=a,b,c"),
        (("--space", "train.optim.rl=0.1,0.2"), "train.optim.rl"),
        (("--space", "train.n_epoch=1,2"), "did you mean train.n_epochs"),
        (("--space", "train.optim.lr=0.3..0.1"), "goes from low to high"),
        (("--space", "train.optim.lr=log:0..1"), "from a positive number"),
        (("--space", "train.optim.lr=log:0.1,1"), "log: is for a range"),
        (("--space", "train.optim.lr=a..b"), "of numbers"),
        (("--space", "train.optim.lr=-1..1"), "train.optim.lr"),
        (("--space", "train.optim.lr=[0.1"), "can't be read"),
        ((*LR, *LR), "given 2 times"),
        ((*LR, "--train.optim.lr", 0.1), "a key is searched, or given"),
        ((*LR, "--search", "grid"), "a grid needs values, or a range with a step"),
        ((*LR, "--trials", 0), "--trials must be at least 1"),
        ((*LR, "--minimize"), "--minimize"),
        ((*LR, "-c", "configs/nowhere.yaml"), "configs/nowhere.yaml"),
    ],
)
def test_a_mistake_is_reported_in_one_line_before_training(tmp_path, capsys, argv, message):
    assert sweep(*argv, "-o", tmp_path / "sweep", *SHORT) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert message in line
    assert not list(tmp_path.glob("sweep/trial-*"))


@pytest.fixture(scope="module")
def one_trial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "one"
    argv = ("--space", "model.pdrop=0,0.2", "--search", "random", "--trials", 1, "-o", folder)
    assert sweep(*LR, *argv, *SHORT) == 0
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--space", "train.optim.lr=log:0.001..1", "--space", "model.pdrop=0,0.2", "--search", "random"), "space"),
        ((*LR, "--space", "model.pdrop=0,0.2", "--search", "tpe"), "search"),
        ((*LR, "--space", "model.pdrop=0,0.2", "--search", "random", "--train.n_epochs", 3), "train.n_epochs"),
        ((*LR, "--space", "model.pdrop=0,0.2", "--search", "random", "--metric", "valid/loss", "--minimize"), "valid/loss"),
    ],
)
def test_another_search_in_the_same_folder_is_rejected_with_the_difference(one_trial, capsys, argv, message):
    argv = argv if "--train.n_epochs" in argv else (*argv, *SHORT[:2])
    assert sweep(*argv, "-o", one_trial, *SHORT[2:]) == 2
    line = capsys.readouterr().err.strip()
    assert f"{one_trial} holds a sweep with" in line
    assert message in line


@pytest.mark.slow
def test_an_unknown_metric_is_reported_with_the_known_ones(tmp_path, capsys):
    assert sweep(*LR, "--metric", "valid/acc", "-o", tmp_path / "sweep", *SHORT) == 2
    error = capsys.readouterr().err
    assert "--metric valid/acc" in error
    assert "valid/acc@1" in error


@pytest.mark.slow
def test_a_metric_can_be_minimized(tmp_path):
    argv = ("--space", "train.optim.lr=0.0001,0.05", "--search", "grid", "--metric", "valid/loss", "--minimize")
    assert sweep(*argv, "-o", tmp_path, *SHORT, "--csv", tmp_path / "table.csv") == 0
    rows = list(table(tmp_path).values())
    assert [row["train.optim.lr"] for row in rows] == ["0.05", "0.0001"]
    for row in rows:
        losses = [line["valid/loss"] for line in metrics(tmp_path / f"trial-{int(row['trial']):04d}") if "valid/loss" in line]
        assert float(row["valid/loss"]) == min(losses)


def test_an_invalid_study_file_is_reported(tmp_path, capsys):
    (tmp_path / "study.log").write_text("no study\n")
    assert sweep(*LR, "-o", tmp_path, *SHORT) == 1
    assert f"{tmp_path / 'study.log'} is no study" in capsys.readouterr().err


def test_runs_without_a_study_file_are_not_resumed_as_new_trials(tmp_path, capsys):
    (tmp_path / "trial-0000").mkdir()
    assert sweep(*LR, "-o", tmp_path, *SHORT) == 2
    assert f"{tmp_path / 'trial-0000'} is of a sweep whose study.log is gone" in capsys.readouterr().err


def test_without_optuna_the_error_tells_how_to_install_it():
    check = "import sys; sys.modules['optuna'] = None\nfrom importlib import util; import engine.config.command_line as c\n"
    check += "c.find_spec = lambda name: None if name == 'optuna' else util.find_spec(name)\n"
    check += "from tools.sweep import main; sys.exit(c.run_tool(lambda: main(['--space', 'train.optim.lr=0.1,0.2'])))"
    finished = run_command("python", "-c", check)
    assert finished.returncode == 1
    assert (
        finished.stderr
        == "error: sweep.py needs packages that are not installed: optuna; pip install -r requirements-extra.txt\n"
    )


def test_read_space_parses_ranges_steps_and_values():
    integers, floats, steps, values = read_space(["a.b=4..64", "c=0.5..2", "d=1..9..4", "e=[1,2],x,null"])
    assert (integers.low, integers.high, integers.step, integers.log) == (4, 64, None, False)
    assert isinstance(integers.low, int)
    assert (floats.low, floats.high) == (0.5, 2.0)
    assert steps.grid == [1, 5, 9]
    assert values.grid == ([1, 2], "x", None)
