"""Logging to Weights & Biases and MLflow, without a network."""

import json
import sys

import pytest

from tests.faults.campaign import SMALL
from tests.running import metrics, results, run_main

ARGV = (*SMALL, "--train.n_steps", 12, "--train.print_freq", 3, "--train.save_freq", 6, "--train.eval_freq", 6)


@pytest.fixture
def store(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return uri


def test_mlflow_receives_the_metrics_and_the_config(store, tmp_path):
    from mlflow import MlflowClient

    run = tmp_path / "run"
    assert run_main("-e", run, *ARGV, "--tracking.to", "[mlflow]", "--tracking.project", "mine") == 0
    client = MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.run_id == json.loads((run / "trackers.json").read_text())["mlflow"]
    assert found.info.status == "FINISHED"
    assert found.data.params["train.optim.type"] == "SGD"
    for our_name, mlflow_name in (("train/loss", "train/loss"), ("valid/acc@1", "valid/acc_at_1")):
        history = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, mlflow_name)]
        assert history == [(line["step"], line[our_name]) for line in metrics(run) if our_name in line]


def test_resumed_run_keeps_its_tracker_ids(store, tmp_path):
    from mlflow import MlflowClient

    run = tmp_path / "run"
    argv = (*ARGV, "--tracking.to", "[mlflow,wandb]")
    assert run_main("-e", run, *argv, "--train.time_limit", 1e-9) == 143
    first = json.loads((run / "trackers.json").read_text())
    assert MlflowClient(store).get_run(first["mlflow"]).info.status == "KILLED"
    assert run_main("-e", run, "-r", "latest", "--train.time_limit", "null") == 0
    assert json.loads((run / "trackers.json").read_text()) == first
    client = MlflowClient(store)
    assert len(client.search_runs([client.get_run(first["mlflow"]).info.experiment_id])) == 1
    assert client.get_run(first["mlflow"]).info.status == "FINISHED"
    wandb_runs = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert wandb_runs
    assert all(name.endswith(first["wandb"]) for name in wandb_runs)


def test_unreachable_server_is_one_warning_and_training_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run_main("-e", tmp_path / "run", *ARGV, "--tracking.to", "[mlflow]") == 0
    assert capsys.readouterr().out.count("warning: tracking.to mlflow:") == 1
    assert results(tmp_path / "run")["status"] == "completed"


def test_tracker_is_disabled_once_its_server_is_lost(store, tmp_path, capsys, monkeypatch):
    from engine.run.trackers import MLflow

    record = MLflow.record

    def fail(self, step, values):
        if step > 3:
            raise ConnectionError("the server has gone")
        record(self, step, values)

    monkeypatch.setattr(MLflow, "record", fail)
    assert run_main("-e", tmp_path / "run", *ARGV, "--tracking.to", "[mlflow]") == 0
    assert capsys.readouterr().out.count("warning: tracking.to mlflow: the server has gone") == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 6, 9, 12]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_tracker_package_is_a_one_line_error_before_training(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert run_main("-e", tmp_path / "run", *ARGV, "--tracking.to", f"[{name}]") == 2
    line = capsys.readouterr().err.strip()
    assert line.endswith(f"tracking.to: {name} is not installed (--tracking.to); pip install {name}")
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_an_error_and_project_without_a_tracker_is_a_warning(tmp_path, capsys):
    assert run_main("-e", tmp_path / "run", *ARGV, "--tracking.to", "[comet]") == 2
    assert "wandb or mlflow" in capsys.readouterr().err
    assert run_main("-e", tmp_path / "run", *ARGV, "--tracking.project", "mine") == 0
    assert "tracking.project (--tracking.project) has no effect with tracking.to []" in capsys.readouterr().out


def test_crashed_run_is_marked_failed_in_mlflow(store, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from engine.update import Update

    run, update = tmp_path / "run", Update.__call__

    def crash(self, state, batch, **options):
        if state.step == 4:
            raise ZeroDivisionError("crashed on purpose")
        update(self, state, batch, **options)

    monkeypatch.setattr(Update, "__call__", crash)
    with pytest.raises(ZeroDivisionError):
        run_main("-e", run, *ARGV, "--tracking.to", "[mlflow]")
    run_id = json.loads((run / "trackers.json").read_text())["mlflow"]
    assert MlflowClient(store).get_run(run_id).info.status == "FAILED"
