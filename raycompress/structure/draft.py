"""A structure in the making: what the labels say, before it is known to run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycompress.structure.model import ChannelGroup, Structure
from raycompress.structure.trace import SizeSeen, Trace

__all__ = ["Draft", "freeze", "line_of"]


@dataclass(frozen=True)
class Draft:
    """A structure, and which of its sizes each size seen in the trace is."""

    structure: Structure
    forms: list[int]

    def slope(self, seen: int) -> NDArray[np.int64]:
        """How a size seen changes with the channels of each group, shape (groups,)."""
        slope: NDArray[np.int64] = self.structure.sizes.slope[self.forms[seen]]
        return slope

    def changes(self, seen: int) -> bool:
        """Whether a size seen follows any group."""
        return bool(self.slope(seen).any())

    def groups(self, seen: Collection[int]) -> tuple[str, ...]:
        """Names of the groups that these sizes follow."""
        found = {int(g) for i in seen for g in np.flatnonzero(self.slope(i))}
        return tuple(self.structure.groups[g].name for g in sorted(found))


def freeze(seen: Trace, group: ChannelGroup, reason: str) -> None:
    """Nothing of the group may be removed."""
    leaves = {leaf.name: leaf for leaf in seen.leaves}
    for m in group.members:
        ids = leaves[m.parameter].starts[m.dim] + m.indices.ravel()
        seen.space.freeze(torch.from_numpy(ids), reason)


def line_of(size: SizeSeen) -> Tensor | None:
    """Labels along the dim of a size, shape (value,); None where it only counts groups of them."""
    for facet in size.facets:
        if facet.shape[size.dim] == size.value:
            for d in range(facet.dim()):
                if d != size.dim:
                    facet = facet.narrow(d, 0, 1)
            return facet.reshape(-1)
    return None
