"""NetAdapt (Yang et al. 2018, arXiv 1804.03230): group after group, judged after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from raycompress.budget import Allocator
from raycompress.candidate import Candidate, Training, Trial
from raycompress.criteria import criterion
from raycompress.errors import ConfigError, EvaluationError
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.search import Search
from raycompress.structure import ChannelGroup

__all__ = ["NetAdapt"]


@dataclass(frozen=True, kw_only=True)
class NetAdapt(Pruner):
    """Shrinks the model step by step to a budget of parameters, MACs or measured latency.

    In each iteration every channel group makes a proposal: the fewest channels removed from it
    alone that bring the resource down to this iteration's target. All proposals are fine-tuned for
    `epochs` and evaluated, in parallel on the replicas; the best by `rule` wins and carries its
    weights on. The targets fall by steps that decay; the first step is derived from the budget, so
    that the last iteration ends at it (the paper's defaults reach only 44 % in 30 iterations).
    Fine-tuning the end result for long is the job's `recover`.

    Deviations from the paper: what couples layers makes one group, and one proposal; where no group
    can meet a target alone, each proposes all that it can, and the target is tried again.

    Attributes:
        criterion: Which channels of a group go first, on the current weights: "l2" as in the
            paper, another name, or an import path.
        iterations: At least 1; more and smaller steps cost more and end better.
        decay: Of the steps, in (0, 1]; 0.96 in the paper.
        epochs: Of fine-tuning each proposal, above 0; may be a fraction.
        rule: "score": the best score wins, as in the paper; "ratio": the smallest loss of score for
            what is saved, as in its authors' code.
        lr: Peak learning rate of fine-tuning; None takes the task's own.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "l2"
    iterations: int = 10
    decay: float = 0.96
    epochs: float = 0.2
    rule: Literal["score", "ratio"] = "score"
    lr: float | None = None
    round_to: int = 1
    min_kept: int = 1

    def __post_init__(self) -> None:
        criterion(self.criterion, "NetAdapt.criterion", "channels")
        for name in ("iterations", "round_to", "min_kept"):
            if getattr(self, name) < 1:
                raise ConfigError(f"NetAdapt.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"NetAdapt.decay must be in (0, 1], got {self.decay:g}")
        if self.epochs <= 0:
            raise ConfigError(f"NetAdapt.epochs must be above 0, got {self.epochs:g}")
        if self.rule not in ("score", "ratio"):
            raise ConfigError(f"NetAdapt.rule must be 'score' or 'ratio', got {self.rule!r}")

    def targets_from(self, excess: float) -> list[float]:
        """Excess over the budget after each iteration, from that of the dense model down to 1.

        The steps are d, d * decay, d * decay^2, ...; d is such that they add up.
        """
        total = sum(self.decay**i for i in range(self.iterations))
        step = (excess - 1) / total
        left = excess
        found = []
        for i in range(self.iterations):
            left -= step * self.decay**i
            found.append(left)
        return [*found[:-1], 1.0]

    def search(self, problem: Problem) -> Search:
        """Yields one trained candidate for each group and iteration."""
        groups = problem.groups()
        fixed = [name for name, choice in groups.items() if choice.sparsity is not None]
        if fixed:
            raise ConfigError(f"targets give {fixed[0]!r} a sparsity, which NetAdapt is to find")
        fitter = allocator(problem, list(groups), "NetAdapt", self.round_to, self.min_kept)
        ranks = criterion(self.criterion, "NetAdapt.criterion", "channels")
        counts = {group.name: group.num_channels for group in fitter.groups}
        weights, winner = problem.weights, Candidate(problem.weights)
        score: float | None = None
        for number, target in enumerate(self.targets_from(fitter.excess(counts)), 1):
            while fitter.excess(counts) > max(target, 1.0):
                scores = yield from problem.scores(ranks, list(groups), weights)
                ranking = problem.ranking("channels", scores)
                proposals = self._proposals(fitter, counts, target)
                training = Training(self.epochs, self.lr, problem.seed + 1000 * number)
                trials = yield [
                    problem.candidate(p, ranking, weights=weights, training=training)
                    for p in proposals
                ]
                best = self._best(fitter, counts, proposals, trials, score)
                counts, score = proposals[best], trials[best].score
                weights = trials[best].trained()
                winner = replace(trials[best].candidate, weights=weights, training=None)
        return winner

    def _proposals(
        self, fitter: Allocator, counts: Mapping[str, int], target: float
    ) -> list[dict[str, int]]:
        """For each group the most channels that meet the target; or all that groups can do."""
        met, most = [], []
        for group in fitter.groups:
            smaller = sorted(self._smaller(fitter, group, counts[group.name]), reverse=True)
            changed = [{**counts, group.name: count} for count in smaller]
            fits = next((c for c in changed if fitter.excess(c) <= target), None)
            if fits is not None:
                met.append(fits)
            elif changed:
                # More channels may take less time: the cheapest, not the fewest.
                cheapest = min(changed, key=fitter.excess)
                if fitter.excess(cheapest) < fitter.excess(counts):
                    most.append(cheapest)
        return met or most

    def _smaller(self, fitter: Allocator, group: ChannelGroup, count: int) -> list[int]:
        return [n for n in fitter.sizes(group.name) if n < count]

    def _best(
        self,
        fitter: Allocator,
        counts: Mapping[str, int],
        proposals: list[dict[str, int]],
        trials: list[Trial],
        score: float | None,
    ) -> int:
        """Index of the winner; ties go to the first."""
        alive = [i for i, trial in enumerate(trials) if trial.failure is None]
        if not alive:
            raise EvaluationError(f"all proposals failed, the first: {trials[0].failure}")
        if self.rule == "score" or score is None:
            return max(alive, key=lambda i: (trials[i].score, -i))
        saved = {i: fitter.excess(counts) - fitter.excess(proposals[i]) for i in alive}
        return min(alive, key=lambda i: ((score - trials[i].score) / saved[i], i))
