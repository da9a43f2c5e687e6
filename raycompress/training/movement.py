"""Movement pruning (Sanh et al. 2020, arXiv 2005.07683): keep what moves away from zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from raycompress.errors import TaskError
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.steps import after_step, before_step, stepped

__all__ = ["Movement"]


@dataclass(frozen=True, kw_only=True)
class Movement(TrainingMethod):
    """Learns a score beside every weight; the model runs with the mask of the scores.

    With S the scores, M(S) the mask and W' = W * M(S) what the model runs with, the gradients are
    (sections 4 and 4.1) dL/dW = dL/dW' * M(S) and, straight through the mask, dL/dS = dL/dW' * W.
    So S accumulates -score_lr * dL/dW' * W: a weight that grows away from zero gains score, one
    that shrinks loses.

    Hard: M(S) keeps the top 1 - sparsity(t) of each layer. Soft, as in the authors' code:
    M(S) = [sigmoid(S) > threshold(t)], and the loss gains penalty * mean(sigmoid(S)) for each
    layer, which pulls scores down. Scores begin at 0, so that at sigmoid 1/2 all are kept. Sparsity
    and threshold rise from 0 by the cubic schedule of gradual pruning between the two warm-ups.

    Between steps the parameters hold W'; W is put back for the optimizer's step alone. So the
    task's own loop needs no change, and weight decay sees W.

    Deviation from the authors' code, which trains scores by Adam: plain gradient steps, so that
    scores sum up what the equation says.

    Attributes:
        parameters: Names of the weights that are scored.
        sparsity: Final fraction removed of each, in the same order (hard).
        score_lr: Learning rate of the scores.
        warm_up: Share of the steps before pruning starts.
        cool_down: Share of the steps after the final sparsity is reached.
        soft: Threshold and penalty in place of the sparsity.
        threshold: Of the scores' sigmoid in the end (soft).
        penalty: Of the mean sigmoid of the scores (soft); 0: none.
    """

    parameters: tuple[str, ...]
    sparsity: tuple[float, ...] = ()
    score_lr: float = 1e-2
    warm_up: float = 0.1
    cool_down: float = 0.2
    soft: bool = False
    threshold: float = 0.5
    penalty: float = 0.0

    def reached(self, progress: float) -> float:
        """Share of the final sparsity at a share of the steps, both in [0, 1]."""
        span = max(1.0 - self.warm_up - self.cool_down, 1e-9)
        left = 1 - min(max((progress - self.warm_up) / span, 0.0), 1.0)
        return 1 - left**3

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Keeps scores, and masks the weights between steps; leaves the scores as `extra`.

        Raises:
            TaskError: The task's own loop doesn't report its progress, or a weight never had a
                gradient, so that nothing tells what of it matters.
        """
        weights = {name: run.model.get_parameter(name) for name in self.parameters}
        scores = {name: torch.zeros_like(w) for name, w in weights.items()}
        full = {name: w.detach().clone() for name, w in weights.items()}
        masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        final = dict(zip(self.parameters, self.sparsity or [0.0] * len(weights), strict=True))
        moved: set[str] = set()

        def of(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
            now = stepped(optimizer)
            return [(name, weight) for name, weight in weights.items() if id(weight) in now]

        def before(optimizer: torch.optim.Optimizer) -> None:
            with torch.no_grad():
                for name, weight in of(optimizer):
                    weight.copy_(full[name])
                    if weight.grad is None:
                        continue
                    moved.add(name)
                    gradient = weight.grad * weight
                    weight.grad.mul_(masks[name])
                    if self.soft and self.penalty:
                        gate = scores[name].sigmoid()
                        gradient += self.penalty * gate * (1 - gate) / gate.numel()
                    scores[name] -= self.score_lr * gradient

        def after(optimizer: torch.optim.Optimizer) -> None:
            # The loop reports a step after it; so this one's number is one ahead of run.step.
            progress = min((run.step + 1) / run.num_steps, 1.0) if run.num_steps else 0.0
            with torch.no_grad():
                for name, weight in of(optimizer):
                    full[name].copy_(weight)
                    masks[name] = self._mask(scores[name], final[name], progress)
                    weight.mul_(masks[name])

        with before_step(run.model, before), after_step(run.model, after):
            yield
        if not run.num_steps:
            raise TaskError(
                f"{type(run.task).__name__}.train never called `progress`, which movement "
                "pruning's schedule needs"
            )
        still = [name for name in weights if name not in moved]
        if still:
            raise TaskError(
                f"{still[0]!r} never had a gradient in a step of the optimizer, so movement "
                "pruning can't score it: leave frozen layers out by targets"
            )
        for name, score in scores.items():
            run.extra[f"{name}.score"] = score

    def kept(self, scores: Tensor, reached: float = 1.0) -> Tensor:
        """The soft mask at a share of the final threshold."""
        return scores.sigmoid() > self.threshold * reached

    def _mask(self, scores: Tensor, sparsity: float, progress: float) -> Tensor:
        if self.soft:
            return self.kept(scores, self.reached(progress))
        removed = int(scores.numel() * sparsity * self.reached(progress) + 1e-9)
        order = torch.argsort(scores.flatten(), stable=True)
        mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[order[:removed]] = False
        return mask.view_as(scores)
