"""Pruning of single weights: layer by layer or all against each other, free or in patterns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from raycompress.candidate import Candidate
from raycompress.criteria import criterion, parameter_name
from raycompress.errors import BudgetError, ConfigError
from raycompress.pruning.allocation import Competition
from raycompress.pruning.patterns import Pattern, pattern_of
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import Units, check_sparsity, plan_units, removable
from raycompress.search import Search
from raycompress.targets import POOL_KEYS

__all__ = ["LAMP", "FineGrained", "Level", "Wanda"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FineGrained(Pruner):
    """Removes single weights by any criterion; the model keeps its shape.

    Of the n weights of a layer, the floor(n * sparsity) with the lowest scores go, ties by index,
    so that the count is exact. Biases and norms stay. With a budget of parameters all targeted
    layers get the one sparsity that meets it (zeros don't count as parameters).

    Attributes:
        criterion: A name such as "level", "lamp" or "wanda", or an import path.
        sparsity: Fraction removed, in [0, 1); targets override it.
        scope: "layer": each loses its own fraction; "global": all layers' weights compete, and
            every layer keeps at least one.
        pattern: "": free; "row": the same fraction of each output's weights; "2:4" or another n:m:
            n of m consecutive inputs stay, for each output and kernel position, which fixes the
            sparsity; "block 4x4": whole blocks of outputs by inputs. Layers whose inputs can't be
            cut into m are left whole, with a warning.
    """

    criterion: str = "level"
    sparsity: float | None = None
    scope: Literal["layer", "global"] = "layer"
    pattern: str = ""

    understands: ClassVar[tuple[str, ...]] = POOL_KEYS

    def __post_init__(self) -> None:
        name = type(self).__name__
        criterion(self.criterion, f"{name}.criterion", "weights")
        check_sparsity(name, self.sparsity)
        pattern = pattern_of(self.pattern, f"{name}.pattern")
        if self.scope not in ("layer", "global"):
            raise ConfigError(f"{name}.scope must be 'layer' or 'global', got {self.scope!r}")
        if self.scope == "global" and self.pattern:
            raise ConfigError(f"{name}: pattern {self.pattern!r} is for scope 'layer' alone")
        if pattern.sparsity is not None and self.sparsity not in (None, pattern.sparsity):
            raise ConfigError(
                f"{name}.sparsity is {pattern.sparsity:g} with pattern {self.pattern!r}, "
                f"got {self.sparsity:g}"
            )

    def search(self, problem: Problem) -> Search:
        """Returns as soon as the weights are scored."""
        name = type(self).__name__
        ranks = criterion(self.criterion, f"{name}.criterion", "weights")
        pattern = pattern_of(self.pattern, f"{name}.pattern")
        own = self.sparsity if pattern.sparsity is None else pattern.sparsity
        units = plan_units(problem, ranks, name, own, compete=self.scope == "global")
        if self.pattern and any(units.pool.values()):
            raise ConfigError(f"{name}: layers with pattern {self.pattern!r} can't compete")
        other = next((k for k, s in units.sparsity.items() if s != own), None)
        if pattern.kind == "n:m" and problem.budget is None and other is not None:
            raise ConfigError(
                f"{name}: pattern {self.pattern!r} fixes the sparsity at {own:g}, and targets ask "
                f"{units.sparsity[other]:g} of {other!r}"
            )
        if pattern.kind == "n:m" and problem.budget is not None:
            raise ConfigError(
                f"{name}: pattern {self.pattern!r} fixes the sparsity, and leaves a budget nothing"
            )
        needed = None if problem.budget is None else self._needed(problem, units)
        modules = dict(problem.model.named_modules())
        fitting = [n for n in units.names if pattern.fits(modules[n])]
        if not fitting:
            raise ConfigError(
                f"{name}: no targeted layer's inputs can be cut into groups of {pattern.second}"
            )
        if len(fitting) < len(units.names):
            left = ", ".join(n for n in units.names if n not in fitting)
            logger.warning("pattern %s doesn't fit, left whole: %s", self.pattern, left)
        scores = yield from problem.scores(ranks, fitting)
        keys = {parameter_name(layer): modules[layer] for layer in fitting}
        if self.scope == "global" and needed is not None:
            contest = Competition(scores, units.least)
            if contest.most < needed:
                raise BudgetError(
                    f"budget {problem.budget} can't be reached: max_sparsity_per_layer of targets "
                    "keeps too many weights"
                )
            counts = contest.counts(needed)
        elif self.pattern:
            counts = self._patterned(problem, units, pattern, keys, scores, needed)
        elif needed is not None:
            counts = self._within(problem, needed, lambda s: units.kept(_all(units, s), scores))
        else:
            counts = units.final(scores)
        arranged = {key: pattern.arrange(module, scores[key]) for key, module in keys.items()}
        winner: Candidate = problem.candidate(counts, problem.ranking("weights", arranged))
        return winner

    def _patterned(
        self,
        problem: Problem,
        units: Units,
        pattern: Pattern,
        modules: Mapping[str, nn.Module],
        scores: Mapping[str, Tensor],
        needed: int | None,
    ) -> dict[str, int]:
        def kept(sparsity: Mapping[str, float]) -> dict[str, int]:
            gone = {
                key: pattern.num_removed(module, scores[key], sparsity[key])
                for key, module in modules.items()
            }
            return {key: max(scores[key].numel() - number, 1) for key, number in gone.items()}

        if needed is None:
            return kept(units.sparsity)
        return self._within(problem, needed, lambda s: kept(_all(units, s)))

    def _within(
        self, problem: Problem, needed: int, kept: Callable[[float], dict[str, int]]
    ) -> dict[str, int]:
        """Counts at the lowest sparsity, one for all layers, at which enough are removed."""
        whole = sum(kept(0.0).values())
        low, high = 0.0, 1.0
        if whole - sum(kept(high).values()) < needed:
            raise BudgetError(
                f"budget {problem.budget} can't be reached with pattern {self.pattern!r}"
            )
        for _ in range(50):  # the number removed rises with the sparsity, in steps
            middle = (low + high) / 2
            enough = whole - sum(kept(middle).values()) >= needed
            low, high = (low, middle) if enough else (middle, high)
        return kept(high)

    def _needed(self, problem: Problem, units: Units) -> int:
        return removable(problem, type(self).__name__, sum(units.num.values()))


def _all(units: Units, sparsity: float) -> dict[str, float]:
    return dict.fromkeys(units.sparsity, sparsity)


@dataclass(frozen=True, kw_only=True)
class Level(FineGrained):
    """Magnitude pruning of single weights (Han et al. 2015; NNI's Level)."""

    criterion: ClassVar[str] = "level"  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class LAMP(FineGrained):
    """Layer-adaptive magnitude pruning (Lee et al. 2021, arXiv 2010.07611).

    One threshold for all layers, on scores that sum up what would be left: see `criteria/lamp.py`.
    """

    criterion: ClassVar[str] = "lamp"  # type: ignore[misc]
    scope: Literal["layer", "global"] = "global"


@dataclass(frozen=True, kw_only=True)
class Wanda(FineGrained):
    """Pruning by weights and activations (Sun et al. 2023, arXiv 2306.11695).

    The same fraction of each output's weights goes, by |w| times the norm of the input; no
    training, and the other weights stay as they are.
    """

    criterion: ClassVar[str] = "wanda"  # type: ignore[misc]
    pattern: str = "row"
