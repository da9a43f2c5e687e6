"""What the ledger holds of a candidate, from results and back to trials: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raycompress.candidate import Candidate, Shard, Trial
from raycompress.on_runtime import FLOAT_OF
from raycompress.search import Timings
from raycompress.structure.latency.measure import LatencyRow
from raycompress.task import Split
from raycompress.units import UnitResult

__all__ = ["Record", "answered", "recalled", "record_of", "timing_records"]

Record = Mapping[str, Any]


def answered(candidate: Candidate, results: Sequence[UnitResult], dfe: float) -> Trial:
    """The trial of a candidate whose units have all finished."""
    failure = next((r.failure for r in results if r.failure is not None), None)
    return Trial(
        candidate,
        shards=() if failure is not None else tuple(s for r in results for s in r.shards),
        failure=failure,
        weights=results[0].weights,
        seconds=sum(r.seconds for r in results),
        dfe=dfe,
    )


def record_of(trial: Trial, results: Sequence[UnitResult], split: Split | None) -> dict[str, Any]:
    """What is kept of it."""
    candidate = trial.candidate
    kind = "evaluation"
    if candidate.collect is not None:
        kind = "collection"
    elif candidate.training is not None:
        kind = "training"
    return {
        "kind": kind,
        "candidate": candidate.key(),
        "split": split,
        "shards": [[s.count, s.score, s.loss] for s in trial.shards],
        "failure": trial.failure,
        "weights": trial.weights,
        "seconds": round(trial.seconds, 6),
        "dfe": trial.dfe,
        "worker": ",".join(sorted({r.worker for r in results})),
    }


def timing_records(
    asked: Timings, rows: Sequence[LatencyRow] | str, seconds: float
) -> list[dict[str, Any]]:
    """What is kept of candidates that were timed together.

    Args:
        asked: Names of rows are indices of its candidates, behind `FLOAT_OF` those of float models.
        rows: What was measured, or why nothing could be.
        seconds: That it took.
    """
    failures: dict[str, str] = {}
    fast: dict[str, float] = {}
    if isinstance(rows, str):
        failures = {str(index): rows for index in range(len(asked.candidates))}
    else:
        failures = {row.name: row.failure for row in rows if row.failure}
        # What else the machine does only adds to a pass: its low percentiles say more.
        fast = {row.name: round(row.p10_ms, 6) for row in rows if not row.failure}
    return [
        {
            "kind": "timing",
            "candidate": candidate.key(),
            "runtime": asked.runtime,
            "batch_size": asked.batch_size,
            "latency_ms": fast.get(name),
            "float_ms": fast.get(FLOAT_OF + name),
            "split": None,
            "shards": [],
            "failure": failures.get(name, failures.get(FLOAT_OF + name)),
            "weights": None,
            "seconds": round(seconds / len(asked.candidates), 6),
            "dfe": 0.0,
            "worker": "",
        }
        for name, candidate in ((str(i), c) for i, c in enumerate(asked.candidates))
    ]


def recalled(candidate: Candidate, record: Record, *, replayed: bool = True) -> Trial:
    """The trial of what was kept."""
    return Trial(
        candidate,
        shards=tuple(Shard(*sums) for sums in record["shards"]),
        failure=record["failure"],
        weights=record["weights"],
        seconds=record["seconds"],
        dfe=record["dfe"],
        replayed=replayed,
        latency_ms=record.get("latency_ms"),
        float_ms=record.get("float_ms"),
    )
