"""MLflow behind the tracker contract; only the modules beside it import mlflow too.

An explicit client and no "active run", so that two jobs in one process don't disturb each other.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import posixpath
import re
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout may be JSON
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # between our own lines

import mlflow
from mlflow.entities import LoggedModelOutput, Metric, Param
from mlflow.exceptions import MlflowException
from torch import nn

from raycompress.artifacts.export import portable
from raycompress.errors import TrackingError, VerificationError
from raycompress.storage import Place
from raycompress.tracking.address import artifact_place, check, masked_uri
from raycompress.tracking.base import Point, Status
from raycompress.tracking.exclusive import alone
from raycompress.tracking.mlflow_store import guard, impatient
from raycompress.weights import Weights, digest_of_state

__all__ = ["MlflowTracker"]

WEIGHTS_TAG = "raycompress.weights"
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
        continued: The run was there before and may hold steps.
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        experiment_id: str,
        run_id: str,
        key: str,
        *,
        continued: bool = True,
    ) -> None:
        self._client, self._uri, self._experiment = client, uri, experiment_id
        self._run_id, self._key, self._continued = run_id, key, continued
        self._steps: dict[str, int] = {}
        self._children: dict[str, MlflowTracker] = {}
        self._open = True

    @staticmethod
    def start(
        *, uri: str | None, experiment: str | None, output: Place, job_name: str, job_key: str
    ) -> MlflowTracker:
        """Starts the job's run, or continues the one that has its key.

        Raises:
            TrackingError: The store can't be used.
        """
        address = uri if uri is not None else f"sqlite:///{output}/mlflow.db"
        name = experiment if experiment is not None else job_name
        check(address)
        patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
        with guard(address), impatient(patience), alone(address):
            client = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
            found = client.get_experiment_by_name(name)
            if found is not None and found.lifecycle_stage != "active":
                raise TrackingError(
                    f"MLflow at {masked_uri(address)}: experiment {name!r} is deleted; restore it "
                    f"(mlflow experiments restore -x {found.experiment_id}) or set "
                    "tracking.experiment to another name"
                )
            if found is not None:
                experiment_id = found.experiment_id
            else:
                experiment_id = _make_experiment(client, name, artifact_place(address, output))
            if uri is None:
                with closing(sqlite3.connect(f"{output}/mlflow.db")) as database:
                    database.execute("PRAGMA journal_mode=WAL")
            tags = {"raycompress.job": job_key}
            run_id, old = _find_or_make(client, experiment_id, job_name, tags, "raycompress.trial")
        return MlflowTracker(client, address, experiment_id, run_id, job_key, continued=old)

    @property
    def run_id(self) -> str:
        """MLflow's run id."""
        return self._run_id

    def child(self, name: str) -> MlflowTracker:
        """The child run of a trial."""
        if name not in self._children:
            tags = {
                "raycompress.job": self._key,
                "raycompress.trial": name,
                "mlflow.parentRunId": self._run_id,
            }
            with guard(self._uri):
                run_id, old = _find_or_make(self._client, self._experiment, name, tags, None)
            self._children[name] = MlflowTracker(
                self._client, self._uri, self._experiment, run_id, self._key, continued=old
            )
        return self._children[name]

    def log_params(self, params: Mapping[str, str | int | float | bool | None]) -> None:
        """Settings; a value that the run has already stays."""
        with guard(self._uri):
            known = self._client.get_run(self._run_id).data.params
            new = [
                Param(_clean(name), str(value)[:6000])
                for name, value in params.items()
                if _clean(name) not in known
            ]
            for start in range(0, len(new), 100):
                self._client.log_batch(self._run_id, params=new[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Finite figures; those of its own that the run has already are left out."""
        if step is not None:
            self.log_curve([(step, time.time(), metrics)])
            return
        with guard(self._uri):
            known = self._client.get_run(self._run_id).data.metrics if self._continued else {}
            self._log(
                [
                    metric
                    for metric in _metrics(0, time.time(), metrics)
                    if known.get(metric.key) != metric.value
                ]
            )

    def log_curve(self, points: Sequence[Point]) -> None:
        """Steps of finite figures; those that the run holds already are left out."""
        try:
            with guard(self._uri):
                new = [m for point in points for m in _metrics(*point)]
                self._log([m for m in new if m.step > self._last_step(m.key)])
        except TrackingError:
            self._steps, self._continued = {}, True  # what the store took of it, it knows
            raise
        for metric in new:
            self._steps[metric.key] = max(metric.step, self._steps[metric.key])

    def _log(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def _last_step(self, name: str) -> int:
        if name not in self._steps:
            history = self._client.get_metric_history(self._run_id, name) if self._continued else []
            self._steps[name] = max((metric.step for metric in history), default=-1)
        return self._steps[name]

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder of files."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with guard(self._uri):
            log(self._run_id, str(path), folder or None)

    def describe(self, text: str) -> None:
        """Shown on the run's page."""
        with guard(self._uri):
            self._client.set_tag(self._run_id, "mlflow.note.content", text[:5000])

    def log_model(
        self, model: nn.Module, example_inputs: tuple[Any, ...], registered_name: str | None = None
    ) -> str:
        """An exported program with a free batch size, as an MLflow model, loaded and compared.

        The same weights are kept and registered once for each run.

        Raises:
            RaycompressError: torch.export can't export the model.
            VerificationError: What is loaded isn't what was kept.
        """
        from raycompress.tracking.mlflow_torch import check_inputs, save_torch_model

        check_inputs(example_inputs)
        model = portable(model)
        # Class and weights, by which a model that was kept before is found.
        weights = digest_of_state(Weights(model.state_dict(), {}))
        weights = f"{type(model).__qualname__}:{weights}"

        def save(own: Path, own_id: str) -> None:
            save_torch_model(model, example_inputs, own, self._run_id, own_id)

        return self._log_model("model", weights, save, registered_name)

    def log_onnx(
        self,
        path: Path,
        example_inputs: tuple[Any, ...],
        weights: str,
        registered_name: str | None = None,
    ) -> str:
        """An ONNX file as MLflow's own kind of it, loaded and compared; kept once.

        Raises:
            VerificationError: What is loaded isn't what was kept.
        """
        from raycompress.tracking.mlflow_onnx import save_onnx_model

        def save(own: Path, own_id: str) -> None:
            save_onnx_model(path, example_inputs, own, self._run_id, own_id)

        return self._log_model("quantized", f"onnx:{weights}", save, registered_name)

    def _log_model(
        self,
        name: str,
        weights: str,
        save: Callable[[Path, str], None],
        registered_name: str | None,
    ) -> str:
        """Keeps and registers a model once for each run; see `_keep`."""
        with guard(self._uri):
            model_id = self._kept(weights) or self._keep(name, weights, save)
            if registered_name is not None:
                self._register(model_id, registered_name)
        return f"models:/{model_id}"

    def _kept(self, weights: str) -> str | None:
        outputs = self._client.get_run(self._run_id).outputs
        for output in outputs.model_outputs if outputs is not None else ():
            logged = self._client.get_logged_model(output.model_id)
            if logged.tags.get(WEIGHTS_TAG) == weights and logged.status == "READY":
                return str(output.model_id)
        return None

    def _keep(self, name: str, weights: str, save: Callable[[Path, str], None]) -> str:
        """Keeps what `save(folder, model id)` writes, and tells it by the weights from then on."""
        import mlflow.artifacts

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logged = self._client.create_logged_model(
                self._experiment, name, self._run_id, tags={WEIGHTS_TAG: weights}
            )
            status = "FAILED"
            try:
                own = Path(folder) / "model"
                save(own, logged.model_id)
                self._client.log_model_artifacts(logged.model_id, str(own))
                back = mlflow.artifacts.download_artifacts(
                    logged.artifact_location,
                    dst_path=tempfile.mkdtemp(dir=folder),
                    tracking_uri=self._uri,
                )
                # Compared, not loaded: what comes from a server may be anything.
                _check_same(own, Path(back))
                status = "READY"
            finally:
                self._client.finalize_logged_model(logged.model_id, status)
        self._client.log_outputs(self._run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return str(logged.model_id)

    def _register(self, model_id: str, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Its place, not "models:/...", which MLflow would look up in the process-wide store.
        source = self._client.get_logged_model(model_id).artifact_location
        versions = self._client.search_model_versions(f"name='{name}' and run_id='{self._run_id}'")
        if not any(v.source == source for v in versions):
            self._client.create_model_version(name, source, self._run_id, model_id=model_id)

    def finish(self, status: Status) -> None:
        """Ends the run, and the children that are still open, in the same state."""
        for child in self._children.values():
            if child._open:
                child.finish(status)
        with guard(self._uri):
            self._client.set_terminated(self._run_id, status)
        self._open = False


def _metrics(step: int, seconds: float, metrics: Mapping[str, float]) -> list[Metric]:
    return [
        Metric(_clean(name), float(value), int(seconds * 1000), step)
        for name, value in metrics.items()
        if math.isfinite(value)  # MLflow would store infinity as 1.8e308 and spoil the chart
    ]


def _check_same(own: Path, back: Path) -> None:
    """Raises a VerificationError unless each file came back as it was sent."""
    for path in sorted(p for p in own.rglob("*") if p.is_file()):
        name = path.relative_to(own)
        if not (back / name).is_file() or (back / name).read_bytes() != path.read_bytes():
            raise VerificationError(
                f"the tracking store gives back another {name} than it was given; the model in it "
                "can't be trusted"
            )


def _make_experiment(client: Any, name: str, place: str | None) -> str:
    """Makes an experiment, or takes the one that another job has made meanwhile."""
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)


def _find_or_make(
    client: Any, experiment: str, name: str, tags: Mapping[str, str], without: str | None
) -> tuple[str, bool]:
    """The run that has all the tags (and lacks one), and whether it was there before."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    for run in client.search_runs([experiment], query):
        if without is None or without not in run.data.tags:
            client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id), True
    run = client.create_run(experiment, run_name=name, tags=dict(tags))
    return str(run.info.run_id), False


def _clean(name: str) -> str:
    """A name that MLflow takes; what had to be cut is told apart by a digest."""
    clean = re.sub(r"[^\w\-. :/]", "_", name)
    clean = posixpath.normpath("/" + clean).lstrip("/") or "_"
    if len(clean) > 250:
        clean = f"{clean[:240]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return clean
