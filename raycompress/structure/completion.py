"""Masks that other tools made: reading whole channels from them, or completing them first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycompress.errors import StructureError
from raycompress.structure.model import ChannelGroup, Member, Structure

__all__ = ["Change", "Completion", "complete", "kept_from_masks"]


@dataclass(frozen=True)
class Change:
    """What completing did to a group: channels each layer wanted to lose, and channels lost."""

    group: str
    asked: dict[str, int]
    removed: int
    note: str


@dataclass(frozen=True, eq=False)
class Completion:
    """Complete masks, the kept indices that they mean, and what was changed.

    Attributes:
        masks: parameter name -> bool tensor, True = keep.
        kept: group name -> kept channel indices.
        changes: groups whose masks had to change.
        dropped: parameters whose masks could not be used at all, with the reason.
    """

    masks: dict[str, Tensor]
    kept: dict[str, Tensor]
    changes: tuple[Change, ...]
    dropped: dict[str, str]


def checked(structure: Structure, masks: Mapping[str, Tensor]) -> dict[str, NDArray[np.bool_]]:
    """Masks by first name, as arrays.

    Raises:
        StructureError: unknown names or wrong shapes.
    """
    first = {a: leaf.name for leaf in structure.leaves.values() for a in leaf.aliases}
    result: dict[str, NDArray[np.bool_]] = {}
    for name, mask in masks.items():
        leaf = structure.leaves.get(first.get(name, name))
        if leaf is None or not leaf.is_parameter:
            raise StructureError(f"mask for {name!r}: the model has no such parameter")
        if tuple(mask.shape) != leaf.shape:
            raise StructureError(
                f"mask for {name!r} has shape {tuple(mask.shape)}, the parameter {leaf.shape}"
            )
        values = mask.detach().cpu().bool().numpy()
        before = result.get(leaf.name)
        result[leaf.name] = values if before is None else np.logical_and(before, values)
    return result


def lines_gone(mask: NDArray[np.bool_], dim: int) -> NDArray[np.bool_]:
    """Which indices along dim are masked altogether, shape (size,)."""
    others = tuple(d for d in range(mask.ndim) if d != dim)
    return np.asarray(np.logical_not(np.any(mask, axis=others)), dtype=np.bool_)


def _by_member(member: Member, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Channels all of whose indices are gone, shape (num_channels,)."""
    return np.asarray(np.all(gone[member.indices], axis=1), dtype=np.bool_)


def kept_from_masks(structure: Structure, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kept indices of each group that complete masks describe."""
    given = checked(structure, masks)
    kept: dict[str, Tensor] = {}
    for name, mask in given.items():
        if not mask.any():
            raise StructureError(f"mask for {name!r} removes everything: the layer would be empty")
    for group in structure.groups:
        gone = np.zeros(group.num_channels, dtype=np.bool_)
        for m in group.members:
            if m.parameter in given and m.role != "consumer":
                gone |= _by_member(m, lines_gone(given[m.parameter], m.dim))
        if gone.any():
            kept[group.name] = torch.from_numpy(np.flatnonzero(~gone))
    expected = structure.masks(kept)
    for name, mask in given.items():
        want = expected.get(name)
        full = np.ones(mask.shape, dtype=np.bool_) if want is None else want.numpy()
        if not np.array_equal(mask, full):
            raise StructureError(_difference(structure, name, mask, full))
    missing = sorted(set(expected) - set(given))
    if missing:
        raise StructureError(
            f"masks are incomplete: {missing[0]!r} loses channels with the others but has no "
            f"mask ({len(missing)} such parameters); structure.complete(masks) adds them"
        )
    return kept


def _difference(
    structure: Structure, name: str, mask: NDArray[np.bool_], want: NDArray[np.bool_]
) -> str:
    frozen = [f for f in structure.frozen if f.parameter == name]
    for f in frozen:
        if lines_gone(mask, f.dim).any() and not lines_gone(want, f.dim).any():
            return f"mask for {name!r} removes along dim {f.dim}, which is frozen: {f.reason}"
    if (mask & ~want).any():
        return (
            f"masks are incomplete: {name!r} keeps entries of channels that other masks remove; "
            "structure.complete(masks) completes them"
        )
    return (
        f"mask for {name!r} removes single entries or channels that the rest of the group keeps; "
        "only whole channels can be slimmed (structure.complete(masks) completes single layers)"
    )


def complete(
    structure: Structure,
    masks: Mapping[str, Tensor],
    *,
    rule: Literal["intersection", "union"] = "intersection",
) -> Completion:
    """Completes masks of single layers to whole groups.

    A producing layer asks to lose the channels whose output rows its masks (weight or bias)
    remove entirely. "intersection", NNI's rule: a channel goes if every producing layer of its
    group asks for it, so a layer that was left alone keeps the group whole. "union": it goes if
    any asks. Fine-grained masks ask for nothing. A group never loses its last channels.

    Args:
        structure: of the dense model.
        masks: parameter name -> bool tensor of its shape, True = keep.
        rule: how the layers of one group agree.
    """
    given = checked(structure, masks)
    kept: dict[str, Tensor] = {}
    changes: list[Change] = []
    used: set[str] = set()
    for group in structure.groups:
        asked = _asked(group, given, used)
        if not any(a.any() for a in asked.values()):
            continue
        votes = np.stack(list(asked.values()))
        agreed = np.all(votes, axis=0) if rule == "intersection" else np.any(votes, axis=0)
        gone = np.asarray(agreed, dtype=np.bool_)
        note = "" if (votes == gone).all() else f"layers disagree; {rule} taken"
        if group.num_channels - gone.sum() < group.min_kept:
            spared = np.flatnonzero(gone)[: group.min_kept]
            gone[spared] = False
            note = "the last channels are kept"
        if gone.any():
            kept[group.name] = torch.from_numpy(np.flatnonzero(~gone))
        if note:
            counts = {k: int(v.sum()) for k, v in asked.items()}
            changes.append(Change(group.name, counts, int(gone.sum()), note))
    dropped = {}
    for name, mask in given.items():
        if name not in used and not mask.all():
            dropped[name] = next(
                (f.reason for f in structure.frozen if f.parameter == name),
                "removes no whole output channel",
            )
    return Completion(structure.masks(kept), kept, tuple(changes), dropped)


def _asked(
    group: ChannelGroup, given: Mapping[str, NDArray[np.bool_]], used: set[str]
) -> dict[str, NDArray[np.bool_]]:
    """For each producing layer, the channels that its masks remove."""
    asked: dict[str, NDArray[np.bool_]] = {}
    for m in group.members:
        if m.role != "producer":
            continue
        layer = m.parameter.rpartition(".")[0] or m.parameter
        asked.setdefault(layer, np.zeros(group.num_channels, dtype=np.bool_))
        if m.parameter in given:
            gone = _by_member(m, lines_gone(given[m.parameter], m.dim))
            if gone.any():
                used.add(m.parameter)
            asked[layer] |= gone
    return asked
