"""NNI's SimulatedAnnealingPruner (v1.8 to v2.10), to compare with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raycompress.budget import Allocator
from raycompress.candidate import Candidate
from raycompress.criteria import criterion
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.annealing import free_groups
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.pruning.units import check_sparsity
from raycompress.search import Search
from raycompress.structure import ChannelGroup

__all__ = ["NNISimulatedAnnealing"]

Rates = list[float]
"""Sparsities, ascending; they belong to the groups in the order of their size."""
Scaling = Callable[[Sequence[float]], Rates | None]


@dataclass(frozen=True, kw_only=True)
class NNISimulatedAnnealing(Pruner):
    """Annealing as NNI has it; a comparison for `SimulatedAnnealing`, which is what to use.

    As there: the temperature falls from 100 to 20 by a factor of 0.9 after each accepted move,
    which makes 16 of them; what is worse is accepted with probability exp(-|difference| / T) of the
    task's score, so that with scores in [0, 1] even the worst is with more than 95 %, and the
    search is a random walk; sparsities are drawn, sorted so that larger layers never get smaller
    ones, and scaled to the target, until none of them reaches 1; proposals are judged one by one,
    as they are: nothing is recalibrated or reconstructed, and the start isn't judged at all; the
    best ever seen wins.

    Deviations: coupled layers are one group, with the weights of all that produce it for its size
    (NNI's layers are pruned apart from one another, and its speed-up undoes what contradicts
    itself); with a budget, sparsities are scaled to what the model really keeps, where NNI sums up
    nominal weights; and draws are bounded, where NNI hangs (its issues 3865 and 4527).

    Attributes:
        criterion: NNI's `base_algo`: which channels of a group go first.
        sparsity: Share of the prunable layers' weights that is removed by NNI's own account, which
            counts what filters take with them and no inputs; a budget overrides it.
        start_temperature: In the unit of the score.
        stop_temperature: The search ends when the temperature isn't above it any more.
        cool_down_rate: Factor of the temperature after each accepted move, in (0, 1).
        perturbation_magnitude: Largest change of a sparsity at the start; falls with the
            temperature.
        max_draws: Draws of sparsities until some can be scaled to the target; if none of the first
            can, the search is refused, and later proposals then are what they started from.
        max_rejections: In a row, after which the temperature falls without a move.
    """

    criterion: str = "l1"
    sparsity: float | None = None
    start_temperature: float = 100.0
    stop_temperature: float = 20.0
    cool_down_rate: float = 0.9
    perturbation_magnitude: float = 0.35
    max_draws: int = 10_000
    max_rejections: int = 100

    def __post_init__(self) -> None:
        name = "NNISimulatedAnnealing"
        criterion(self.criterion, f"{name}.criterion", "channels")
        check_sparsity(name, self.sparsity)
        if not 0 < self.stop_temperature < self.start_temperature:
            raise ConfigError(
                f"{name}: 0 < stop_temperature < start_temperature must hold, got "
                f"{self.stop_temperature:g} and {self.start_temperature:g}"
            )
        for key in ("cool_down_rate", "perturbation_magnitude"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(f"{name}.{key} must be in (0, 1), got {getattr(self, key):g}")
        for key in ("max_draws", "max_rejections"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{name}.{key} must be at least 1, got {getattr(self, key)}")

    def search(self, problem: Problem) -> Search:
        """Yields one candidate after the other, at least as many as temperatures."""
        names = free_groups(problem, "NNISimulatedAnnealing")
        groups = [problem.structure.group(name) for name in names]
        groups.sort(key=lambda group: (_size(problem, group), group.name))
        scaled = self._scaling(problem, groups)
        rates = self._first(problem, len(groups), scaled)
        ranks = criterion(self.criterion, "NNISimulatedAnnealing.criterion", "channels")
        ranking = yield from problem.rank(ranks, names)
        temperature, score, best = self.start_temperature, -math.inf, -math.inf
        winner = Candidate(problem.weights)
        proposed = accepted = 0
        while temperature > self.stop_temperature:
            for _ in range(self.max_rejections):
                rng = random.Random(f"nni:{problem.seed}:{proposed}")
                proposal = self._perturbed(rates, temperature, scaled, rng)
                problem.report({"temperature": temperature, "accepted": float(accepted)})
                asked = problem.candidate(_counts(groups, proposal), ranking)
                trial = (yield [asked])[0]
                proposed += 1
                if trial.score > best:
                    best, winner = trial.score, asked
                if trial.score > score or self.takes(score - trial.score, temperature, rng):
                    rates, score = proposal, trial.score
                    accepted += 1
                    break
            temperature *= self.cool_down_rate
        return winner

    def takes(self, difference: float, temperature: float, rng: random.Random) -> bool:
        """Whether what is worse is accepted all the same."""
        return rng.random() < math.exp(-abs(difference) / temperature)

    def _scaling(self, problem: Problem, groups: Sequence[ChannelGroup]) -> Scaling:
        """What brings ascending rates to the target; None where one of them would reach 1."""
        if problem.budget is not None:
            names = [group.name for group in groups]
            fitter = allocator(problem, names, "NNISimulatedAnnealing", 1, 1)
            return lambda rates: _to_budget(fitter, groups, rates)
        if self.sparsity is None:
            raise ConfigError(
                "NNISimulatedAnnealing needs a budget, such as budgets: [{macs: 50%}], or a "
                "sparsity: NNISimulatedAnnealing.sparsity"
            )
        sparsity, sizes = self.sparsity, [_size(problem, group) for group in groups]
        return lambda rates: _to_sparsity(sparsity, sizes, rates)

    def _first(self, problem: Problem, num: int, scaled: Scaling) -> Rates:
        rng = random.Random(f"nni:{problem.seed}")
        for _ in range(self.max_draws):
            rates = scaled(sorted(rng.random() for _ in range(num)))
            if rates is not None:
                return rates
        target = problem.budget if problem.budget is not None else f"sparsity {self.sparsity}"
        raise BudgetError(
            f"NNISimulatedAnnealing: none of {self.max_draws} draws of sparsities can be scaled to "
            f"{target} without one of them reaching 1, where NNI draws for ever; "
            "SimulatedAnnealing meets any budget that can be reached"
        )

    def _perturbed(
        self, rates: Rates, temperature: float, scaled: Scaling, rng: random.Random
    ) -> Rates:
        reach = temperature / self.start_temperature * self.perturbation_magnitude
        for _ in range(self.max_draws):
            moved = sorted(max(0.0, rate + rng.uniform(-reach, reach)) for rate in rates)
            found = scaled(moved)
            if found is not None:
                return found
        return rates


def _size(problem: Problem, group: ChannelGroup) -> int:
    """Weights of the layers that produce a group's channels."""
    parameters = {member.parameter for member in group.members if member.role == "producer"}
    shapes = [problem.structure.leaves[name].shape for name in parameters]
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def _counts(groups: Sequence[ChannelGroup], rates: Sequence[float]) -> dict[str, int]:
    return {
        group.name: num_kept(
            group.num_channels, rate, round_to=group.multiple, min_kept=group.min_kept
        )
        for group, rate in zip(groups, rates, strict=True)
    }


def _to_budget(
    fitter: Allocator, groups: Sequence[ChannelGroup], rates: Sequence[float]
) -> Rates | None:
    """The rates times the smallest factor at which the budget is met."""
    if max(rates) <= 0:
        return None
    low, high = 0.0, (1 - 1e-6) / max(rates)
    if not fitter.meets(_counts(groups, [rate * high for rate in rates])):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        if fitter.meets(_counts(groups, [rate * middle for rate in rates])):
            high = middle
        else:
            low = middle
    return [rate * high for rate in rates]


def _to_sparsity(sparsity: float, sizes: Sequence[int], rates: Sequence[float]) -> Rates | None:
    """NNI's `_rescale_sparsities`; sizes and rates ascend."""
    removed = sum(int(size * rate) for size, rate in zip(sizes, rates, strict=True))
    if not removed:
        return None
    factor = sparsity * sum(sizes) / removed
    scaled = [rate * factor for rate in rates]
    return scaled if scaled[-1] < 1 else None
