"""Tasks on which some candidates, or all, can't be judged or trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raycompress.testing import ToyTask


class FailingTask(ToyTask):
    """Fails on models whose first convolution has lost too much.

    Args:
        how: "raise": an exception in `score`; "nan score", "nan loss": what it says;
            "out of memory": what torch raises then; "nan training": the loss of training.
        below: Fails with fewer channels (of 8) than this.
    """

    def __init__(self, how: str, below: int) -> None:
        super().__init__()
        self.how, self.below, self.fails = how, below, False

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Notices what it is given."""
        self.fails = model.conv1.out_channels < self.below  # type: ignore[union-attr]
        if self.fails and self.how == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(model, batch)

    def score(self, outputs: Any, batch: Any) -> Tensor:
        """Of each example."""
        if self.fails and self.how == "raise":
            raise ValueError("no score for such a small model")
        scores = super().score(outputs, batch)
        return scores * float("nan") if self.fails and self.how == "nan score" else scores

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Of a batch."""
        loss = super().loss(outputs, batch)
        bad = {"nan loss": True, "nan training": outputs.requires_grad}.get(self.how, False)
        return loss * float("nan") if self.fails and bad else loss


class NaNMetric(ToyTask):
    """Its metric is no mean over examples, and NaN for what is pruned."""

    def evaluate(self, model: nn.Module, split: str) -> float:
        """A number for the whole split."""
        pruned = model.conv1.out_channels < 8  # type: ignore[union-attr]
        return float("nan") if pruned else 0.5


class OwnLoop(ToyTask):
    """A training loop of the user's, which diverges and doesn't look."""

    def train(self, model: nn.Module, **settings: Any) -> None:
        """Leaves NaN behind."""
        with torch.no_grad():
            model.conv3.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
