"""Who proposes the next sample: pure functions of the seed, the number and what is known."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raycompress.tuning.entries import PRUNER, Point, SearchSpace
from raycompress.tuning.spaces import Integers, OneOf, Space

if TYPE_CHECKING:
    import optuna

__all__ = ["OBJECTIVES", "TPE", "Grid", "NotYet", "Random", "Sample", "Searcher"]

OBJECTIVES: dict[str, Literal["max", "min"]] = {
    "score": "max",
    "loss": "min",
    "macs": "min",
    "params": "min",
}
"""What samples can be judged by: mean score and loss on validation data, and cost."""


@dataclass(frozen=True)
class Sample:
    """A point that was asked for, and what came of it.

    Attributes:
        number: From 0, in the order of asking.
        point: Its parameters.
        state: "stopped": as hopeless, before its end.
        objectives: In the study's order; of a stopped one, the best that it had; of others that
            haven't finished, empty.
        failure: Why it failed.
        figures: What was measured, by name; None: it wasn't.
    """

    number: int
    point: Point
    state: Literal["running", "finished", "failed", "stopped"] = "running"
    objectives: tuple[float, ...] = ()
    failure: str | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)


class NotYet(Exception):
    """A searcher waits for samples that run before it proposes more."""


class Searcher(Protocol):
    """Proposes samples. What it draws comes from its seed and the number alone."""

    def propose(self, number: int, history: Sequence[Sample]) -> Point | None:
        """The next point; None: there are no more.

        Args:
            number: Of the sample, from 0.
            history: All samples that were asked for before, by number.
        """


@dataclass(frozen=True)
class Random:
    """Points at random, whatever came of the others."""

    space: SearchSpace
    seed: int

    def propose(self, number: int, history: Sequence[Sample]) -> Point | None:
        """A draw."""
        return self.space.draw(random.Random(f"sample:{self.seed}:{number}"))


@dataclass(frozen=True)
class Grid:
    """All points, one after the other."""

    space: SearchSpace

    def propose(self, number: int, history: Sequence[Sample]) -> Point | None:
        """The next one."""
        return next(itertools.islice(self.space.points(), number, None), None)


@dataclass(frozen=True)
class TPE:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), for several objectives too.

    Optuna's study is made anew for each proposal, from what is known, and its sampler seeded from
    the number: so a proposal depends on nothing that a restart would lose.

    Attributes:
        space: What is searched.
        seed: Of the sampler.
        directions: "max" or "min", for each objective.
    """

    space: SearchSpace
    seed: int
    directions: tuple[Literal["max", "min"], ...]

    def propose(self, number: int, history: Sequence[Sample]) -> Point | None:
        """Where points like the best so far are likely; at random until ten have finished."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = random.Random(f"tpe:{self.seed}:{number}").getrandbits(32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                directions=["maximize" if d == "max" else "minimize" for d in self.directions],
                sampler=optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, group=True, constant_liar=True
                ),
            )
            for sample in history:
                study.add_trial(self._told(sample))
            trial = study.ask()
            point: Point = {}
            if len(self.space.entries) > 1:
                point[PRUNER] = trial.suggest_categorical(PRUNER, range(len(self.space.entries)))
            for name, space in self.space.below(point.get(PRUNER, 0)).items():
                point[name] = _suggest(trial, name, space)
        return point

    def _told(self, sample: Sample) -> optuna.trial.FrozenTrial:
        import optuna

        spaces = self.space.parameters()
        states = optuna.trial.TrialState
        finite = bool(sample.objectives) and all(math.isfinite(v) for v in sample.objectives)
        state = {
            "running": states.RUNNING,
            "finished": states.COMPLETE if finite else states.FAIL,
            "failed": states.FAIL,
            "stopped": states.PRUNED if finite else states.FAIL,
        }[sample.state]
        return optuna.trial.create_trial(
            state=state,
            params={name: _internal(spaces[name], value) for name, value in sample.point.items()},
            distributions={name: _distribution(spaces[name]) for name in sample.point},
            values=sample.objectives if state == states.COMPLETE else None,
            # What a stopped one came to counts as that, and less than any that finished.
            intermediate_values={0: sample.objectives[0]} if state == states.PRUNED else None,
        )


def _distribution(space: Space) -> Any:
    import optuna

    if isinstance(space, OneOf):
        return optuna.distributions.CategoricalDistribution(range(len(space.options)))
    if isinstance(space, Integers):
        return optuna.distributions.IntDistribution(space.low, space.high)
    return optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)


def _internal(space: Space, value: Any) -> Any:
    return space.index(value) if isinstance(space, OneOf) else value


def _suggest(trial: optuna.Trial, name: str, space: Space) -> Any:
    if isinstance(space, OneOf):
        return space.options[trial.suggest_categorical(name, range(len(space.options)))]
    if isinstance(space, Integers):
        return trial.suggest_int(name, space.low, space.high)
    return trial.suggest_float(name, space.low, space.high, log=space.log)
