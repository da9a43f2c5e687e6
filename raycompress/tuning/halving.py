"""Asynchronous successive halving (ASHA, Li et al. 2020, arXiv 1810.05934)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from raycompress.errors import ConfigError

__all__ = ["Halving"]


@dataclass
class Halving:
    """Stops trials that are behind at a rung.

    Rungs stand after `grace`, `grace * factor`, `grace * factor^2`, ... steps. A trial that comes
    to one goes on if it is among the best ceil(n / factor) of the n that came there so far, itself
    included, and stops otherwise. Ties go on.

    Deviation from the paper, as in Ray Tune: nobody waits at a rung to be promoted. So the first to
    come always goes on, and what stops depends on the order of coming.

    Attributes:
        grace: Steps before any trial is stopped, at least 1.
        factor: At least 2.
    """

    grace: int
    factor: int
    _losses: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise ConfigError(f"grace must be at least 1, got {self.grace}")
        if self.factor < 2:
            raise ConfigError(f"factor must be at least 2, got {self.factor}")

    def stops(self, group: str, trial: str, steps: int, loss: float) -> bool:
        """Whether a trial is to stop.

        Args:
            group: Trials are compared within it alone, such as those of one budget.
            trial: Its name.
            steps: That it has done; called after each.
            loss: Its lowest so far; infinite: it has nothing yet to be judged by, and goes on.
        """
        if not math.isfinite(loss) or not self._is_rung(steps):
            return False
        rung = self._losses.setdefault((group, steps), {})
        rung[trial] = loss
        better = sum(other < loss for other in rung.values())
        return better >= math.ceil(len(rung) / self.factor)

    def _is_rung(self, steps: int) -> bool:
        rung = self.grace
        while rung < steps:
            rung *= self.factor
        return rung == steps
