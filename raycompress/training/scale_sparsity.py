"""Sparsity of norm scales: the training of Network Slimming (Liu et al. 2017, arXiv 1708.06519)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raycompress.errors import TaskError
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.steps import before_step, stepped

__all__ = ["ScaleSparsity"]


@dataclass(frozen=True, kw_only=True)
class ScaleSparsity(TrainingMethod):
    """Adds strength * sum |gamma| over all BatchNorm scales to the loss, by its sub-gradient.

    Equation 1 of the paper: the sum, not a mean, so that a strength of 1e-4 means what it means
    there. At gamma = 0 the sub-gradient is 0.

    Attributes:
        strength: The paper's lambda: 1e-4 for VGG, 1e-5 for ResNet-164 and DenseNet-40.
    """

    strength: float = 1e-4

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Adds the sub-gradient before every step.

        Raises:
            TaskError: The model has no BatchNorm with a scale.
        """
        scales = [
            module.weight
            for module in run.model.modules()
            if isinstance(module, _BatchNorm) and isinstance(module.weight, nn.Parameter)
        ]
        if not scales:
            raise TaskError("sparsity of norm scales needs a model with BatchNorm scales")

        def shrink(optimizer: torch.optim.Optimizer) -> None:
            now = stepped(optimizer)
            for scale in scales:
                if id(scale) in now and scale.grad is not None:
                    scale.grad.add_(scale.detach().sign(), alpha=self.strength)

        with before_step(run.model, shrink):
            yield
