"""Automated gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from raycompress.candidate import Candidate, Training
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import Units, check_counts, check_sparsity, plan_units
from raycompress.search import Search
from raycompress.targets import POOL_KEYS, SCHEDULE_KEYS

__all__ = ["AGP", "Ramp"]


@dataclass(frozen=True, kw_only=True)
class AGP(Pruner):
    """Raises the sparsity while the model trains, fast at first and slowly at the end.

    At time t between `start` and `end` the sparsity is (equation 1 of the paper)
    s_t = s_f + (s_i - s_f) * (1 - (t - start) / (end - start)) ** 3; it is raised every
    `frequency`, and a last time at `end`, so that s_f is reached exactly whether or not
    `frequency` divides the span. Afterwards the mask is frozen and training goes on to `epochs`.

    Targets may give layers schedules of their own (`initial_sparsity`, `final_sparsity`,
    `start_epoch`, `end_epoch`, `frequency`).

    What was removed stays removed: weights are held at zero, channels leave the model (training
    gets cheaper as it goes on). Deviations from the paper: between two prunings the task's own
    loop trains as a run of its own, so that its learning rate schedule starts anew after each; a
    single run that is killed would lose everything, this loses one period.

    Attributes:
        criterion: What goes first: a name such as "level" or "l1", or an import path.
        final_sparsity: Fraction removed at the end, in [0, 1); targets and budgets override it.
        initial_sparsity: Fraction removed at the start, in [0, 1).
        unit: Of the times below: "epoch" or "step" (of the optimizer).
        start: First pruning; before, the dense model trains.
        end: Last pruning.
        frequency: Time between prunings, above 0.
        total: Training ends here, at `end` or later; None: one `frequency` after `end`.
        shape: "cubic" as in the paper, or "linear".
        lr: Peak learning rate of each period; None takes the task's own.
        round_to: Kept counts of channels are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "level"
    final_sparsity: float | None = None
    initial_sparsity: float = 0.0
    unit: Literal["epoch", "step"] = "epoch"
    start: float = 0.0
    end: float = 5.0
    frequency: float = 1.0
    total: float | None = None
    shape: Literal["cubic", "linear"] = "cubic"
    lr: float | None = None
    round_to: int = 1
    min_kept: int = 1

    understands: ClassVar[tuple[str, ...]] = (*POOL_KEYS, *SCHEDULE_KEYS)

    def __post_init__(self) -> None:
        criterion(self.criterion, "AGP.criterion")
        check_counts("AGP", self.round_to, self.min_kept)
        check_sparsity("AGP", self.final_sparsity, "final_sparsity")
        check_sparsity("AGP", self.initial_sparsity, "initial_sparsity")
        if self.final_sparsity is not None and self.initial_sparsity > self.final_sparsity:
            raise ConfigError(
                f"AGP.initial_sparsity must be at most final_sparsity ({self.final_sparsity:g}), "
                f"got {self.initial_sparsity:g}"
            )
        if self.frequency <= 0:
            raise ConfigError(f"AGP.frequency must be above 0, got {self.frequency:g}")
        if not 0 <= self.start < self.end:
            raise ConfigError(
                f"AGP: 0 <= start < end must hold, got {self.start:g} and {self.end:g}"
            )
        if self.total is not None and self.total < self.end:
            raise ConfigError(f"AGP.total must be at least end ({self.end:g}), got {self.total:g}")
        if self.unit == "step":
            for name in ("start", "end", "frequency", "total"):
                value = getattr(self, name)
                if value is not None and value != int(value):
                    raise ConfigError(f"AGP.{name} must be whole steps, got {value:g}")

    def search(self, problem: Problem) -> Search:
        """Yields one candidate for each period of training, which goes on from the last."""
        ranks = criterion(self.criterion, "AGP.criterion")
        units = plan_units(
            problem,
            ranks,
            "AGP",
            self.final_sparsity,
            round_to=self.round_to,
            min_kept=self.min_kept,
        )
        ramps = {key: self._ramp(key, units) for key in units.num}
        for key, pool in units.pool.items():
            if pool and ramps[key] != next(r for k, r in ramps.items() if units.pool[k] == pool):
                raise ConfigError(f"targets: layers of {pool} compete, and need one schedule")
        times = sorted({time for ramp in ramps.values() for time in ramp.times()})
        last = times[-1] + self.frequency if self.total is None else max(self.total, times[-1])
        weights = problem.weights
        if times[0] > 0:
            trial = (yield [Candidate(weights, training=self._training(problem, times[0], 0))])[0]
            weights = trial.trained()
        winner = Candidate(weights)
        for period, (time, until) in enumerate(zip(times, [*times[1:], last], strict=True), 1):
            scores = yield from problem.scores(ranks, units.names, weights)
            now = {key: ramp.sparsity(time) for key, ramp in ramps.items()}
            training = self._training(problem, until - time, period)
            asked = problem.candidate(
                units.kept(now, scores),
                problem.ranking(ranks.kind, scores),
                weights=weights,
                training=training,
            )
            weights = (yield [asked])[0].trained()
            winner = replace(asked, weights=weights, training=None)
        return winner

    def _ramp(self, key: str, units: Units) -> Ramp:
        """The schedule of a layer or group: its target's; where that is silent, the pruner's."""
        asked, final = units.choices[key].schedule, units.sparsity[key]
        given = (asked.start_epoch, asked.end_epoch, asked.frequency)
        if self.unit == "step" and any(value is not None for value in given):
            raise ConfigError("targets give epochs, and AGP.unit is 'step'")
        start, end, frequency = (
            own if value is None else value
            for own, value in zip((self.start, self.end, self.frequency), given, strict=True)
        )
        initial = asked.initial_sparsity
        if initial is not None and initial > final:
            raise ConfigError(
                f"targets.initial_sparsity must be at most the final sparsity of {key!r} "
                f"({final:g}), got {initial:g}"
            )
        if not 0 <= start < end:
            raise ConfigError(
                f"targets: 0 <= start_epoch < end_epoch must hold, got {start:g} and {end:g}"
            )
        first = min(self.initial_sparsity if initial is None else initial, final)
        return Ramp(first, final, start, end, frequency, 3 if self.shape == "cubic" else 1)

    def _training(self, problem: Problem, span: float, period: int) -> Training:
        seed = problem.seed + 1000 * period
        if self.unit == "step":
            return Training(0.0, self.lr, seed, steps=round(span))
        return Training(span, self.lr, seed)


@dataclass(frozen=True)
class Ramp:
    """How the sparsity of one layer rises.

    Attributes:
        initial: Sparsity at `start`.
        final: Sparsity from `end` on.
        start: Time of the first pruning.
        end: Time of the last.
        frequency: Time between.
        power: 3 in the paper; 1: linear.
    """

    initial: float
    final: float
    start: float
    end: float
    frequency: float
    power: int

    def times(self) -> list[float]:
        """When the layer is pruned, ascending; the last is `end`."""
        number = math.ceil((self.end - self.start) / self.frequency - 1e-9)
        return [*(self.start + i * self.frequency for i in range(number)), self.end]

    def sparsity(self, time: float) -> float:
        """Sparsity after the last pruning at or before a time; 0 before the first."""
        past = [t for t in self.times() if t <= time]
        if not past:
            return 0.0
        left = 1 - min((past[-1] - self.start) / (self.end - self.start), 1.0)
        return self.final + (self.initial - self.final) * left**self.power
