"""The pruner contract: a problem in, a search out."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from raycompress.budget import Allocator, Budget
from raycompress.criteria import CRITERIA, rank
from raycompress.errors import ConfigError
from raycompress.executor import LocalExecutor
from raycompress.masks import Masks
from raycompress.search import Candidate, Executor, Ranking, Search, Training, run_search
from raycompress.structure import Structure, analyze
from raycompress.targets import Target, select_groups, select_layers
from raycompress.task import Task
from raycompress.weights import Weights, WeightStore

__all__ = ["Problem", "Pruner"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a pruner is given: the model to prune, within what, and who answers.

    Attributes:
        model: Dense and trained, on the CPU, in eval mode; read only.
        structure: Its analysis.
        weights: Digest of its weights.
        executor: Where rankings are published; the search itself only yields.
        budget: What may be kept; None: the pruner's own sparsity decides.
        targets: Which layers may be pruned; empty: all.
        seed: Of everything that the search draws.
    """

    model: nn.Module
    structure: Structure
    weights: str
    executor: Executor
    budget: Budget | None = None
    targets: Sequence[Target] = ()
    seed: int = 0

    def groups(self) -> dict[str, float | None]:
        """Targeted channel groups, with the sparsity that targets ask for."""
        return select_groups(self.model, self.structure, self.targets)

    def layers(self) -> dict[str, float | None]:
        """Targeted layers, with the sparsity that targets ask for."""
        return select_layers(self.model, self.targets)

    def rank(self, criterion: str, names: Sequence[str]) -> Ranking:
        """Ranks groups (or, for single weights, layers) and makes the ranking known."""
        ranking = rank(CRITERIA[criterion](), self.model, self.structure, names)
        self.executor.publish(ranking)
        return ranking

    def candidate(
        self,
        counts: Mapping[str, int],
        ranking: Ranking,
        *,
        recalibrate: int = 0,
        training: Training | None = None,
    ) -> Candidate:
        """A candidate of this problem's model."""
        return Candidate.of(
            counts, ranking, weights=self.weights, recalibrate=recalibrate, training=training
        )


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """Base of all pruners.

    A pruner's own file holds its fields (its YAML keys) and `search`; a user's own is named by
    import path and needs no registration.
    """

    @abstractmethod
    def search(self, problem: Problem) -> Search:
        """A generator: yields candidates, is sent their trials, returns the winner."""

    def check(self, problem: Problem) -> None:
        """Raises an InputError if this problem can't be solved; called before anything starts.

        The default makes the search and throws it away before its first evaluation, which
        checks targets, sparsities and the budget.
        """
        search = self.search(problem)
        try:
            next(search)
        except StopIteration:
            pass
        finally:
            search.close()

    def prune(
        self,
        model: nn.Module,
        task: Task,
        targets: Sequence[Target] = (),
        *,
        budget: Mapping[str, str | float] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> Masks:
        """Runs the search in this process; needs neither Ray nor a job.

        Args:
            model: Dense and trained, on the CPU; read only.
            task: Judges candidates.
            targets: Which layers may be pruned; empty: all.
            budget: What may be kept, such as {"macs": "50%"}.
            seed: Of everything that the search draws.
            device: Where candidates are evaluated.

        Returns:
            Complete masks of the winner: `masked_copy` applies them, `slim` shrinks the model.
        """
        structure = analyze(model, task.example_inputs())
        with tempfile.TemporaryDirectory() as folder:
            store = WeightStore(folder)
            weights = Weights(model.state_dict(), {})
            digest = store.put(weights)
            executor = LocalExecutor(task, structure, store, device=device)
            problem = Problem(
                model=model,
                structure=structure,
                weights=digest,
                executor=executor,
                budget=None if budget is None else Budget.of(budget),
                targets=targets,
                seed=seed,
            )
            winner = run_search(self.search(problem), executor)
            return executor.host.masks(winner)


def allocator(
    problem: Problem, groups: Sequence[str], pruner: str, round_to: int, min_kept: int
) -> Allocator:
    """The allocator of a pruner that can't do without a budget.

    Raises:
        ConfigError: The problem has none.
        BudgetError: It can't be met.
    """
    if problem.budget is None:
        raise ConfigError(f"{pruner} needs a budget, such as budgets: [{{macs: 50%}}]")
    return Allocator(
        problem.structure, tuple(groups), problem.budget, round_to=round_to, min_kept=min_kept
    )
