"""Bits for each layer, found by probes, an exact program and a race (our own).

Every layer is quantized alone at each choice of bits, and judged once; the sum of these losses is
minimised exactly within limits on bytes and bit operations (`solver.py`). HAWQ-V3 (arXiv
2011.10680) has the same program over second-order sensitivities; the currency here is measured
loss, as for `CurveSolver`. What the sum can't know, that losses of layers quantized together don't
just add up, is left to a race among the solution, solutions of perturbed losses, and equal bits.

Pruned models compete under the same limits, so that fewer channels stand against fewer bits.

Where latency is limited, layers are in integers or in float on a runtime: what each saves is timed
(`integer_times.py`), and so is the whole model with what was found, before it may win.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raycompress.budget import Budget, read_limit
from raycompress.candidate import Candidate, Trial
from raycompress.errors import BudgetError, ConfigError, EvaluationError
from raycompress.importing import named, resolve
from raycompress.pruning.bit_allocation import ADVICE, LIMITS, Program, falling
from raycompress.pruning.bit_costs import FLOAT, BitCosts, Choice
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.solver import Floats
from raycompress.pruning.timed_mixtures import TimedMixtures
from raycompress.quantization import QUANTIZERS
from raycompress.quantization.lowering import INTEGERS
from raycompress.quantization.quantizer import Bits, Quantization, Quantizer
from raycompress.search import Asked, Probes, Race, Search
from raycompress.wording import near

__all__ = ["MixedPrecision"]

ATTEMPTS = 4
"""How often the program is given a limit on latency, corrected by what was timed before."""
ENOUGH = 0.95
"""Of a limit on latency, with which a solution isn't looked for once more."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Pruner):
    """Gives each layer its bits within limits on size, latency and bit operations; may prune first.

    The probes don't depend on limits and seed: in a job they are made once for all of them. What
    it finds is calibrated, not trained; a job's `quantize` trains and stores it with these bits.

    Attributes:
        quantizer: Judges bits without training: a name such as "PTQ", or an import path.
        weight_bits: What weights of a layer may have; with 32 the whole layer may stay in float.
        input_bits: What inputs of a layer may have; empty: they stay in float.
        size: Limit on bytes of the packed model: a percentage of the float model such as "15%",
            or a number; null: none.
        bit_ops: Limit on multiply-adds of one example, each times the bits of its weight and of
            its input (32 in float): a percentage of the float model, or a number; null: none.
        latency_ms: Limit on milliseconds of a forward pass on `runtime`, as timed: a percentage of
            the float model on the same runtime, or a number; null: none. Runtimes have kernels of 8
            bits and of float: weight_bits must be [8, 32], and input_bits [8].
        runtime: Backend that latency is timed on, "onnx" or "inductor".
        batch_size: Examples in such a pass.
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
    latency_ms: str | float | None = None
    runtime: str = "onnx"
    batch_size: int = 1
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
            allowed = (*range(2, 9), 32) if part == "weight" else range(2, 9)
            if not set(bits) <= set(allowed) or len(set(bits)) < len(bits):
                more = ", or 32 for float" if part == "weight" else ""
                raise ConfigError(
                    f"{name}.{key} must be different numbers from 2 to 8{more}, got {list(bits)}"
                )
            if bits and part not in quantizer.parts:
                raise ConfigError(
                    f"{name}.{key} must be [], since {self.quantizer} quantizes no {part}, "
                    f"got {list(bits)}"
                )
        if not set(self.weight_bits) - {FLOAT}:
            raise ConfigError(f"{name}.weight_bits must not be empty, or float alone")
        if all(getattr(self, key) is None for key in LIMITS):
            raise ConfigError(
                f"{name} needs a limit: size, bit_ops or latency_ms, such as size: 15%"
            )
        for key in LIMITS:
            if getattr(self, key) is not None:
                read_limit(getattr(self, key), f"{name}.{key}")
        if self.latency_ms is not None:
            if set(self.weight_bits) != {8, FLOAT} or set(self.input_bits) != {8}:
                raise ConfigError(
                    f"{name}.latency_ms is that of kernels, which have 8 bits or float: "
                    f"weight_bits must be [8, 32] and input_bits [8], "
                    f"got {list(self.weight_bits)} and {list(self.input_bits)}"
                )
            if self.runtime not in INTEGERS:
                raise ConfigError(
                    f"{name}.runtime must be one of {', '.join(INTEGERS)}, got {self.runtime!r}"
                    f"{near(self.runtime, INTEGERS)}"
                )
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
        for key, least in (("batches", 1), ("neighbours", 0), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{name}.{key} must be at least {least}")
        if not 0 < self.perturbation <= 2:
            raise ConfigError(f"{name}.perturbation must be in (0, 2], got {self.perturbation:g}")

    @property
    def timed_on(self) -> str:
        """Where latency is limited, the runtime that it is timed on."""
        return "" if self.latency_ms is None else self.runtime

    def search(self, problem: Problem) -> Search:
        """Yields what the pruner asks for, then timings and all probes, then timings and a race."""
        self._check(problem)
        dense = BitCosts.of(problem.model, problem.structure)
        if not self.pruner:
            self._program().allowed(dense)  # refuses what can't be met before anything is asked
        bases = yield from self._bases(problem)
        timed = self._timed(problem, dense)
        if self.latency_ms is None:
            costs = [BitCosts.of(problem.model, problem.structure, own) for _, own in bases]
        else:
            costs = yield from timed.priced(bases)
        priced = [(base, own) for (base, _), own in zip(bases, costs, strict=True)]
        losses = yield from self._probes(problem)
        ratios: Mapping[Candidate, float] = {}
        if self.latency_ms is None:
            proposals = self._proposals(problem, priced, losses, 1.0)
        else:
            ratios = yield from self._within(problem, priced, losses, timed, self.latency_ms)
            proposals = list(ratios)
        trials = yield Race(tuple(proposals), objective=self.objective)
        alive = [trial for trial in trials if trial.judged]
        if not alive:
            raise EvaluationError(f"every allocation of bits failed: {trials[0].failure}")
        winner = min(alive, key=self._energy).candidate
        problem.report(self._figures(winner, dict(priced), ratios))
        yield [winner]  # which the trial judges in any case, to have its figures
        return winner

    def _figures(
        self,
        winner: Candidate,
        priced: Mapping[Candidate, BitCosts],
        ratios: Mapping[Candidate, float],
    ) -> dict[str, float]:
        """What the winner takes of all that is limited; latency as predicted and as timed."""
        costs = priced[replace(winner, quantize=None)]
        assert winner.quantize is not None
        bits = {name: (each.weight, each.input) for name, each in winner.quantize.choices}
        choices: dict[str, Choice] = dict.fromkeys(costs.layers, (FLOAT, None))
        choices |= {n: (FLOAT if w is None else w, given) for n, (w, given) in bits.items()}
        figures = {key: costs.value(key, choices) for key in self._program().limits}
        if winner in ratios:
            limit = read_limit(self.latency_ms or "", "MixedPrecision.latency_ms")
            figures["latency_float_ms"] = costs.float_ms
            figures["latency_limit_ms"] = limit.absolute(costs.float_ms)
            figures["latency_timed_ms"] = ratios[winner] * figures["latency_limit_ms"]
        return figures

    def _within(
        self,
        problem: Problem,
        priced: Sequence[tuple[Candidate, BitCosts]],
        losses: Mapping[str, Floats],
        timed: TimedMixtures,
        limit: str | float,
    ) -> Generator[Asked, list[Trial], dict[Candidate, float]]:
        """Proposals within the limit on latency as timed, not by sums alone, with their part of it.

        Sums are off by ten percent and more: where the program's own solution for a base is too
        slow, or much faster than it has to be, the limit that it is given is corrected by that.

        Raises:
            BudgetError: None is.
        """
        asked = read_limit(limit, "MixedPrecision.latency_ms")
        ratios: dict[Candidate, float] = {}
        reason: BudgetError | None = None
        for pair in priced:
            corrected = before = 1.0
            for attempt in range(ATTEMPTS):
                try:
                    proposals = self._proposals(problem, [pair], losses, corrected)
                except BudgetError as error:
                    if not attempt:
                        reason = error  # others are narrower
                        break
                    corrected = (corrected + before) / 2
                    continue
                before = corrected
                new = [each for each in proposals if each not in ratios]
                ratios |= dict(zip(new, (yield from timed.ratios(new, asked)), strict=True))
                solution = ratios[proposals[0]]
                if math.isinf(solution):  # the runtime can't take it
                    solution = min(ratios[each] for each in proposals)
                if ENOUGH <= solution <= 1 or math.isinf(solution):
                    break
                corrected *= 0.99 / solution
        if not ratios and reason is not None:
            raise reason
        within = {each: ratio for each, ratio in ratios.items() if ratio <= 1}
        if not within and all(math.isinf(ratio) for ratio in ratios.values()):
            raise EvaluationError(f"{self.runtime} can run none of the allocations that were found")
        if not within:
            raise BudgetError(
                f"latency_ms {limit} can't be reached: the fastest allocation that was timed on "
                f"{self.runtime}, batch size {self.batch_size}, takes {min(ratios.values()):.3g} "
                f"times as long; {ADVICE}"
            )
        return within

    def _proposals(
        self,
        problem: Problem,
        priced: Sequence[tuple[Candidate, BitCosts]],
        losses: Mapping[str, Floats],
        corrected: float,
    ) -> list[Candidate]:
        """What is within the limits by what it costs, of all bases."""
        rng, program = random.Random(f"perturb:{problem.seed}"), self._program()
        proposals: list[Candidate] = []
        reason: BudgetError | None = None
        for base, costs in priced:
            try:
                found = program.found(costs, losses, rng, corrected)
            except BudgetError as error:
                reason = error  # others are narrower
                continue
            proposals += [replace(base, quantize=self._quantization(each)) for each in found]
        if not proposals:
            assert reason is not None
            raise reason
        return proposals

    def may_find(self, problem: Problem) -> Sequence[Quantization]:
        """Every choice of bits, given to all layers."""
        layers = BitCosts.of(problem.model, problem.structure).layers
        return [self._quantization(dict.fromkeys(layers, each)) for each in self._rounded()]

    def shared(self, problem: Problem) -> Generator[Asked, list[Trial], None]:
        """The pruner's own, timings of the dense model, and all probes."""
        self._check(problem)
        if self.pruner:
            yield from self._inner().shared(problem)
        if self.latency_ms is not None:
            yield from self._timed(problem, BitCosts.of(problem.model, problem.structure)).layers()
        yield from self._probes(problem)

    def _timed(self, problem: Problem, dense: BitCosts) -> TimedMixtures:
        return TimedMixtures(problem, dense, self._quantization, self.runtime, self.batch_size)

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
        names, choices = list(BitCosts.of(problem.model, problem.structure).layers), self._rounded()
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
            bits = len({weight for weight, _ in choices})
            losses[name] = falling(values.reshape(bits, -1)).ravel()
            if FLOAT in self.weight_bits:
                losses[name] = np.append(losses[name], 0.0)
        return losses

    def _program(self) -> Program:
        floats: list[Choice] = [(FLOAT, None)] if FLOAT in self.weight_bits else []
        asked = {key: getattr(self, key) for key in LIMITS}
        limits = {key: value for key, value in asked.items() if value is not None}
        return Program((*self._rounded(), *floats), limits, self.neighbours, self.perturbation)

    def _rounded(self) -> list[Choice]:
        """Pairs of bits of weights and inputs, by rising bits of weights, then of inputs."""
        inputs: Sequence[int | None] = sorted(self.input_bits) or [None]
        return list(itertools.product(sorted(set(self.weight_bits) - {FLOAT}), inputs))

    def _quantization(self, choices: Mapping[str, Choice]) -> Quantization:
        bits = {
            name: Bits(weight=weight, input=given)
            for name, (weight, given) in choices.items()
            if weight != FLOAT
        }
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
                "its limits are size, bit_ops and latency_ms"
            )

    def _energy(self, trial: Trial) -> float:
        return trial.loss if self.objective == "loss" else -trial.score
