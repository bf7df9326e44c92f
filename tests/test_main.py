import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from tests.running import ROOT, metrics, results, run_command, run_main

SHORT = ("--train.n_steps", 20, "--train.batch_size", 64, "--train.eval_freq", 10)


def test_accelerate_launch_trains(tmp_path):
    finished = run_command("accelerate-launch", "main.py", "-c", "configs/lenet_digits.yaml", "-e", tmp_path / "run", *SHORT)
    assert finished.returncode == 0, finished.stderr
    assert results(tmp_path / "run")["status"] == "completed"
    assert "best valid acc@1" in finished.stdout


@pytest.mark.slow
def test_the_precision_of_the_launcher_is_used(tmp_path):
    argv = ("-c", "configs/lenet_digits.yaml", "-e", tmp_path / "run", *SHORT)
    finished = run_command("accelerate-launch", "--mixed_precision", "bf16", "main.py", *argv)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "bf16"
    evaluated = run_command("python", "tools/evaluate.py", tmp_path / "run", "--json")
    best = results(tmp_path / "run")["best"]
    assert json.loads(evaluated.stdout)["loss"] == best["valid/loss"]


def test_a_progress_bar_is_shown_on_a_terminal_but_not_logged(tmp_path):
    reading_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a new terminal has no columns
    argv = [sys.executable, "main.py", "-e", str(tmp_path / "run"), *map(str, SHORT)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(reading_end, 4096):
            output += chunk
    except OSError:  # raised on Linux when a pseudo-terminal is closed
        pass
    assert process.wait() == 0
    assert b"/20 [" in output
    assert "20/20 [" not in (tmp_path / "run" / "output.log").read_text()


def test_a_closed_stdout_does_not_end_the_training(tmp_path):
    argv = [sys.executable, "main.py", "-e", str(tmp_path / "run"), *map(str, SHORT)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    process.stderr.close()
    assert results(tmp_path / "run")["status"] == "completed"
    assert "stdout can't be written" in (tmp_path / "run" / "output.log").read_text()
    assert metrics(tmp_path / "run")[-1]["step"] == 20


def test_help_and_engine_config_do_not_import_torch():
    script = "import sys, main; main.parser().format_help(); import engine.config.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_help_lists_the_options():
    finished = run_command("python", "main.py", "--help")
    assert finished.returncode == 0
    for word in ("--config", "--exp_dir", "--resume", "--print_config", "--dry_run", "--train.optim.type Adam"):
        assert word in finished.stdout


def test_print_config_prints_a_config_that_runs(tmp_path, capsys):
    assert run_main("--print_config", "--train.optim.lr", "1e-3", *SHORT) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert run_main("-c", tmp_path / "printed.yaml", "-e", tmp_path / "run") == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 20


def test_print_config_checks_names_and_arguments(capsys):
    assert run_main("--print_config", "--model.pdrp", "0.1") == 2
    assert "did you mean model.pdrop?" in capsys.readouterr().err


def test_without_a_config_lenet_trains_on_digits(capsys):
    assert run_main("--print_config") == 0
    printed = capsys.readouterr().out
    assert "name: digits" in printed
    assert "name: lenet" in printed


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) < 80
