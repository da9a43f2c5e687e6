"""Automated gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_sparsity, plan_units
from raycompress.search import Candidate, Search, Training

__all__ = ["AGP"]


@dataclass(frozen=True, kw_only=True)
class AGP(Pruner):
    """Raises the sparsity while the model trains, fast at first and slowly at the end.

    At time t between `start` and `end` the sparsity is (equation 1 of the paper)
    s_t = s_f + (s_i - s_f) * (1 - (t - start) / (end - start)) ** 3; it is raised every
    `frequency`, and a last time at `end`, so that s_f is reached exactly whether or not
    `frequency` divides the span. Afterwards the mask is frozen and training goes on to `epochs`.

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

    def __post_init__(self) -> None:
        criterion(self.criterion, "AGP.criterion")
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

    def times(self) -> list[float]:
        """When the model is pruned, ascending; the last is `end`."""
        number = math.ceil((self.end - self.start) / self.frequency - 1e-9)
        return [*(self.start + i * self.frequency for i in range(number)), self.end]

    def progress(self, time: float) -> float:
        """How far the sparsity has risen from initial to final at a time, in [0, 1]."""
        left = 1 - min(max((time - self.start) / (self.end - self.start), 0.0), 1.0)
        return 1 - (left**3 if self.shape == "cubic" else left)

    def search(self, problem: Problem) -> Search:
        """Yields one candidate for each period of training, which goes on from the last."""
        ranks = criterion(self.criterion, "AGP.criterion")
        units = plan_units(problem, ranks, "AGP", self.final_sparsity, self.round_to, self.min_kept)
        weights = problem.weights
        if self.start > 0:
            trial = (yield [Candidate(weights, training=self._training(problem, self.start, 0))])[0]
            weights = trial.trained()
        times = self.times()
        last = self.total if self.total is not None else self.end + self.frequency
        winner = Candidate(weights)
        for period, (time, until) in enumerate(zip(times, [*times[1:], last], strict=True), 1):
            ranking = yield from problem.rank(ranks, units.names, weights)
            counts = units.between(self.initial_sparsity, self.progress(time))
            training = self._training(problem, until - time, period)
            asked = problem.candidate(counts, ranking, weights=weights, training=training)
            trial = (yield [asked])[0]
            weights = trial.trained()
            winner = replace(asked, weights=weights, training=None)
        return winner

    def _training(self, problem: Problem, span: float, period: int) -> Training:
        seed = problem.seed + 1000 * period
        if self.unit == "step":
            return Training(0.0, self.lr, seed, steps=round(span))
        return Training(span, self.lr, seed)
