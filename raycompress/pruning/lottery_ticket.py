"""The lottery ticket hypothesis: iterative magnitude pruning with rewinding.

Frankle & Carbin 2019 (arXiv 1803.03635); rewinding to step k: Frankle et al. 2019 (1903.01611).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from raycompress.candidate import Candidate, Training
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_sparsity, plan_units
from raycompress.search import Search
from raycompress.targets import POOL_KEYS, ROUND_KEYS
from raycompress.weights import Weights

__all__ = ["LotteryTicket"]


@dataclass(frozen=True, kw_only=True)
class LotteryTicket(Pruner):
    """Trains, prunes, and rewinds what survives to where training began, round by round.

    Round 0 trains the dense model from the weights that the job starts with, which must be its
    initialisation: give it a task whose `build_model` returns an untrained model. After round r
    each layer keeps (1 - sparsity) ** (r / rounds) of its weights: every round removes the same
    fraction of what is left. Each round starts from the rewound weights, with a new optimizer,
    learning rate schedule and norm statistics, and the same order of examples.

    Attributes:
        criterion: What goes first, on the trained weights: a name such as "level", or an import
            path.
        sparsity: Fraction removed after the last round, in [0, 1); targets override it.
        rounds: Of pruning, at least 1; targets override it by `prune_iterations`.
        epochs: Of each round, above 0.
        rewind_steps: Survivors go back to the weights after this many steps of training; 0: to
            the very first.
        reinit: Control experiment: the last mask, trained from new random weights.
        lr: Peak learning rate; None takes the task's own.
    """

    criterion: str = "level"
    sparsity: float | None = None
    rounds: int = 5
    epochs: float = 1.0
    rewind_steps: int = 0
    reinit: bool = False
    lr: float | None = None

    understands: ClassVar[tuple[str, ...]] = (*POOL_KEYS, *ROUND_KEYS)

    def __post_init__(self) -> None:
        criterion(self.criterion, "LotteryTicket.criterion")
        check_sparsity("LotteryTicket", self.sparsity)
        for name, least in (("rounds", 1), ("rewind_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"LotteryTicket.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.epochs <= 0:
            raise ConfigError(f"LotteryTicket.epochs must be above 0, got {self.epochs:g}")

    def search(self, problem: Problem) -> Search:
        """Yields the dense run, then one candidate a round."""
        ranks = criterion(self.criterion, "LotteryTicket.criterion")
        units = plan_units(problem, ranks, "LotteryTicket", self.sparsity)
        asked_rounds = {c.rounds for c in units.choices.values() if c.rounds is not None}
        if len(asked_rounds) > 1:
            raise ConfigError(
                f"targets.prune_iterations must be the same everywhere, got {sorted(asked_rounds)}"
            )
        rounds = asked_rounds.pop() if asked_rounds else self.rounds
        if self.reinit:
            reinitialised(problem.model, problem.seed)  # what can't be reset is refused at once
        training = Training(self.epochs, self.lr, problem.seed)
        start = problem.weights
        if self.rewind_steps:
            early = replace(training, epochs=0.0, steps=self.rewind_steps)
            start = (yield [Candidate(start, training=early)])[0].trained()
        trained = (yield [Candidate(start, training=training)])[0].trained()
        asked = Candidate(start)
        for number in range(1, rounds + 1):
            scores = yield from problem.scores(ranks, units.names, trained)
            counts = units.geometric(number / rounds, scores)
            ranking = problem.ranking(ranks.kind, scores)
            if self.reinit and number == rounds:
                start = problem.store.put(
                    Weights(reinitialised(problem.model, problem.seed).state_dict(), {})
                )
            asked = problem.candidate(counts, ranking, weights=start, training=training)
            trained = (yield [asked])[0].trained()
        return replace(asked, weights=trained, training=None)


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with new weights, by its modules' own `reset_parameters`.

    Raises:
        ConfigError: A module has parameters of its own, and doesn't say how to reset them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        copied = copy.deepcopy(model)
        for name, module in copied.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ConfigError(
                    f"new weights can't be drawn: {name or 'the model'} ({type(module).__name__}) "
                    "has parameters, and no reset_parameters()"
                )
    return copied
