"""`raycompress.run`: wires a job to its executor, its tracker and its reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from raycompress.backend import Backend, LocalBackend
from raycompress.config import JobConfig
from raycompress.errors import InterruptedJob, TrackingError
from raycompress.executor import LedgerExecutor
from raycompress.job import run_job
from raycompress.ledger import Ledger, scan_ledger
from raycompress.loading import job_key, load_job, parse_job
from raycompress.output import check_changes, keep_job, lock
from raycompress.plan import Plan, StudyPlan, prepare
from raycompress.progress import Progress, SilentProgress
from raycompress.publish import check_tracking, open_tracker, publish, unpublished
from raycompress.results import JobResult, SampleRow
from raycompress.signals import held, ignored, terminable
from raycompress.storage import writing
from raycompress.tracking.base import NoTracker, Status, Tracker
from raycompress.trial import Shared, finished, run_trial
from raycompress.tuned import Samples
from raycompress.tuning import Searcher
from raycompress.watch import Watch

__all__ = ["RayBackend", "backend_of", "run", "validate"]

STATUS: dict[str, Status] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""Of a sample's run in the tracking store."""


class RayBackend:
    """Replicas on Ray; trials are scheduled by Ray Tune."""

    def _spec(self, plan: Plan, weights: Mapping[str, Any]) -> Any:
        from raycompress.distributed.spec import PoolSpec

        config = plan.config
        return PoolSpec(
            task=config.task,
            task_args=config.task_args,
            structure=plan.structure,
            store=str(plan.output / "weights"),
            evaluation=config.evaluation,
            import_paths=(os.getcwd(),),
            weights=weights,
        )

    def pool(
        self, plan: Plan, ledger: Ledger, progress: Callable[[int, int, float], None]
    ) -> LedgerExecutor:
        """A pool of replicas outside of any trial."""
        from raycompress.distributed.pool import ReplicaPool

        config, target = plan.config, plan.config.latency.resources
        return ReplicaPool(
            self._spec(plan, {}), config.cluster, ledger=ledger, progress=progress, target=target
        )

    def run_trials(
        self, plan: Plan, payloads: Sequence[Mapping[str, Any]], shared: Shared, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Each trial in its own process, with its replicas in one placement group."""
        from raycompress.distributed.tune import TrialSpec, run_trials

        return run_trials(
            [TrialSpec(str(payload["name"]), payload) for payload in payloads],
            "raycompress.driver:run_ray_trial",
            self._spec(plan, {shared.digest: shared.weights}),
            plan.config.cluster,
            plan.output,
            partial(finished, shared),
            on_report=watch,
            shared=shared,
        )

    def searcher(self, study: StudyPlan) -> Searcher:
        """The study's own, or one of Ray Tune's."""
        if ":" not in study.tune.searcher:
            return study.searcher()
        from raycompress.distributed.searcher import TuneSearcher

        return TuneSearcher(study.tune.searcher, study.space, study.tune.objectives, study.seed)

    def run_samples(self, plan: Plan, samples: Samples, shared: Shared, watch: Watch) -> None:
        """Each sample in its own process, as trials are; as many at once as fit."""
        from raycompress.distributed.tune import TrialSpec, run_samples

        def ask() -> TrialSpec | None:
            payload = samples.ask()
            return None if payload is None else TrialSpec(str(payload["name"]), payload)

        run_samples(
            ask,
            samples.tell,
            samples.study.num_left,
            "raycompress.driver:run_ray_trial",
            self._spec(plan, {shared.digest: shared.weights}),
            plan.config.cluster,
            plan.output,
            partial(finished, shared),
            on_report=watch,
            shared=shared,
        )


def run_ray_trial(
    payload: Mapping[str, Any],
    make_pool: Callable[..., LedgerExecutor],
    report: Callable[[int, Mapping[str, float]], None],
    shared: Shared,
) -> None:
    """What a Tune trial runs."""
    target = shared.config.latency.resources
    run_trial(payload, lambda ledger: make_pool(ledger=ledger, target=target), report, shared)


def validate(job: JobConfig | Mapping[str, Any] | str | Path, *, tracking: bool = True) -> Plan:
    """Checks a job without starting anything.

    Raises:
        InputError: With what is wrong.
    """
    config = _config(job)
    plan = prepare(config)
    if tracking:
        check_tracking(config)
    address = config.cluster.address
    if config.cluster.executor == "ray" and address not in (None, "local"):
        from raycompress.distributed.cluster import check_address

        check_address(address, "cluster.address")
    return plan


def run(
    job: JobConfig | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    changed: bool = False,
) -> JobResult:
    """Runs a compression job to its end; the same job again continues where it was stopped.

    Args:
        job: A job, plain data as in a job file, or the path of one.
        progress: Told of stages; None says nothing.
        changed: Go on in an output that holds the job with other settings: what still holds is
            kept, results are replaced. False refuses.

    Returns:
        What was found; it is also in `<output>/results` and in MLflow.

    Raises:
        InputError: The job can't work; nothing was started.
        RaycompressError: It failed.
        InterruptedJob: It was stopped by a signal.
        UnpublishedJob: It is done, but the tracking store was away, or refused results.
    """
    plan = validate(job)
    shown = progress if progress is not None else SilentProgress()
    try:
        with ExitStack() as stack:
            stack.callback(shown.close)
            stack.enter_context(writing(plan.output))
            stack.enter_context(lock(plan.output))
            if not changed:
                check_changes(plan.config, plan.output)
            stack.enter_context(terminable())
            return _run(plan, shown, stack)
    except KeyboardInterrupt:  # or a second one, while what the stack holds was left
        raise InterruptedJob(
            f"stopped; what was finished is in {plan.output}, and the same command continues"
        ) from None


def _run(plan: Plan, progress: Progress, stack: ExitStack) -> JobResult:
    config = plan.config
    keep_job(config, plan.output)
    kept = sum(1 for _ in scan_ledger(plan.output / "ledger"))
    if kept:
        progress.message(f"Continues: {kept} finished units of work are in {plan.output}")
    progress.stage("Open the tracking store")
    tracker: Tracker = NoTracker()
    try:
        with held():  # else a run could be there that nobody ends
            tracker = open_tracker(plan, job_key(config), progress.message)
        backend = backend_of(plan, progress, stack)

        def report(name: str, step: int, metrics: Mapping[str, float]) -> None:
            progress.step(f"{name}: best loss {metrics['best_loss']:.4f}, step {step}")
            tracker.child(name).log_metrics(metrics, step)

        for trial in plan.trials:
            tracker.child(trial.name)
        on_sample = _sample_reporter(tracker, progress)
        result, _ = run_job(plan, backend, progress, report, on_sample)
        progress.stage("Publish")
        result = publish(plan, result, tracker)
        try:
            tracker.finish("FINISHED")
        except TrackingError as error:
            raise unpublished(plan, error) from error
        return result
    except BaseException as error:
        _end(tracker, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", progress)
        raise


def _end(tracker: Tracker, status: Status, progress: Progress) -> None:
    """Ends the runs of a job that isn't done; why it isn't matters more than a store's trouble."""
    try:
        with ignored():  # it gives up within seconds
            tracker.finish(status)
    except TrackingError as error:
        progress.message(f"{error}; its run may stand there as RUNNING until the job continues")


def backend_of(plan: Plan, progress: Progress, stack: ExitStack) -> Backend:
    """Where a job's work runs; what it connects to is left with the stack."""
    config = plan.config
    if config.cluster.executor != "ray":
        return LocalBackend()
    progress.stage("Connect to Ray")
    from raycompress.distributed.cluster import connect
    from raycompress.distributed.reach import check_reach

    stack.enter_context(connect(config.cluster))
    check_reach(plan.output)
    return RayBackend()


def _sample_reporter(tracker: Tracker, progress: Progress) -> Callable[[SampleRow, bool], None]:
    """Tells the tracker and the terminal of a study's samples."""
    scores: dict[str, list[float]] = {}

    def on_sample(row: SampleRow, is_new: bool) -> None:
        child = tracker.child(row.name)
        if row.state == "running":
            child.log_params({"study": row.study, **row.settings})
            return
        done = scores.setdefault(row.study, [])
        if row.state == "finished" and row.score is not None:
            done.append(row.score)
        if not is_new:
            return
        figures = {name: getattr(row, name) for name in ("score", "loss", "macs", "params", "dfe")}
        child.log_metrics({f"sample/{k}": v for k, v in figures.items() if v is not None})
        child.finish(STATUS[row.state])
        best = f", best {max(done):.4f}" if done else ""
        if row.failure is not None:
            progress.message(f"{row.name} failed: {row.failure}")
        else:
            score = "" if row.score is None else f" with score {row.score:.4f}"
            progress.step(f"{row.name} {row.state}{score}{best}")

    return on_sample


def _config(job: JobConfig | Mapping[str, Any] | str | Path) -> JobConfig:
    if isinstance(job, JobConfig):
        return job
    if isinstance(job, str | Path):
        return load_job(job)
    return parse_job(job)
