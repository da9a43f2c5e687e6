"""MLflow behind the tracker contract; the only module that imports mlflow.

An explicit client and no "active run", so that two jobs in one process don't disturb each other.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
import torch
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from torch import nn

from raycompress.errors import TrackingError
from raycompress.tracking.address import masked_uri
from raycompress.tracking.base import Status

__all__ = ["MlflowTracker", "ui_command"]

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class MlflowTracker:
    """One MLflow run; see `Tracker`.

    Args:
        client: Bound to the tracking URI.
        uri: The tracking URI.
        experiment_id: Where runs are made.
        run_id: The run.
        key: The job's digest, by which its runs are found again.
    """

    def __init__(self, client: Any, uri: str, experiment_id: str, run_id: str, key: str) -> None:
        self._client, self._uri, self._experiment = client, uri, experiment_id
        self._run_id, self._key = run_id, key
        self._steps: dict[str, int] = {}

    @staticmethod
    def start(
        *, uri: str | None, experiment: str | None, output: Path, job_name: str, job_key: str
    ) -> MlflowTracker:
        """Starts the job's run, or continues the one that has its key.

        Raises:
            TrackingError: The store can't be used.
        """
        address = uri if uri is not None else f"sqlite:///{output}/mlflow.db"
        name = experiment if experiment is not None else job_name
        try:
            client = mlflow.MlflowClient(tracking_uri=address)
            found = client.get_experiment_by_name(name)
            if found is not None:
                experiment_id = found.experiment_id
            else:
                place = (output / "artifacts").absolute().as_uri() if uri is None else None
                experiment_id = client.create_experiment(name, artifact_location=place)
            if uri is None:
                with sqlite3.connect(output / "mlflow.db") as database:
                    database.execute("PRAGMA journal_mode=WAL")
                database.close()
            run_id = _find_or_make(
                client, experiment_id, job_name, {"raycompress.job": job_key}, "raycompress.trial"
            )
        except MlflowException as error:
            raise TrackingError(
                f"MLflow at {masked_uri(address)} can't be used: {str(error).splitlines()[0]}"
            ) from error
        return MlflowTracker(client, address, experiment_id, run_id, job_key)

    @property
    def run_id(self) -> str:
        """MLflow's run id."""
        return self._run_id

    def child(self, name: str) -> MlflowTracker:
        """The child run of a trial."""
        tags = {
            "raycompress.job": self._key,
            "raycompress.trial": name,
            "mlflow.parentRunId": self._run_id,
        }
        run_id = _find_or_make(self._client, self._experiment, name, tags, None)
        return MlflowTracker(self._client, self._uri, self._experiment, run_id, self._key)

    def log_params(self, params: Mapping[str, str | int | float | bool | None]) -> None:
        """Settings; a value that the run has already stays."""
        known = self._client.get_run(self._run_id).data.params
        new = [
            Param(_clean(name), str(value)[:6000])
            for name, value in params.items()
            if _clean(name) not in known
        ]
        self._client.log_batch(self._run_id, params=new)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Finite figures; a step that the run holds already is left out."""
        if step is not None and step <= self._last_step(next(iter(metrics), "")):
            return
        now = int(time.time() * 1000)
        batch = [
            Metric(_clean(name), float(value), now, step or 0)
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(batch), 1000):
            self._client.log_batch(self._run_id, metrics=batch[start : start + 1000])
        if step is not None:
            for name in metrics:
                self._steps[_clean(name)] = step

    def _last_step(self, name: str) -> int:
        name = _clean(name)
        if name not in self._steps:
            history = self._client.get_metric_history(self._run_id, name) if name else []
            self._steps[name] = max((metric.step for metric in history), default=-1)
        return self._steps[name]

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder of files."""
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), folder or None)
        else:
            self._client.log_artifact(self._run_id, str(path), folder or None)

    def describe(self, text: str) -> None:
        """Shown on the run's page."""
        self._client.set_tag(self._run_id, "mlflow.note.content", text[:5000])

    def log_model(
        self, model: nn.Module, example_inputs: tuple[Any, ...], registered_name: str | None = None
    ) -> str:
        """An exported program with a free batch size, as an MLflow model.

        MLflow's own flavour takes one input; a model of several is kept as a `.pt2` artifact.
        """
        model = model.cpu().eval()
        if len(example_inputs) == 1 and isinstance(example_inputs[0], torch.Tensor):
            with torch.inference_mode():
                output = model(*example_inputs)
            if isinstance(output, torch.Tensor):
                return self._log_mlflow_model(model, example_inputs[0], output, registered_name)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.pt2"
            torch.export.save(torch.export.export(model, example_inputs), path)
            self.log_artifact(path, "model")
        return f"runs:/{self._run_id}/model/model.pt2"

    def _log_mlflow_model(
        self,
        model: nn.Module,
        example: torch.Tensor,
        output: torch.Tensor,
        registered_name: str | None,
    ) -> str:
        import mlflow.pytorch
        from mlflow.models import infer_signature

        signature = infer_signature(example.numpy(), output.numpy())
        before = mlflow.get_tracking_uri()
        version = torch.__version__.split("+")[0]
        mlflow.set_tracking_uri(self._uri)
        try:
            with warnings.catch_warnings(), mlflow.start_run(run_id=self._run_id, nested=True):
                warnings.simplefilter("ignore")
                logged = mlflow.pytorch.log_model(
                    model,
                    name="model",
                    signature=signature,
                    input_example=example.numpy(),
                    pip_requirements=[f"torch=={version}", f"mlflow=={mlflow.__version__}"],
                    registered_model_name=registered_name,
                )
        finally:
            mlflow.set_tracking_uri(before)
        return str(logged.model_uri)

    def finish(self, status: Status) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run_id, status)


def _find_or_make(
    client: Any, experiment: str, name: str, tags: Mapping[str, str], without: str | None
) -> str:
    """The run that has all the tags (and lacks one), made if there is none."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    for run in client.search_runs([experiment], query):
        if without is None or without not in run.data.tags:
            client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
    run = client.create_run(experiment, run_name=name)
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return str(run.info.run_id)


def _clean(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def ui_command(output: Path, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The command that opens MLflow's UI on loopback for an output folder, and its environment."""
    database = output / "mlflow.db"
    if not database.exists():
        raise TrackingError(f"{output} holds no MLflow store; is it the output of a job?")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--default-artifact-root", (output / "artifacts").as_uri()]
    return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
