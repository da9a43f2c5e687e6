"""From a search's winner to a model that can be trusted: recover, shrink, verify, measure.

Runs once per trial; what it trains and scores goes through the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycompress.config import JobConfig
from raycompress.errors import EvaluationError, VerificationError
from raycompress.executor import LedgerExecutor
from raycompress.masks import Masks, masked_copy, save_masks, weight_masks
from raycompress.method import TrainingMethod
from raycompress.plan import Plan, TrialPlan
from raycompress.reconstruction import Reconstruction
from raycompress.results import Latency, Limit, ModelRow, SearchStep, TrialResult, Verification
from raycompress.search import Candidate, Training
from raycompress.structure import expand, file_size, slim, verify
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import LatencyTable
from raycompress.task import Split
from raycompress.training import Distillation
from raycompress.trial import load_ranking, write_json
from raycompress.weights import Weights, WeightStore

__all__ = [
    "Finished",
    "Measured",
    "final_model",
    "finish_candidate",
    "finish_trial",
    "measure_dense",
    "reconstructed",
    "recovery",
    "trial_without_model",
]


@dataclass(frozen=True)
class Measured:
    """A candidate with what was measured of it but latency, which is measured for all at once."""

    name: str
    candidate: Candidate
    score_validation: float
    score_test: float
    params: int
    nonzero: int
    macs: int
    file_bytes: int

    def row(self, latency: tuple[Latency, ...] = ()) -> ModelRow:
        """As a row of the final table."""
        assert self.name in ("dense", "masked", "slim")
        return ModelRow(
            name=self.name,  # type: ignore[arg-type]
            params=self.params,
            nonzero_params=self.nonzero,
            macs=self.macs,
            file_bytes=self.file_bytes,
            score_validation=self.score_validation,
            score_test=self.score_test,
            latency=latency,
        )


def measure_dense(plan: Plan, pool: LedgerExecutor, weights: str) -> Measured:
    """Scores, sizes and cost of the dense model."""
    macs = plan.structure.cost().macs
    return _measure("dense", Candidate(weights), plan.model, macs, pool)


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
    winner = Candidate.from_key(found["winner"])
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


@dataclass(frozen=True)
class Finished:
    """A candidate's model: built, verified, measured.

    Attributes:
        candidate: With the weights that it has now.
        kept: Kept channel indices by group; empty if nothing was slimmed.
        rows: "dense", "masked", and "slim" if it is.
        measured: The last of them.
        timed: Latency of all of them.
        verification: Of slim against masked; None where nothing was slimmed.
    """

    candidate: Candidate
    kept: Mapping[str, list[int]]
    rows: tuple[ModelRow, ...]
    measured: Measured
    timed: list[LatencyRow]
    verification: Verification | None

    @property
    def counts(self) -> dict[str, int]:
        """Kept channels by group."""
        return {name: len(indices) for name, indices in self.kept.items()}


def finish_candidate(
    plan: Plan,
    candidate: Candidate,
    training: Training,
    name: str,
    folder: Path,
    pool: LedgerExecutor,
    store: WeightStore,
    dense: Measured,
) -> Finished:
    """Trains, shrinks, verifies and measures a candidate; leaves masks and groups in a folder.

    Args:
        plan: The job.
        candidate: Its ranking is published.
        training: Of no epochs: builds, reconstructs and recalibrates alone.
        name: For messages.
        folder: Made if it isn't there.
        pool: Trains, scores and times.
        store: Holds the weights.
        dense: To compare with.

    Raises:
        EvaluationError: Its training or evaluation failed.
        VerificationError: The slim model doesn't compute what the masked one does.
    """
    recovered = pool.evaluate([candidate.with_training(training)])[0]
    if recovered.failure is not None or recovered.weights is None:
        raise EvaluationError(f"recovering {name} failed: {recovered.failure}")
    final = replace(candidate, weights=recovered.weights, recalibrate=0, reconstruct=None)
    trained = store.get(recovered.weights)
    folder.mkdir(parents=True, exist_ok=True)
    small = final_model(plan, trained)
    if trained.kept:
        kept = {name: list(indices) for name, indices in trained.kept.items()}
        masks: Masks = plan.structure.masks(kept)
        full = _load(plan.model, expand(plan.structure, plan.model, small.state_dict(), kept))
        verdict = verify(
            full, small, plan.task.example_inputs(), structure=plan.structure, kept=kept
        )
        if verdict.kind == "wrong":
            raise VerificationError(
                f"{name}: the slim model doesn't compute what the masked one does "
                f"(relative error {verdict.max_error:.2g}; {'; '.join(verdict.reasons)}); "
                "it was not published"
            )
        verification = Verification(
            kind=verdict.kind,
            max_error=verdict.max_error,
            reasons=verdict.reasons,
            reference_error=verdict.reference_error,
        )
        masked = Candidate(store.put(Weights(full.state_dict(), {})))
        cost = plan.structure.cost({name: len(indices) for name, indices in kept.items()})
        rows = [
            _measure("masked", masked, full, plan.structure.cost().macs, pool),
            _measure("slim", final, small, cost.macs, pool),
        ]
    else:
        ranked = pool.rankings[final.ranking].kept(final.counts) if final.kept else {}
        masks = weight_masks(plan.model, ranked)
        verification, kept = None, {}
        rows = [_measure("masked", final, small, plan.structure.cost().macs, pool)]
    save_masks(masks, folder / "masks.safetensors")
    write_json(folder / "groups.json", _groups(plan, kept))
    timed = pool.latency(
        {row.name: row.candidate for row in [dense, *rows]},
        plan.config.latency.batch_sizes,
        plan.config.latency.repeats,
        plan.config.latency.max_seconds,
    )
    return Finished(
        candidate=final,
        kept=kept,
        rows=tuple(row.row(_latency(timed, row.name)) for row in [dense, *rows]),
        measured=rows[-1],
        timed=timed,
        verification=verification,
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


def final_model(plan: Plan, trained: Weights) -> nn.Module:
    """The model of stored weights: slim where they are, on the CPU, in eval mode."""
    if not trained.kept:
        return _load(plan.model, trained.state)
    kept = {name: list(indices) for name, indices in trained.kept.items()}
    return _load(slim(plan.model, plan.structure, kept), trained.state)


def _load(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    copied = masked_copy(model, {})
    copied.load_state_dict(dict(state))
    return copied.eval()


def _measure(
    name: str, candidate: Candidate, model: nn.Module, macs: int, pool: LedgerExecutor
) -> Measured:
    scores = {}
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        trial = pool.evaluate([candidate], split)
        if trial[0].failure is not None:
            raise EvaluationError(f"evaluating the {name} model failed: {trial[0].failure}")
        scores[split] = trial[0].score
    return Measured(
        name,
        candidate,
        scores["validation"],
        scores["test"],
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int((p != 0).sum()) for p in model.parameters()),
        macs=macs,
        file_bytes=file_size(model),
    )


def _latency(timed: list[LatencyRow], name: str) -> tuple[Latency, ...]:
    return tuple(
        Latency(
            batch_size=row.batch_size,
            median_ms=row.median_ms,
            p10_ms=row.p10_ms,
            p90_ms=row.p90_ms,
            peak_bytes=row.peak_bytes,
        )
        for row in timed
        if row.name == name
    )


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


def _groups(plan: Plan, kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """What can be removed, and what was: readable without this library."""
    return {
        "groups": [
            {
                "name": group.name,
                "channels": group.num_channels,
                "kept": len(kept.get(group.name, range(group.num_channels))),
                "kept_indices": kept.get(group.name, "all"),
                "producers": list(group.producers),
                "exact": group.exact,
            }
            for group in plan.structure.groups
        ],
        "frozen": [[f.parameter, f.dim, f.reason] for f in plan.structure.frozen],
    }
