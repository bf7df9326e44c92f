"""What can go wrong while a run trains, and what it must say and leave."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from engine.run.checkpoint import read_checkpoint
from engine.run.folder import RunFolder, committed_checkpoints
from engine.run.metrics import MetricsLog
from tests.faults.campaign import IN_FILES, KILLED, SMALL, different, digest
from tests.faults.children import AtStep, FullDisk, InEvaluation, train
from tests.on_disk import write_image_folder
from tests.running import ROOT, metrics, results, run_command, run_main, untimed

pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run, *KILLED).codes == [0]
    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data"), n_classes=4, n_train=6)


class TestFullDisk:
    def test_a_save_that_fails_is_a_warning_and_the_run_goes_on_to_the_same_end(self, whole, tmp_path):
        run = tmp_path / "run"
        ended = train(run, *KILLED, fault=FullDisk(file_bytes=20_000, first=10, last=17))
        assert ended.codes == [0], ended.said
        assert "warning: step 12 could not be saved" in ended.said
        assert "the last good checkpoint is" in ended.said
        assert digest(run) == digest(whole)
        assert untimed(metrics(run)) == untimed(metrics(whole))
        assert [path.name for path in (run / "ckpt").iterdir() if path.name.startswith(".")] == []

    def test_three_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(self, tmp_path):
        run = tmp_path / "run"
        ended = train(run, *KILLED, "--train.save_freq", 2, "--train.eval_freq", 24, fault=FullDisk(20_000, first=5))
        assert ended.codes == [1]
        assert "error: step 10 could not be saved" in ended.said
        assert "the 3rd time in a row" in ended.said
        assert read_checkpoint((run / "ckpt" / "latest").resolve()).step == 4
        assert results(run)["status"] == "failed"

    def test_on_two_ranks_both_end(self, tmp_path):
        argv = (*KILLED, "--train.save_freq", 2, "--train.eval_freq", 24)
        ended = train(tmp_path / "run", *argv, fault=FullDisk(20_000, first=5), ranks=2)
        assert ended.codes == [1, 1]
        assert ended.said.count("the 3rd time in a row") == 1

    def test_lines_that_the_disk_did_not_take_are_written_when_it_does(self, tmp_path, caplog):
        tracker = MetricsLog(RunFolder(tmp_path, is_new=True), step=0, metrics_bytes=0)
        tracker.record(1, {"a": 1.0})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))  # in the middle of the second line
        try:
            tracker.record(2, {"a": 2.0})
            tracker.record(3, {"a": 3.0})
            assert [line["step"] for line in metrics(tmp_path)] == [1]
            with pytest.raises(OSError, match="too large"):  # so that no checkpoint counts on them
                tracker.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        tracker.record(4, {"a": 4.0})
        assert tracker.flush() == (tmp_path / "metrics.jsonl").stat().st_size
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
        assert "its lines are kept until it can" in caplog.text


def test_a_checkpoint_that_cannot_be_saved_at_a_signal_is_an_error(tmp_path):
    ended = train(tmp_path / "run", *KILLED, fault=SignalOnAFullDisk())
    assert ended.codes == [1]
    assert "could not be saved" in ended.said


class SignalOnAFullDisk:
    def __call__(self, run_dir):
        FullDisk(20_000)(run_dir)
        AtStep(4, "SIGTERM")(run_dir)


def test_a_signal_in_the_middle_of_an_evaluation_cuts_it_short_and_it_is_made_up_for(whole, tmp_path):
    run = tmp_path / "run"
    ended = train(run, *KILLED, fault=InEvaluation("SIGTERM"))
    assert ended.codes == [143], ended.said
    assert results(run)["step"] == 8
    assert [line["step"] for line in metrics(run)] == [4]
    assert train(run, "-r", "latest").codes == [0]
    assert list(different(run, whole)) == []


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    run = tmp_path / "run"
    assert train(run, *KILLED, fault=TwoSignals()).codes == [130]
    assert [path.name for path in committed_checkpoints(run)] == ["step-000006"]  # not that of the step it happened in
    assert not (run / "results.json").exists()


class TwoSignals:
    def __call__(self, run_dir):
        AtStep(7, "SIGINT")(run_dir)
        AtStep(7, "SIGINT")(run_dir)


def test_a_ctrl_c_which_reaches_every_rank_makes_all_save_the_same_step(tmp_path):
    run = tmp_path / "run"
    ended = train(run, *KILLED, fault=AtStep(7, "SIGINT"), ranks=2)
    assert ended.codes == [130, 130], ended.said
    step = results(run)["step"]
    assert results(run)["status"] == "interrupted"
    assert read_checkpoint((run / "ckpt" / "latest").resolve()).step == step
    assert 7 < step < 24


class TestNaNOnOneRank:
    def test_both_stop_and_no_checkpoint_holds_it(self, tmp_path):
        run = tmp_path / "run"
        ended = train(run, *KILLED, fault=AtStep(7, "nan", rank=1), ranks=2)
        assert ended.codes == [1, 1]
        assert ended.said.count("the training diverged") == 1
        assert [path.name for path in committed_checkpoints(run)] == ["step-000006"]
        weights = read_checkpoint(committed_checkpoints(run)[0]).weights
        assert all(value.isfinite().all() for value in weights.values())

    def test_both_skip_the_same_step_where_that_is_asked_for(self, tmp_path):
        run = tmp_path / "run"
        argv = (*KILLED, "--train.nonfinite", "skip")
        ended = train(run, *argv, fault=AtStep(7, "nan", rank=1), ranks=2)
        assert ended.codes == [0, 0], ended.said
        found = read_checkpoint((run / "ckpt" / "latest").resolve())
        assert ended.said.count("step 7: the gradient is no number; the update is left out") == 1
        assert all(value.isfinite().all() for value in found.weights.values())


class TestOtherProcesses:
    """Every process ends within the timeout and ten seconds, and what happened first is what is shown."""

    def test_a_rank_that_crashes_takes_the_other_with_it(self, tmp_path):
        begin = time.monotonic()
        ended = train(tmp_path / "run", *KILLED, fault=AtStep(7, "crash", rank=1), ranks=2, timeout=60)
        assert time.monotonic() - begin < 60 + 10
        assert ended.codes == [1, 1]
        assert "ZeroDivisionError: crashed on purpose" in ended.said
        assert "another rank has ended" in ended.said
        assert ended.said.index("ZeroDivisionError") < ended.said.index("another rank has ended")

    def test_a_rank_that_hangs_is_ended_by_itself_and_named(self, tmp_path):
        begin = time.monotonic()
        argv = (*KILLED, "--train.timeout", 4)
        ended = train(tmp_path / "run", *argv, fault=AtStep(7, "hang", rank=1), ranks=2, timeout=60)
        assert time.monotonic() - begin < 4 + 10 + 15  # and the start
        assert ended.codes == [1, 1]
        assert "error on rank 1: no progress for 4 seconds" in ended.said or "hasn't answered for 4 seconds" in ended.said

    def test_a_worker_that_is_killed_ends_the_run_with_one_line(self, images, tmp_path):
        argv = (*IN_FILES, "--data.dataroot", images, "--dataloader.num_workers", 2)
        ended = train(tmp_path / "run", *argv, fault=WorkerFails("killed"))
        assert ended.codes == [1], ended.said
        (error,) = [line for line in ended.said.splitlines() if line.startswith("error")]
        assert error.startswith("error: a worker that reads data has died")

    def test_a_worker_that_hangs_ends_the_run_with_one_line(self, images, tmp_path):
        argv = (*IN_FILES, "--data.dataroot", images, "--dataloader.num_workers", 2, "--train.timeout", 3)
        begin = time.monotonic()
        ended = train(tmp_path / "run", *argv, fault=WorkerFails("hangs"))
        assert time.monotonic() - begin < 3 + 10 + 15
        assert ended.codes == [1], ended.said
        assert "error: no worker has prepared a batch for 3 seconds" in ended.said
        assert "Traceback" not in ended.said


class WorkerFails:
    def __init__(self, how):
        self.how = how

    def __call__(self, run_dir):
        from datasets.pipeline.images import TrainingImages

        read = TrainingImages.__call__

        def faulty(this, request, out):
            if request.epoch == 1:
                if self.how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1000)
            read(this, request, out)

        TrainingImages.__call__ = faulty


def test_under_accelerate_launch_the_child_notices_that_its_parent_has_gone_saves_and_ends(tmp_path):
    run = tmp_path / "run"
    argv = ["main.py", "-e", run, *SMALL, "--train.n_steps", 100_000, "--train.print_freq", 50, "--train.save_freq", 100_000]
    argv += ["--train.eval_freq", 100_000]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in launcher.stdout:
        if "step 100/" in line:
            break
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 60
    while not (run / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert results(run)["status"] == "interrupted"
    assert read_checkpoint((run / "ckpt" / "latest").resolve()).step == results(run)["step"] >= 100


def test_memory_that_runs_out_is_said_with_what_to_try(tmp_path, capsys, monkeypatch):
    from engine.update import Update

    def too_much(self, state, batch, *, measure):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Update, "__call__", too_much)
    assert run_main("-e", tmp_path / "run", *KILLED) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert all(words in said for words in ("out of memory", "train.batch_size 64", "fp32", "--train.micro_batch_size 32"))


def test_memory_that_the_machine_does_not_have_is_found_out_by_torch(tmp_path, capsys, monkeypatch):
    from engine.update import Update

    monkeypatch.setattr(Update, "__call__", lambda self, state, batch, *, measure: torch.empty(1 << 60, dtype=torch.uint8))
    assert run_main("-e", tmp_path / "run", *KILLED) == 1
    assert "out of memory on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["missing", "unwritable"])
def test_without_tensorboard_there_is_one_warning_and_the_rest_is_whole(whole, tmp_path, capsys, monkeypatch, how):
    run = tmp_path / "run"
    if how == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        run.mkdir()
        (run / "tensorboard").symlink_to("/proc/no/folder/can/be/made/here")
    assert run_main("-e", run, *KILLED) == 0
    said = capsys.readouterr().out
    assert said.count("TensorBoard (") == 1
    assert untimed(metrics(run)) == untimed(metrics(whole))


def test_a_config_that_explodes_or_runs_code_is_refused_at_once(tmp_path):
    explodes = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (explodes, "seed: !!python/object/apply:os.system ['touch hacked']\n", "seed: 1\nseed: 2\n"):
        config = tmp_path / "config.yaml"
        config.write_text(text)
        begin = time.monotonic()
        assert run_main("-c", config, "-e", tmp_path / "run") == 2
        assert time.monotonic() - begin < 1
        assert not (ROOT / "hacked").exists()
        assert not (tmp_path / "run").exists()


@pytest.fixture(params=["refused", "silent"])
def no_network(request, monkeypatch, tmp_path):
    """Every connection is refused at once, or made and never answered."""
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        if request.param == "silent":
            proxy.listen()
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "")
        for name in ("TORCH_HOME", "HF_HOME"):  # nothing was downloaded before
            monkeypatch.setenv(name, str(tmp_path / name))
        yield


NEEDS = {
    "data": (("--data.name", "MNIST", "--data.dataroot", "nowhere"), "put the files into nowhere/MNIST/raw"),
    "torchvision's weights": (("--data.name", "shapes", "--data.n_train", 64, "--model.name", "resnet18"), "the file"),
    "timm's weights": (("--data.name", "shapes", "--data.n_train", 64, "--model.name", "timm/resnet18"), "the file"),
}


@pytest.mark.parametrize("what", NEEDS)
def test_without_a_network_one_line_says_soon_what_to_put_where(what, no_network, tmp_path):
    argv, says = NEEDS[what]
    pretrained = () if what == "data" else ("--model.pretrained", "true")
    begin = time.monotonic()
    ended = run_command("python", "main.py", "-e", tmp_path / "run", *argv, *pretrained, "--train.n_steps", 2, timeout=60)
    assert time.monotonic() - begin < 10 + 20  # and the start
    assert ended.returncode == 1
    assert says in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.fixture
def nobody(monkeypatch):
    """Root may write anywhere: run folders are opened with the rights of another user, as far as this is root."""
    if os.geteuid() != 0:
        return
    take = RunFolder._take_lock

    def as_nobody(this):
        os.seteuid(65534)
        try:
            take(this)
        finally:
            os.seteuid(0)

    monkeypatch.setattr(RunFolder, "_take_lock", as_nobody)


def test_a_run_folder_that_is_read_only_is_an_error_before_data_is_read(nobody, capsys, monkeypatch):
    monkeypatch.setattr("engine.build.read_data", lambda *args: pytest.fail("data was read"))
    with tempfile.TemporaryDirectory() as above:  # pytest's own folders are closed to others
        os.chmod(above, 0o755)
        run = Path(above) / "run"
        run.mkdir(mode=0o555)
        assert run_main("-e", run, *KILLED) == 1
    said = capsys.readouterr().err.strip()
    assert said == f"error: {run} can't be written (Permission denied)"


def test_the_state_of_a_run_says_how_it_ended(tmp_path):
    run = tmp_path / "run"
    assert train(run, *KILLED, fault=AtStep(7, "crash")).codes == [1]
    assert json.loads((run / "results.json").read_text())["why"] == "ZeroDivisionError: crashed on purpose"
