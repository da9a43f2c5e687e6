"""The pruner contract: a problem in, a search out."""

from __future__ import annotations

import copy
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.budget import Allocator, Budget, Pricing
from raycompress.candidate import Candidate, Ranking, Training, Trial
from raycompress.criteria import Criterion
from raycompress.errors import ConfigError, EvaluationError
from raycompress.local import LocalExecutor
from raycompress.masks import Masks, prune_order
from raycompress.pruning.tied import own_weights
from raycompress.quantization.quantizer import Quantization
from raycompress.search import Asked, Executor, Search, run_search
from raycompress.structure import Structure, analyze, expand
from raycompress.targets import (
    Choice,
    Target,
    config_list,
    not_understood,
    select_groups,
    select_layers,
)
from raycompress.task import Task, check_device, check_instance, example_inputs_of
from raycompress.weights import Weights, WeightStore

__all__ = ["Problem", "Pruner"]


def _ignore(figures: Mapping[str, float]) -> None:
    """Nobody listens."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a pruner is given: the model to prune, within what, and who answers.

    Attributes:
        model: Dense and trained, on the CPU, in eval mode; read only.
        structure: Its analysis.
        weights: Digest of its weights.
        executor: Where rankings are published; the search itself only yields.
        store: Holds weights and statistics by digest.
        budget: What may be kept; None: the pruner's own sparsity decides.
        targets: Which layers may be pruned; empty: all.
        seed: Of everything that the search draws.
        latency: Prices counts for budgets of latency; None: nothing was measured.
        report: Told of figures of the search's own, such as residuals; they go with its next step.
    """

    model: nn.Module
    structure: Structure
    weights: str
    executor: Executor
    store: WeightStore
    budget: Budget | None = None
    targets: Sequence[Target] = ()
    seed: int = 0
    latency: Pricing | None = None
    report: Callable[[Mapping[str, float]], None] = _ignore

    def groups(self) -> dict[str, Choice]:
        """Targeted channel groups, with what targets ask of each."""
        return select_groups(self.model, self.structure, self.targets)

    def layers(self) -> dict[str, Choice]:
        """Targeted layers, with what targets ask of each; of tied ones the first."""
        return own_weights(self.model, select_layers(self.model, self.targets))

    def scores(
        self, criterion: Criterion, names: Sequence[str], weights: str | None = None
    ) -> Generator[Sequence[Candidate], list[Trial], dict[str, Tensor]]:
        """Scores groups (or, for single weights, layers): `yield from` it in a search.

        A criterion that needs data has them collected on a replica. What is removed already in
        the weights that are scored gets -inf, and so goes first.

        Args:
            criterion: Scores.
            names: Of channel groups; for a criterion of single weights, of layers.
            weights: Digest of the weights that are scored; None: the dense model's own.

        Raises:
            EvaluationError: Collecting failed.
        """
        criterion.check(self.model, self.structure, names)
        parent = self.weights if weights is None else weights
        statistics: Mapping[str, Tensor] = {}
        if criterion.needs_data:
            trial = (yield [Candidate(parent, collect=criterion)])[0]
            if trial.weights is None:
                raise EvaluationError(f"{type(criterion).__name__}: {trial.failure}")
            statistics = self.store.get(trial.weights).state
        scores = criterion.scores(self.dense(parent), self.structure, names, statistics)
        for key, gone in self.removed(criterion.kind, list(scores), parent).items():
            scores[key] = scores[key].double().masked_fill(gone, -math.inf)
        return scores

    def rank(
        self, criterion: Criterion, names: Sequence[str], weights: str | None = None
    ) -> Generator[Sequence[Candidate], list[Trial], Ranking]:
        """Ranks what `scores` scores and makes the ranking known: `yield from` it in a search."""
        scores = yield from self.scores(criterion, names, weights)
        return self.ranking(criterion.kind, scores)

    def ranking(
        self, kind: Literal["channels", "weights"], scores: Mapping[str, Tensor]
    ) -> Ranking:
        """Ranks by scores, ties by index, and makes the ranking known."""
        ranking = Ranking(kind, {key: prune_order(values) for key, values in scores.items()})
        self.executor.publish(ranking)
        return ranking

    def removed(
        self, kind: Literal["channels", "weights"], keys: Sequence[str], weights: str
    ) -> dict[str, Tensor]:
        """Units that are gone in some weights: bool tensors by the keys of a ranking."""
        if weights == self.weights:
            return {}
        stored = self.store.get(weights)
        if kind == "weights":
            return {key: stored.state[key] == 0 for key in keys}
        gone = {}
        for key in keys:
            if key in stored.kept:
                gone[key] = torch.ones(self.structure.group(key).num_channels, dtype=torch.bool)
                gone[key][list(stored.kept[key])] = False
        return gone

    def dense(self, weights: str) -> nn.Module:
        """A model of stored weights in dense shapes, on the CPU; what was removed is zero."""
        if weights == self.weights:
            return self.model
        stored = self.store.get(weights)
        state: Mapping[str, Tensor] = stored.state
        if stored.kept:
            kept = {name: list(indices) for name, indices in stored.kept.items()}
            state = expand(self.structure, self.model, stored.state, kept)
        model = copy.deepcopy(self.model)
        model.load_state_dict(dict(state))
        return model

    def first_shards(self, share: float) -> tuple[int, int] | None:
        """`Candidate.shards` of a part in (0, 1] of the validation split, at least one shard."""
        num_shards = self.executor.num_shards
        part = max(round(share * num_shards), 1)
        return None if part == num_shards else (0, part)

    def candidate(
        self,
        counts: Mapping[str, int],
        ranking: Ranking,
        *,
        weights: str | None = None,
        recalibrate: int = 0,
        training: Training | None = None,
    ) -> Candidate:
        """A candidate of this problem's model, or of other weights of it."""
        return Candidate.of(
            counts,
            ranking,
            weights=self.weights if weights is None else weights,
            recalibrate=recalibrate,
            training=training,
        )


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """Base of all pruners.

    A pruner's own file holds its fields (its YAML keys) and `search`; a user's own is named by
    import path and needs no registration.
    """

    understands: ClassVar[tuple[str, ...]] = ()
    """Keys of targets that it honours beyond their sparsity; others are refused."""

    @abstractmethod
    def search(self, problem: Problem) -> Search:
        """A generator: yields candidates, is sent their trials, returns the winner."""

    def shared(self, problem: Problem) -> Generator[Asked, list[Trial], Any]:
        """What the search asks for whatever its budget and seed.

        A job asks it once, before its trials; their searches then get the answers from the ledger.
        """
        yield from ()

    def may_find(self, problem: Problem) -> Sequence[Quantization]:
        """Quantizations that together have all bits its winner may have; none: it has none.

        Where there are some, a job's `quantize` trains and stores the model with what is found.
        """
        del problem
        return ()

    @property
    def timed_on(self) -> str:
        """The runtime on which its winner is within a limit on latency; "": it has no such limit.

        A job's `quantize` lowers to the same one.
        """
        return ""

    def check(self, problem: Problem) -> None:
        """Raises an InputError if this problem can't be solved; called before anything starts.

        The default makes the search and throws it away before its first evaluation, which
        checks targets, sparsities and the budget.
        """
        self.check_targets(problem.targets)
        with tempfile.TemporaryDirectory() as folder:  # what it stores goes with the search
            search = self.search(replace(problem, store=WeightStore(folder)))
            try:
                next(search)
            except StopIteration:
                pass
            finally:
                search.close()

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Raises a ConfigError for keys of targets that this pruner wouldn't honour."""
        key = not_understood(targets, self.understands)
        if key:
            allowed = ", ".join(("sparsity", "final_sparsity", *self.understands))
            raise ConfigError(
                f"targets.{key} is nothing that {type(self).__name__} can honour; "
                f"allowed: {allowed}"
            )

    def prune(
        self,
        model: nn.Module,
        task: Task,
        targets: Iterable[Target | Mapping[str, Any]] = (),
        *,
        budget: Mapping[str, str | float] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> Masks:
        """Runs the search in this process; needs neither Ray nor a job.

        Args:
            model: Dense, on the CPU. Pruners that train or reconstruct leave it with the weights
                that came out; the others only read it.
            task: Judges candidates. Its `build_model` makes models like `model`, whose weights
                they get.
            targets: Which layers may be pruned, as NNI's `config_list`; empty: all.
            budget: What may be kept, such as {"macs": "50%"}. "latency_ms" is measured here first,
                at batch size 1.
            seed: Of everything that the search draws.
            device: Where candidates are evaluated.

        Returns:
            Complete masks of the winner: `masked_copy` applies them, `slim` shrinks the model.

        Raises:
            ConfigError: Targets, sparsity, budget or device can't be honoured.
            BudgetError: The budget can't be met.
            TaskError: `task` is none, or is for another model.
        """
        check_instance(task)
        check_device(device)
        chosen = config_list(targets)
        self.check_targets(chosen)
        structure = analyze(model, example_inputs_of(task), form="module")
        with tempfile.TemporaryDirectory() as folder:
            store = WeightStore(folder)
            weights = Weights(model.state_dict(), {})
            digest = store.put(weights)
            executor = LocalExecutor(task, structure, store, device=device)
            executor.host.check_state(weights.state)
            limits = None if budget is None else Budget.of(budget)
            problem = Problem(
                model=model,
                structure=structure,
                weights=digest,
                executor=executor,
                store=store,
                budget=limits,
                targets=chosen,
                seed=seed,
                latency=executor.latency_table()
                if limits is not None and limits.names_latency
                else None,
            )
            winner = run_search(self.search(problem), executor)
            masks = executor.host.masks(winner)
            if winner.reconstruct is not None and winner.training is None:
                winner = winner.with_training(Training(0.0))  # to have the weights it was judged by
            if winner.training is not None or winner.weights != digest:
                trained = executor.evaluate([winner])[0].weights or winner.weights
                model.load_state_dict(problem.dense(trained).state_dict())
            return masks


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
        problem.structure,
        tuple(groups),
        problem.budget,
        round_to=round_to,
        min_kept=min_kept,
        latency=problem.latency,
    )
