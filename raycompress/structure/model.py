"""Plain data: what the analysis of a model found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.cost import Cost, CostModel, LayerCost

if TYPE_CHECKING:
    from raycompress.structure.completion import Completion
    from raycompress.structure.graph.plan import GraphPlan

__all__ = [
    "AnyMasks",
    "AttributeFix",
    "ChannelGroup",
    "Frozen",
    "Kept",
    "LeafShape",
    "Member",
    "Structure",
]

Role = Literal["producer", "norm", "consumer", "elementwise"]
Kept = Mapping[str, Sequence[int] | NDArray[np.int64] | Tensor]
# "layer.weight" -> mask, or, as NNI has it, "layer" -> {"weight": mask}.
AnyMasks = Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Member:
    """Removing channel c removes `indices[c]` along `dim` of a parameter or buffer.

    Attributes:
        parameter: its (first) name in the model.
        dim: the dim.
        indices: shape (num_channels, multiplicity).
        role: what the parameter does with the channels.
    """

    parameter: str
    dim: int
    indices: NDArray[np.int64] = field(repr=False)
    role: Role


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """A pool of interchangeable channels; each channel is removed from all members at once.

    Attributes:
        name: of the first module that produces these channels; unique.
        num_channels: how many there are, each a class of indices.
        members: everything that a channel removes.
        producers: names of the modules that produce the channels.
        types: class names of the producers.
        exact: whether the slim model computes the same as the masked one.
        reason: the operation across channels that makes it differ, "" if exact.
        min_kept: fewest channels that may be kept.
        multiple: kept counts must be a multiple of this, or all.
    """

    name: str
    num_channels: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    types: tuple[str, ...]
    exact: bool = True
    reason: str = ""
    min_kept: int = 1
    multiple: int = 1

    def round_up(self, count: int) -> int:
        """The smallest count that may be kept and is at least `count`."""
        wanted = max(count, self.min_kept, 1)
        return min(-(-wanted // self.multiple) * self.multiple, self.num_channels)


@dataclass(frozen=True)
class Frozen:
    """A dim of a parameter of which some or all indices can't be removed."""

    parameter: str
    dim: int
    reason: str


@dataclass(frozen=True)
class LeafShape:
    """Shape of a parameter or buffer, and its other names where it is tied."""

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    is_parameter: bool


@dataclass(frozen=True)
class AttributeFix:
    """An integer attribute of a module that follows a size (index into the cost model's sizes).

    `position` is the entry's place where the attribute is a tuple or list.
    """

    module: str
    attribute: str
    size: int
    position: int | None = None

    def apply(self, module: nn.Module, value: int) -> None:
        """Sets it."""
        if self.position is None:
            setattr(module, self.attribute, value)
            return
        old = getattr(module, self.attribute)
        new = [*old]
        new[self.position] = value
        setattr(module, self.attribute, type(old)(new))


@dataclass(frozen=True)
class QueryRows:
    """Rows of a parameter that make the queries of attention whose scale follows their width.

    Attributes:
        parameter: its first name.
        dim: along which the rows lie.
        rows: dense indices, for each head those of its positions.
    """

    parameter: str
    dim: int
    rows: tuple[tuple[int, ...], ...]

    def factors(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What queries of narrower heads must be multiplied with, for each dense index."""
        index = np.array(self.rows)
        widths = kept[index].sum(axis=1)
        width = int(widths.max())
        assert set(widths.tolist()) <= {0, width}, "heads of different widths"
        factors = np.ones(len(kept))
        factors[index] = (width / index.shape[1]) ** 0.5
        return factors

    def times(self, tensor: Tensor, factor: float) -> Tensor:
        """The parameter with these rows multiplied."""
        result = tensor.clone()
        index = torch.tensor(self.rows, device=tensor.device).flatten()
        return result.index_copy_(self.dim, index, result.index_select(self.dim, index) * factor)


@dataclass(frozen=True, eq=False)
class Structure:
    """Channel groups and cost of one model. Picklable; holds no tensor or module of it.

    Attributes:
        groups: what can be removed.
        frozen: what can't, and why.
        unknown_ops: operators without a rule, with the module that first called each.
        untouched: parameters that the traced pass never read.
        leaves: every parameter and buffer, by its first name.
        module_types: class name of each module.
        fixes: attributes to correct in a slim model.
        sizes: cost terms and layer sizes as functions of the kept counts.
        plan: the exported graph and what changes in it, for graph form; None for module form.
        query_rows: what makes queries for attention whose scale follows the width of a head.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    unknown_ops: dict[str, str]
    untouched: tuple[str, ...]
    leaves: dict[str, LeafShape]
    module_types: dict[str, str]
    fixes: tuple[AttributeFix, ...]
    sizes: CostModel
    plan: GraphPlan | None = None
    query_rows: tuple[QueryRows, ...] = ()

    def __repr__(self) -> str:
        """In a line; `raycompress.structure.tables` prints the rest."""
        cost = self.cost()
        return (
            f"Structure({self.form} form, {len(self.groups)} channel groups, "
            f"{cost.params:,} parameters, {cost.macs:,} MACs)"
        )

    @property
    def form(self) -> Literal["module", "graph"]:
        """What `slim` makes: the user's class, or the exported graph."""
        return "module" if self.plan is None else "graph"

    def group(self, name: str) -> ChannelGroup:
        """The group of that name, or the one that a module of that name produces."""
        for g in self.groups:
            if g.name == name:
                return g
        produced = [g for g in self.groups if name in g.producers]
        if len(produced) == 1:
            return produced[0]
        raise StructureError(f"no channel group {name!r}{self._instead(name, produced)}")

    def _instead(self, name: str, produced: list[ChannelGroup]) -> str:
        if produced:
            return f"; {name!r} produces the channels of {', '.join(g.name for g in produced)}"
        for f in self.frozen:
            if f.parameter.rpartition(".")[0] == name and f.dim == 0:
                return f": the outputs of {name!r} can't be pruned ({f.reason})"
        names = [g.name for g in self.groups]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"; groups are {', '.join(names[:8])}{more}" if names else "; there are none"

    def limited(self, *, round_to: int = 1, min_kept: int = 1) -> Structure:
        """The same structure with limits on what may be kept of each group.

        Args:
            round_to: the kept channels of a group give each layer that produces them a multiple
                of so many outputs. A channel that is a whole head of 64 gives 64 at once.
            min_kept: fewest kept channels, counted as `num_channels` counts. A group that can't
                meet the limits stays whole.

        Raises:
            StructureError: a limit is below 1.
        """
        for key, value in (("round_to", round_to), ("min_kept", min_kept)):
            if value < 1:
                raise StructureError(f"{key} must be at least 1, got {value}")
        groups = []
        for g in self.groups:
            steps = {m.indices.shape[1] for m in g.members if m.role == "producer"}
            multiple = math.lcm(*(round_to // math.gcd(round_to, s) for s in steps))
            limited = replace(g, multiple=multiple, min_kept=min(min_kept, g.num_channels))
            groups.append(replace(limited, min_kept=limited.round_up(min_kept)))
        return replace(self, groups=tuple(groups))

    def cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        """Cost with `kept[group]` channels of each group; groups left out stay whole."""
        return self.sizes.cost(self.counts(kept))

    def cost_table(self, kept: Mapping[str, int] | None = None) -> list[LayerCost]:
        """Parameters and MACs of each layer, in order of their first call."""
        return self.sizes.table(self.counts(kept), self.module_types)

    def counts(self, kept: Mapping[str, int] | None = None) -> NDArray[np.int64]:
        """Kept counts of all groups in order, shape (groups,)."""
        counts = self.sizes.full.copy()
        if kept:
            for name, count in kept.items():
                at = self.sizes.index.get(name)
                if at is None:
                    raise StructureError(f"no channel group {name!r}{self._instead(name, [])}")
                if not 0 <= count <= self.sizes.full[at]:
                    raise StructureError(
                        f"group {name!r} has {self.sizes.full[at]} channels, asked for {count}"
                    )
                counts[at] = count
        return counts

    def indices(self, kept: Kept) -> dict[str, NDArray[np.int64]]:
        """Kept indices as sorted arrays, checked.

        Raises:
            StructureError: unknown group, index out of range, twice, or too few.
        """
        result = {}
        for name, value in kept.items():
            group = self.group(name)
            if group.name in result:
                raise StructureError(f"group {group.name!r} is given twice, also as {name!r}")
            given = np.asarray(value)
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise StructureError(
                    f"group {name!r}: kept channels are a list of indices, got {given.dtype} of "
                    f"shape {given.shape}"
                )
            raw = given.astype(np.int64)
            unique = np.unique(raw)
            n = group.num_channels
            if len(unique) != len(raw):
                raise StructureError(f"group {name!r}: a channel index is given twice")
            if len(unique) and (unique[0] < 0 or unique[-1] >= n):
                raise StructureError(f"group {name!r} has channels 0..{n - 1}, got {unique[-1]}")
            if len(unique) < group.min_kept or len(unique) != group.round_up(len(unique)):
                raise StructureError(_not_allowed(group, len(unique)))
            result[group.name] = unique
        return result

    def keep_vectors(self, kept: Kept) -> dict[tuple[str, int], NDArray[np.bool_]]:
        """For each (parameter, dim) that loses something: which indices stay, shape (size,)."""
        vectors: dict[tuple[str, int], NDArray[np.bool_]] = {}
        for name, indices in self.indices(kept).items():
            group = self.group(name)
            gone = np.ones(group.num_channels, dtype=np.bool_)
            gone[indices] = False
            if not gone.any():
                continue
            for m in group.members:
                key = (m.parameter, m.dim)
                if key not in vectors:
                    size = self.leaves[m.parameter].shape[m.dim]
                    vectors[key] = np.ones(size, dtype=np.bool_)
                vectors[key][m.indices[gone].ravel()] = False
        return vectors

    def masks(self, kept: Kept) -> dict[str, Tensor]:
        """Complete masks: parameter name -> bool tensor of its shape, True = keep."""
        masks: dict[str, Tensor] = {}
        for (name, dim), vector in self.keep_vectors(kept).items():
            leaf = self.leaves[name]
            if not leaf.is_parameter:
                continue
            mask = masks.setdefault(name, torch.ones(leaf.shape, dtype=torch.bool))
            shape = [1] * len(leaf.shape)
            shape[dim] = -1
            mask &= torch.from_numpy(vector).reshape(shape)
        return masks

    def kept(self, masks: AnyMasks) -> dict[str, Tensor]:
        """Kept channel indices of each group that loses some; the inverse of `masks`.

        Args:
            masks: by parameter name, or by module and then parameter; nonzero = keep.

        Raises:
            StructureError: unknown names, wrong shapes, masks that don't cover whole channels
                (see `complete`), or a layer that would be empty.
        """
        from raycompress.structure.completion import kept_from_masks

        return kept_from_masks(self, masks)

    def complete(
        self,
        masks: AnyMasks,
        *,
        rule: Literal["intersection", "union"] = "intersection",
    ) -> Completion:
        """Completes masks of single layers to whole groups; see `completion.complete`."""
        from raycompress.structure.completion import complete

        return complete(self, masks, rule=rule)

    def names(self) -> Iterable[str]:
        """Names of all groups, in order."""
        return (g.name for g in self.groups)


def _not_allowed(group: ChannelGroup, asked: int) -> str:
    n, step = group.num_channels, group.multiple
    if group.min_kept == n:
        allowed = f"all {n} channels"
    elif step == 1:
        allowed = f"{group.min_kept} to {n} channels"
    else:
        allowed = f"a multiple of {step} channels from {group.min_kept} on, or all {n}"
    empty = "; a layer would be empty" if asked == 0 else ""
    return f"group {group.name!r} can keep {allowed}, asked for {asked}{empty}"
