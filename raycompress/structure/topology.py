"""Which layers belong together, in which steps they shrink, what masks contradict, what it costs.

Each tool is a function from a `Structure` to a list of plain rows; `tables` prints and exports
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raycompress.structure.cost import LayerCost
from raycompress.structure.model import AnyMasks, ChannelGroup, Structure

__all__ = [
    "ChannelDependency",
    "FrozenDims",
    "LayerRow",
    "MaskConflict",
    "StepDependency",
    "channel_dependencies",
    "frozen_dims",
    "layer_rows",
    "mask_conflicts",
    "step_dependencies",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ChannelDependency:
    """Layers whose outputs are pruned together: one row for each channel group.

    Attributes:
        group: its name.
        layers: the layers that produce the channels.
        readers: the layers whose inputs shrink with them.
        channels: how many there are.
        params: parameters that removing one of them removes, everything else left whole.
        exact: whether the slim model computes the same as the masked one.
        reason: the operation across channels that makes it differ, "" if exact.
    """

    group: str
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    params: int
    exact: bool
    reason: str


def channel_dependencies(structure: Structure) -> list[ChannelDependency]:
    """The channel dependency sets, in the order in which the model runs."""
    whole = structure.cost().params
    rows = []
    for group in structure.groups:
        readers = [
            _layer(m.parameter) for m in group.members if m.role == "consumer"
        ]  # a layer that reads its own outputs, as a shared one does, is both
        less = structure.cost({group.name: group.num_channels - 1}).params
        rows.append(
            ChannelDependency(
                group=group.name,
                layers=group.producers,
                readers=tuple(dict.fromkeys(readers)),
                channels=group.num_channels,
                params=whole - less,
                exact=group.exact,
                reason=group.reason,
            )
        )
    return rows


@dataclass(frozen=True)
class StepDependency:
    """In which steps the outputs of a layer can shrink (NNI: group dependency).

    Attributes:
        layer: its name.
        group: the channel group; a layer whose outputs belong to several has a row for each.
        outputs: how many of the layer's outputs belong to the group.
        channels: channels of the group.
        step: outputs that one channel takes: the heads' dim, or one from each group of a grouped
            convolution that reads them.
        multiple: the outputs that are kept are a multiple of this, or all.
        min_kept: fewest outputs that can be kept.
    """

    layer: str
    group: str
    outputs: int
    channels: int
    step: int
    multiple: int
    min_kept: int


def step_dependencies(structure: Structure) -> list[StepDependency]:
    """For each layer that can be pruned, the steps in which it can."""
    rows: dict[tuple[str, str], StepDependency] = {}
    for group in structure.groups:
        for m in group.members:
            if m.role != "producer":
                continue
            step = m.indices.shape[1]
            layer = _layer(m.parameter)
            row = StepDependency(
                layer=layer,
                group=group.name,
                outputs=m.indices.size,
                channels=group.num_channels,
                step=step,
                multiple=step * group.multiple,
                min_kept=step * group.min_kept,
            )
            known = rows.get((layer, group.name))
            if known is None or known.outputs < row.outputs:
                rows[layer, group.name] = row
    return list(rows.values())


@dataclass(frozen=True)
class FrozenDims:
    """Everything that can't be pruned for one reason.

    Attributes:
        reason: why.
        parameters: names, with the dim in brackets.
    """

    reason: str
    parameters: tuple[str, ...]


def frozen_dims(structure: Structure) -> list[FrozenDims]:
    """What can't be pruned, by reason."""
    found: dict[str, list[str]] = {}
    for f in structure.frozen:
        found.setdefault(f.reason, []).append(f"{f.parameter}[{f.dim}]")
    return [FrozenDims(reason, tuple(names)) for reason, names in found.items()]


@dataclass(frozen=True)
class MaskConflict:
    """A layer whose mask doesn't get what it asks for, or loses more than it asks for.

    Attributes:
        group: the channel group, "" where the mask is of no use at all.
        layer: the layer, or the parameter where the mask is of no use.
        against: layers of the same group that ask for other channels.
        restored: channels that its mask removes and that stay.
        also_removed: channels that its mask keeps and that go.
        reason: why.
    """

    group: str
    layer: str
    against: tuple[str, ...]
    restored: Shape
    also_removed: Shape
    reason: str


def mask_conflicts(
    structure: Structure,
    masks: AnyMasks,
    *,
    rule: Literal["intersection", "union"] = "intersection",
) -> list[MaskConflict]:
    """What masks of single layers contradict, and what completing them by the rule changes.

    Raises:
        StructureError: as `completion.complete`.
    """
    done = structure.complete(masks, rule=rule)
    rows = []
    for change in done.changes:
        removed = set(change.removed)
        for layer, asked in change.asked.items():
            if set(asked) == removed:
                continue
            rows.append(
                MaskConflict(
                    group=change.group,
                    layer=layer,
                    against=tuple(k for k, v in change.asked.items() if v != asked),
                    restored=tuple(c for c in asked if c not in removed),
                    also_removed=tuple(c for c in change.removed if c not in asked),
                    reason=change.note,
                )
            )
    rows += [MaskConflict("", n, (), (), (), reason) for n, reason in done.dropped.items()]
    return rows


@dataclass(frozen=True)
class LayerRow:
    """One layer of the counter's table, dense and with the kept counts; conventions as in `cost`.

    A layer's numbers are its own, without those of the modules in it; the last row is their sum.

    Attributes:
        layer: module name, "(model)" for what the model itself holds and computes.
        type: class name.
        weight: shape of its weight, () if it has none.
        output: shape of its first output, with the batch size of the example; () if none.
        params: parameters, tied ones at their first name.
        macs: multiply-adds for one example.
        flops: 2 * macs.
        activation_bytes: bytes written for one example.
        kept_weight: as `weight`, with the kept counts; so for all that follow.
        kept_output: as `output`.
        kept_params: as `params`.
        kept_macs: as `macs`.
        kept_flops: as `flops`.
        kept_activation_bytes: as `activation_bytes`.
    """

    layer: str
    type: str
    weight: Shape
    output: Shape
    params: int
    macs: int
    flops: int
    activation_bytes: int
    kept_weight: Shape
    kept_output: Shape
    kept_params: int
    kept_macs: int
    kept_flops: int
    kept_activation_bytes: int


def layer_rows(structure: Structure, kept: Mapping[str, int] | None = None) -> list[LayerRow]:
    """Parameters, MACs, FLOPs and activations of each layer, in order of the first call.

    Args:
        structure: of the dense model.
        kept: group name -> kept count; groups left out stay whole.

    Raises:
        StructureError: an unknown group, or a count that it doesn't have.
    """
    dense, small = structure.cost_table(), structure.cost_table(kept)
    lost = _lost(structure, kept or {})
    rows = []
    for a, b in zip(dense, small, strict=True):
        leaf = structure.leaves.get(f"{a.name}.weight" if a.name else "weight")
        shape = leaf.shape if leaf is not None else ()
        name = leaf.name if leaf is not None else ""
        less = tuple(size - lost.get((name, d), 0) for d, size in enumerate(shape))
        rows.append(_layer_row(a.name or "(model)", a.type, shape, less, a, b))
    whole, rest = structure.cost(), structure.cost(kept)
    # The totals come from the cost model, not from the rows: those are rounded one by one.
    total = LayerCost("", "", *whole, ())
    rows.append(_layer_row("total", "", (), (), total, LayerCost("", "", *rest, ())))
    return rows


def _layer_row(
    name: str, type_: str, weight: Shape, kept: Shape, a: LayerCost, b: LayerCost
) -> LayerRow:
    return LayerRow(
        layer=name,
        type=type_,
        weight=weight,
        output=a.output,
        params=a.params,
        macs=a.macs,
        flops=2 * a.macs,
        activation_bytes=a.activation_bytes,
        kept_weight=kept,
        kept_output=b.output,
        kept_params=b.params,
        kept_macs=b.macs,
        kept_flops=2 * b.macs,
        kept_activation_bytes=b.activation_bytes,
    )


def _lost(structure: Structure, kept: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """How much each (parameter, dim) shrinks."""
    lost: dict[tuple[str, int], int] = {}
    for name, count in kept.items():
        group: ChannelGroup = structure.group(name)
        for m in group.members:
            less = (group.num_channels - count) * m.indices.shape[1]
            lost[m.parameter, m.dim] = lost.get((m.parameter, m.dim), 0) + less
    return lost


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter
