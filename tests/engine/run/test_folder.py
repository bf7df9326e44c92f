"""Opening run folders: other people's files, full disks, and files that a run can do without."""

import errno
import importlib
import json
import resource
import shutil

import pytest

from engine.config.errors import RunError
from engine.plugins import require_run_plugins
from engine.run.folder import FILES, FOLDERS, RunFolder, find_checkpoint, find_resumption, read_config
from tests.faults.campaign import SMALL
from tests.running import run_main

SHORT = (*SMALL, "--train.n_steps", 4, "--train.batch_size", 64, "--train.save_freq", 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert run_main("-e", run, *SHORT) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [(), ("-r", "auto")])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(tmp_path, capsys, name, resume):
    path = tmp_path / name
    if name in FOLDERS:
        path.mkdir()
        path /= "mine"
    path.write_text("seed: 1\n")
    before = content(tmp_path)
    assert run_main("-e", tmp_path, *SHORT, *resume) == 2
    assert f"{tmp_path} has {name} and is not a run folder" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_a_start_that_fails_keeps_the_other_files_of_its_folder(tmp_path):
    for name in ("notes.txt", "environment.yaml", ".gitignore"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / ".gitignore").write_text("*")
    before = content(tmp_path)
    assert run_main("-e", tmp_path, "--data.name", "imagefolder", "--data.dataroot", tmp_path / "nowhere", *SHORT) == 1
    assert content(tmp_path) == before


def test_a_start_that_was_killed_before_its_config_was_written_can_be_repeated(tmp_path):
    folder = RunFolder.start(tmp_path / "run")
    folder.write_json("environment.json", {})
    (folder.path / "output.log").write_text("training\n")
    folder.close()
    assert run_main("-e", folder.path, "-r", "auto", *SHORT) == 0


def test_only_temporary_files_of_this_program_are_removed(run):
    kept = [".gitignore", ".latest-notes", ".step-1", ".step-000002.mine"]
    for name in (*kept, ".step-000002.77", ".step-000002.pruned", ".latest", ".best.5"):
        (run / "ckpt" / name).write_text("")
    for name in (".config.yaml.77", "figures/.curves.png.77", ".step-000002.77", ".vimrc.77"):
        (run / name).write_text("")
    RunFolder.reopen(run).close()
    assert sorted(path.name for path in (run / "ckpt").glob(".*")) == sorted(kept)
    assert sorted(path.name for path in run.glob(".*.*")) == [".step-000002.77", ".vimrc.77"]
    assert not (run / "figures" / ".curves.png.77").exists()


def test_step_folders_without_manifests_are_never_a_reason_to_start_again(run, capsys):
    for manifest in run.glob("ckpt/step-*/manifest.json"):
        manifest.unlink()
    before = content(run)
    assert run_main("-e", run, "-r", "auto", *SHORT) == 1
    assert "copy the manifests back to resume, or move the step folders away to start again" in capsys.readouterr().err
    assert content(run) == before


def test_a_checkpoint_behind_a_link_to_another_disk_belongs_to_its_run(run, tmp_path):
    (run / "ckpt").rename(tmp_path / "disk")
    (run / "ckpt").symlink_to(tmp_path / "disk")
    assert find_checkpoint(run).parent.parent == run
    assert find_checkpoint(run / "ckpt" / "latest") == run / "ckpt" / "step-000004"
    assert find_resumption(str(run / "ckpt" / "step-000002"), None).run_dir == run


class TestFullDisk:
    @pytest.mark.parametrize("n_bytes", [0, 100, 2000])
    def test_a_start_is_one_line_and_leaves_no_folder(self, tmp_path, capsys, n_bytes):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            assert run_main("-e", tmp_path / "run", *SHORT) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert capsys.readouterr().err == f"error: {tmp_path / 'run'} can't be written (File too large)\n"
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("opening", ["engine.train.add_log_file", "engine.train.MetricsLog", "engine.run.folder.take_lock"])
    def test_a_file_that_cannot_be_opened_is_one_line(self, tmp_path, capsys, monkeypatch, opening):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run"))

        module, _, name = opening.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), name, full)
        assert run_main("-e", tmp_path / "run", *SHORT) == 1
        assert capsys.readouterr().err == f"error: {tmp_path / 'run'} can't be written (No space left on device)\n"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    RunFolder.start(tmp_path / "run").close()
    assert "this file system has no locks" in caplog.text


@pytest.mark.parametrize("damaged", [b"", b"\0" * 100, b"{", b"[]"])
def test_a_damaged_environment_is_a_warning_and_replaced(run, capsys, damaged):
    (run / "environment.json").write_bytes(damaged)
    require_run_plugins(run)
    capsys.readouterr()
    assert run_main("-e", run, "-r", "latest", "--train.n_steps", 5) == 0
    assert json.loads((run / "environment.json").read_text())["earlier_sessions"] == []


@pytest.mark.parametrize("damaged", [b"", b"\0" * 100, b'{"a": 1}'])
def test_damaged_classes_are_a_warning_and_come_from_the_data(run, caplog, damaged):
    from engine.inference.trained import load_trained

    (run / "classes.json").write_bytes(damaged)
    assert load_trained(run, {}).classes == tuple("0123456789")
    assert f"{run / 'classes.json'}: it is" in caplog.text


@pytest.mark.parametrize("damaged", [b"", b"\0" * 100, b"- 1\n", b"a: [\n", b"\xff\xfe"])
def test_a_damaged_config_is_named_and_says_where_its_values_are(run, damaged):
    (run / "config.yaml").write_bytes(damaged)
    with pytest.raises(
        RunError, match=rf'{run / "config.yaml"}.*its values are in manifest.json of each checkpoint, under "config"'
    ):
        read_config(run)
    manifest = json.loads((run / "ckpt" / "latest" / "manifest.json").read_text())
    assert manifest["config"]["train.batch_size"] == 64


def test_a_run_on_a_disk_without_links_and_folder_fsync_is_resumed(plain_disk, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_main("-e", run, *SHORT, "--train.eval_freq", 2) == 0
    assert (run / "ckpt" / "latest").read_text() == "step-000004\n"
    assert run_main("-r", run / "ckpt" / "latest", "--train.n_steps", 6) == 0
    assert run_main("-e", run, "-r", "best", "--train.n_steps", 7) == 0
    assert (run / "ckpt" / "latest").read_text() == "step-000007\n"
    output = capsys.readouterr().out
    assert output.count("latest and best are text files") == 1
    assert output.count("this file system can't flush folders") <= 1


def test_a_checkpoint_that_was_copied_elsewhere_is_found(run, tmp_path):
    copy = shutil.copytree(run / "ckpt" / "step-000004", tmp_path / "other" / "ckpt" / "mine")
    (tmp_path / "other" / "figures").symlink_to(tmp_path)
    assert find_checkpoint(copy) == copy
