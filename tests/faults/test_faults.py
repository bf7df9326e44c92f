"""Faults during training: the error message, the exit code and the files of the run."""

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
from tests.faults.campaign import DIGITS_RUN, FILES_RUN, SMALL, differences, digest
from tests.faults.children import AtStep, FullDisk, InEvaluation, train
from tests.on_disk import write_image_folder
from tests.running import ROOT, metrics, results, run_command, run_main, untimed

pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(run, *DIGITS_RUN).codes == [0]
    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data"), n_classes=4, n_train=6)


class TestFullDisk:
    def test_a_failed_save_is_a_warning_and_does_not_change_the_result(self, uninterrupted, tmp_path):
        run = tmp_path / "run"
        ended = train(run, *DIGITS_RUN, fault=FullDisk(file_bytes=20_000, first=10, last=17))
        assert ended.codes == [0], ended.output
        assert "warning: step 12 could not be saved" in ended.output
        assert "the last good checkpoint is" in ended.output
        assert digest(run) == digest(uninterrupted)
        assert untimed(metrics(run)) == untimed(metrics(uninterrupted))
        assert [path.name for path in (run / "ckpt").iterdir() if path.name.startswith(".")] == []

    def test_three_failed_saves_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(self, tmp_path):
        run = tmp_path / "run"
        ended = train(run, *DIGITS_RUN, "--train.save_freq", 2, "--train.eval_freq", 24, fault=FullDisk(20_000, first=5))
        assert ended.codes == [1]
        assert "error: step 10 could not be saved" in ended.output
        assert "the 3rd time in a row" in ended.output
        assert read_checkpoint((run / "ckpt" / "latest").resolve()).step == 4
        assert results(run)["status"] == "failed"

    def test_three_failed_saves_in_a_row_end_both_ranks(self, tmp_path):
        argv = (*DIGITS_RUN, "--train.save_freq", 2, "--train.eval_freq", 24)
        ended = train(tmp_path / "run", *argv, fault=FullDisk(20_000, first=5), ranks=2)
        assert ended.codes == [1, 1]
        assert ended.output.count("the 3rd time in a row") == 1

    def test_metrics_that_do_not_fit_on_the_disk_are_written_later(self, tmp_path, caplog):
        log = MetricsLog(RunFolder(tmp_path, is_new=True), step=0, metrics_bytes=0)
        log.record(1, {"a": 1.0})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))  # in the middle of the second line
        try:
            log.record(2, {"a": 2.0})
            log.record(3, {"a": 3.0})
            assert [line["step"] for line in metrics(tmp_path)] == [1]
            with pytest.raises(OSError, match="too large"):  # so no checkpoint is committed without them
                log.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.record(4, {"a": 4.0})
        assert log.flush() == (tmp_path / "metrics.jsonl").stat().st_size
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
        assert "its lines are kept until it can" in caplog.text


def test_a_failed_save_after_a_signal_is_an_error(tmp_path):
    ended = train(tmp_path / "run", *DIGITS_RUN, fault=SignalAndFullDisk())
    assert ended.codes == [1]
    assert "could not be saved" in ended.output


class SignalAndFullDisk:
    def __call__(self, run_dir):
        FullDisk(20_000)(run_dir)
        AtStep(4, "SIGTERM")(run_dir)


def test_a_signal_during_an_evaluation_stops_it_and_the_resumed_run_repeats_it(uninterrupted, tmp_path):
    run = tmp_path / "run"
    ended = train(run, *DIGITS_RUN, fault=InEvaluation("SIGTERM"))
    assert ended.codes == [143], ended.output
    assert results(run)["step"] == 8
    assert [line["step"] for line in metrics(run)] == [4]
    assert train(run, "-r", "latest").codes == [0]
    assert list(differences(run, uninterrupted)) == []


def test_a_second_ctrl_c_exits_at_once(tmp_path):
    run = tmp_path / "run"
    assert train(run, *DIGITS_RUN, fault=TwoSignals()).codes == [130]
    assert [path.name for path in committed_checkpoints(run)] == ["step-000006"]  # none for step 7
    assert not (run / "results.json").exists()


class TwoSignals:
    def __call__(self, run_dir):
        AtStep(7, "SIGINT")(run_dir)
        AtStep(7, "SIGINT")(run_dir)


def test_after_ctrl_c_on_every_rank_all_save_the_same_step(tmp_path):
    run = tmp_path / "run"
    ended = train(run, *DIGITS_RUN, fault=AtStep(7, "SIGINT"), ranks=2)
    assert ended.codes == [130, 130], ended.output
    step = results(run)["step"]
    assert results(run)["status"] == "interrupted"
    assert read_checkpoint((run / "ckpt" / "latest").resolve()).step == step
    assert 7 < step < 24


class TestNaNOnOneRank:
    def test_both_ranks_stop_and_no_checkpoint_contains_nan(self, tmp_path):
        run = tmp_path / "run"
        ended = train(run, *DIGITS_RUN, fault=AtStep(7, "nan", rank=1), ranks=2)
        assert ended.codes == [1, 1]
        assert ended.output.count("the training diverged") == 1
        assert [path.name for path in committed_checkpoints(run)] == ["step-000006"]
        weights = read_checkpoint(committed_checkpoints(run)[0]).weights
        assert all(value.isfinite().all() for value in weights.values())

    def test_both_ranks_skip_the_same_step_with_nonfinite_skip(self, tmp_path):
        run = tmp_path / "run"
        argv = (*DIGITS_RUN, "--train.nonfinite", "skip")
        ended = train(run, *argv, fault=AtStep(7, "nan", rank=1), ranks=2)
        assert ended.codes == [0, 0], ended.output
        checkpoint = read_checkpoint((run / "ckpt" / "latest").resolve())
        assert ended.output.count("step 7: non-finite gradient; skipping this update") == 1
        assert all(value.isfinite().all() for value in checkpoint.weights.values())


class TestFailingProcesses:
    """Every process ends, instead of waiting for the one that failed, and the first error is printed."""

    def test_a_crashed_rank_ends_the_other_rank(self, tmp_path):
        ended = train(tmp_path / "run", *DIGITS_RUN, fault=AtStep(7, "crash", rank=1), ranks=2)
        assert ended.codes == [1, 1]
        assert "ZeroDivisionError: crashed on purpose" in ended.output
        assert "another rank has ended" in ended.output
        assert ended.output.index("ZeroDivisionError") < ended.output.index("another rank has ended")

    def test_a_hanging_rank_ends_itself_and_is_named(self, tmp_path):
        argv = (*DIGITS_RUN, "--train.timeout", 4)
        ended = train(tmp_path / "run", *argv, fault=AtStep(7, "hang", rank=1), ranks=2)
        assert ended.codes == [1, 1]
        assert "error on rank 1: no progress for 4 seconds" in ended.output or "hasn't answered for 4 seconds" in ended.output

    def test_a_killed_worker_ends_the_run_with_a_one_line_error(self, images, tmp_path):
        argv = (*FILES_RUN, "--data.dataroot", images, "--dataloader.num_workers", 2)
        ended = train(tmp_path / "run", *argv, fault=WorkerFails("killed"))
        assert ended.codes == [1], ended.output
        (error,) = [line for line in ended.output.splitlines() if line.startswith("error")]
        assert error.startswith("error: a worker that reads data has died")

    def test_a_hanging_worker_ends_the_run_with_a_one_line_error(self, images, tmp_path):
        argv = (*FILES_RUN, "--data.dataroot", images, "--dataloader.num_workers", 2, "--train.timeout", 3)
        ended = train(tmp_path / "run", *argv, fault=WorkerFails("hangs"))
        assert ended.codes == [1], ended.output
        assert "error: no worker has prepared a batch for 3 seconds" in ended.output
        assert "Traceback" not in ended.output


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


def test_a_training_saves_and_exits_when_accelerate_launch_is_terminated(tmp_path):
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


def test_out_of_memory_is_a_one_line_error_with_suggestions(tmp_path, capsys, monkeypatch):
    from engine.update import Update

    def out_of_memory(self, state, batch, *, measure):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Update, "__call__", out_of_memory)
    assert run_main("-e", tmp_path / "run", *DIGITS_RUN) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(words in message for words in ("out of memory", "train.batch_size 64", "fp32", "--train.micro_batch_size 32"))


def test_an_allocation_larger_than_the_memory_is_reported_as_out_of_memory(tmp_path, capsys, monkeypatch):
    from engine.update import Update

    monkeypatch.setattr(Update, "__call__", lambda self, state, batch, *, measure: torch.empty(1 << 60, dtype=torch.uint8))
    assert run_main("-e", tmp_path / "run", *DIGITS_RUN) == 1
    assert "out of memory on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["missing", "unwritable"])
def test_without_tensorboard_there_is_one_warning_and_the_metrics_are_complete(uninterrupted, tmp_path, capsys, monkeypatch, how):
    run = tmp_path / "run"
    if how == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", refuse_to_write)
    assert run_main("-e", run, *DIGITS_RUN) == 0
    output = capsys.readouterr().out
    assert output.count("TensorBoard (") == 1
    assert untimed(metrics(run)) == untimed(metrics(uninterrupted))


def refuse_to_write(*args, **kwargs):
    raise OSError(30, "Read-only file system")


@pytest.mark.timeout(60)  # expanding the aliases would fill the memory
def test_a_config_with_exploding_aliases_code_or_duplicate_keys_is_refused(tmp_path):
    exploding = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (exploding, "seed: !!python/object/apply:os.system ['touch hacked']\n", "seed: 1\nseed: 2\n"):
        config = tmp_path / "config.yaml"
        config.write_text(text)
        assert run_main("-c", config, "-e", tmp_path / "run") == 2
        assert not (ROOT / "hacked").exists()
        assert not (tmp_path / "run").exists()


@pytest.fixture(params=["refused", pytest.param("silent", marks=pytest.mark.slow)])
def no_network(request, monkeypatch, tmp_path):
    """Refuse every connection, or accept it and never answer."""
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        if request.param == "silent":
            proxy.listen()
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "")
        for name in ("TORCH_HOME", "HF_HOME"):  # empty caches
            monkeypatch.setenv(name, str(tmp_path / name))
        yield


DOWNLOADS = {
    "data": (("--data.name", "MNIST", "--data.dataroot", "nowhere"), "put the files into nowhere/MNIST/raw"),
    "torchvision's weights": (("--data.name", "shapes", "--data.n_train", 64, "--model.name", "resnet18"), "the file"),
    "timm's weights": (("--data.name", "shapes", "--data.n_train", 64, "--model.name", "timm/resnet18"), "the file"),
}


@pytest.mark.parametrize("what", DOWNLOADS)
def test_without_a_network_a_one_line_error_says_which_files_to_put_where(what, no_network, tmp_path):
    argv, expected = DOWNLOADS[what]
    pretrained = () if what == "data" else ("--model.pretrained", "true")
    ended = run_command("python", "main.py", "-e", tmp_path / "run", *argv, *pretrained, "--train.n_steps", 2)
    assert ended.returncode == 1
    assert expected in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.fixture
def without_root(monkeypatch):
    """Open run folders as another user if the tests run as root, who may write anywhere."""
    if os.geteuid() != 0:
        return
    take_lock = RunFolder._take_lock

    def take_lock_as_nobody(this):
        os.seteuid(65534)
        try:
            take_lock(this)
        finally:
            os.seteuid(0)

    monkeypatch.setattr(RunFolder, "_take_lock", take_lock_as_nobody)


def test_a_read_only_run_folder_is_an_error_before_data_is_read(without_root, capsys, monkeypatch):
    monkeypatch.setattr("engine.build.read_data", lambda *args: pytest.fail("data was read"))
    with tempfile.TemporaryDirectory() as parent:  # other users can't enter pytest's folders
        os.chmod(parent, 0o755)
        run = Path(parent) / "run"
        run.mkdir(mode=0o555)
        assert run_main("-e", run, *DIGITS_RUN) == 1
    message = capsys.readouterr().err.strip()
    assert message == f"error: {run} can't be written (Permission denied)"


def test_results_json_has_the_reason_of_a_failure(tmp_path):
    run = tmp_path / "run"
    assert train(run, *DIGITS_RUN, fault=AtStep(7, "crash")).codes == [1]
    assert json.loads((run / "results.json").read_text())["why"] == "ZeroDivisionError: crashed on purpose"
