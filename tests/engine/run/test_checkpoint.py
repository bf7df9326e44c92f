import errno
import json
import os
import shutil
import stat

import pytest
import torch

from engine.config.errors import RunError
from engine.run.checkpoint import Checkpoints, InvalidCheckpoint, read_checkpoint
from engine.run.folder import find_checkpoint
from models.loading.pretrained import read_weights

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


def change_manifest(folder, **values):
    """Change values of a manifest and sign it; None removes one."""
    from engine.run.checkpoint import _manifest_digest

    manifest = json.loads((folder / "manifest.json").read_text()) | values
    manifest = {key: value for key, value in manifest.items() if value is not None and key != "digest"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": _manifest_digest(manifest)}))


class TestFormat:
    def test_an_older_manifest_without_format_and_config_is_read(self, checkpoints, tmp_path):
        checkpoints.save(5, WEIGHTS, STATE, best_step=5)
        change_manifest(tmp_path / "ckpt" / "step-000005", format=None, config=None)
        assert checkpoints.load("latest").config is None

    def test_a_newer_one_is_refused_by_name_and_no_older_checkpoint_is_used(self, checkpoints, tmp_path):
        checkpoints.save(5, WEIGHTS, STATE, best_step=5)
        checkpoints.save(6, WEIGHTS, STATE, best_step=5)
        change_manifest(tmp_path / "ckpt" / "step-000006", format=2)
        with pytest.raises(RunError, match=r"step-000006/manifest.json has format 2: a newer version of this program wrote it"):
            checkpoints.load("latest")

    def test_it_has_the_config(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, 1, {"train.optim.betas": (0.9, 0.99), "seed": 1})
        checkpoints.save(5, WEIGHTS, STATE, best_step=5)
        assert checkpoints.load("latest").config == {"train.optim.betas": [0.9, 0.99], "seed": 1}


def test_a_step_folder_without_a_manifest_is_set_aside_and_the_step_saved(checkpoints, tmp_path, caplog):
    folder = tmp_path / "ckpt" / "step-000005"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("mine")
    checkpoints.save(5, WEIGHTS, STATE, best_step=5)
    assert read_checkpoint(folder).step == 5
    assert (tmp_path / "ckpt" / "set-aside" / "step-000005-0" / "model.safetensors").read_text() == "mine"
    assert f"{folder} is set aside, because it has no manifest.json" in caplog.text


class TestWithoutLinks:
    """Disks that hold no symlinks, and copies that followed them."""

    def test_latest_and_best_are_text_files(self, plain_disk, checkpoints, tmp_path, caplog):
        for step in range(1, 6):
            checkpoints.save(step, WEIGHTS, STATE, best_step=2 if step > 1 else None)
        ckpt = tmp_path / "ckpt"
        assert ((ckpt / "latest").read_text(), (ckpt / "best").read_text()) == ("step-000005\n", "step-000002\n")
        assert checkpoints.load("best").step == 2
        assert find_checkpoint(tmp_path) == find_checkpoint(ckpt / "best") == ckpt / "step-000002"
        assert find_checkpoint(ckpt / "latest") == ckpt / "step-000005"
        assert checkpoints.last_good() == f"the last good checkpoint is {ckpt / 'step-000005'}"
        for path in (tmp_path, ckpt / "best"):
            assert read_weights(path).keys() == WEIGHTS.keys()
        assert caplog.text.count("latest and best are text files") == 1
        assert sorted(path.name for path in ckpt.iterdir()) == ["best", "latest", "step-000002", "step-000004", "step-000005"]

    def test_links_replace_text_files(self, checkpoints, tmp_path):
        checkpoints.save(1, WEIGHTS, STATE, best_step=1)
        for name in ("latest", "best"):
            (tmp_path / "ckpt" / name).unlink()
            (tmp_path / "ckpt" / name).write_text("step-000001")
        assert checkpoints.load("best").step == 1
        checkpoints.save(2, WEIGHTS, STATE, best_step=1)
        assert (tmp_path / "ckpt" / "latest").readlink().name == "step-000002"

    def test_links_that_became_folders_are_set_aside(self, checkpoints, tmp_path):
        checkpoints.save(1, WEIGHTS, STATE, best_step=1)
        shutil.copytree(tmp_path / "ckpt", tmp_path / "copy" / "ckpt")
        copy = Checkpoints(tmp_path / "copy", keep_last=2)
        assert copy.load("best").step == copy.load("latest").step == 1
        assert find_checkpoint(tmp_path / "copy" / "ckpt" / "best").name == "best"
        copy.save(2, WEIGHTS, STATE, best_step=1)
        ckpt = tmp_path / "copy" / "ckpt"
        assert [(ckpt / name).readlink().name for name in ("latest", "best")] == ["step-000002", "step-000001"]
        assert sorted(path.name for path in (ckpt / "set-aside").iterdir()) == ["best-0", "latest-0"]

    @pytest.mark.parametrize("target", ["/", "..", "../ckpt/step-000001", "step-999999", "step-000001/../.."])
    def test_a_link_out_of_the_folder_is_none(self, checkpoints, tmp_path, target):
        checkpoints.save(1, WEIGHTS, STATE, best_step=1)
        (tmp_path / "ckpt" / "best").unlink()
        (tmp_path / "ckpt" / "best").symlink_to(target)
        with pytest.raises(RunError, match="has no best"):
            checkpoints.load("best")


def test_an_error_of_a_folder_fsync_that_is_not_about_the_file_system_is_raised(checkpoints, monkeypatch):
    fsync = os.fsync

    def fail(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.save(1, WEIGHTS, STATE, best_step=1)
