"""The stages of a job, in order.

A job knows nothing of Ray and MLflow: a *backend* gives it executors and runs its trials, a
*tracker* keeps its results. Every stage answers from the ledger, the weight store and the trials'
markers what an earlier run of the same job has done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raycompress.analysis.sensitivity import SensitivityRow
from raycompress.backend import Backend
from raycompress.candidate import Candidate
from raycompress.errors import EvaluationError
from raycompress.executor import LedgerExecutor
from raycompress.finish import finish_trial, trial_without_model
from raycompress.groundwork import (
    Job,
    dense_weights,
    latency_table,
    sensitivity,
    share_probes,
    table_note,
)
from raycompress.ledger import answers, scan_ledger
from raycompress.lowered import try_lowering
from raycompress.measured import Measured, measure_dense
from raycompress.pareto import Point
from raycompress.plan import Plan, TrialPlan
from raycompress.points import Pricer, gather, origin_of, write_table
from raycompress.progress import Progress
from raycompress.quantized import quantize_trials
from raycompress.results import Curve, FrozenLayer, JobResult, SampleRow, TrialResult
from raycompress.structure.latency.table import LatencyTable
from raycompress.trial import Shared, finished, save_result, unfinished
from raycompress.tuned import OnSample, Samples
from raycompress.tuning import Halving
from raycompress.watch import OnReport, Watch
from raycompress.weights import WeightStore

__all__ = ["run_job"]


@dataclass(frozen=True)
class _Found:
    """What searches came to.

    Attributes:
        trials: In the order of the job; of studies, the samples that are kept.
        results: By name of the trial.
        samples: Of all studies.
    """

    trials: Sequence[TrialPlan]
    results: Mapping[str, Mapping[str, Any]]
    samples: Sequence[SampleRow] = ()

    def winners(self) -> dict[str, Candidate]:
        """What searches that came to an end returned, by trial."""
        return {
            name: Candidate.from_key(result["winner"])
            for name, result in self.results.items()
            if result["winner"] is not None
        }


def run_job(
    plan: Plan, backend: Backend, progress: Progress, report: OnReport, on_sample: OnSample
) -> tuple[JobResult, list[SensitivityRow]]:
    """Runs a planned job from baseline to the last measurement.

    Args:
        plan: The validated job.
        backend: Where work runs.
        progress: Told of stages.
        report: Told of each step of each trial.
        on_sample: Told of each sample of a study.

    Returns:
        The result, and the sensitivity curves as rows.
    """
    start, before = time.monotonic(), _spent(plan)
    job = Job(plan, backend, progress, WeightStore(plan.output / "weights"))
    if plan.quantize is not None and plan.quantize.section.lower != "none":
        progress.stage(f"See whether the model can be lowered to {plan.quantize.section.lower}")
        try_lowering(plan)
    with job.pool() as pool:
        weights = dense_weights(job, pool)
        curves = sensitivity(job, pool, weights)
        table = latency_table(job, pool)
        share_probes(job, pool, weights)
        facts = (pool.info.task, pool.info.data, pool.info.numeric_class)
    found = _compress(job, weights, table, facts, report, on_sample)
    with job.pool() as pool:
        progress.stage("Measure the dense model")
        dense = measure_dense(plan, pool, weights)
        trials: list[TrialResult] = []
        for trial in found.trials:
            trials.append(_finish(job, trial, found.results[trial.name], pool, dense, table))
        if plan.quantize is not None:
            winners = found.winners()
            trials = quantize_trials(plan, trials, winners, pool, job.store, dense, progress)
        points = _points(job, trials, found, pool, weights, table)
        device = pool.info.numeric_class
    _check_any(trials)
    on_front = [replace(p, candidate="") for p in points if p.fronts or p.search_fronts]
    result = JobResult(
        name=plan.config.name,
        score_name=plan.task.score_name,
        dense=dense.row(),
        output=str(plan.output),
        trials=tuple(trials),
        samples=tuple(found.samples),
        sensitivity=_curves(curves),
        sensitivity_criterion="" if plan.sensitivity is None else plan.sensitivity.criterion,
        frozen=tuple(
            FrozenLayer(name=f"{each.parameter} (dim {each.dim})", reason=each.reason)
            for each in plan.structure.frozen
            if each.reason != "positions of a kernel"  # no channels, nothing to tell anyone
        ),
        best=_best(trials),
        device=device,
        front=tuple(sorted(on_front, key=lambda p: (-p.macs, -p.score))),
        num_points=len({point.id for point in points}),
        dfe=_spent(plan),
        run_dfe=_spent(plan) - before,
        seconds=time.monotonic() - start,
        notes=_notes(plan, table),
    )
    return result, curves


def _spent(plan: Plan) -> float:
    """What all runs of a job have cost so far."""
    return math.fsum(record["dfe"] for record in scan_ledger(plan.output / "ledger"))


def _compress(
    job: Job,
    weights: str,
    table: LatencyTable | None,
    facts: tuple[str, ...],
    report: OnReport,
    on_sample: OnSample,
) -> _Found:
    """Runs all trials, or all studies."""
    plan = job.plan
    shared = Shared(
        plan.config, plan.structure, weights, job.store.get(weights), plan.output, table, facts
    )
    tune = plan.config.tune
    halving = Halving(tune.grace, tune.factor) if tune and tune.scheduler == "asha" else None
    watch = Watch(report, halving)
    if plan.studies:
        return _search_studies(job, shared, watch, on_sample)
    results = _run_all(job, shared, watch)
    return _Found(plan.trials, results)


def _run_all(job: Job, shared: Shared, watch: Watch) -> dict[str, dict[str, Any]]:
    """Results of all planned trials; those of an earlier run are not run again."""
    results = {}
    missing = []
    for trial in job.plan.trials:
        payload = shared.payload(trial)
        result = finished(shared, payload)
        group = "" if trial.budget is None else str(trial.budget)
        watch.remember(trial.name, group, [] if result is None else result["curve"])
        if result is None:
            missing.append(payload)
        else:
            results[trial.name] = result
    if not missing:
        return results
    job.progress.stage(f"Search: {', '.join(str(p['name']) for p in missing)}")
    found, failures = job.backend.run_trials(job.plan, missing, shared, watch)
    for payload in missing:
        name = payload["name"]
        curve = watch.curves[name]
        if name in found:
            results[name] = found[name]
        elif name in watch.stopped:
            step = watch.stopped[name]
            job.progress.message(f"{name} was stopped after step {step}: others are ahead")
            results[name] = unfinished(payload, curve, stopped=step)
            save_result(shared, payload, results[name])
        else:
            failure = failures.get(name, "it never finished")
            job.progress.message(f"{name} failed: {failure}")
            results[name] = unfinished(payload, curve, failure=failure)
    return results


def _search_studies(job: Job, shared: Shared, watch: Watch, on_sample: OnSample) -> _Found:
    chosen: list[TrialPlan] = []
    results: dict[str, Mapping[str, Any]] = {}
    rows: list[SampleRow] = []
    for plan in job.plan.studies:
        job.progress.stage(f"Study {plan.name}: {plan.describe()}")
        searcher = job.backend.searcher(plan)
        with Samples(plan, searcher, shared, watch, on_sample) as samples:
            job.backend.run_samples(job.plan, samples, shared, watch)
            rows += samples.rows()
            for trial, result in samples.kept():
                chosen.append(trial)
                results[trial.name] = result
    if rows and not chosen:
        reasons = list(dict.fromkeys(row.failure for row in rows if row.failure))
        raise EvaluationError(f"all {len(rows)} samples failed: {'; '.join(reasons[:3])}")
    return _Found(chosen, results, rows)


def _finish(
    job: Job,
    trial: TrialPlan,
    found: Mapping[str, Any],
    pool: LedgerExecutor,
    dense: Measured,
    table: LatencyTable | None,
) -> TrialResult:
    """A finished trial's model, measured; or why there is none."""
    failure = found["failure"]
    if failure is None and found["stopped"] is None:
        job.progress.stage(f"Recover, shrink, verify and measure {trial.name}")
        try:
            return finish_trial(job.plan, trial, found, pool, job.store, dense, table)
        except EvaluationError as error:  # the other trials are sound
            failure = str(error)
            job.progress.message(failure)
    return trial_without_model(trial, found, failure)


def _points(
    job: Job,
    trials: Sequence[TrialResult],
    found: _Found,
    pool: LedgerExecutor,
    weights: str,
    table: LatencyTable | None,
) -> list[Point]:
    """Everything that the searches evaluated, and their final models; also left as a table."""
    if not trials:
        return []
    own = {trial.name for trial in trials}
    others = [row.name for row in found.samples if row.name not in own]
    pricer = Pricer(pool, weights, job.plan.model, table)
    points = gather(job.plan, trials, found.winners(), pricer, others)
    origin = origin_of(pool, weights)
    write_table(points, job.plan.output / "results" / "pareto.parquet", origin)
    return points


def _check_any(trials: Sequence[TrialResult]) -> None:
    """Raises an EvaluationError if every trial failed."""
    failures = {trial.name: trial.failure for trial in trials if trial.failure is not None}
    if trials and len(failures) == len(trials):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(failures.items())[:3])
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise EvaluationError(f"all {len(trials)} trials failed: {reasons}{more}")


def _curves(rows: Sequence[SensitivityRow]) -> tuple[Curve, ...]:
    names = list(dict.fromkeys(row.group for row in rows))
    return tuple(
        Curve(
            group=name,
            num=next(row.num for row in rows if row.group == name),
            points=tuple((row.sparsity, row.score) for row in rows if row.group == name),
        )
        for name in names
    )


def _best(trials: Sequence[TrialResult]) -> str:
    """The trial to publish: the smallest in multiply-adds within a point of the best score.

    Selected on validation data.
    """
    rows = [(trial.name, trial.rows[-1]) for trial in trials if trial.rows]
    if not rows:
        return ""
    top = max(row.score_validation or 0.0 for _, row in rows)
    close = [(name, row) for name, row in rows if (row.score_validation or 0.0) >= top - 0.01]
    return min(close, key=lambda pair: (pair[1].macs, pair[1].nonzero_params))[0]


def _notes(plan: Plan, table: LatencyTable | None) -> tuple[str, ...]:
    records = answers(plan.output / "ledger")
    # What a runtime can't take as a mixture of integers and float is none of the models.
    failed = [r["failure"] for r in records if r["failure"] and r["kind"] != "timing"]
    timed = table is not None or any(trial.pruner.timed_on for trial in plan.checked)
    notes = [
        "Scores on validation data selected; scores on test data selected nothing.",
        f"Latency{', and what it decided,' if timed else ''} depends on the machine; everything "
        "else is the same on every run on it.",
    ]
    if table is not None:
        notes.append(table_note(table))
    tune, cluster = plan.config.tune, plan.config.cluster
    at_once = cluster.executor == "ray" and cluster.max_concurrent != 1
    if plan.studies and tune and tune.searcher not in ("random", "grid") and at_once:
        notes.append(
            "Samples were proposed while others ran, in an order that time decided: another run "
            "may draw others; cluster.max_concurrent: 1 draws the same ones each time."
        )
    if tune and tune.scheduler == "asha" and at_once:
        notes.append("Which trials were stopped depends on the order in which they ran.")
    if failed:
        notes.append(f"{len(failed)} candidates failed, first: {failed[0]}")
    return tuple(notes)
