"""Random scores: the control that every criterion must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from raycompress.criteria.criterion import Criterion, Statistics
from raycompress.structure import ChannelGroup

__all__ = ["Random"]


@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Uniform draws, the same for a group whatever else is ranked.

    Attributes:
        seed: Of the draws.
    """

    seed: int = 0

    normalised: ClassVar[bool] = False

    def group_scores(
        self, model: nn.Module, group: ChannelGroup, statistics: Statistics
    ) -> list[Tensor]:
        """One draw for each channel."""
        digest = hashlib.sha256(f"{self.seed}:{group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return [torch.rand(group.num_channels, generator=generator, dtype=torch.float64)]
