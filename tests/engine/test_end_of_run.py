"""After the last step: the test, results.json, figures and trackers. A run that is trained counts as completed."""

import importlib
import json
import os
import sys

import pytest

from engine.run.checkpoint import InvalidCheckpoint
from engine.tasks.classification import Classification
from tests.faults.campaign import SMALL
from tests.faults.children import At, run_script, train
from tests.on_disk import write_image_folder
from tests.running import metrics, results, run_main

SHORT = (*SMALL, "--train.n_steps", 8, "--train.batch_size", 64, "--train.print_freq", 4, "--train.eval_freq", 4)
WITH_TEST = (*SHORT, "--data.valid_ratio", 0.2)


@pytest.fixture
def module():
    """engine.train, whose name the package hides."""
    return importlib.import_module("engine.train")


class TestBestCheckpoint:
    @pytest.fixture(autouse=True)
    def damaged(self, monkeypatch):
        def refuse(path):
            raise InvalidCheckpoint(f"{path} is damaged")

        monkeypatch.setattr("engine.run.checkpoint.read_checkpoint", refuse)

    def test_a_damaged_one_is_not_needed_if_the_last_step_is_the_best(self, tmp_path, capsys):
        assert run_main("-e", tmp_path / "run", *WITH_TEST, "--train.eval_freq", 8) == 0
        (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert "step-000008 is damaged; the test uses the weights of the last step, which are the same" in warning
        assert results(tmp_path / "run")["best"]["step"] == 8
        assert results(tmp_path / "run")["test"]["test/count"] == 360

    def test_without_an_earlier_best_there_are_no_test_metrics(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert run_main("-e", run, *WITH_TEST, "--train.optim.lr", 1e-12) == 0  # all evaluations are alike, the first is the best
        (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert warning.startswith("warning: no test metrics, because the best checkpoint is lost: ")
        assert warning.endswith("step-000004 is damaged")
        assert results(run)["status"] == "completed"
        assert results(run)["best"]["step"] == 4
        assert results(run)["test"] == {}
        assert not any("test/loss" in line for line in metrics(run))


def test_a_best_step_that_was_not_saved_is_not_replaced_by_an_older_one(module, tmp_path, capsys, monkeypatch):
    test_best = module._test_best

    def with_an_older_link(run, outputs, agreement):
        best = outputs.folder.path / "ckpt" / "best"
        best.unlink()
        best.symlink_to("step-000008")
        return test_best(run, outputs, agreement)

    monkeypatch.setattr(module, "_test_best", with_an_older_link)
    argv = (*WITH_TEST, "--train.optim.lr", 1e-12, "--train.save_freq", 4)
    assert run_main("-e", tmp_path / "run", *argv) == 0
    assert "no test metrics, because the best checkpoint is lost: the best step 4 was not saved" in capsys.readouterr().out


class TestFigures:
    @pytest.mark.parametrize("method", ["draw", "predict"])
    def test_a_bug_in_a_task_is_a_warning_with_its_type(self, method, tmp_path, capsys, monkeypatch):
        def buggy(*args, **options):
            raise ZeroDivisionError("\nin a plugin\nmore")

        monkeypatch.setattr(Classification, method, buggy)
        assert run_main("-e", tmp_path / "run", *SHORT) == 0
        output = capsys.readouterr().out
        assert "warning: figures/predictions.png can't be drawn: ZeroDivisionError: in a plugin\n" in output
        assert results(tmp_path / "run")["status"] == "completed"
        assert [path.name for path in (tmp_path / "run" / "figures").iterdir()] == ["curves.png"]

    @pytest.mark.parametrize(("n_test", "n_drawn"), [(1, 1), (90, 32)])
    def test_two_ranks_draw_the_first_samples_of_the_whole_split(self, n_test, n_drawn, tmp_path):
        run = tmp_path / "run"  # with one sample, rank 0 has none
        argv = (*SHORT, "--data.name", "shapes", "--data.n_train", 128, "--data.n_test", n_test)
        ended = train(run, *argv, fault=CountDrawn(), ranks=2)
        assert ended.codes == [0, 0], ended.output
        assert f"drawn: {n_drawn}" in ended.output
        assert "can't be drawn" not in ended.output
        assert (run / "figures" / "predictions.png").exists()
        assert metrics(run)[-1]["valid/count"] == n_test

    def test_a_failed_figure_leaves_no_file(self, tmp_path):
        from engine.plots.style import new_figure, save_figure

        figure = new_figure()
        figure.savefig = lambda path, **options: (path.write_bytes(b"half"), 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_figure(figure, tmp_path / "figure.png")
        assert list(tmp_path.iterdir()) == []


class CountDrawn:
    def __call__(self, run_dir):
        draw = Classification.draw

        def counted(this, images, *args):
            print("drawn:", len(images))
            return draw(this, images, *args)

        Classification.draw = counted


def test_a_full_disk_after_the_last_step_is_warnings(tmp_path):
    ended = train(tmp_path / "run", *SHORT, fault=At("engine.train:_finish", "full disk"))
    assert ended.codes == [0], ended.output
    assert "Traceback" not in ended.output
    for name in ("results.json", "figures/predictions.png", "figures/curves.png", "TensorBoard's files"):
        assert ended.output.count(f"warning: {name} can't be") == 1
    assert "best valid acc@1" in ended.output


def test_class_folders_with_any_names_can_be_trained_on_and_drawn(tmp_path, capsys):
    data, run = write_image_folder(tmp_path / "data", n_classes=2), tmp_path / "run"
    for part in ("train", "val"):
        os.rename(data / part / "class_0", data / part / "$a_{$")
        os.rename(data / part / "class_1", os.fsencode(data / part) + b"/caf\xe9")  # not UTF-8
    argv = ("--data.name", "imagefolder", "--data.dataroot", data, "--data.img_size", 28, "--train.batch_size", 4)
    assert run_main("-e", run, *SHORT, *argv, "--train.n_steps", 2) == 0
    assert "warning" not in capsys.readouterr().out
    assert json.loads((run / "classes.json").read_text()) == ["$a_{$", "caf\\udce9"]
    assert (run / "figures" / "predictions.png").exists()
    evaluated = run_script("tools/evaluate.py", run, "--per_class")
    assert "caf\\udce9" in evaluated.stdout
    exported = run_script("tools/export.py", "torch", run, "-o", tmp_path / "model.pt2")
    assert exported.returncode == 0, exported.stderr


def test_a_path_that_is_not_utf8_can_be_logged(tmp_path, capsys):
    import logging

    from engine.run.log import add_log_file, remove_log_file, set_up_terminal

    set_up_terminal(is_main=True)
    handler = add_log_file(tmp_path / "output.log")
    logging.getLogger("engine").warning("%s is odd", os.fsdecode(b"caf\xe9"))
    remove_log_file(handler)
    assert (tmp_path / "output.log").read_text() == capsys.readouterr().out == "warning: caf\\udce9 is odd\n"


def test_the_packages_of_detection_are_missed_before_data_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # as if it were not installed
    monkeypatch.setattr("engine.build.read_data", lambda *args: pytest.fail("data were read"))
    argv = ("--task", "detection", "--data.name", "cocojson", "--data.dataroot", tmp_path, "--model.name", "resnet18")
    assert run_main("-e", tmp_path / "run", *SMALL, *argv, "--detection.head", "fasterrcnn") == 1
    message = capsys.readouterr().err.strip()
    expected = "task detection needs packages that are not installed: pycocotools; pip install -r requirements.txt"
    assert message == f"error: {expected}"
    assert not (tmp_path / "run").exists()
