"""`raycompress.run`: wires a job to its executor, its tracker and its reports."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from raycompress.config import JobConfig
from raycompress.errors import InterruptedJob
from raycompress.executor import LedgerExecutor
from raycompress.job import Backend, LocalBackend, OnReport, run_job
from raycompress.ledger import Ledger, read_ledger
from raycompress.loading import job_key, load_job, parse_job
from raycompress.output import check_changes, keep_job, lock
from raycompress.plan import Plan, prepare
from raycompress.progress import Progress, SilentProgress
from raycompress.publish import check_tracking, open_tracker, publish
from raycompress.results import JobResult
from raycompress.trial import Shared

__all__ = ["RayBackend", "backend_of", "run", "terminable", "validate"]


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

        return ReplicaPool(
            self._spec(plan, {}), plan.config.cluster, ledger=ledger, progress=progress
        )

    def run_trials(
        self, plan: Plan, payloads: Sequence[Mapping[str, Any]], shared: Shared, report: OnReport
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Each trial in its own process, with its replicas in one placement group."""
        from raycompress.distributed.tune import TrialSpec, run_trials

        return run_trials(
            [TrialSpec(str(payload["name"]), payload) for payload in payloads],
            "raycompress.driver:run_ray_trial",
            self._spec(plan, {shared.digest: shared.weights}),
            plan.config.cluster,
            plan.output,
            on_report=report,
            shared=shared,
        )


def run_ray_trial(
    payload: Mapping[str, Any],
    make_pool: Callable[..., LedgerExecutor],
    report: Callable[[int, Mapping[str, float]], None],
    shared: Shared,
) -> dict[str, Any]:
    """What a Tune trial runs."""
    from raycompress.trial import run_trial

    return run_trial(payload, lambda ledger: make_pool(ledger=ledger), report, shared)


def validate(job: JobConfig | Mapping[str, Any] | str | Path, *, tracking: bool = True) -> Plan:
    """Checks a job without starting anything.

    Raises:
        InputError: With what is wrong.
    """
    config = _config(job)
    plan = prepare(config)
    if tracking:
        check_tracking(config)
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
    """
    plan = validate(job)
    shown = progress if progress is not None else SilentProgress()
    with ExitStack() as stack:
        stack.callback(shown.close)
        stack.enter_context(lock(plan.output))
        if not changed:
            check_changes(plan.config, plan.output)
        stack.enter_context(terminable())
        try:
            return _run(plan, shown, stack)
        except KeyboardInterrupt:
            raise InterruptedJob(
                f"stopped; what was finished is in {plan.output}, and the same command continues"
            ) from None


def _run(plan: Plan, progress: Progress, stack: ExitStack) -> JobResult:
    config = plan.config
    keep_job(config, plan.output)
    kept = len(read_ledger(plan.output / "ledger"))
    if kept:
        progress.message(f"Continues: {kept} finished units of work are in {plan.output}")
    progress.stage("Open the tracking store")
    tracker = open_tracker(plan, job_key(config))
    status = "FAILED"
    try:
        backend = backend_of(config, progress, stack)
        children = {trial.name: tracker.child(trial.name) for trial in plan.trials}

        def report(name: str, step: int, metrics: Mapping[str, float]) -> None:
            progress.step(f"{name}: best loss {metrics['best_loss']:.4f}, step {step}")
            children[name].log_metrics(metrics, step)

        result, _ = run_job(plan, backend, progress, report)
        progress.stage("Publish")
        result = publish(plan, result, tracker, children)
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)  # type: ignore[arg-type]


def backend_of(config: JobConfig, progress: Progress, stack: ExitStack) -> Backend:
    """Where a job's work runs; what it connects to is left with the stack."""
    if config.cluster.executor != "ray":
        return LocalBackend()
    progress.stage("Connect to Ray")
    from raycompress.distributed.cluster import connect

    stack.enter_context(connect(config.cluster))
    return RayBackend()


def _config(job: JobConfig | Mapping[str, Any] | str | Path) -> JobConfig:
    if isinstance(job, JobConfig):
        return job
    if isinstance(job, str | Path):
        return load_job(job)
    return parse_job(job)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which ends a submitted job, stops as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
