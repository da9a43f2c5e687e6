"""The stages before the trials: dense weights, sensitivity, latency table, what pruners share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from raycompress.analysis.sensitivity import SensitivityRow, write_sensitivity
from raycompress.backend import Backend
from raycompress.candidate import Candidate, Training, Trial
from raycompress.errors import EvaluationError
from raycompress.executor import LedgerExecutor
from raycompress.ledger import Ledger
from raycompress.plan import Plan, check_trial
from raycompress.progress import Progress
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.search import run_search
from raycompress.storage import staged
from raycompress.structure.latency.table import LatencyTable
from raycompress.weights import Weights, WeightStore

__all__ = ["Job", "dense_weights", "latency_table", "sensitivity", "share_probes", "table_note"]


@dataclass(frozen=True)
class Job:
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


def dense_weights(job: Job, pool: LedgerExecutor) -> str:
    """The dense weights' digest: as they came, or trained first."""
    initial = Weights(job.plan.model.state_dict(), {})
    digest = job.store.put(initial)
    config = job.plan.config
    first = config.model.pretrain
    if first is not None:
        job.progress.stage("Train the dense model")
        pool.share(digest, initial)
        trial = pool.evaluate(
            [Candidate(digest, training=Training(first.epochs, first.lr, config.seed))]
        )[0]
        if trial.failure is not None or trial.weights is None:
            _raise_failure("training the dense model", trial.failure)
        digest = trial.weights
        job.plan.model.load_state_dict(dict(job.store.get(digest).state))
    pool.share(digest, job.store.get(digest))
    return digest


def sensitivity(job: Job, pool: LedgerExecutor, weights: str) -> list[SensitivityRow]:
    """Curves of the dense model's groups, also left as a table; none if not asked for."""
    plan = job.plan
    if plan.sensitivity is None:
        return []
    job.progress.stage("Analyse sensitivity")
    dense = pool.evaluate([Candidate(weights)])[0]
    if dense.failure is not None:
        _raise_failure("evaluating the dense model", dense.failure)
    problem = job.problem(pool, weights)
    rows = plan.sensitivity.run(problem, pool, dense.score)
    with staged(plan.output / "results") as folder:
        write_sensitivity(rows, folder)
    return rows


def latency_table(job: Job, pool: LedgerExecutor) -> LatencyTable | None:
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
    job.progress.message(table_note(table))
    for trial in asking:
        check_trial(plan, trial, table)
    return table


def share_probes(job: Job, pool: LedgerExecutor, weights: str) -> None:
    """What pruners ask for whatever their budget and seed: once, for all trials."""
    plan = job.plan
    asked: list[Pruner] = []

    def told(_: int, trials: Sequence[Trial]) -> None:
        timed = sum(t.latency_ms is not None for t in trials)
        if timed:
            job.progress.message(f"timed {timed} mixtures of integers and float")

    for trial in plan.trials:
        if trial.pruner in asked or type(trial.pruner).shared is Pruner.shared:
            continue
        asked.append(trial.pruner)
        job.progress.stage(f"Probe the model for {type(trial.pruner).__name__}")
        problem = job.problem(pool, weights)
        try:
            run_search(trial.pruner.shared(problem), pool, told)
        except EvaluationError as error:  # its trials will meet it; the others are sound
            job.progress.message(f"probing for {type(trial.pruner).__name__} failed: {error}")


def table_note(table: LatencyTable) -> str:
    """What the table is worth, in one sentence."""
    error = table.error
    return (
        f"Latency table at batch size {table.batch_size} on {table.device}: its predictions for "
        f"{error.num} random slim models are off by {100 * error.mean:.1f} % in the mean and "
        f"{100 * error.max:.1f} % at most."
    )


def _raise_failure(what: str, failure: str | None) -> NoReturn:
    """Ends the job with a unit's failure."""
    raise EvaluationError(f"{what} failed: {failure}")
