import json
import os

import pytest
import torch

from engine.config.errors import RunError
from engine.run.checkpoint import Checkpoints, InvalidCheckpoint, read_checkpoint

WEIGHTS = {"w": torch.arange(12.0).view(3, 4), "n": torch.tensor(3)}
STATE = {"step": 5, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, keep_last=2)


def test_checkpoint_round_trips(checkpoints):
    checkpoints.save(5, WEIGHTS, STATE, best_step=5)
    read = checkpoints.load("latest")
    assert read.step == 5
    assert all(torch.equal(read.weights[name], WEIGHTS[name]) for name in WEIGHTS)
    assert read.train_state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_every_flipped_byte_is_detected(checkpoints, tmp_path):
    checkpoints.save(5, WEIGHTS, STATE, best_step=5)
    folder = tmp_path / "ckpt" / "step-000005"
    n_flipped = 0
    for path in folder.iterdir():
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 60)):
            damaged = bytearray(content)
            damaged[position] ^= 0x20
            path.write_bytes(damaged)
            with pytest.raises(InvalidCheckpoint):
                read_checkpoint(folder)
            n_flipped += 1
        path.write_bytes(content)
    assert n_flipped > 150
    assert read_checkpoint(folder).step == 5


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_file_is_logged_and_the_previous_checkpoint_is_loaded(checkpoints, tmp_path, caplog, name, damage):
    checkpoints.save(5, WEIGHTS, STATE, best_step=5)
    checkpoints.save(6, WEIGHTS, STATE, best_step=5)
    path = tmp_path / "ckpt" / "step-000006" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -10 if damage == "truncated" else 0])
    assert checkpoints.load("latest").step == 5
    if (name, damage) != ("manifest.json", "missing"):  # without a manifest the checkpoint was never committed
        assert name in caplog.text


def test_pickle_that_runs_code_is_an_error_even_with_a_valid_manifest(checkpoints, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    checkpoints.save(5, WEIGHTS, STATE, best_step=5)
    folder = tmp_path / "ckpt" / "step-000005"
    torch.save(Payload(), folder / "train_state.pt")
    from engine.run.checkpoint import _manifest_digest, hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"]["train_state.pt"] = hashlib.sha256((folder / "train_state.pt").read_bytes()).hexdigest()
    manifest["digest"] = _manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidCheckpoint, match="refused"):
        read_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_committed_step_is_never_rewritten(checkpoints, tmp_path):
    checkpoints.save(5, WEIGHTS, STATE, best_step=5)
    before = (tmp_path / "ckpt" / "step-000005" / "model.safetensors").stat()
    checkpoints.save(5, {"w": torch.zeros(1)}, STATE, best_step=5)
    after = (tmp_path / "ckpt" / "step-000005" / "model.safetensors").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_last_and_best_checkpoints_are_kept(checkpoints, tmp_path):
    for step in range(1, 7):
        checkpoints.save(step, WEIGHTS, STATE, best_step=2 if step >= 2 else None)
    assert sorted(path.name for path in (tmp_path / "ckpt").glob("step-*")) == ["step-000002", "step-000005", "step-000006"]
    assert (tmp_path / "ckpt" / "latest").readlink().name == "step-000006"
    assert (tmp_path / "ckpt" / "best").readlink().name == "step-000002"


def test_failed_write_keeps_the_last_checkpoint_and_no_temporary_directory(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(5, WEIGHTS, STATE, best_step=5)

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(6, WEIGHTS, STATE, best_step=6)
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["best", "latest", "step-000005"]
    assert checkpoints.load("latest").step == 5


def test_tied_weights_round_trip(checkpoints):
    tied = torch.ones(3, 3)
    checkpoints.save(1, {"a": tied, "b": tied, "c": tied.t()}, STATE, best_step=None)
    assert checkpoints.load("latest").weights.keys() == {"a", "b", "c"}


def test_no_valid_checkpoint_is_an_error(checkpoints):
    with pytest.raises(RunError, match="no valid checkpoint"):
        checkpoints.load("latest")
