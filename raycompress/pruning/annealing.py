"""The walk of simulated annealing over kept channel counts, for the pruners that take it.

Kirkpatrick et al. 1983, with the Metropolis rule. Deviations from AutoCompress's search (arXiv
1907.03141, section 3.2) and from NNI's: the temperature is calibrated on the objective's own scale,
where theirs runs from 100 to 20 whatever the metric, which accepts nearly everything; every
proposal meets the budget by construction, where theirs are drawn until one does; the budget is
counted after true shape propagation; layers aren't forced to be pruned in order of their size; the
layers of what is judged imitate the ones that were pruned, by least squares.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raycompress.budget import Allocator
from raycompress.candidate import Candidate, Ranking, Trial
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.reconstruction import Reconstruction
from raycompress.search import Asked, Race

__all__ = ["Annealer", "accepted_up_to", "free_groups"]

LEAST_FRACTION = 0.02
NUM_DRAWS = 20
"""Draws for each proposal: in a tight budget all neighbours may round to the same counts."""

Counts = Mapping[str, int]
Proposals = Sequence[Sequence[Counts]]
"""For each chain, what it proposes."""
Margins = Sequence[Sequence[float]]
"""For each proposal, by how much it may be worse than where its chain is."""
Judged = list[list[Trial]]
"""For each chain, the answers to what it proposed."""


@dataclass(frozen=True, kw_only=True)
class Annealer(Pruner):
    """Base of pruners that anneal the keep fractions of channel groups.

    Attributes:
        criterion: Which channels of a group go first: a name such as "l1", or an import path.
        iterations: Annealing steps after the first, which calibrates.
        neighbours: Proposals of a chain for each step: the first that passes the Metropolis rule
            is its move, the rest only count for the best so far. That is the serial algorithm's
            path, with its next rejections evaluated in advance.
        chains: Independent walks from the same start. What all of them propose in a step is
            evaluated at once, and the best that any of them sees wins. Neither this nor
            `neighbours` is ever derived from the number of workers.
        start_acceptance: Probability with which a move that is worse by the median difference of
            the first step is accepted at the start.
        end_acceptance: The same at the end; the temperature falls geometrically between.
        perturbation: Largest change of a keep fraction at the start; falls to a tenth.
        objective: "loss": lower validation loss wins (finer than accuracy); "score": the task's.
        reconstruct: Before judging, the layers of a candidate imitate those that were pruned, by
            least squares over calibration batches; the winner keeps the weights that it was judged
            with. Layers that can't be solved for, such as grouped convolutions, stay as they are.
        recalibrate: Calibration batches for norm statistics before judging; 0: none. Tried on the
            dense model first; data that make it worse are refused.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "l1"
    iterations: int = 40
    neighbours: int = 4
    chains: int = 1
    start_acceptance: float = 0.8
    end_acceptance: float = 0.01
    perturbation: float = 0.35
    objective: Literal["loss", "score"] = "loss"
    reconstruct: bool = True
    recalibrate: int = 4
    round_to: int = 1
    min_kept: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        criterion(self.criterion, f"{name}.criterion", "channels")
        for key, least in (
            ("iterations", 0),
            ("neighbours", 1),
            ("chains", 1),
            ("recalibrate", 0),
            ("round_to", 1),
            ("min_kept", 1),
        ):
            if getattr(self, key) < least:
                raise ConfigError(
                    f"{name}.{key} must be at least {least}, got {getattr(self, key)}"
                )
        if not 0 < self.end_acceptance <= self.start_acceptance < 1:
            raise ConfigError(
                f"{name}: 0 < end_acceptance <= start_acceptance < 1 must hold, got "
                f"{self.end_acceptance:g} and {self.start_acceptance:g}"
            )
        if not 0 < self.perturbation <= 1:
            raise ConfigError(f"{name}.perturbation must be in (0, 1], got {self.perturbation:g}")
        if self.objective not in ("loss", "score"):
            raise ConfigError(f"{name}.objective must be 'loss' or 'score', got {self.objective!r}")

    def anneal(
        self,
        problem: Problem,
        fitter: Allocator,
        start: Counts,
        ranking: Ranking,
        *,
        weights: str,
        stream: str,
    ) -> Generator[Asked, list[Trial], Candidate]:
        """Walks from an allocation, and returns the best that it saw: `yield from` it.

        Args:
            problem: Makes candidates.
            fitter: Makes allocations that meet the budget.
            start: Within the budget.
            ranking: Which channels go first.
            weights: Digest of those that are pruned, and that `reconstruct` imitates.
            stream: Names the random numbers that are drawn.
        """
        known: dict[Candidate, Trial] = {}

        def judged(
            proposals: Proposals, walks: Sequence[_Walk] = (), margins: Margins = ()
        ) -> Generator[Asked, list[Trial], Judged]:
            """The one place where proposals are evaluated.

            They race against where their walks are: who is beyond the margin for certain can't be
            accepted, and is no best so far either.
            """
            made = [
                [self.candidate(problem, counts, ranking, weights) for counts in each]
                for each in proposals
            ]
            asked: dict[Candidate, tuple[Trial | None, float]] = {}
            for chain, each in enumerate(made):
                for position, candidate in enumerate(each):
                    if candidate in known and known[candidate].judged:
                        continue
                    # Of chains that ask for the same, the one that waits longest counts.
                    margin = margins[chain][position] if walks else math.inf
                    rival = walks[chain].trial if walks else None
                    if candidate not in asked or margin > asked[candidate][1]:
                        asked[candidate] = (rival, margin)
            if asked:
                rivals = tuple(rival for rival, _ in asked.values() if rival and rival.judged)
                allowed = tuple(margin for _, margin in asked.values())
                trials = yield (
                    Race(tuple(asked), rivals, allowed, objective=self.objective)
                    if len(rivals) == len(asked)
                    else list(asked)
                )
                known.update(zip(asked, trials, strict=True))
            return [[known[candidate] for candidate in each] for each in made]

        first = [
            [start, *self.propose(fitter, start, 0, f"{stream}:{chain}")]
            for chain in range(self.chains)
        ]
        trials = yield from judged(first)
        energies = [[self.energy(trial) for trial in each] for each in trials]
        scale = _scale(energies[0][0], [e for each in energies for e in each])
        walks = []
        for counts, own, answers in zip(first, energies, trials, strict=True):
            best = min(range(len(own)), key=own.__getitem__)
            walks.append(_Walk(counts[best], own[best], answers[best]))
        for iteration in range(1, self.iterations + 1):
            temperature = self.temperature(iteration, scale)
            proposals = [
                self.propose(fitter, walk.counts, iteration, f"{stream}:{chain}")
                for chain, walk in enumerate(walks)
            ]
            moves = sum(walk.moves for walk in walks)
            problem.report({"temperature": temperature, "moves": float(moves)})
            margins = []
            for chain, each in enumerate(proposals):
                rng = random.Random(f"accept:{stream}:{chain}:{iteration}")
                margins.append([accepted_up_to(temperature, rng.random()) for _ in each])
            trials = yield from judged(proposals, walks, margins)
            for chain, walk in enumerate(walks):
                walk.step(proposals[chain], trials[chain], margins[chain], self.energy)
        # Trials are in the order in which they were asked for, so that the first of equals wins.
        return min(known.values(), key=self.energy).candidate

    def candidate(
        self, problem: Problem, counts: Counts, ranking: Ranking, weights: str
    ) -> Candidate:
        """An allocation as it is judged."""
        plain = problem.candidate(counts, ranking, weights=weights, recalibrate=self.recalibrate)
        if not self.reconstruct or not plain.kept:
            return plain
        return replace(plain, reconstruct=Reconstruction(dense=weights))

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

    def energy(self, trial: Trial) -> float:
        """What is minimised; inf for a failed candidate."""
        return trial.loss if self.objective == "loss" else -trial.score

    def propose(
        self, fitter: Allocator, current: Counts, iteration: int, stream: str
    ) -> list[dict[str, int]]:
        """Neighbours of an allocation: within the budget, none equal to it or to another.

        There are fewer than `neighbours` where none that is new is found in so many draws.
        """
        rng = random.Random(f"propose:{stream}:{iteration}")
        progress = max(iteration - 1, 0) / max(self.iterations - 1, 1)
        reach = self.perturbation * (1 - 0.9 * progress)
        groups = fitter.groups
        base = {g.name: max(current[g.name] / g.num_channels, LEAST_FRACTION) for g in groups}
        proposals: list[dict[str, int]] = []
        for _ in range(self.neighbours):
            for _ in range(NUM_DRAWS):
                fractions = dict(base)
                most = max(2, len(groups) // 3)
                for group in rng.sample(groups, min(rng.randint(1, most), len(groups))):
                    moved = fractions[group.name] + rng.uniform(-reach, reach)
                    fractions[group.name] = min(max(moved, LEAST_FRACTION), 1.0)
                counts = fitter.fit(fractions)
                if counts != current and counts not in proposals:
                    proposals.append(counts)
                    break
        return proposals


@dataclass
class _Walk:
    """Where a chain is."""

    counts: Counts
    energy: float
    trial: Trial
    moves: int = 0

    def step(
        self,
        proposals: Sequence[Counts],
        trials: Sequence[Trial],
        margins: Sequence[float],
        energy: Callable[[Trial], float],
    ) -> None:
        """Moves to the first proposal that is no worse than its margin allows, if any."""
        for counts, trial, margin in zip(proposals, trials, margins, strict=True):
            proposed = energy(trial)
            if math.isfinite(proposed) and proposed - self.energy <= margin:
                self.counts, self.energy, self.trial = counts, proposed, trial
                self.moves += 1
                return


def accepted_up_to(temperature: float, draw: float) -> float:
    """The Metropolis rule, turned around: by how much what is accepted may be worse.

    A proposal that is worse by d is accepted with probability exp(-d / temperature), hence if a
    uniform draw is below that: if d < -temperature * log(draw). Known before anything is judged,
    this is where a race may end.

    Args:
        temperature: In the energy's unit; 0 accepts what is no worse alone.
        draw: Uniform in [0, 1).
    """
    if temperature <= 0:
        return 0.0
    return -temperature * math.log(draw) if draw > 0 else math.inf


def free_groups(problem: Problem, pruner: str) -> list[str]:
    """Names of the targeted groups of a pruner that finds their sparsities itself.

    Raises:
        ConfigError: A target gives one.
    """
    groups = problem.groups()
    fixed = next((name for name, choice in groups.items() if choice.sparsity is not None), None)
    if fixed is not None:
        raise ConfigError(f"targets give {fixed!r} a sparsity, which {pruner} is to find")
    if not groups:
        raise ConfigError(f"{pruner}: the model has no channel group that can be pruned")
    return list(groups)


def _scale(start: float, energies: Sequence[float]) -> float:
    """Median of the finite differences from the start's energy (the lowest, if it failed); or 0."""
    finite = [energy for energy in energies if math.isfinite(energy)]
    origin = start if math.isfinite(start) else min(finite, default=0.0)
    differences = [abs(energy - origin) for energy in finite if energy != origin]
    return statistics.median(differences) if differences else 0.0
