"""The bits of all layers that lose least within limits, by the exact program of `solver.py`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raycompress.budget import read_limit
from raycompress.errors import BudgetError
from raycompress.pruning.bit_costs import FLOAT, BitCosts, Choice
from raycompress.pruning.solver import Floats, PairwiseCost, solve

__all__ = ["ADVICE", "LIMITS", "Program", "allocate", "falling"]


LIMITS = ("size", "bit_ops", "latency_ms")
ADVICE = "raise it, time larger batches (batch_size), or prune first (pruner, widths)"


@dataclass(frozen=True)
class Program:
    """What is asked, for any losses and costs.

    Attributes:
        choices: That each layer has, by rising bits; the last may be float.
        limits: Of those in `LIMITS` that there are, as users write them.
        neighbours: Solutions of perturbed losses.
        perturbation: Standard deviation of the logarithm of a layer's losses in them.
    """

    choices: tuple[Choice, ...]
    limits: Mapping[str, str | float]
    neighbours: int
    perturbation: float

    def found(
        self,
        costs: BitCosts,
        losses: Mapping[str, Floats],
        rng: random.Random,
        corrected: float = 1.0,
    ) -> list[dict[str, Choice]]:
        """The solution, equal bits, and neighbours; all different and within the limits.

        Args:
            costs: Of the layers.
            losses: For each layer the loss at each choice, no smaller with fewer bits.
            rng: Perturbs.
            corrected: The limit on latency is multiplied by it.

        Raises:
            BudgetError: Nothing is, or nothing has to be quantized.
        """
        limits = self.allowed(costs, corrected)
        found = [allocate(costs, self.choices, losses, limits)]
        equal = (dict.fromkeys(costs.layers, choice) for choice in reversed(self.choices))
        found += itertools.islice((e for e in equal if _rounds(e) and costs.within(e, limits)), 1)
        for _ in range(self.neighbours):
            factors = {name: math.exp(rng.gauss(0, self.perturbation)) for name in losses}
            noisy = {name: factors[name] * values for name, values in losses.items()}
            found.append(allocate(costs, self.choices, noisy, limits))
        rounded = [e for i, e in enumerate(found) if e not in found[:i] and _rounds(e)]
        if not rounded or not _rounds(found[0]):
            raise BudgetError(
                "the limits are met in float: there is nothing to quantize; lower them, or leave "
                "MixedPrecision out"
            )
        return rounded

    def allowed(self, costs: BitCosts, corrected: float = 1.0) -> dict[str, float]:
        """The most of each that is limited, and was timed if it has to be.

        Raises:
            BudgetError: Even the choices that take least exceed one of them.
        """
        allowed = {}
        for key, asked in self.limits.items():
            if key == "latency_ms" and costs.times is None:
                continue
            used, whole = self._least(key, costs), costs.dense(key)
            allowed[key] = read_limit(asked, f"MixedPrecision.{key}").absolute(whole)
            if key == "latency_ms":
                allowed[key] *= corrected
            if used > allowed[key]:
                share = f"{100 * used / whole:.3g}%"
                if key == "latency_ms":
                    raise BudgetError(
                        f"{key} {asked} can't be reached: by what was timed, the fastest mixture "
                        f"of integers and float takes {used:.3g} ms, {share} of {whole:.3g} ms in "
                        f"float; {ADVICE}"
                    )
                raise BudgetError(
                    f"{key} {asked} can't be reached: with the fewest bits in every layer it is "
                    f"{used:.6g}, {share}"
                )
        return allowed

    def _least(self, key: str, costs: BitCosts) -> float:
        """The least that any choices take: a sum over layers."""
        choices = dict.fromkeys(costs.layers, self.choices[0])
        for name in choices:
            ways = [{**choices, name: choice} for choice in self.choices]
            choices = min(ways, key=lambda way: costs.value(key, way))
        return costs.value(key, choices)


def allocate(
    costs: BitCosts,
    choices: Sequence[Choice],
    losses: Mapping[str, Floats],
    limits: Mapping[str, float],
) -> dict[str, Choice]:
    """The choices with the smallest sum of losses; what is left of the limits is given out.

    Args:
        costs: Of the layers.
        choices: By rising bits.
        losses: For each layer the loss at each choice, no smaller with fewer bits.
        limits: By "size", "bit_ops" and "latency_ms".

    Raises:
        BudgetError: No choices are within the limits.
    """
    most = dict.fromkeys(losses, choices[-1])
    rows = []
    for key, limit in limits.items():
        whole = costs.value(key, most)
        single = {
            name: np.array([costs.value(key, {**most, name: each}) - whole for each in choices])
            for name in losses
        }
        rows.append((PairwiseCost(whole, single, {}), limit))
    levels = solve(losses, rows)
    # Where two choices lose nothing by the probes, more bits are the safer one.
    for name, level in _richer(levels, losses):
        raised = {**levels, name: max(level, levels[name])}
        if costs.within({n: choices[i] for n, i in raised.items()}, limits):
            levels = raised
    return {name: choices[level] for name, level in levels.items()}


def _richer(levels: Mapping[str, int], losses: Mapping[str, Floats]) -> Iterator[tuple[str, int]]:
    """Levels above the solution's that lose no more, most to gain first; ties by name."""
    gains = [
        (float(values[level] - values[levels[name]]), -level, name)
        for name, values in losses.items()
        for level in range(levels[name] + 1, len(values))
        if values[level] <= values[levels[name]]
    ]
    return ((name, -negative) for _, negative, name in sorted(gains))


def falling(values: Floats) -> Floats:
    """The smallest values above the given ones that don't rise with bits, along either axis."""
    flipped = np.flip(values)
    raised = np.maximum.accumulate(np.maximum.accumulate(flipped, axis=0), axis=1)
    return np.flip(raised)


def _rounds(choices: Mapping[str, Choice]) -> bool:
    """Whether any layer isn't in float."""
    return any(bits != FLOAT for bits, _ in choices.values())
