"""What is collected of a model over calibration data, on the replica that holds both.

Collection streams: what is kept is sums, never activations, so that memory doesn't grow with the
number of batches, and the result doesn't depend on how the examples were cut into batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycompress.structure import Structure
from raycompress.task import Task

__all__ = ["Collector", "Probe"]


@dataclass(frozen=True)
class Probe:
    """A model with the data to look at it.

    Attributes:
        model: Of dense shapes (removed channels and weights are zero), on `device`, in eval mode.
            Leave it as it was.
        structure: Of the model.
        task: Runs the model on a batch, and has the loss.
        device: Where the model and the batches are.
        batches: Makes a new iterator over the calibration batches.
    """

    model: nn.Module
    structure: Structure
    task: Task
    device: torch.device
    batches: Callable[[], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class Collector(ABC):
    """Base of what can be collected: a frozen dataclass of plain fields, at a module's top level.

    A candidate that holds one is answered with the digest of what was collected.

    Attributes:
        passes: Forward passes over the calibration data that it counts as; a backward pass is two.
    """

    passes: ClassVar[float] = 1.0

    @abstractmethod
    def collect(self, probe: Probe) -> dict[str, Tensor]:
        """Statistics by name; small next to the model's weights."""
