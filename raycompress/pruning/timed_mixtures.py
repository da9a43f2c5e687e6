"""A search's questions about latency: models with layers in integers and in float on a runtime."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from raycompress.budget import Limit
from raycompress.candidate import Candidate, Trial
from raycompress.errors import EvaluationError
from raycompress.pruning.bit_costs import BitCosts, Choice
from raycompress.pruning.integer_times import IntegerTimes
from raycompress.pruning.pruner import Problem
from raycompress.quantization.quantizer import Quantization
from raycompress.search import Timings
from raycompress.structure.latency.table import TableError

__all__ = ["TimedMixtures"]

CHECKS = 4
"""Random mixtures that are timed for nothing but to say how far off the sums are."""
CHUNK = 7
"""Models that are timed in turns with the dense one in integers."""

Timed = Generator[Timings, list[Trial], list[tuple[Trial, Trial]]]


@dataclass(frozen=True)
class TimedMixtures:
    """Asks for latencies: `yield from` its methods in a search.

    Attributes:
        problem: Its dense model is what layers of are in integers or in float.
        dense: What that costs.
        quantization: Of choices by layer.
        runtime: A backend that computes in integers.
        batch_size: Examples in a forward pass.
    """

    problem: Problem
    dense: BitCosts
    quantization: Callable[[Mapping[str, Choice]], Quantization]
    runtime: str
    batch_size: int

    def time(self, candidates: Sequence[Candidate], *, floats: bool = False) -> Timed:
        """Each candidate's trial, behind that of the dense model in integers beside it.

        A candidate that the runtime can't take has a failure.

        Args:
            candidates: Any number of them.
            floats: Their float models are timed as well, not only the dense one.

        Raises:
            EvaluationError: The runtime can't take the dense model in integers.
        """
        first, timed = self._in_float(()), []
        for start in range(0, len(candidates), CHUNK):
            asked = (first, *candidates[start : start + CHUNK])
            with_float = tuple(range(len(asked))) if floats else (0,)
            beside, *others = yield Timings(asked, self.runtime, self.batch_size, with_float)
            if beside.failure is not None:
                raise EvaluationError(f"timing on {self.runtime} failed: {beside.failure}")
            timed += [(beside, other) for other in others]
        return timed

    def layers(self) -> Generator[Timings, list[Trial], IntegerTimes]:
        """What the dense model's layers save; those of one kind and size are timed once.

        A layer that can't be in float alone counts as if it were all that integers save.

        Raises:
            EvaluationError: The runtime can't take the model.
        """
        kinds = self._kinds()
        alone: dict[tuple[object, ...], str] = {}
        for name, kind in kinds.items():
            alone.setdefault(kind, name)
        single = [(name,) for name in alone.values()] if len(kinds) > 1 else []
        rng = random.Random("timed mixtures")
        names = list(kinds)
        mixtures = [_drawn(names, rng) for _ in range(CHECKS)] if len(kinds) > 2 else []
        asked = [*single, *mixtures] or [()]
        timed = yield from self.time([self._in_float(each) for each in asked])
        float_ms, integer_ms = _float(timed[0][0]), _own(timed[0][0])
        # On the scale of the first ones, whatever the machine did meanwhile.
        found = [
            _own(trial) * integer_ms / _own(beside) if trial.failure is None else float_ms
            for beside, trial in timed
        ]
        own = dict.fromkeys(alone, 0.0)
        own |= {kind: ms - integer_ms for kind, ms in zip(own, found[: len(single)], strict=False)}
        savings = {name: own[kind] for name, kind in kinds.items()}
        times = IntegerTimes.of(float_ms, integer_ms, savings, TableError.of([], []))
        checked = [
            (times.latency_ms(each), ms)
            for each, ms, (_, trial) in zip(
                mixtures, found[len(single) :], timed[len(single) :], strict=False
            )
            if trial.failure is None
        ]
        error = TableError.of([predicted for predicted, _ in checked], [ms for _, ms in checked])
        return replace(times, error=error)

    def priced(
        self, bases: Sequence[tuple[Candidate, Mapping[str, int]]]
    ) -> Generator[Timings, list[Trial], list[BitCosts]]:
        """What each base costs, milliseconds included.

        Args:
            bases: Pruned or dense, in float, with their kept counts.
        """
        times = yield from self.layers()
        if times.error.num:
            self.problem.report({"latency_error": times.error.mean})
        ends = [replace(base, quantize=self._integers()) for base, _ in bases]
        pruned = [end for end in ends if end != self._in_float(())]
        timed = dict(zip(pruned, (yield from self.time(pruned, floats=True)), strict=True))
        costs = []
        for end, (_, counts) in zip(ends, bases, strict=True):
            costs_of = BitCosts.of(self.problem.model, self.problem.structure, counts)
            own = times
            if end in timed:
                beside, trial = timed[end]
                if trial.failure is not None:
                    raise EvaluationError(f"timing on {self.runtime} failed: {trial.failure}")
                drift = times.integer_ms / _own(beside)
                shares = {
                    name: costs_of.layers[name].macs / max(layer.macs, 1)
                    for name, layer in self.dense.layers.items()
                }
                own = times.pruned(_float(trial) * drift, _own(trial) * drift, shares)
            costs.append(replace(costs_of, times=own, float_ms=times.float_ms))
        return costs

    def ratios(
        self, candidates: Sequence[Candidate], limit: Limit
    ) -> Generator[Timings, list[Trial], list[float]]:
        """Latency of each, as timed, over the limit; inf for what the runtime can't take."""
        timed = yield from self.time(candidates)
        return [
            _own(trial) / limit.absolute(_float(beside)) if trial.failure is None else math.inf
            for beside, trial in timed
        ]

    def _in_float(self, names: Collection[str]) -> Candidate:
        return Candidate(self.problem.weights, quantize=self._integers(names))

    def _integers(self, in_float: Collection[str] = ()) -> Quantization:
        return self.quantization({n: (8, 8) for n in self.dense.layers if n not in in_float})

    def _kinds(self) -> dict[str, tuple[object, ...]]:
        """For each layer what is equal for those that take as long."""
        kinds: dict[str, tuple[object, ...]] = {}
        for name, layer in self.dense.layers.items():
            module = self.problem.model.get_submodule(name)
            kinds[name] = (type(module), module.get_parameter("weight").shape, layer.macs)
        return kinds


def _drawn(names: list[str], rng: random.Random) -> tuple[str, ...]:
    """Some of them, neither none nor all."""
    return tuple(sorted(rng.sample(names, rng.randint(1, len(names) - 1))))


def _own(trial: Trial) -> float:
    assert trial.latency_ms is not None
    return trial.latency_ms


def _float(trial: Trial) -> float:
    assert trial.float_ms is not None
    return trial.float_ms
