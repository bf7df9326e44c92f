"""Weights & Biases and MLflow, in addition to TensorBoard and metrics.jsonl, if the config names them.

A resumed run continues the tracker's run, whose id is kept in the run folder. A server that can't be reached costs one warning:
metrics.jsonl has everything.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from engine.config.schema import TrackingConfig, flatten
from engine.run.folder import RunFolder, finite, read_replaceable

log = logging.getLogger(__name__)

IDS = "trackers.json"
Settings = Mapping[str, Any]  # the whole config, as plain values


class Trackers:
    """The trackers that the config names. One that fails is not called again, and the training goes on."""

    def __init__(self, tracking: TrackingConfig, settings: Settings, folder: RunFolder) -> None:
        ids = {} if folder.is_new else read_replaceable(folder.path, IDS, dict)
        self.open: dict[str, WeightsAndBiases | MLflow] = {}

        def start(name: str) -> None:
            self.open[name] = TRACKERS[name](tracking.project, settings, folder, ids.get(name))

        for name in tracking.to:
            self._try(name, partial(start, name))
        if self.open:
            folder.write_json(IDS, ids | {name: tracker.run_id for name, tracker in self.open.items()})

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, partial(tracker.record, step, finite(dict(metrics))))

    def close(self, status: str) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, partial(tracker.close, status))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker's client or its server raises
            self.open.pop(name, None)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("tracking.to %s: %s; the training goes on without it, metrics.jsonl has everything", name, reason)


class WeightsAndBiases:
    def __init__(self, project: str, settings: Settings, folder: RunFolder, run_id: str | None) -> None:
        import wandb

        options: dict[str, Any] = {"id": run_id, "resume": "allow", "settings": wandb.Settings(silent=True, console="off")}
        self.run = wandb.init(project=project, name=folder.path.name, dir=folder.path, config=dict(settings), **options)
        self.run_id = self.run.id

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "completed" else 1)


class MLflow:
    """Logs to the server or folder that MLFLOW_TRACKING_URI names, or to mlflow's default."""

    STATUS = {"completed": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    MAX_PARAMS = 100  # in one request
    PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # with a server that does not answer

    def __init__(self, project: str, settings: Settings, folder: RunFolder, run_id: str | None) -> None:
        for name, value in self.PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if run_id is not None:
            self.run_id = run_id
            self.client.update_run(run_id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(project)
        self.run_id = self.client.create_run(experiment_id, run_name=folder.path.name).info.run_id
        params = [Param(key, str(value)) for key, value in flatten(settings).items()]
        for first in range(0, len(params), self.MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[first : first + self.MAX_PARAMS])

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log a line. mlflow does not allow @ in a name: valid/acc@1 becomes valid/acc_at_1."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items() if value is not None]
        self.client.log_batch(self.run_id, metrics=found)

    def close(self, status: str) -> None:
        self.client.set_terminated(self.run_id, self.STATUS[status])


TRACKERS: dict[str, type[WeightsAndBiases] | type[MLflow]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}
