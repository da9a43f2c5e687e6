"""Pulls weights toward a target: the proximal term of ADMM's first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raycompress.method import TrainingMethod, TrainingRun
from raycompress.steps import before_step, stepped

__all__ = ["Toward"]


@dataclass(frozen=True, kw_only=True)
class Toward(TrainingMethod):
    """Adds rho / 2 * ||W - T||^2 to the loss, by its gradient rho * (W - T).

    The gradient goes through the optimizer like the loss's own (arXiv 1804.03294, equation 7).

    Attributes:
        target: Digest of T in the weight store, by parameter name.
        rho: Strength, above 0.
    """

    target: str
    rho: float

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Adds the gradient before every step."""
        parameters = dict(run.model.named_parameters(remove_duplicate=False))
        targets = run.weights(self.target).state
        pairs = [(parameters[name], target.to(run.device)) for name, target in targets.items()]

        def pull(optimizer: torch.optim.Optimizer) -> None:
            now = stepped(optimizer)
            with torch.no_grad():
                for parameter, target in pairs:
                    if id(parameter) in now and parameter.grad is not None:
                        parameter.grad.add_(parameter - target, alpha=self.rho)

        with before_step(run.model, pull):
            yield
