"""Simulated annealing over kept channel counts (Kirkpatrick et al. 1983; AutoCompress, 1907.03141).

Deviations from AutoCompress's search (and from NNI's): the temperature is calibrated on the
objective's own scale, where theirs runs from 100 to 20 whatever the metric, which accepts nearly
everything; every proposal meets the budget by construction, where theirs are drawn until one does;
the budget is parameters or multiply-adds after true shape propagation; layers aren't forced to be
pruned in order of their size.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raycompress.budget import Allocator
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.recalibration import check_recalibration
from raycompress.search import Candidate, Search, Trial

__all__ = ["SimulatedAnnealing"]

LEAST_FRACTION = 0.02


@dataclass(frozen=True, kw_only=True)
class SimulatedAnnealing(Pruner):
    """Searches the keep fraction of every channel group within a budget.

    Starts at the uniform allocation. Each iteration proposes `neighbours` allocations around the
    current one, which are evaluated at once and then looked at in order: the first that passes
    the Metropolis rule becomes the current one, the rest only count for the best so far. That is
    the serial algorithm's path, with its next rejections evaluated in advance. The best
    allocation ever seen wins.

    Attributes:
        criterion: Which channels of a group go first: a name such as "l1", or an import path.
        iterations: Annealing steps after the first, which calibrates.
        neighbours: Proposals for each step; evaluated in parallel, and never derived from the
            number of workers.
        start_acceptance: Probability with which a move that is worse by the median difference of
            the first step is accepted at the start.
        end_acceptance: The same at the end; the temperature falls geometrically between.
        perturbation: Largest change of a keep fraction at the start; falls to a tenth.
        objective: "loss": lower validation loss wins (finer than accuracy); "score": the task's.
        recalibrate: Calibration batches for norm statistics before judging; 0: none. Tried on the
            dense model first; data that make it worse are refused.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "l1"
    iterations: int = 40
    neighbours: int = 4
    start_acceptance: float = 0.8
    end_acceptance: float = 0.01
    perturbation: float = 0.35
    objective: Literal["loss", "score"] = "loss"
    recalibrate: int = 4
    round_to: int = 1
    min_kept: int = 1

    def __post_init__(self) -> None:
        criterion(self.criterion, "SimulatedAnnealing.criterion", "channels")
        for name, least in (
            ("iterations", 0),
            ("neighbours", 1),
            ("recalibrate", 0),
            ("round_to", 1),
            ("min_kept", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"SimulatedAnnealing.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 < self.end_acceptance <= self.start_acceptance < 1:
            raise ConfigError(
                "SimulatedAnnealing: 0 < end_acceptance <= start_acceptance < 1 must hold, got "
                f"{self.end_acceptance:g} and {self.start_acceptance:g}"
            )
        if not 0 < self.perturbation <= 1:
            raise ConfigError(
                f"SimulatedAnnealing.perturbation must be in (0, 1], got {self.perturbation:g}"
            )

    def search(self, problem: Problem) -> Search:
        """Yields `neighbours` candidates a step (one more in the first)."""
        groups = problem.groups()
        fixed = [name for name, choice in groups.items() if choice.sparsity is not None]
        if fixed:
            raise ConfigError(
                f"targets give {fixed[0]!r} a sparsity, which SimulatedAnnealing is to find"
            )
        fitter = allocator(
            problem, list(groups), "SimulatedAnnealing", self.round_to, self.min_kept
        )
        yield from check_recalibration(problem.weights, self.recalibrate)
        ranks = criterion(self.criterion, "SimulatedAnnealing.criterion", "channels")
        ranking = yield from problem.rank(ranks, list(groups))

        def candidates(several: Sequence[Mapping[str, int]]) -> list[Candidate]:
            return [
                problem.candidate(counts, ranking, recalibrate=self.recalibrate)
                for counts in several
            ]

        uniform = fitter.fit(dict.fromkeys(groups, 1.0))
        proposals = [uniform, *self._propose(problem, fitter, uniform, 0)]
        trials = yield candidates(proposals)
        energies = [self._energy(trial) for trial in trials]
        scale = _scale(energies)
        best = min(range(len(trials)), key=energies.__getitem__)
        current, energy = proposals[best], energies[best]
        winner, lowest = trials[best].candidate, energy
        for iteration in range(1, self.iterations + 1):
            temperature = self.temperature(iteration, scale)
            rng = random.Random(f"accept:{problem.seed}:{iteration}")
            proposals = self._propose(problem, fitter, current, iteration)
            trials = yield candidates(proposals)
            moved = False
            for counts, trial in zip(proposals, trials, strict=True):
                proposed = self._energy(trial)
                if proposed < lowest:
                    winner, lowest = trial.candidate, proposed
                if not moved and accepts(proposed - energy, temperature, rng.random()):
                    current, energy, moved = counts, proposed, True
        return winner

    def temperature(self, iteration: int, scale: float) -> float:
        """Of an iteration (from 1): falls geometrically between the two acceptances.

        Args:
            iteration: From 1 to `iterations`.
            scale: The median difference that the acceptances speak of.
        """
        if scale == 0:
            return 0.0
        start = scale / -math.log(self.start_acceptance)
        end = scale / -math.log(self.end_acceptance)
        progress = (iteration - 1) / max(self.iterations - 1, 1)
        return float(start * (end / start) ** progress)

    def _energy(self, trial: Trial) -> float:
        return trial.loss if self.objective == "loss" else -trial.score

    def _propose(
        self, problem: Problem, fitter: Allocator, current: Mapping[str, int], iteration: int
    ) -> list[dict[str, int]]:
        """Neighbours of an allocation, each within the budget and none equal to it or another."""
        rng = random.Random(f"propose:{problem.seed}:{iteration}")
        progress = max(iteration - 1, 0) / max(self.iterations - 1, 1)
        reach = self.perturbation * (1 - 0.9 * progress)
        groups = fitter.groups
        base = {g.name: max(current[g.name] / g.num_channels, LEAST_FRACTION) for g in groups}
        proposals: list[dict[str, int]] = []
        for _ in range(self.neighbours):
            # A bounded number of draws: in a tight budget all neighbours may round to the same.
            for _ in range(20):
                fractions = dict(base)
                most = max(2, len(groups) // 3)
                for group in rng.sample(groups, min(rng.randint(1, most), len(groups))):
                    moved = fractions[group.name] + rng.uniform(-reach, reach)
                    fractions[group.name] = min(max(moved, LEAST_FRACTION), 1.0)
                counts = fitter.fit(fractions)
                if counts != current and counts not in proposals:
                    break
            proposals.append(counts)
        return proposals


def accepts(difference: float, temperature: float, draw: float) -> bool:
    """The Metropolis rule: better always, worse with probability exp(-difference / temperature).

    Args:
        difference: Proposed minus current energy.
        temperature: In the energy's unit; 0 accepts what is better alone.
        draw: Uniform in [0, 1).
    """
    if difference <= 0:
        return True
    if temperature <= 0 or not math.isfinite(difference):
        return False
    return draw < math.exp(-difference / temperature)


def _scale(energies: Sequence[float]) -> float:
    """Median of the finite, positive differences from the first energy; 0 without any."""
    differences = [
        abs(e - energies[0]) for e in energies[1:] if math.isfinite(e) and e != energies[0]
    ]
    finite = [d for d in differences if math.isfinite(d)]
    return statistics.median(finite) if finite else 0.0
