"""Masks that other tools made: reading whole channels from them, or completing them first."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.model import AnyMasks, ChannelGroup, Member, Structure

__all__ = ["Change", "Completion", "complete", "kept_from_masks", "masks_of"]


@dataclass(frozen=True)
class Change:
    """What completing did to a group.

    Attributes:
        group: its name.
        asked: for each producing layer, the channels that its masks remove.
        removed: the channels that go.
        added: parameters of the group that had no mask although channels go: removed with the
            channel are its bias and norm shift too, which the masks kept. Where they aren't zero,
            the completed model computes something else; `fold_constants` mends that.
        note: why the layers didn't get what they asked for, "" if they did.
    """

    group: str
    asked: dict[str, tuple[int, ...]]
    removed: tuple[int, ...]
    added: tuple[str, ...]
    note: str


@dataclass(frozen=True, eq=False)
class Completion:
    """Complete masks, the kept indices that they mean, and what was changed.

    Attributes:
        masks: parameter name -> bool tensor, True = keep.
        kept: group name -> kept channel indices.
        changes: groups whose masks had to change.
        dropped: parameters whose masks remove something that stays and that no layer's `asked`
            tells of, with the reason.
    """

    masks: dict[str, Tensor]
    kept: dict[str, Tensor]
    changes: tuple[Change, ...]
    dropped: dict[str, str]


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that `torch.nn.utils.prune` left in a model, by parameter name, True = keep.

    Read them first, make them permanent with `torch.nn.utils.prune.remove`, then analyse.
    """
    originals = dict(model.named_parameters())
    return {
        name.removesuffix("_mask"): mask.bool()
        for name, mask in model.named_buffers()
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in originals
    }


def checked(structure: Structure, masks: AnyMasks) -> dict[str, NDArray[np.bool_]]:
    """Masks by first name, as arrays.

    Raises:
        StructureError: unknown names or wrong shapes.
    """
    first = {a: leaf.name for leaf in structure.leaves.values() for a in leaf.aliases}
    result: dict[str, NDArray[np.bool_]] = {}
    for name, mask in _flat(masks):
        leaf = structure.leaves.get(first.get(name, name))
        if leaf is None or not leaf.is_parameter:
            raise StructureError(_unknown(structure, name))
        if tuple(mask.shape) != leaf.shape:
            raise StructureError(
                f"mask for {name!r} has shape {tuple(mask.shape)}, the parameter {leaf.shape}"
            )
        values = mask.detach().cpu().bool().numpy()
        before = result.get(leaf.name)
        result[leaf.name] = values if before is None else np.logical_and(before, values)
    return result


def _flat(masks: AnyMasks) -> Iterator[tuple[str, Tensor]]:
    for name, value in masks.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, mask in inner:
            full = f"{name}.{key}" if key and name else name or key
            if isinstance(mask, Tensor):
                yield full, mask
            elif mask is not None or not key:  # NNI writes None where a layer has no bias
                raise StructureError(
                    f"mask for {full!r} must be a tensor, got {type(mask).__name__}"
                )


def _unknown(structure: Structure, name: str) -> str:
    names = [leaf.name for leaf in structure.leaves.values() if leaf.is_parameter]
    if any(n.rpartition(".")[0] == name for n in names):
        return (
            f"mask for {name!r}: the model has no such parameter, {name!r} is a module; "
            f'name {name + ".weight"!r}, or give {{{name!r}: {{"weight": mask}}}}'
        )
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"mask for {name!r}: the model has no such parameter{hint}"


def lines_gone(mask: NDArray[np.bool_], dim: int) -> NDArray[np.bool_]:
    """Which indices along dim are masked altogether, shape (size,)."""
    others = tuple(d for d in range(mask.ndim) if d != dim)
    return np.asarray(np.logical_not(np.any(mask, axis=others)), dtype=np.bool_)


def _by_member(member: Member, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Channels all of whose indices are gone, shape (num_channels,)."""
    return np.asarray(np.all(gone[member.indices], axis=1), dtype=np.bool_)


def kept_from_masks(structure: Structure, masks: AnyMasks) -> dict[str, Tensor]:
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
    masks: AnyMasks,
    *,
    rule: Literal["intersection", "union"] = "intersection",
) -> Completion:
    """Completes masks of single layers to whole groups.

    A producing layer asks to lose the channels whose outputs its masks (weight or bias) remove
    entirely. "intersection", NNI's rule: a channel goes if every producing layer of its group
    asks for it, so a layer that was left alone keeps the group whole. "union": it goes if any
    asks. Fine-grained masks, and masks of inputs or norms alone, ask for nothing. Where the limits
    of the group (`min_kept`, `multiple`) forbid the count, the first of the channels that would
    go stay.

    Args:
        structure: of the dense model.
        masks: by parameter name, or by module and then parameter; nonzero = keep.
        rule: how the layers of one group agree.

    Raises:
        StructureError: unknown names, wrong shapes, an unknown rule.
    """
    if rule not in ("intersection", "union"):
        raise StructureError(f"rule must be 'intersection' or 'union', got {rule!r}")
    given = checked(structure, masks)
    kept: dict[str, Tensor] = {}
    changes: list[Change] = []
    told: dict[str, NDArray[np.bool_]] = {}  # what of each mask stands in `asked`
    for group in structure.groups:
        asked = _asked(group, given, told)
        if not any(a.any() for a in asked.values()):
            continue
        votes = np.stack(list(asked.values()))
        gone = np.all(votes, axis=0) if rule == "intersection" else np.any(votes, axis=0)
        note = "" if (votes == gone).all() else f"layers disagree; {rule} taken"
        left = group.num_channels - int(gone.sum())
        if left != group.round_up(left):
            gone[np.flatnonzero(gone)[: group.round_up(left) - left]] = False
            note = f"{group.round_up(left)} channels must be kept"
        added: tuple[str, ...] = ()
        if gone.any():
            kept[group.name] = torch.from_numpy(np.flatnonzero(~gone))
            own = dict.fromkeys(m.parameter for m in group.members if m.role != "consumer")
            added = tuple(n for n in own if n not in given and structure.leaves[n].is_parameter)
        if note or added:
            channels = {k: tuple(np.flatnonzero(v).tolist()) for k, v in asked.items()}
            removed = tuple(np.flatnonzero(gone).tolist())
            changes.append(Change(group.name, channels, removed, added, note))
    complete_masks = structure.masks(kept)
    dropped = {}
    for name, mask in given.items():
        zeros = np.logical_not(mask)
        if name in complete_masks:
            zeros &= complete_masks[name].numpy()
        if name in told:
            zeros &= ~told[name]
        if zeros.any():
            dropped[name] = _why_dropped(structure, name, mask, int(zeros.sum()), name in told)
    return Completion(complete_masks, kept, tuple(changes), dropped)


def _why_dropped(
    structure: Structure, name: str, mask: NDArray[np.bool_], zeros: int, partly: bool
) -> str:
    for f in structure.frozen:
        if f.parameter == name and lines_gone(mask, f.dim).any():
            return f.reason
    if partly:
        return f"{zeros} zeros outside the channels that it removes whole"
    return "removes no output channel that goes"


def _asked(
    group: ChannelGroup,
    given: Mapping[str, NDArray[np.bool_]],
    told: dict[str, NDArray[np.bool_]],
) -> dict[str, NDArray[np.bool_]]:
    """For each producing layer, the channels that its masks remove; marks their entries as told."""
    asked: dict[str, NDArray[np.bool_]] = {}
    for m in group.members:
        if m.role != "producer":
            continue
        layer = m.parameter.rpartition(".")[0] or m.parameter
        asked.setdefault(layer, np.zeros(group.num_channels, dtype=np.bool_))
        if m.parameter in given:
            mask = given[m.parameter]
            gone = _by_member(m, lines_gone(mask, m.dim))
            if gone.any():
                entries = told.setdefault(m.parameter, np.zeros(mask.shape, dtype=np.bool_))
                np.moveaxis(entries, m.dim, 0)[m.indices[gone].ravel()] = True
            asked[layer] |= gone
    return asked
