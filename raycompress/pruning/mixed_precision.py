"""Bits for each layer, found by probes, an exact program and a race (our own).

Every layer is quantized alone at each choice of bits, and judged once; the sum of these losses is
minimised exactly within limits on bytes and bit operations (`solver.py`). HAWQ-V3 (arXiv
2011.10680) has the same program over second-order sensitivities; the currency here is measured
loss, as for `CurveSolver`. What the sum can't know, that losses of layers quantized together don't
just add up, is left to a race among the solution, solutions of perturbed losses, and equal bits.

Pruned models compete under the same limits, so that fewer channels stand against fewer bits.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raycompress.budget import Budget, read_limit
from raycompress.candidate import Candidate, Trial
from raycompress.errors import BudgetError, ConfigError, EvaluationError
from raycompress.importing import named, resolve
from raycompress.pruning.bit_costs import BitCosts, Choice
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.solver import Floats, PairwiseCost, solve
from raycompress.quantization import QUANTIZERS
from raycompress.quantization.quantizer import Bits, Quantization, Quantizer
from raycompress.search import Asked, Probes, Race, Search

__all__ = ["MixedPrecision", "allocate"]


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Pruner):
    """Gives each layer its bits within limits on size and bit operations; may prune first.

    The probes don't depend on limits and seed: in a job they are made once for all of them. What
    it finds is calibrated, not trained; a job's `quantize` trains and stores it with these bits.

    Attributes:
        quantizer: Judges bits without training: a name such as "PTQ", or an import path.
        weight_bits: What weights of a layer may have.
        input_bits: What inputs of a layer may have; empty: they stay in float.
        size: Limit on bytes of the packed model: a percentage of the float model such as "15%",
            or a number; null: none.
        bit_ops: Limit on multiply-adds of one example, each times the bits of its weight and of
            its input (32 in float): a percentage of the float model, or a number; null: none.
        pruner: Prunes first: a name such as "CurveSolver" (with its default settings), or an
            import path; "": nothing is pruned. The job's budget is its budget.
        widths: Fractions of the parameters that it keeps, in place of a budget, each in (0, 1];
            all compete within the limits, and 1 is the dense model.
        share: Part of the validation split that probes are judged on, in whole shards.
        objective: "loss": lower validation loss wins (finer than accuracy); "score": the task's.
        batches: Calibration batches.
        neighbours: Solutions of perturbed losses in the race, for each width.
        perturbation: Standard deviation of the logarithm of a layer's losses in them.
    """

    quantizer: str = "PTQ"
    weight_bits: tuple[int, ...] = (8, 4, 2)
    input_bits: tuple[int, ...] = (8,)
    size: str | float | None = None
    bit_ops: str | float | None = None
    pruner: str = ""
    widths: tuple[float, ...] = ()
    share: float = 0.25
    objective: Literal["loss", "score"] = "loss"
    batches: int = 8
    neighbours: int = 3
    perturbation: float = 0.5

    def __post_init__(self) -> None:
        name = "MixedPrecision"
        quantizer = self._quantizer()
        if quantizer.trains == "yes":
            raise ConfigError(f"{name}.quantizer: {self.quantizer} has to be trained; PTQ hasn't")
        for key, part in (("weight_bits", "weight"), ("input_bits", "input")):
            bits = getattr(self, key)
            if not all(2 <= each <= 8 for each in bits) or len(set(bits)) < len(bits):
                raise ConfigError(
                    f"{name}.{key} must be different numbers from 2 to 8, got {list(bits)}"
                )
            if bits and part not in quantizer.parts:
                raise ConfigError(
                    f"{name}.{key} must be [], since {self.quantizer} quantizes no {part}, "
                    f"got {list(bits)}"
                )
        if not self.weight_bits:
            raise ConfigError(f"{name}.weight_bits must not be empty")
        if self.size is None and self.bit_ops is None:
            raise ConfigError(f"{name} needs a limit: size or bit_ops, such as size: 15%")
        for key in ("size", "bit_ops"):
            if getattr(self, key) is not None:
                read_limit(getattr(self, key), f"{name}.{key}")
        if self.pruner:
            self._inner()
        elif self.widths:
            raise ConfigError(f"{name}.widths need a pruner, such as pruner: CurveSolver")
        if not all(0 < width <= 1 for width in self.widths):
            raise ConfigError(f"{name}.widths must be in (0, 1], got {list(self.widths)}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"{name}.share must be in (0, 1], got {self.share:g}")
        if self.objective not in ("loss", "score"):
            raise ConfigError(f"{name}.objective must be 'loss' or 'score', got {self.objective!r}")
        for key, least in (("batches", 1), ("neighbours", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{name}.{key} must be at least {least}")
        if not 0 < self.perturbation <= 2:
            raise ConfigError(f"{name}.perturbation must be in (0, 2], got {self.perturbation:g}")

    def search(self, problem: Problem) -> Search:
        """Yields what the pruner asks for, then all probes at once, then the race."""
        self._check(problem)
        costs = BitCosts.of(problem.model, problem.structure)
        if not self.pruner:
            self._limits(costs)  # refuses what can't be met before anything is asked
        bases = yield from self._bases(problem)
        losses = yield from self._probes(problem)
        rng = random.Random(f"perturb:{problem.seed}")
        proposals: list[Candidate] = []
        reason: BudgetError | None = None
        for base, counts in bases:
            costs = BitCosts.of(problem.model, problem.structure, counts)
            try:
                found = self._allocations(costs, losses, rng)
            except BudgetError as error:
                reason = error  # others are narrower
                continue
            if not proposals:
                problem.report({"size": costs.size(found[0]), "bit_ops": costs.bit_ops(found[0])})
            proposals += [replace(base, quantize=self._quantization(each)) for each in found]
        if not proposals:
            assert reason is not None
            raise reason
        trials = yield Race(tuple(proposals), objective=self.objective)
        alive = [trial for trial in trials if trial.judged]
        if not alive:
            raise EvaluationError(f"every allocation of bits failed: {trials[0].failure}")
        return min(alive, key=self._energy).candidate

    def may_find(self, problem: Problem) -> Sequence[Quantization]:
        """Every choice of bits, given to all layers."""
        layers = BitCosts.of(problem.model, problem.structure).layers
        return [self._quantization(dict.fromkeys(layers, each)) for each in self._choices()]

    def shared(self, problem: Problem) -> Generator[Asked, list[Trial], None]:
        """The pruner's own, and all probes."""
        self._check(problem)
        if self.pruner:
            yield from self._inner().shared(problem)
        yield from self._probes(problem)

    def _bases(
        self, problem: Problem
    ) -> Generator[Asked, list[Trial], list[tuple[Candidate, dict[str, int]]]]:
        """What is quantized, each with its kept counts."""
        if not self.pruner:
            return [(Candidate(problem.weights), {})]
        budgets: list[Budget | None] = [problem.budget]
        if self.widths:
            budgets = [Budget.of({"params": f"{100 * width}%"}) for width in self.widths]
        bases: list[tuple[Candidate, dict[str, int]]] = []
        for width, budget in itertools.zip_longest(self.widths, budgets):
            if width == 1:
                bases.append((Candidate(problem.weights), {}))
                continue
            found = yield from self._inner().search(replace(problem, budget=budget))
            if found.training is not None:
                found = found.trained((yield [found])[0].trained())
            lost = (
                {} if found.weights == problem.weights else problem.store.kept_counts(found.weights)
            )
            bases.append((found, {**lost, **found.counts}))
        return bases

    def _probes(self, problem: Problem) -> Generator[Asked, list[Trial], dict[str, Floats]]:
        """For each layer the loss above the float model's, alone at each choice of bits.

        At least 0, and no smaller with fewer bits.
        """
        names, choices = list(BitCosts.of(problem.model, problem.structure).layers), self._choices()
        shards = problem.first_shards(self.share)
        asked = [
            Candidate(problem.weights, shards=shards, quantize=self._quantization({name: choice}))
            for name in names
            for choice in choices
        ]
        dense, *trials = yield Probes((Candidate(problem.weights, shards=shards), *asked))
        for trial in (dense, *trials):
            if trial.failure is not None:
                which = trial.candidate.quantize
                what = "in float" if which is None else f"at {dict(which.choices)}"
                raise EvaluationError(f"judging the model {what} failed: {trial.failure}")
        base = self._energy(dense)
        losses = {}
        for index, name in enumerate(names):
            own = trials[index * len(choices) : (index + 1) * len(choices)]
            values = np.array([max(self._energy(trial) - base, 0.0) for trial in own])
            losses[name] = _falling(values.reshape(len(self.weight_bits), -1)).ravel()
        return losses

    def _allocations(
        self, costs: BitCosts, losses: Mapping[str, Floats], rng: random.Random
    ) -> list[dict[str, Choice]]:
        """The solution, equal bits, and neighbours; all different and within the limits."""
        choices, limits = self._choices(), self._limits(costs)
        found = [allocate(costs, choices, losses, limits)]
        equal = (dict.fromkeys(costs.layers, choice) for choice in reversed(choices))
        found += itertools.islice((each for each in equal if costs.within(each, limits)), 1)
        for _ in range(self.neighbours):
            factors = {name: math.exp(rng.gauss(0, self.perturbation)) for name in losses}
            noisy = {name: factors[name] * values for name, values in losses.items()}
            found.append(allocate(costs, choices, noisy, limits))
        return [each for i, each in enumerate(found) if each not in found[:i]]

    def _limits(self, costs: BitCosts) -> dict[str, float]:
        """Bytes and bit operations allowed, of those that are limited.

        Raises:
            BudgetError: The fewest bits exceed one of them.
        """
        fewest = dict.fromkeys(costs.layers, self._choices()[0])
        limits = {}
        for key, used, whole in (
            ("size", costs.size(fewest), costs.float_size),
            ("bit_ops", costs.bit_ops(fewest), costs.float_bit_ops),
        ):
            asked = getattr(self, key)
            if asked is None:
                continue
            limits[key] = read_limit(asked, f"MixedPrecision.{key}").absolute(whole)
            if used > limits[key]:
                raise BudgetError(
                    f"{key} {asked} can't be reached: with the fewest bits in every layer it is "
                    f"{used:.6g}, {100 * used / whole:.3g}%"
                )
        return limits

    def _choices(self) -> list[Choice]:
        """Pairs of bits of weights and inputs, by rising bits of weights, then of inputs."""
        inputs: Sequence[int | None] = sorted(self.input_bits) or [None]
        return list(itertools.product(sorted(self.weight_bits), inputs))

    def _quantization(self, choices: Mapping[str, Choice]) -> Quantization:
        bits = {name: Bits(weight=weight, input=given) for name, (weight, given) in choices.items()}
        return Quantization.of(self._quantizer(), bits, self.batches)

    def _quantizer(self) -> Quantizer:
        made: Quantizer = named(self.quantizer, Quantizer, QUANTIZERS, "MixedPrecision.quantizer")()
        return made

    def _inner(self) -> Pruner:
        path = self.pruner if ":" in self.pruner else f"raycompress.pruning:{self.pruner}"
        made: Pruner = resolve(path, Pruner, "MixedPrecision.pruner")()
        return made

    def _check(self, problem: Problem) -> None:
        if self.pruner:
            self._inner().check_targets(problem.targets)
            if self.widths and problem.budget is not None:
                raise ConfigError(
                    f"MixedPrecision.widths stand in place of a budget, got {problem.budget}"
                )
        elif problem.targets or problem.budget is not None:
            what = f"budget {problem.budget}" if problem.budget is not None else "targets"
            raise ConfigError(
                f"MixedPrecision without a pruner keeps all channels, and can't honour {what}; "
                "its limits are size and bit_ops"
            )

    def _energy(self, trial: Trial) -> float:
        return trial.loss if self.objective == "loss" else -trial.score


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
        limits: By "size" and "bit_ops".

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


def _falling(values: Floats) -> Floats:
    """The smallest values above the given ones that don't rise with bits, along either axis."""
    flipped = np.flip(values)
    raised = np.maximum.accumulate(np.maximum.accumulate(flipped, axis=0), axis=1)
    return np.flip(raised)
