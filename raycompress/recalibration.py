"""Recalibration of BatchNorm: running statistics taken anew from calibration data.

Pruning shifts what a norm sees; judged with its old statistics, a candidate looks far worse than it
is (EagleEye, arXiv 2007.02491).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["recalibrate"]


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
