"""What a job evaluated, as points of metric against cost, and the fronts that nothing beats.

Light: standard library alone, so that a summary is read and shown without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["RESOURCES", "Point", "front", "marked"]

RESOURCES = ("macs", "params", "latency_ms", "size_bytes")
"""What a point may be cheap in; names of `Point`'s fields."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model that was evaluated on validation data.

    Attributes:
        id: Short name, the same in every run: a digest of `candidate`.
        trial: That evaluated it; "" for the dense model.
        step: Of the trial's curve; None for final models and the dense one.
        stage: "search": as a search judged it, before recovery; "final": a trial's finished model.
        candidate: `Candidate.key()` as JSON, with the trained weights in place of the training.
        macs: Multiply-adds of one example.
        params: Parameters that are left; of a masked model, those that aren't masked.
        latency_ms: As the job's latency table predicts; None without one, and with bits.
        size_bytes: Of the numbers that are stored: packed in a quantized model, else four for each,
            zeros too. None: unknown, in a table of an older version.
        bits: Of a quantized model, such as "W2-8 A8"; "" in float.
        score: Mean over the validation data, higher is better; no test data.
        loss: The same, lower is better.
        complete: All of the validation data was looked at; probes and what a race dropped have
            seen a part, and are on no front.
        trained: Its weights were trained after pruning, or are those of a trained parent.
        reconstructed: Its layers imitate the dense ones by least squares.
        fronts: Resources by which nothing evaluated beats it: no model costs at most as much and
            scores at least as well, and one of the two better.
        search_fronts: The same among the dense model and what searches judged, before recovery.
    """

    id: str
    trial: str = ""
    step: int | None = None
    stage: Literal["dense", "search", "final"] = "search"
    candidate: str = ""
    macs: int
    params: int
    latency_ms: float | None = None
    size_bytes: int | None = None
    bits: str = ""
    score: float
    loss: float
    complete: bool = True
    trained: bool = False
    reconstructed: bool = False
    fronts: tuple[str, ...] = ()
    search_fronts: tuple[str, ...] = ()


def front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which points no other point dominates: costs at most as much, scores at least as well.

    One of the two must be better; equal points don't dominate each other. Numbers that aren't
    finite are on no front, and beat nothing.

    Args:
        costs: Lower is better.
        scores: Of the same points, higher is better.
    """
    finite = [
        index
        for index, pair in enumerate(zip(costs, scores, strict=True))
        if all(map(math.isfinite, pair))
    ]
    on_front = [False] * len(costs)
    best = -math.inf  # of all that is cheaper
    top, cost = -math.inf, math.nan  # of what costs the same
    for index in sorted(finite, key=lambda i: (costs[i], -scores[i])):
        if costs[index] != cost:
            best = max(best, top)
            top, cost = scores[index], costs[index]
        on_front[index] = scores[index] == top > best
    return on_front


def marked(points: Sequence[Point]) -> list[Point]:
    """The points with their fronts.

    Multiply-adds of few bits aren't those of float: quantized models compete by bytes alone.
    """
    everything = _fronts(points, [point.complete for point in points])
    before = _fronts(points, [point.complete and point.stage != "final" for point in points])
    return [
        replace(point, fronts=one, search_fronts=two)
        for point, one, two in zip(points, everything, before, strict=True)
    ]


def _fronts(points: Sequence[Point], counted: Sequence[bool]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()] * len(points)
    for resource in RESOURCES:
        costs = [
            cost
            if use
            and (cost := getattr(point, resource)) is not None
            and (resource == "size_bytes" or not point.bits)
            else math.inf
            for point, use in zip(points, counted, strict=True)
        ]
        for index, on in enumerate(front(costs, [point.score for point in points])):
            if on:
                found[index] = (*found[index], resource)
    return found
