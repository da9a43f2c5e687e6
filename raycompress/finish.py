"""From a search's winner to a model that can be trusted: recover, shrink, verify, measure.

Runs once per trial; what it trains and scores goes through the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raycompress.candidate import Candidate, Training
from raycompress.config import JobConfig
from raycompress.executor import LedgerExecutor
from raycompress.measured import Finished, Measured, finish_candidate
from raycompress.method import TrainingMethod
from raycompress.plan import Plan, TrialPlan
from raycompress.reconstruction import Reconstruction
from raycompress.results import Limit, SearchStep, TrialResult
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import LatencyTable
from raycompress.training import Distillation
from raycompress.trial import load_ranking
from raycompress.weights import WeightStore

__all__ = ["finish_trial", "reconstructed", "recovery", "trial_without_model"]


def finish_trial(
    plan: Plan,
    trial: TrialPlan,
    found: Mapping[str, Any],
    pool: LedgerExecutor,
    store: WeightStore,
    dense: Measured,
    table: LatencyTable | None = None,
) -> TrialResult:
    """Recovers, shrinks, verifies and measures a trial's winner, and saves it.

    Args:
        plan: The job.
        trial: Whose winner.
        found: The trial's result.
        pool: Trains, scores and times.
        store: Holds the weights.
        dense: To compare with.
        table: What a limit on latency was priced with.

    Raises:
        EvaluationError: Its training or evaluation failed.
        VerificationError: The slim model doesn't compute what the masked one does.
    """
    # What is recovered and made slim is in float; the bits that a search found come after it.
    winner = replace(Candidate.from_key(found["winner"]), quantize=None)
    if winner.kept:
        pool.publish(load_ranking(winner.ranking, plan.output / "rankings"))
    folder = plan.output / "results" / trial.name
    training = recovery(plan.config, trial.seed, dense.candidate.weights)
    winner = reconstructed(plan.config, winner, dense.candidate.weights)
    final = finish_candidate(plan, winner, training, trial.name, folder, pool, store, dense)
    predicted = None if table is None else table.latency_ms(final.counts)
    return TrialResult(
        name=trial.name,
        pruner=type(trial.pruner).__name__,
        seed=trial.seed,
        budget="" if trial.budget is None else str(trial.budget),
        limits=_limits(trial, final.measured, dense, final.timed, predicted),
        counts=_counts(plan, final, pool),
        rows=final.rows,
        verification=final.verification,
        dfe=found["total_dfe"],
        evaluations=found["evaluated"],
        replayed=found["replayed"],
        seconds=found["seconds"],
        curve=tuple(SearchStep(**point) for point in found["curve"]),
        masks=str(folder / "masks.safetensors"),
        weights=final.candidate.weights,
    )


def trial_without_model(
    trial: TrialPlan, found: Mapping[str, Any], failure: str | None
) -> TrialResult:
    """What is told of a trial that failed or was stopped."""
    return TrialResult(
        name=trial.name,
        pruner=type(trial.pruner).__name__,
        seed=trial.seed,
        budget="" if trial.budget is None else str(trial.budget),
        dfe=found["total_dfe"],
        evaluations=found["evaluated"],
        replayed=found["replayed"],
        seconds=found["seconds"],
        curve=tuple(SearchStep(**point) for point in found["curve"]),
        failure=failure,
        stopped=found["stopped"],
    )


def recovery(config: JobConfig, seed: int, dense: str) -> Training:
    """A job's fine-tuning; of no epochs if it has none.

    Args:
        config: The job.
        seed: Of the trial.
        dense: Digest of the teacher's weights.
    """
    recover = config.recover
    if recover is None:
        return Training(0.0, None, seed)
    methods: tuple[TrainingMethod, ...] = ()
    if recover.distill is not None:
        methods = (Distillation(teacher=dense, **vars(recover.distill)),)
    return Training(recover.epochs, recover.lr, seed, methods)


def reconstructed(config: JobConfig, winner: Candidate, dense: str) -> Candidate:
    """A winner as the job builds it before fine-tuning."""
    if config.reconstruct and winner.kept and winner.reconstruct is None:
        return replace(winner, reconstruct=Reconstruction(dense))
    return winner


def _limits(
    trial: TrialPlan,
    measured: Measured,
    dense: Measured,
    timed: list[LatencyRow],
    predicted: float | None,
) -> tuple[Limit, ...]:
    if trial.budget is None:
        return ()
    # Rows come by batch size; the first is what the budget speaks of.
    times = {row.name: row.median_ms for row in reversed(timed)}
    # Zeros of a masked model don't count as parameters; a slim model has none to speak of.
    small = measured.nonzero if measured.name == "masked" else measured.params
    values: dict[str, tuple[float, float]] = {
        "latency_ms": (times[measured.name], times[dense.name]),
        "macs": (measured.macs, dense.macs),
        "params": (small, dense.params),
    }
    return tuple(
        Limit(
            resource=name,
            asked=str(limit),
            limit=limit.absolute(values[name][1]),
            measured=values[name][0],
            dense=values[name][1],
            predicted=predicted if name == "latency_ms" else None,
        )
        for name, limit in trial.budget.limits
    )


def _counts(plan: Plan, final: Finished, pool: LedgerExecutor) -> tuple[tuple[str, int, int], ...]:
    candidate = final.candidate
    num = {group.name: group.num_channels for group in plan.structure.groups}
    if not candidate.kept:
        return tuple((name, count, num[name]) for name, count in final.counts.items())
    orders = pool.rankings[candidate.ranking].orders
    counts = {**candidate.counts, **final.counts}
    return tuple((name, counts.get(name, len(order)), len(order)) for name, order in orders.items())
