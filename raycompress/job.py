"""The stages of a job, in order.

A job knows nothing of Ray and MLflow: a *backend* gives it executors and runs its trials, a
*tracker* keeps its results. Every stage answers from the ledger, the weight store and the trials'
markers what an earlier run of the same job has done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

from raycompress.analysis.sensitivity import SensitivityRow, write_sensitivity
from raycompress.candidate import Candidate, Training
from raycompress.config import TrainingConfig
from raycompress.errors import EvaluationError, StorageError
from raycompress.executor import LedgerExecutor
from raycompress.finish import finish_trial, trial_without_model
from raycompress.ledger import Ledger, scan_ledger
from raycompress.local import LocalExecutor
from raycompress.lowered import try_lowering
from raycompress.measured import Measured, measure_dense
from raycompress.pareto import Point
from raycompress.plan import Plan, StudyPlan, TrialPlan, check_trial
from raycompress.points import Pricer, gather, origin_of, write_table
from raycompress.progress import Progress
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.quantized import quantize_trials
from raycompress.results import Curve, FrozenLayer, JobResult, SampleRow, TrialResult
from raycompress.search import run_search
from raycompress.storage import staged, writing
from raycompress.structure.latency.table import LatencyTable
from raycompress.trial import Shared, finished, run_trial, save_result, unfinished
from raycompress.tuned import OnSample, Samples
from raycompress.tuning import Halving, Searcher
from raycompress.watch import OnReport, Watch
from raycompress.weights import Weights, WeightStore

__all__ = ["Backend", "LocalBackend", "run_job"]

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Where a job's work runs."""

    def pool(
        self, plan: Plan, ledger: Ledger, progress: Callable[[int, int, float], None]
    ) -> LedgerExecutor:
        """Executors for what is outside of trials; closed before trials start."""

    def run_trials(
        self, plan: Plan, payloads: Sequence[Mapping[str, Any]], shared: Shared, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Runs trials; returns results, and the reasons of those that failed, by name.

        Those that the watch stops are in neither.
        """

    def searcher(self, study: StudyPlan) -> Searcher:
        """Who proposes a study's samples."""

    def run_samples(self, plan: Plan, samples: Samples, shared: Shared, watch: Watch) -> None:
        """Runs a study's samples as trials until it gives out no more."""


class LocalBackend:
    """Everything in this process, one unit after the other."""

    def pool(
        self, plan: Plan, ledger: Ledger, progress: Callable[[int, int, float], None]
    ) -> LedgerExecutor:
        """A `LocalExecutor`."""
        return LocalExecutor(
            plan.task,
            plan.structure,
            WeightStore(plan.output / "weights"),
            plan.config.evaluation,
            ledger=ledger,
            progress=progress,
        )

    def run_trials(
        self, plan: Plan, payloads: Sequence[Mapping[str, Any]], shared: Shared, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """One trial after the other."""
        results, failures = {}, {}
        for payload in payloads:
            result, failure = self._run(plan, payload, shared, watch)
            if result is not None:
                results[str(payload["name"])] = result
            if failure is not None:
                failures[str(payload["name"])] = failure
        return results, failures

    def searcher(self, study: StudyPlan) -> Searcher:
        """The study's own."""
        return study.searcher()

    def run_samples(self, plan: Plan, samples: Samples, shared: Shared, watch: Watch) -> None:
        """One sample after the other."""
        while (payload := samples.ask()) is not None:
            samples.tell(str(payload["name"]), *self._run(plan, payload, shared, watch))

    def _run(
        self, plan: Plan, payload: Mapping[str, Any], shared: Shared, watch: Watch
    ) -> tuple[dict[str, Any] | None, str | None]:
        """A trial's result, or why it failed; neither if it was stopped."""
        name = str(payload["name"])

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            if watch(name, step, metrics):
                raise _Stopped

        def make_pool(ledger: Ledger) -> LedgerExecutor:
            return self.pool(plan, ledger, lambda *_: None)

        try:
            with writing(shared.output):
                return run_trial(payload, make_pool, on_step, shared), None
        except _Stopped:
            return None, None
        except StorageError:  # it is no trial's failure, and the others would meet it too
            raise
        except Exception as error:  # of a pruner, perhaps the user's own: the others go on
            _log.debug("trial %s failed", name, exc_info=True)
            return None, f"{type(error).__name__}: {error}"


class _Stopped(BaseException):
    """Unwinds a trial that is to stop; no search may catch it."""


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


@dataclass(frozen=True)
class _Job:
    """What the stages share."""

    plan: Plan
    backend: Backend
    progress: Progress
    store: WeightStore

    def problem(self, pool: LedgerExecutor, weights: str) -> Problem:
        """The dense model as what comes before the trials asks about it: no budget, no seed."""
        return Problem(
            model=self.plan.model,
            structure=self.plan.structure,
            weights=weights,
            executor=pool,
            store=self.store,
            targets=self.plan.config.targets,
        )

    @contextmanager
    def pool(self) -> Iterator[LedgerExecutor]:
        """An executor that writes the job's own part of the ledger."""

        def on_training(step: int, num_steps: int, loss: float) -> None:
            self.progress.step(f"loss {loss:.4f}, step", step, num_steps)

        with (
            Ledger(self.plan.output / "ledger", "job") as ledger,
            self.backend.pool(self.plan, ledger, on_training) as pool,
        ):
            yield pool


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
    job = _Job(plan, backend, progress, WeightStore(plan.output / "weights"))
    if plan.quantize is not None and plan.quantize.section.lower != "none":
        progress.stage(f"See whether the model can be lowered to {plan.quantize.section.lower}")
        try_lowering(plan)
    with job.pool() as pool:
        weights = _dense_weights(job, pool)
        curves = _sensitivity(job, pool, weights)
        table = _latency_table(job, pool)
        _shared(job, pool, weights)
        facts = (pool.info.task, pool.info.data, pool.info.numeric_class)
    found = _compress(job, weights, table, facts, report, on_sample)
    with job.pool() as pool:
        progress.stage("Measure the dense model")
        dense = measure_dense(plan, pool, weights)
        trials: list[TrialResult] = []
        for trial in found.trials:
            trials.append(_finish(job, trial, found.results[trial.name], pool, dense, table))
        points = _points(job, trials, found, pool, weights, table)
        if plan.quantize is not None:
            winners = found.winners()
            trials = quantize_trials(plan, trials, winners, pool, job.store, dense, progress)
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


def _dense_weights(job: _Job, pool: LedgerExecutor) -> str:
    """The dense weights' digest: as they came, or trained first."""
    initial = Weights(job.plan.model.state_dict(), {})
    digest = job.store.put(initial)
    config = job.plan.config
    if config.model.pretrain is not None:
        job.progress.stage("Train the dense model")
        pool.share(digest, initial)
        trial = pool.evaluate(
            [Candidate(digest, training=training_of(config.model.pretrain, config.seed))]
        )[0]
        if trial.failure is not None or trial.weights is None:
            raise_failure("training the dense model", trial.failure)
        digest = trial.weights
        job.plan.model.load_state_dict(dict(job.store.get(digest).state))
    pool.share(digest, job.store.get(digest))
    return digest


def _sensitivity(job: _Job, pool: LedgerExecutor, weights: str) -> list[SensitivityRow]:
    plan = job.plan
    if plan.sensitivity is None:
        return []
    job.progress.stage("Analyse sensitivity")
    dense = pool.evaluate([Candidate(weights)])[0]
    if dense.failure is not None:
        raise_failure("evaluating the dense model", dense.failure)
    problem = job.problem(pool, weights)
    rows = plan.sensitivity.run(problem, pool, dense.score)
    with staged(plan.output / "results") as folder:
        write_sensitivity(rows, folder)
    return rows


def _latency_table(job: _Job, pool: LedgerExecutor) -> LatencyTable | None:
    """The table that prices latency budgets, if there are any; measured once, then read.

    Raises:
        BudgetError: A budget that is out of reach by this table.
    """
    plan = job.plan
    asking = [t for t in plan.checked if t.budget is not None and t.budget.names_latency]
    if not asking:
        return None
    job.progress.stage("Measure the latency table")
    latency = plan.config.latency
    table = pool.latency_table(latency.batch_sizes[0], plan.output / "latency", latency.max_seconds)
    job.progress.message(_table_note(table))
    for trial in asking:
        check_trial(plan, trial, table)
    return table


def _shared(job: _Job, pool: LedgerExecutor, weights: str) -> None:
    """What pruners ask for whatever their budget and seed: once, for all trials."""
    plan = job.plan
    asked: list[Pruner] = []
    for trial in plan.trials:
        if trial.pruner in asked or type(trial.pruner).shared is Pruner.shared:
            continue
        asked.append(trial.pruner)
        job.progress.stage(f"Probe the model for {type(trial.pruner).__name__}")
        problem = job.problem(pool, weights)
        try:
            run_search(trial.pruner.shared(problem), pool)
        except EvaluationError as error:  # its trials will meet it; the others are sound
            job.progress.message(f"probing for {type(trial.pruner).__name__} failed: {error}")


def _table_note(table: LatencyTable) -> str:
    error = table.error
    return (
        f"Latency table at batch size {table.batch_size} on {table.device}: its predictions for "
        f"{error.num} random slim models are off by {100 * error.mean:.1f} % in the mean and "
        f"{100 * error.max:.1f} % at most."
    )


def _compress(
    job: _Job,
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


def _run_all(job: _Job, shared: Shared, watch: Watch) -> dict[str, dict[str, Any]]:
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


def _search_studies(job: _Job, shared: Shared, watch: Watch, on_sample: OnSample) -> _Found:
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
    job: _Job,
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
    job: _Job,
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
    points = gather(job.plan, trials, found.winners(), Pricer(pool, weights, table), others)
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


def training_of(config: TrainingConfig, seed: int) -> Training:
    """A job's training settings as a training unit."""
    return Training(config.epochs, config.lr, seed)


def raise_failure(what: str, failure: str | None) -> NoReturn:
    """Ends the job with a unit's failure."""
    raise EvaluationError(f"{what} failed: {failure}")


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
    failed = [r for r in scan_ledger(plan.output / "ledger") if r.get("failure")]
    notes = [
        "Scores on validation data selected; scores on test data selected nothing.",
        "Latency depends on the machine; everything else is the same on every run on it.",
    ]
    if table is not None:
        notes.append(_table_note(table))
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
        notes.append(f"{len(failed)} candidates failed, first: {failed[0]['failure']}")
    return tuple(notes)
