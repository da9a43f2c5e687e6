"""What a job found, as plain data: written to `results/summary.json`, read by reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CurvePoint", "JobResult", "ModelRow", "SensitivityPoint", "TrialResult"]


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of the final table.

    Attributes:
        name: "dense", "masked" or "slim".
        score_validation: Mean score on validation data, which selected.
        score_test: Mean score on test data, which selected nothing.
        params: Parameters.
        nonzero_params: Parameters that aren't zero.
        macs: Multiply-adds of one example.
        latency: Batch size -> (median, 10th percentile, 90th percentile) in milliseconds.
        file_bytes: Size as a safetensors file.
    """

    name: str
    score_validation: float
    score_test: float
    params: int
    nonzero_params: int
    macs: int
    latency: dict[int, tuple[float, float, float]]
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One step of a search.

    Attributes:
        step: From 0.
        score: Of the step's best candidate by loss.
        loss: Its loss.
        best_score: Highest score so far.
        best_loss: Lowest loss so far.
        dfe: Dense-forward equivalents so far, replayed ones included.
        failed: Candidates of the step that failed.
    """

    step: int
    score: float
    loss: float
    best_score: float
    best_loss: float
    dfe: float
    failed: int


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One pruner with one budget and one seed.

    Attributes:
        name: Of the trial.
        pruner: Class name.
        budget: As text; "" without one.
        seed: Of the search.
        kept: Kept count of each group (or parameter) that lost something.
        sizes: Count of each group (or parameter) that there is to lose.
        rows: "masked" and, for structured pruning, "slim".
        verdict: "exact", "inexact", "wrong", or "" where nothing was slimmed.
        max_error: Largest difference between slim and masked, relative to the output's scale.
        reasons: Why they differ.
        budget_use: Resource -> (measured on the slim model, limit); absolute.
        score_search: Validation score of the winner before recovery.
        dfe: Cost of the search in dense-forward equivalents, replayed ones included.
        evaluations: Candidates evaluated in this run.
        replayed: Candidates that the ledger answered.
        seconds: Wall time of the search in this run.
        curve: The search.
        weights: Digest of the final weights.
        model_path: Exported program (.pt2) below the output; "" if there is none.
        model_uri: In the tracking store; "" without one.
    """

    name: str
    pruner: str
    budget: str
    seed: int
    kept: dict[str, int]
    sizes: dict[str, int]
    rows: tuple[ModelRow, ...]
    verdict: str
    max_error: float
    reasons: tuple[str, ...]
    budget_use: dict[str, tuple[float, float]]
    score_search: float
    dfe: float
    evaluations: int
    replayed: int
    seconds: float
    curve: tuple[CurvePoint, ...]
    weights: str
    model_path: str
    model_uri: str


@dataclass(frozen=True, kw_only=True)
class SensitivityPoint:
    """One point of a sensitivity curve.

    Attributes:
        group: Channel group, or layer.
        sparsity: Fraction removed.
        score: Mean validation score.
    """

    group: str
    sparsity: float
    score: float


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a job found.

    Attributes:
        name: Of the job.
        score_name: What scores measure.
        output: Folder of everything that the job wrote.
        tracking_uri: Where the runs are; "" without tracking.
        run_id: Of the job's run there.
        dense: The dense model.
        trials: In the order of the job.
        sensitivity: Points, ordered by group and sparsity.
        frozen: (parameter, dim, reason) of what can't be pruned.
        unknown_ops: Operators without a rule, each with the module that called it.
        seconds: Wall time of this run of the job.
        dfe: Dense-forward equivalents of the whole job in this run.
    """

    name: str
    score_name: str
    output: str
    tracking_uri: str
    run_id: str
    dense: ModelRow
    trials: tuple[TrialResult, ...] = ()
    sensitivity: tuple[SensitivityPoint, ...] = ()
    frozen: tuple[tuple[str, int, str], ...] = ()
    unknown_ops: dict[str, str] = field(default_factory=dict)
    seconds: float
    dfe: float

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> JobResult:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return JobResult(
            **{
                **values,
                "dense": _row(values["dense"]),
                "trials": tuple(_trial(each) for each in values["trials"]),
                "sensitivity": tuple(SensitivityPoint(**each) for each in values["sensitivity"]),
                "frozen": tuple((str(p), int(d), str(r)) for p, d, r in values["frozen"]),
            }
        )


def _row(values: Mapping[str, Any]) -> ModelRow:
    latency = {int(size): tuple(times) for size, times in values["latency"].items()}
    return ModelRow(**{**values, "latency": latency})


def _trial(values: Mapping[str, Any]) -> TrialResult:
    return TrialResult(
        **{
            **values,
            "rows": tuple(_row(row) for row in values["rows"]),
            "reasons": tuple(values["reasons"]),
            "budget_use": {name: tuple(use) for name, use in values["budget_use"].items()},
            "curve": tuple(CurvePoint(**point) for point in values["curve"]),
        }
    )
