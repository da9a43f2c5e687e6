"""Pruning of single weights: layer by layer or all against each other, free or in patterns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raycompress.criteria import criterion, parameter_name
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.patterns import pattern_of
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import Units, check_sparsity, plan_units, removable
from raycompress.search import Candidate, Search

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
        units = plan_units(problem, ranks, name, own)
        if self.scope == "global":
            self._check_global(problem, units)
        elif pattern.kind == "n:m" and problem.budget is not None:
            raise ConfigError(
                f"{name}: pattern {self.pattern!r} fixes the sparsity, a budget can't"
            )
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
        if self.scope == "global":
            counts = globally(scores, self._num_removed(problem, units))
        else:

            def kept(sparsity: Mapping[str, float]) -> dict[str, int]:
                gone = {
                    key: pattern.num_removed(module, scores[key], sparsity[key])
                    for key, module in keys.items()
                }
                return {key: max(scores[key].numel() - gone[key], 1) for key in keys}

            counts = kept(units.sparsity)
            if problem.budget is not None:
                counts = self._within(problem, units, kept)
        arranged = {key: pattern.arrange(module, scores[key]) for key, module in keys.items()}
        winner: Candidate = problem.candidate(counts, problem.ranking("weights", arranged))
        return winner

    def _within(
        self,
        problem: Problem,
        units: Units,
        kept: Callable[[Mapping[str, float]], dict[str, int]],
    ) -> dict[str, int]:
        """Counts at the lowest sparsity, one for all layers, that meets the budget."""
        needed = self._num_removed(problem, units)

        def at(sparsity: float) -> tuple[dict[str, int], bool]:
            counts = kept(dict.fromkeys(units.sparsity, sparsity))
            return counts, sum(units.num[key] - n for key, n in counts.items()) >= needed

        low, high = 0.0, 1.0
        if not at(high)[1]:
            raise BudgetError(
                f"budget {problem.budget} can't be reached with pattern {self.pattern!r}"
            )
        for _ in range(50):  # the number removed rises with the sparsity, in steps
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle)[1] else (middle, high)
        return at(high)[0]

    def _check_global(self, problem: Problem, units: Units) -> None:
        own = {key for key, s in units.sparsity.items() if s != self.sparsity}
        if problem.budget is None and own:
            raise ConfigError(
                f"targets give {min(own)!r} a sparsity of its own, which "
                f"{type(self).__name__}.scope 'global' is to find"
            )

    def _num_removed(self, problem: Problem, units: Units) -> int:
        total = sum(units.num.values())
        if problem.budget is not None:
            return removable(problem, type(self).__name__, total)
        assert self.sparsity is not None
        return total - num_kept(total, self.sparsity)


def globally(scores: Mapping[str, Tensor], num_removed: int) -> dict[str, int]:
    """Kept counts after the lowest of all scores are removed; each layer keeps its highest.

    Ties go by layer, then by index.

    Args:
        scores: Of each layer's weights.
        num_removed: How many go, over all.
    """
    names = list(scores)
    flat = torch.cat([scores[name].flatten().double() for name in names])
    sizes = torch.tensor([scores[name].numel() for name in names])
    owner = torch.repeat_interleave(torch.arange(len(names)), sizes)
    start = 0
    for size in sizes.tolist():
        # As in a plain ascending order: of equal scores the last is removed last.
        last = int(flat[start : start + size].argsort(stable=True)[-1])
        flat[start + last] = torch.inf
        start += size
    gone = flat.argsort(stable=True)[: min(num_removed, len(flat) - len(names))]
    left = sizes - torch.bincount(owner[gone], minlength=len(names))
    return dict(zip(names, left.tolist(), strict=True))


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
