"""Pruning by ADMM (Zhang et al. 2018, arXiv 1804.03294; structured: 1810.07378)."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raycompress.candidate import Candidate, Training, Trial
from raycompress.criteria import L2, Criterion, Magnitude, channel_rows
from raycompress.errors import ConfigError
from raycompress.masks import prune_order
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_counts, check_sparsity, plan_units
from raycompress.search import Asked, Search
from raycompress.structure import ChannelGroup, slim
from raycompress.training.toward import Toward
from raycompress.weights import Weights

__all__ = ["ADMM", "Projection", "alternate"]

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ADMM(Pruner):
    """Splits min f(W) with W sparse into training, projection, and a running sum of their gap.

    Z is the Euclidean projection of the weights onto the sparse set, U the scaled dual:

    1. Z = Proj(W), U = 0.
    2. Each iteration: W minimises f(W) + rho / 2 * ||W - Z + U||^2 by `epochs` of training;
       Z = Proj(W + U); U = U + W - Z. The residuals ||W - Z|| (primal) and rho * ||Z - Z_before||
       (dual) are reported, relative to ||W||.
    3. What Z removes is removed, and the rest trains on for `retrain_epochs`.

    Single weights: Proj keeps the largest magnitudes of each layer. Channels: it keeps the channels
    of each group whose producing filters have the largest Euclidean norm, all layers of the group
    together, which is the projection onto "at most k channels of the group".

    Attributes:
        units: "weights" or "channels".
        sparsity: Fraction removed, in [0, 1); targets and budgets override it.
        iterations: Of ADMM, at least 1.
        epochs: Of training in each, above 0.
        rho: Strength of the pull in the first iteration. The papers' 1e-4 to 1.5e-3 need many
            thousand steps; watch the residual.
        rho_growth: Factor of rho after each iteration, at least 1; the dual is rescaled with it.
        retrain_epochs: Of training the pruned model; 0: none.
        lr: Peak learning rate; None takes the task's own.
        round_to: Kept counts of channels are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    units: Literal["weights", "channels"] = "weights"
    sparsity: float | None = None
    iterations: int = 8
    epochs: float = 1.0
    rho: float = 1e-2
    rho_growth: float = 1.3
    retrain_epochs: float = 1.0
    lr: float | None = None
    round_to: int = 1
    min_kept: int = 1

    def __post_init__(self) -> None:
        check_counts("ADMM", self.round_to, self.min_kept)
        check_sparsity("ADMM", self.sparsity)
        if self.units not in ("weights", "channels"):
            raise ConfigError(f"ADMM.units must be 'weights' or 'channels', got {self.units!r}")
        if self.iterations < 1:
            raise ConfigError(f"ADMM.iterations must be at least 1, got {self.iterations}")
        for name in ("epochs", "rho"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"ADMM.{name} must be above 0, got {getattr(self, name):g}")
        if self.rho_growth < 1:
            raise ConfigError(f"ADMM.rho_growth must be at least 1, got {self.rho_growth:g}")
        if self.retrain_epochs < 0:
            raise ConfigError(f"ADMM.retrain_epochs must be 0 or more, got {self.retrain_epochs:g}")

    def search(self, problem: Problem) -> Search:
        """Yields one dense training an iteration, then the retraining of what is left."""
        ranks: Criterion = Magnitude() if self.units == "weights" else L2()
        units = plan_units(
            problem,
            ranks,
            "ADMM",
            self.sparsity,
            round_to=self.round_to,
            min_kept=self.min_kept,
        )
        counts = units.final({})
        projection = Projection(problem, units.names, counts, ranks.kind)
        weights, scores = yield from alternate(
            problem,
            projection,
            Candidate(problem.weights),
            iterations=self.iterations,
            epochs=self.epochs,
            rho=self.rho,
            rho_growth=self.rho_growth,
            lr=self.lr,
            seed=problem.seed,
        )
        ranking = problem.ranking(ranks.kind, scores)
        training = Training(self.retrain_epochs, self.lr, problem.seed)
        asked = problem.candidate(counts, ranking, weights=weights, training=training)
        trained = (yield [asked])[0].trained()
        return replace(asked, weights=trained, training=None)


def alternate(
    problem: Problem,
    projection: Projection,
    parent: Candidate,
    *,
    iterations: int,
    epochs: float,
    rho: float,
    rho_growth: float,
    lr: float | None,
    seed: int,
) -> Generator[Asked, list[Trial], tuple[str, dict[str, Tensor]]]:
    """The iterations of ADMM: `yield from` it.

    Args:
        problem: Trains, and is told of the residuals.
        projection: Onto what is to be left.
        parent: Whose weights are trained; may be slim.
        iterations: At least 1.
        epochs: Of training in each.
        rho: Strength in the first.
        rho_growth: Factor of rho after each.
        lr: Peak learning rate; None takes the task's own.
        seed: Of the order of examples.

    Returns:
        Digest of the trained weights, and the scores by which the last projection chose.
    """
    weights = parent.weights
    state = projection.of(problem.dense(weights).state_dict())
    z, scores = projection.project(state)
    u = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for number in range(1, iterations + 1):
        aim = projection.narrowed({name: z[name] - u[name] for name in z})
        target = problem.store.put(Weights(aim, {}))
        training = Training(
            epochs, lr, seed + 1000 * number, methods=(Toward(target=target, rho=rho),)
        )
        trial = (yield [replace(parent, weights=weights, training=training)])[0]
        weights = trial.trained()
        w = projection.of(problem.dense(weights).state_dict())
        before = z
        z, scores = projection.project({name: w[name] + u[name] for name in w})
        u = {name: u[name] + w[name] - z[name] for name in w}
        norm = max(_norm(w), 1e-12)
        problem.report(
            {
                "primal_residual": _norm({n: w[n] - z[n] for n in w}) / norm,
                "dual_residual": rho * _norm({n: z[n] - before[n] for n in z}) / norm,
                "rho": rho,
            }
        )
        rho *= rho_growth
        u = {name: tensor / rho_growth for name, tensor in u.items()}
    return weights, scores


class Projection:
    """The Euclidean projection onto models that keep so many units under each key.

    All in dense shapes: what a slim parent has lost is zero.

    Args:
        problem: Model and structure.
        names: Of the groups or layers that are pruned.
        counts: Kept units under each key.
        kind: Of the units.
        weights: Digest of the parent's; None: the dense model's own.
    """

    def __init__(
        self,
        problem: Problem,
        names: Sequence[str],
        counts: Mapping[str, int],
        kind: str,
        weights: str | None = None,
    ) -> None:
        self._problem = problem
        self._weights = problem.weights if weights is None else weights
        self._counts = counts
        self._groups: list[ChannelGroup] = []
        if kind == "weights":
            self.parameters = list(counts)
            return
        self._gone = problem.removed("channels", names, self._weights)
        self._groups = [problem.structure.group(name) for name in names]
        known = dict(problem.model.named_parameters())
        self.parameters = sorted(
            {
                m.parameter
                for group in self._groups
                for m in group.members
                if m.role == "producer" and m.parameter in known
            }
        )

    def of(self, state: Mapping[str, Tensor]) -> State:
        """The weights that are projected, out of a dense state dict."""
        return {name: state[name].detach().float() for name in self.parameters}

    def narrowed(self, weights: State) -> State:
        """Weights in dense shapes in the parent's own."""
        kept = {} if self._weights == self._problem.weights else self._kept()
        if not kept:
            return weights
        model = self._problem.dense(self._weights)  # a copy
        model.load_state_dict({**model.state_dict(), **weights})
        small = slim(model, self._problem.structure, kept).state_dict()
        return {name: small[name] for name in weights}

    def _kept(self) -> dict[str, list[int]]:
        stored = self._problem.store.get(self._weights)
        return {name: list(indices) for name, indices in stored.kept.items()}

    def project(self, weights: Mapping[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        """The nearest sparse weights, and the scores by which they were chosen."""
        result = {name: tensor.clone() for name, tensor in weights.items()}
        scores: dict[str, Tensor] = {}
        if not self._groups:
            for name, tensor in result.items():
                scores[name] = tensor.abs()
                gone = prune_order(scores[name])[: tensor.numel() - self._counts[name]]
                tensor.view(-1)[gone] = 0
            return result, scores
        for group in self._groups:
            producers = [m for m in group.members if m.role == "producer" and m.parameter in result]
            squares = [channel_rows(weights[m.parameter], m).square().sum(dim=1) for m in producers]
            total = torch.stack(squares).sum(dim=0)
            if group.name in self._gone:  # before channels that are left, and happen to be zero
                total = total.masked_fill(self._gone[group.name], -math.inf)
            scores[group.name] = total
            gone = prune_order(scores[group.name])
            gone = gone[: group.num_channels - self._counts[group.name]]
            for member in producers:
                rows = torch.as_tensor(member.indices)[gone].flatten()
                result[member.parameter].index_fill_(member.dim, rows, 0)
        return result, scores


def _norm(state: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in state.values()))
