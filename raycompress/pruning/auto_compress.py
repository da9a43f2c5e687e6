"""AutoCompress (Liu et al. 2020, arXiv 1907.03141): annealing, ADMM and purification in rounds."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from raycompress.budget import Allocator, Budget, Limit
from raycompress.candidate import Candidate, Ranking, Training, Trial
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.masks import masked_copy
from raycompress.pruning.admm import Projection, alternate
from raycompress.pruning.annealing import Annealer, free_groups
from raycompress.pruning.pruner import Problem, allocator
from raycompress.pruning.purification import purified
from raycompress.recalibration import check_recalibration
from raycompress.search import Asked, Search

__all__ = ["AutoCompress"]


@dataclass(frozen=True, kw_only=True)
class AutoCompress(Annealer):
    """Prunes in rounds of the paper's stages, each round on the slim model of the one before.

    1. *Action sampling, quick evaluation, decision making*: simulated annealing over the keep
       fractions of all groups, within this round's budget.
    2. *Actual pruning*: structured ADMM pulls the weights toward the widths that were found, and
       settles which channels they are.
    3. *Purification*: channels that are as good as dead go as well, if that costs nothing.
    4. *Result generation*: the model is slimmed, trained for `retrain_epochs`, and is the parent of
       the next round.

    The rounds' budgets fall geometrically from what the parent costs to the budget.

    Deviations: the annealing is calibrated, and what it judges is reconstructed (see `annealing`);
    what is pruned are channel groups, a layer's filters with the columns that read them, where the
    paper gives each layer a rate of filters and one of columns; ADMM pulls at the filters alone;
    the rounds share the budgeted resource evenly (NNI's three share a count of weights, leave out
    purification, and don't train in between).

    Attributes:
        rounds: At least 1.
        iterations: Annealing steps of each round after its first, which calibrates.
        admm_iterations: Of ADMM in each round, at least 1.
        admm_epochs: Of training in each of these, above 0.
        rho: Strength of ADMM's pull in its first iteration.
        rho_growth: Factor of rho after each iteration, at least 1.
        purify: Strength, relative to the mean of the group, up to which a channel is as good as
            dead, in [0, 1); 0: only dead ones.
        retrain_epochs: Of training the slim model at the end of each round; 0: none.
        lr: Peak learning rate of all training; None takes the task's own.
    """

    rounds: int = 3
    iterations: int = 15
    admm_iterations: int = 3
    admm_epochs: float = 1.0
    rho: float = 1e-2
    rho_growth: float = 1.3
    purify: float = 0.05
    retrain_epochs: float = 1.0
    lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rounds", "admm_iterations", "rho_growth"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"AutoCompress.{key} must be at least 1, got {getattr(self, key)}"
                )
        for key in ("admm_epochs", "rho"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"AutoCompress.{key} must be above 0, got {getattr(self, key):g}")
        if not 0 <= self.purify < 1:
            raise ConfigError(f"AutoCompress.purify must be in [0, 1), got {self.purify:g}")
        if self.retrain_epochs < 0:
            raise ConfigError(
                f"AutoCompress.retrain_epochs must be 0 or more, got {self.retrain_epochs:g}"
            )

    def search(self, problem: Problem) -> Search:
        """Yields each round's annealing, then its training units."""
        names = free_groups(problem, "AutoCompress")
        whole = allocator(problem, names, "AutoCompress", self.round_to, self.min_kept)
        yield from check_recalibration(problem.weights, self.recalibrate)
        ranks = criterion(self.criterion, "AutoCompress.criterion", "channels")
        sizes = {group.name: group.num_channels for group in whole.groups}
        counts, parent = dict(sizes), Candidate(problem.weights)
        for number in range(1, self.rounds + 1):
            excess = whole.excess(counts)
            if excess <= 1:
                break
            fitter = self._fitter(problem, names, counts, self.allowed(excess, number))
            ranking = yield from problem.rank(ranks, names, parent.weights)
            best = yield from self.anneal(
                problem,
                fitter,
                fitter.fit({name: counts[name] / sizes[name] for name in names}),
                ranking,
                weights=parent.weights,
                stream=f"{problem.seed}:{number}",
            )
            found = {**sizes, **best.counts}
            if found == counts:  # so small a step rounds to none
                continue
            seed = problem.seed + 100_000 * number
            weights, scores = yield from alternate(
                problem,
                Projection(problem, names, found, "channels", parent.weights),
                parent,
                iterations=self.admm_iterations,
                epochs=self.admm_epochs,
                rho=self.rho,
                rho_growth=self.rho_growth,
                lr=self.lr,
                seed=seed,
            )
            ranking = problem.ranking("channels", scores)
            counts, ranking = yield from self._purify(problem, fitter, found, ranking, weights)
            asked = self.candidate(problem, counts, ranking, weights)
            training = Training(self.retrain_epochs, self.lr, seed)
            trained = (yield [asked.with_training(training)])[0].trained()
            parent = problem.candidate(counts, ranking, weights=trained)
        return parent

    def allowed(self, excess: float, number: int) -> float:
        """Excess over the budget that a round may leave.

        Args:
            excess: That of its parent.
            number: Of the round, from 1; the last leaves 1.
        """
        left = self.rounds - number + 1
        return float(excess ** ((left - 1) / left))

    def _fitter(
        self, problem: Problem, names: list[str], most: Mapping[str, int], excess: float
    ) -> Allocator:
        assert problem.budget is not None
        limits = tuple(
            (name, Limit(limit.value * excess, limit.relative))
            for name, limit in problem.budget.limits
        )
        return Allocator(
            problem.structure,
            tuple(names),
            Budget(limits),
            round_to=self.round_to,
            min_kept=self.min_kept,
            most=most,
            latency=problem.latency,
        )

    def _purify(
        self,
        problem: Problem,
        fitter: Allocator,
        counts: dict[str, int],
        ranking: Ranking,
        weights: str,
    ) -> Generator[Asked, list[Trial], tuple[dict[str, int], Ranking]]:
        """Counts and ranking without what is as good as dead, if the model is no worse for it."""
        kept = ranking.kept(counts)
        model = masked_copy(problem.dense(weights), problem.structure.masks(kept))
        fewer, scores = purified(model, fitter, kept, self.purify)
        problem.report({"purified": float(sum(counts.values()) - sum(fewer.values()))})
        if fewer == counts:
            return counts, ranking
        order = problem.ranking("channels", scores)
        plain, pure = yield [
            self.candidate(problem, counts, ranking, weights),
            self.candidate(problem, fewer, order, weights),
        ]
        # What is dead changes nothing but the order of sums.
        margin = 1e-6 * abs(self.energy(plain))
        if self.energy(pure) <= self.energy(plain) + margin:
            return fewer, order
        return counts, ranking
