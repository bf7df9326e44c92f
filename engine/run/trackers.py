"""Weights & Biases and MLflow, beside TensorBoard and metrics.jsonl, where a config names them and they are installed.

A resumed run goes on in the tracker's run, whose id is kept in the run folder. Where a server can't be reached, that is one
warning: metrics.jsonl has everything.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Protocol

from engine.config.errors import ConfigError
from engine.config.resolve import LoadedConfig, flatten, to_dict
from engine.run.folder import RunFolder, finite

log = logging.getLogger(__name__)

IDS = "trackers.json"


class ExternalTracker(Protocol):
    run_id: str

    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


def check_trackers(config: LoadedConfig) -> None:
    for name in config.tracking.to:
        if find_spec(name) is None:
            origin = config.origin("tracking.to").name
            raise ConfigError(f"tracking.to {name} ({origin}): {name} is not installed; pip install {name}")


class Trackers:
    """Those that the config names. One that fails is left alone from then on: no training ends for it."""

    def __init__(self, config: LoadedConfig, folder: RunFolder) -> None:
        path = folder.path / IDS
        ids = json.loads(path.read_text()) if path.is_file() and not folder.is_new else {}
        self.open: dict[str, ExternalTracker] = {}
        for name in config.tracking.to:
            self._try(name, lambda name=name: self.open.update({name: TRACKERS[name](config, folder, ids.get(name))}))
        if self.open:
            folder.write_json(IDS, ids | {name: tracker.run_id for name, tracker in self.open.items()})

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.record(step, finite(dict(metrics))))

    def close(self, status: str) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.close(status))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker's client or its server comes up with
            self.open.pop(name, None)
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("tracking.to %s: %s; the training goes on without it, metrics.jsonl has everything", name, said)


class WeightsAndBiases:
    def __init__(self, config: LoadedConfig, folder: RunFolder, run_id: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=config.tracking.project,
            name=folder.path.name,
            dir=folder.path,
            config=to_dict(config),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run_id = self.run.id

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "completed" else 1)


class MLflow:
    """At the place that MLFLOW_TRACKING_URI names; mlflow's own default without it."""

    STATUS = {"completed": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    MOST_PARAMS = 100  # in one request
    PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # with a server that is away

    def __init__(self, config: LoadedConfig, folder: RunFolder, run_id: str | None) -> None:
        for name, value in self.PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if run_id is not None:
            self.run_id = run_id
            self.client.update_run(run_id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(config.tracking.project)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(config.tracking.project)
        self.run_id = self.client.create_run(experiment_id, run_name=folder.path.name).info.run_id
        params = [Param(key, str(value)) for key, value in flatten(to_dict(config)).items()]
        for first in range(0, len(params), self.MOST_PARAMS):
            self.client.log_batch(self.run_id, params=params[first : first + self.MOST_PARAMS])

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """mlflow's names take no @: valid/acc@1 is valid/acc_at_1."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items() if value is not None]
        self.client.log_batch(self.run_id, metrics=found)

    def close(self, status: str) -> None:
        self.client.set_terminated(self.run_id, self.STATUS[status])


TRACKERS: dict[str, Callable[[LoadedConfig, RunFolder, str | None], ExternalTracker]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
