"""A candidate's model: built, shrunk, verified against its masked twin, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raycompress.candidate import Candidate, Training
from raycompress.errors import EvaluationError, VerificationError
from raycompress.executor import LedgerExecutor
from raycompress.masks import Masks, masked_copy, save_masks, weight_masks
from raycompress.plan import Plan
from raycompress.results import Latency, ModelRow, Verification
from raycompress.storage import Place, staged
from raycompress.structure import expand, file_size, slim, verify
from raycompress.structure.latency.measure import LatencyRow
from raycompress.task import Split
from raycompress.trial import write_json
from raycompress.weights import Weights, WeightStore

__all__ = ["Finished", "Measured", "final_model", "finish_candidate", "latency_of", "measure_dense"]


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


def measure_dense(plan: Plan, pool: LedgerExecutor, weights: str) -> Measured:
    """Scores, sizes and cost of the dense model."""
    macs = plan.structure.cost().macs
    return _measure("dense", Candidate(weights), plan.model, macs, pool)


def finish_candidate(
    plan: Plan,
    candidate: Candidate,
    training: Training,
    name: str,
    folder: Place,
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
        folder: Of files, made if it isn't there.
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
    final = candidate.trained(recovered.weights)
    trained = store.get(recovered.weights)
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
    with staged(folder) as local:
        save_masks(masks, local / "masks.safetensors")
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
        rows=tuple(row.row(latency_of(timed, row.name)) for row in [dense, *rows]),
        measured=rows[-1],
        timed=timed,
        verification=verification,
    )


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


def latency_of(timed: list[LatencyRow], name: str) -> tuple[Latency, ...]:
    """One model's latency among those that were timed together."""
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
