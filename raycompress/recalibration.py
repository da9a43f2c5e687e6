"""Recalibration of BatchNorm: running statistics taken anew from calibration data.

Pruning shifts what a norm sees; judged with its old statistics, a candidate looks far worse than it
is (EagleEye, arXiv 2007.02491).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raycompress.candidate import Candidate, Trial
from raycompress.errors import EvaluationError, TaskError

__all__ = ["WORST_DROP", "check_recalibration", "recalibrate"]


WORST_DROP = 0.02
"""Largest fraction of the dense model's score that recalibration may cost it."""


def check_recalibration(
    weights: str, batches: int
) -> Generator[Sequence[Candidate], list[Trial], None]:
    """Recalibrates the dense model and compares: `yield from` it before candidates are judged so.

    A calibration set that is small, or unlike what the model was trained on, can cost tens of
    points; then it is the set that a search would judge, not its candidates.

    Args:
        weights: Digest of the dense model's weights.
        batches: Calibration batches; 0: nothing to check.

    Raises:
        TaskError: The dense model's score falls by more than `WORST_DROP` of itself, and by more
            than three standard errors over the validation shards.
    """
    if not batches:
        return
    plain, again = yield [Candidate(weights), Candidate(weights, recalibrate=batches)]
    if plain.failure is not None or again.failure is not None:
        raise EvaluationError(f"judging the dense model failed: {plain.failure or again.failure}")
    drops = [
        before.score / before.count - after.score / after.count
        for before, after in zip(plain.shards, again.shards, strict=True)
    ]
    error = statistics.stdev(drops) / len(drops) ** 0.5 if len(drops) > 1 else 0.0
    drop = plain.score - again.score
    if drop > WORST_DROP * abs(plain.score) and drop > 3 * error:
        raise TaskError(
            f"with norm statistics from {batches} calibration batches the dense model's score "
            f"falls from {plain.score:.4g} to {again.score:.4g}: the calibration split is too "
            "small, or unlike the training data; give it more or other data, raise "
            "`recalibrate`, or set it to 0"
        )


def recalibrate(model: nn.Module, forward: Callable[[Any], object], batches: Sequence[Any]) -> None:
    """Replaces the running mean and variance of every BatchNorm by the batches' averages.

    Nothing but these buffers changes; other modules stay in eval mode. Every batch weighs the
    same (cumulative average), so batches should be of one size.

    Args:
        model: In eval mode; left in eval mode.
        forward: Runs the model on a batch.
        batches: Calibration batches on the model's device; with none, nothing changes.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms or not batches:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
