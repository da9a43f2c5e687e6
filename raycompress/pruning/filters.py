"""One-shot pruners by what activations and gradients on data tell of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raycompress.criteria import APoZ, Criterion, MeanActivation, Taylor
from raycompress.errors import ConfigError
from raycompress.pruning.one_shot import ChannelPruner

__all__ = ["ActivationAPoZRank", "ActivationMeanRank", "TaylorFO"]


def _not_negative(pruner: ChannelPruner, *keys: str) -> None:
    for key in keys:
        value = getattr(pruner, key)
        if value < 0:
            name = type(pruner).__name__
            raise ConfigError(f"{name}.{key} must be at least 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class ActivationAPoZRank(ChannelPruner):
    """Removes the channels that are inactive most often (APoZ, arXiv 1607.03250).

    Measured on the calibration split, on the activations that the network has after its norms
    and activation functions.

    Deviation from the paper, which removes what is a standard deviation above the layer's mean,
    in rounds with training: the sparsity decides, once.

    Attributes:
        batches: Calibration batches that are looked at; 0: all.
    """

    batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "batches")

    def scorer(self) -> Criterion:
        """Share of positions where a channel is active."""
        return APoZ(batches=self.batches)


@dataclass(frozen=True, kw_only=True)
class ActivationMeanRank(ChannelPruner):
    """Removes the channels with the smallest mean activation (arXiv 1611.06440, section 2.2).

    Measured on the calibration split, on the activations that the network has after its norms
    and activation functions.

    Deviation from the paper, which removes one channel at a time between updates: one-shot.

    Attributes:
        batches: Calibration batches that are looked at; 0: all.
    """

    batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "batches")

    def scorer(self) -> Criterion:
        """Mean absolute activation."""
        return MeanActivation(batches=self.batches)


@dataclass(frozen=True, kw_only=True)
class TaylorFO(ChannelPruner):
    """Removes the channels whose removal changes the loss least, to first order (arXiv 1906.10771).

    Deviation from the paper, which removes a few channels at a time while it trains, from all
    layers: one-shot; `scope: global` lets all layers' channels compete.

    Attributes:
        form: "gate": the square of the gradient of a gate on the channel; "weight": the sum of
            squares of each weight times its gradient.
        batch_size: Examples in a mini-batch, whose gradients are squared; 0: the task's.
        batches: Mini-batches of the calibration split that are looked at; 0: all.
    """

    form: Literal["gate", "weight"] = "gate"
    batch_size: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("gate", "weight"):
            raise ConfigError(f"TaylorFO.form must be 'gate' or 'weight', got {self.form!r}")
        _not_negative(self, "batch_size", "batches")

    def scorer(self) -> Criterion:
        """Squared first-order change of the loss."""
        return Taylor(form=self.form, batch_size=self.batch_size, batches=self.batches)
