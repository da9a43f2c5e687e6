"""The digits, with evaluations that take their time."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from jobs.tasks.digits import Digits


class SlowTask(Digits):
    """Each forward pass sleeps."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """20 ms for each batch."""
        time.sleep(0.02)
        return super().forward(model, batch)
