"""Where a job's results go: files below the output, figures, and the tracking store."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet

from raycompress.artifacts import save
from raycompress.config import JobConfig
from raycompress.errors import (
    ArtifactError,
    RaycompressError,
    TrackingError,
    UnpublishedJob,
    VerificationError,
)
from raycompress.hiding import hidden
from raycompress.ledger import answers
from raycompress.measured import final_model
from raycompress.output import own_id
from raycompress.pareto import Point
from raycompress.plan import Plan
from raycompress.points import read_table
from raycompress.quantized_files import read_layer_errors
from raycompress.results import JobResult, TrialResult
from raycompress.storage import local_copy, staged
from raycompress.tracking.address import check, masked_uri
from raycompress.tracking.base import NoTracker, Tracker
from raycompress.tracking.figures import (
    allocation_figure,
    pareto_figure,
    quantization_figure,
    search_figure,
    sensitivity_figure,
)
from raycompress.tracking.patient import PatientTracker
from raycompress.tracking.report import report_markdown
from raycompress.weights import WeightStore

__all__ = ["check_tracking", "open_tracker", "publish", "unpublished"]


def check_tracking(config: JobConfig) -> None:
    """Raises a TrackingError if a tracking server is named and can't be used."""
    uri = config.tracking.uri
    if uri is None or uri == "none":
        return
    check(uri)


def open_tracker(plan: Plan, key: str, tell: Callable[[str], None]) -> Tracker:
    """The job's run; the same job in the same output continues the same run.

    Args:
        plan: The job.
        key: Digest of what its results depend on.
        tell: Told when the store goes away and when it is back.

    Raises:
        TrackingError: The store can't be used.
    """
    tracking = plan.config.tracking
    if tracking.uri == "none":
        return NoTracker()
    from raycompress.tracking.mlflow import MlflowTracker

    tracker = PatientTracker.of(
        MlflowTracker.start(
            uri=tracking.uri,
            experiment=tracking.experiment,
            output=plan.output,
            job_name=plan.config.name,
            job_key=f"{key}-{own_id(plan.output)}",
        ),
        lambda: check_tracking(plan.config),
        tell,
        tracking.wait,
    )
    tracker.log_params(_params(plan))
    return tracker


def publish(plan: Plan, result: JobResult, tracker: Tracker) -> JobResult:
    """Writes files and figures, logs everything, and returns the result with its addresses.

    Files come first: they are whole whatever becomes of the store. Publishing again what the store
    has changes nothing in it.

    Raises:
        UnpublishedJob: The store refuses something, or stays away.
    """
    with staged(plan.output / "results") as folder:
        return _publish(plan, result, tracker, folder)


def _publish(plan: Plan, result: JobResult, tracker: Tracker, folder: Path) -> JobResult:
    store = WeightStore(plan.output / "weights")
    notes = list(result.notes)
    for trial in result.trials:
        if not trial.rows:
            continue
        kept = {name: count for name, count, _ in trial.counts}
        model = final_model(plan, store.get(trial.weights))
        try:
            save(model, folder / trial.name / "model.safetensors", kept=kept)
        except ArtifactError as error:
            notes.append(f"{trial.name}: no model.safetensors: {error}")
        if trial.quantized is not None:
            own = folder / trial.name / "quantized"
            quantization_figure(read_layer_errors(own)).savefig(own / "layers.png", dpi=150)
    result = replace(result, notes=tuple(notes))
    write_candidates(plan, folder / "candidates.parquet")
    if result.samples:
        write_samples(result, folder / "samples.csv")
    pruned = any(trial.pruner for trial in result.trials)
    points = read_table(folder / "pareto.parquet")[0] if pruned else []
    figures = _write_figures(result, points, folder / "figures")
    _write_texts(result, folder)
    try:
        result = _log_models(plan, result, tracker, store, folder)
        _write_texts(result, folder)
        _log(plan, result, tracker, figures, folder)
    except TrackingError as error:
        raise unpublished(plan, error) from error
    return result


def unpublished(plan: Plan, error: TrackingError) -> UnpublishedJob:
    """What to say of a job that is done while its store isn't."""
    return UnpublishedJob(
        f"the job is done and its results are in {plan.output}/results, but not all of them are in "
        f"the tracking store: {error}; when it answers again, the same command logs what is missing"
    )


def _write_texts(result: JobResult, folder: Path) -> None:
    (folder / "summary.json").write_text(result.to_json())
    (folder / "report.md").write_text(report_markdown(result))


def _log_models(
    plan: Plan, result: JobResult, tracker: Tracker, store: WeightStore, folder: Path
) -> JobResult:
    """Logs all of the trials; the result with their addresses."""
    tracking = plan.config.tracking
    uri = "" if tracking.uri == "none" else (tracking.uri or f"sqlite:///{plan.output}/mlflow.db")
    trials = []
    notes = list(result.notes)
    for trial in result.trials:
        child = tracker.child(trial.name)
        child.log_params({"pruner": trial.pruner, "budget": trial.budget, "seed": trial.seed})
        address = ""
        if trial.rows:
            model = final_model(plan, store.get(trial.weights))
            registered = tracking.registered_model if trial.name == result.best else None
            lowered = trial.quantized is not None and trial.quantized.backend == "onnx"
            try:
                # What is registered is the last stage.
                own = None if lowered else registered
                address = child.log_model(model, plan.task.example_inputs(), own)
            except (TrackingError, VerificationError):
                raise
            except RaycompressError as error:
                # All else of the trial is sound: the weights are in the store.
                notes.append(f"{trial.name}: no exported model: {error}")
            if lowered:
                trial = _log_lowered(plan, trial, child, registered, folder)
            child.log_artifact(folder / trial.name)
            child.log_metrics(_metrics(trial))
            child.finish("FINISHED")
        else:
            child.log_metrics({"search/dfe": trial.dfe, "search/seconds": trial.seconds})
            child.finish("FAILED" if trial.failure is not None else "KILLED")
        trials.append(replace(trial, model=address, run_id=child.run_id))
    best = next((t for t in trials if t.name == result.best), None)
    return replace(
        result,
        trials=tuple(trials),
        notes=tuple(notes),
        tracking_uri=masked_uri(uri),
        run_id=tracker.run_id,
        model_uri="" if best is None else _last_model(best),
    )


def _log(
    plan: Plan, result: JobResult, tracker: Tracker, figures: Sequence[Path], folder: Path
) -> None:
    """Logs all of the job's own run."""
    for row in result.samples:
        if row.state == "failed":  # also those that were lost
            tracker.child(row.name).finish("FAILED")
    tracker.describe(report_markdown(result))
    tracker.log_metrics({f"dense/{k}": v for k, v in _row_metrics(result.dense).items()})
    best = next((t for t in result.trials if t.name == result.best), None)
    if best is not None:
        tracker.log_metrics(_metrics(best))
    tracker.log_metrics(
        {"job/dfe": result.dfe, "job/run_dfe": result.run_dfe, "job/seconds": result.seconds}
    )
    with local_copy(plan.output / "job.yaml") as job:
        for path in (folder / "summary.json", folder / "report.md", job):
            tracker.log_artifact(path)
    for path in (*sorted(folder.glob("*.parquet")), *sorted(folder.glob("s*.csv"))):
        tracker.log_artifact(path)
    for path in figures:
        tracker.log_artifact(path, "figures")


def _log_lowered(
    plan: Plan, trial: TrialResult, child: Tracker, registered: str | None, folder: Path
) -> TrialResult:
    """Keeps a lowered ONNX model, and registers it if asked to."""
    quantized = trial.quantized
    assert quantized is not None
    inputs = plan.task.example_inputs()
    path = folder / trial.name / "quantized" / quantized.file.rpartition("/")[2]
    address = child.log_onnx(path, inputs, quantized.weights, registered)
    return replace(trial, quantized=replace(quantized, model=address))


TIMED = ("runtime", "batch_size", "latency_ms", "float_ms")


def _mean(shards: Sequence[Sequence[float]], column: int) -> float | None:
    """Over all examples; None of what wasn't judged."""
    if not shards:
        return None
    return sum(shard[column] for shard in shards) / sum(shard[0] for shard in shards)


def write_candidates(plan: Plan, path: Path) -> None:
    """The ledger as one table: a row for each finished unit."""
    rows = [
        {
            "key": record["key"],
            "kind": record["kind"],
            "candidate": json.dumps(record["candidate"]),
            "split": record.get("split"),
            "score": _mean(record["shards"], 1),
            "loss": _mean(record["shards"], 2),
            "failure": record["failure"],
            "weights": record["weights"],
            "seconds": record["seconds"],
            "dfe": record["dfe"],
            "worker": record["worker"],
            **{name: record.get(name) for name in TIMED},
        }
        for record in answers(plan.output / "ledger")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_samples(result: JobResult, path: Path) -> None:
    """The samples of all studies as a table, a column for each setting."""
    own = ("name", "study", "state", "best", "score", "loss", "macs", "params", "dfe", "failure")
    settings = list(dict.fromkeys(name for row in result.samples for name in row.settings))
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*own, *settings])
        for row in result.samples:
            values = [getattr(row, name) for name in own]
            table.writerow([*values, *(row.settings.get(name) for name in settings)])


def _last_model(trial: TrialResult) -> str:
    lowered = "" if trial.quantized is None else trial.quantized.model
    return lowered or trial.model


def _params(plan: Plan) -> dict[str, str | int | float | bool | None]:
    config = plan.config
    return {
        "task": config.task,
        "task_args": str(hidden(config.task_args)),
        "seed": config.seed,
        "pruners": str(hidden(config.pruners)),
        "tune": str(config.tune),
        "budgets": str(list(config.budgets)),
        "reconstruct": str(config.reconstruct),
        "recover": str(config.recover),
        "quantize": str(hidden(config.quantize)),
    }


def _row_metrics(row: object) -> dict[str, float]:
    values = {
        name: float(value)
        for name, value in vars(row).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for latency in getattr(row, "latency", ()):
        values[f"latency_ms_batch_{latency.batch_size}"] = latency.median_ms
        values[f"peak_bytes_batch_{latency.batch_size}"] = float(latency.peak_bytes)
    return values


def _metrics(trial: TrialResult) -> dict[str, float]:
    metrics = {
        f"{row.name}/{name}": value
        for row in trial.rows
        for name, value in _row_metrics(row).items()
    }
    metrics |= {
        "search/dfe": trial.dfe,
        "search/evaluations": float(trial.evaluations),
        "search/seconds": trial.seconds,
    }
    for limit in trial.limits:
        if limit.predicted is not None:
            metrics[f"slim/predicted_{limit.resource}"] = limit.predicted
    if trial.verification is not None:
        metrics["slim/max_error"] = trial.verification.max_error
    if trial.quantized is not None:
        metrics |= {f"quantized/{k}": v for k, v in _row_metrics(trial.quantized).items()}
        for latency in trial.quantized.float_latency:
            metrics[f"quantized/float_ms_batch_{latency.batch_size}"] = latency.median_ms
    return metrics


def _write_figures(result: JobResult, points: Sequence[Point], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if result.sensitivity:
        figures["sensitivity"] = sensitivity_figure(result)
    if any(trial.counts for trial in result.trials):
        figures["allocation"] = allocation_figure(result)
    if any(trial.curve for trial in result.trials):
        figures["search"] = search_figure(result)
    if points:
        figures["pareto"] = pareto_figure(result, points)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths
