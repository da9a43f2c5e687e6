"""Loss curves from few probes, an exact solver, and a local search that races (our own).

Others walk: annealing judges a model for every step, NetAdapt trains one for every group and step.
Here every channel group is pruned alone to two widths, reconstructed, and judged once; the curve
between and beyond them has the shape that the criterion's scores estimate (`curves.py`). The sum of
these losses is minimised exactly within the budget (`solver.py`), for any budget and without
another look at data. The currency is measured loss, since reconstruction errors alone, which SPDY
(arXiv 2201.13096) sums, say little of how layers compare; the cost is the model's own, in which
neighbouring widths multiply. What the sum can't know, that losses of groups pruned together don't
just add up, is left to a short local search from there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raycompress.budget import Allocator
from raycompress.candidate import Candidate, Ranking, Trial
from raycompress.criteria import criterion
from raycompress.errors import ConfigError, EvaluationError
from raycompress.pruning.curves import Curves, errors_of, falling
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.pruning.solver import PairwiseCost, solve
from raycompress.recalibration import check_recalibration
from raycompress.reconstruction import Reconstruction
from raycompress.search import Asked, Probes, Race, Search

__all__ = ["CurveSolver"]

MAX_LEVELS = 24
"""Widths of a group in the first program, at most; fewer where there are many groups."""

MAX_MOVES = 8
"""Programs at one fineness: each starts around the last one's solution, until it stays."""


@dataclass(frozen=True, kw_only=True)
class CurveSolver(Pruner):
    """Probes every group alone, solves for the budget, and refines.

    The probes don't depend on budget and seed: in a job they are made once for all of them.

    Attributes:
        criterion: Which channels of a group go first: a name such as "l1", or an import path.
        probes: Fractions of a group's channels kept in its probes, each in (0, 1); none: the
            criterion's estimates alone decide, which says something with "obs" alone.
        share: Part of the validation split that probes are judged on, in whole shards.
        objective: "loss": lower validation loss wins (finer than accuracy); "score": the task's.
        reconstruct: Before anything is judged, layers imitate the dense ones by least squares over
            calibration batches; the winner keeps the weights that it was judged with.
        recalibrate: Calibration batches for norm statistics before judging; 0: none.
        iterations: Of the local search from the solution; 0: the solution wins.
        neighbours: Allocations that race against the best in each iteration.
        perturbation: Standard deviation of the logarithm of a neighbour's widths.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "obs"
    probes: tuple[float, ...] = (0.5, 0.15)
    share: float = 0.25
    objective: Literal["loss", "score"] = "loss"
    reconstruct: bool = True
    recalibrate: int = 0
    iterations: int = 4
    neighbours: int = 4
    perturbation: float = 0.15
    round_to: int = 1
    min_kept: int = 1

    def __post_init__(self) -> None:
        criterion(self.criterion, "CurveSolver.criterion", "channels")
        for name, least in (
            ("recalibrate", 0),
            ("iterations", 0),
            ("neighbours", 1),
            ("round_to", 1),
            ("min_kept", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"CurveSolver.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not all(0 < fraction < 1 for fraction in self.probes):
            raise ConfigError(
                f"CurveSolver.probes must be fractions in (0, 1), got {list(self.probes)}"
            )
        if not 0 < self.share <= 1:
            raise ConfigError(f"CurveSolver.share must be in (0, 1], got {self.share:g}")
        if self.objective not in ("loss", "score"):
            raise ConfigError(
                f"CurveSolver.objective must be 'loss' or 'score', got {self.objective!r}"
            )
        if not 0 < self.perturbation <= 1:
            raise ConfigError(
                f"CurveSolver.perturbation must be in (0, 1], got {self.perturbation:g}"
            )

    def search(self, problem: Problem) -> Search:
        """Yields all probes at once; then races, first of the solution and uniform widths."""
        fitter = self._fitter(problem)
        curves = yield from self.shared(problem)
        counts = self.solution(fitter, curves)
        proposals = [counts, fitter.fit(dict.fromkeys(curves.widths, 1.0))]
        best: Trial | None = None
        for iteration in range(self.iterations + 1):
            if iteration:
                proposals = self._propose(problem, fitter, counts, iteration)
            trials = yield Race(
                tuple(self._candidate(problem, curves.ranking, each) for each in proposals),
                () if best is None else (best,) * len(proposals),
                objective=self.objective,
            )
            for proposed, trial in zip(proposals, trials, strict=True):
                if trial.judged and (best is None or self._energy(trial) < self._energy(best)):
                    counts, best = proposed, trial
        if best is None:
            raise EvaluationError(f"every allocation within the budget failed: {trials[0].failure}")
        return best.candidate

    def shared(self, problem: Problem) -> Generator[Asked, list[Trial], Curves]:
        """Yields the dense model and all probes; returns the curves.

        Raises:
            EvaluationError: The dense model failed.
        """
        groups = problem.groups()
        yield from check_recalibration(problem.weights, self.recalibrate)
        ranks = criterion(self.criterion, "CurveSolver.criterion", "channels")
        scores = yield from problem.scores(ranks, list(groups))
        ranking = problem.ranking("channels", scores)
        errors = {name: errors_of(scores[name], ranks.cumulative) for name in groups}
        if not self.probes:
            nothing = {name: (problem.structure.group(name).num_channels,) for name in groups}
            return Curves(ranking, errors, nothing, dict.fromkeys(groups, (0.0,)))
        asked: list[tuple[str, int]] = []
        for name in groups:
            group = problem.structure.group(name)
            counts = {
                group.round_up(max(round(fraction * group.num_channels), 1))
                for fraction in self.probes
            }
            asked += [(name, count) for count in sorted(counts) if count < group.num_channels]
        probes = [self._candidate(problem, ranking, {name: count}) for name, count in asked]
        # Differences from the dense model on the same examples need few of them.
        shards = problem.first_shards(self.share)
        dense, *trials = yield Probes(
            tuple(replace(each, shards=shards) for each in [Candidate(problem.weights), *probes])
        )
        if dense.failure is not None:
            raise EvaluationError(f"the dense model failed: {dense.failure}")
        base = self._energy(dense)
        widths, losses = {}, {}
        for name in groups:
            whole = problem.structure.group(name).num_channels
            points = {whole: 0.0}
            for (probed, count), trial in zip(asked, trials, strict=True):
                if probed == name and trial.failure is None:
                    points[count] = max(self._energy(trial) - base, 0.0)
            widths[name] = tuple(sorted(points))
            losses[name] = falling([points[count] for count in widths[name]])
        return Curves(ranking, errors, widths, losses)

    def solution(self, fitter: Allocator, curves: Curves) -> dict[str, int]:
        """The allocation with the smallest sum of losses within the budget.

        Exact where no group has more than `MAX_LEVELS` widths; else a coarse program over all of
        them first, then finer ones around its solution, down to single steps.
        """
        sizes = {
            group.name: [*fitter.sizes(group.name), group.num_channels] for group in fitter.groups
        }
        # The program grows with the pairs of levels of groups that meet, a few for each group.
        num_levels = min(max(int((20_000 / max(len(sizes), 1)) ** 0.5), 8), MAX_LEVELS)
        strides = {name: max(-(-len(each) // num_levels), 1) for name, each in sizes.items()}
        levels = {name: [*each[:: strides[name]], each[-1]] for name, each in sizes.items()}
        counts = self._solved(fitter, curves, levels)
        while max(strides.values()) > 1:
            strides = {name: -(-stride // 2) for name, stride in strides.items()}
            for _ in range(MAX_MOVES):
                before = counts
                for name, each in sizes.items():
                    at, stride = each.index(counts[name]), strides[name]
                    near = {min(max(at + i * stride, 0), len(each) - 1) for i in range(-3, 4)}
                    levels[name] = [each[i] for i in sorted(near)]
                counts = self._solved(fitter, curves, levels)
                if counts == before:
                    break
        return fitter.fill(counts)

    def _solved(
        self, fitter: Allocator, curves: Curves, levels: Mapping[str, Sequence[int]]
    ) -> dict[str, int]:
        distinct = {name: sorted(set(each)) for name, each in levels.items()}
        losses = {name: curves.at(name, each) for name, each in distinct.items()}
        costs = [
            PairwiseCost.of(lambda counts, i=i: fitter.ratios(counts)[i], distinct)  # type: ignore[misc]
            for i in range(len(fitter.budget.limits))
        ]
        limit = 1.0
        # Where a product has three widths, or rounding is at the edge, a little less is asked for.
        for _ in range(20):
            chosen = solve(losses, [(cost, limit) for cost in costs])
            counts = {name: distinct[name][i] for name, i in chosen.items()}
            excess = fitter.excess(counts)
            if excess <= 1:
                return counts
            limit = limit / excess * (1 - 1e-6)
        return fitter.fit({g.name: counts[g.name] / g.num_channels for g in fitter.groups})

    def _propose(
        self, problem: Problem, fitter: Allocator, counts: Mapping[str, int], iteration: int
    ) -> list[dict[str, int]]:
        """Allocations near the best one, within the budget, all different."""
        rng = random.Random(f"propose:{problem.seed}:{iteration}")
        proposals: list[dict[str, int]] = []
        for _ in range(20 * self.neighbours):  # bounded: there may be no more that differ
            fractions = {
                g.name: counts[g.name] / g.num_channels * math.exp(rng.gauss(0, self.perturbation))
                for g in fitter.groups
            }
            near = fitter.fit(fractions)
            if near != counts and near not in proposals:
                proposals.append(near)
            if len(proposals) == self.neighbours:
                break
        return proposals or [dict(counts)]

    def _fitter(self, problem: Problem) -> Allocator:
        groups = problem.groups()
        fixed = [name for name, choice in groups.items() if choice.sparsity is not None]
        if fixed:
            raise ConfigError(f"targets give {fixed[0]!r} a sparsity, which CurveSolver is to find")
        return allocator(problem, list(groups), "CurveSolver", self.round_to, self.min_kept)

    def _candidate(
        self, problem: Problem, ranking: Ranking, counts: Mapping[str, int]
    ) -> Candidate:
        candidate = problem.candidate(counts, ranking, recalibrate=self.recalibrate)
        if not self.reconstruct:
            return candidate
        return replace(candidate, reconstruct=Reconstruction(problem.weights))

    def _energy(self, trial: Trial) -> float:
        return trial.loss if self.objective == "loss" else -trial.score
