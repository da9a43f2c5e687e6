"""What the analysis found is tried: the slim model must compute what the masked one does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raycompress.structure.model import Structure
from raycompress.structure.probe import described
from raycompress.structure.slim import slim
from raycompress.structure.verify import Verdict, verify

__all__ = ["is_right", "wrong_groups"]

_Kept = dict[str, range]
_Inputs = tuple[Any, ...] | dict[str, Any]


def is_right(model: nn.Module, structure: Structure, kept: _Kept, inputs: _Inputs) -> bool:
    """Whether the slim model is equal to the masked one, or its difference is explained."""
    return _compare(model, structure, kept, inputs).kind != "wrong"


def wrong_groups(
    model: nn.Module, structure: Structure, kept: _Kept, inputs: _Inputs
) -> dict[str, str]:
    """Groups that can't be slimmed without another result, with what was found.

    Args:
        model: the dense model.
        structure: its structure.
        kept: kept channels of every group that is tried.
        inputs: arguments of the model.
    """
    verdict = _compare(model, structure, kept, inputs)
    if verdict.kind != "wrong" or not kept:
        return {}
    if len(kept) == 1:
        return dict.fromkeys(kept, verdict.reasons[0])
    names = list(kept)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    found: dict[str, str] = {}
    for half in halves:
        found |= wrong_groups(model, structure, {n: kept[n] for n in half}, inputs)
    if not found:  # only together
        found = dict.fromkeys(halves[1], verdict.reasons[0])
    return found


def _compare(model: nn.Module, structure: Structure, kept: _Kept, inputs: _Inputs) -> Verdict:
    try:
        masked, small = _masked(model, structure, kept), slim(model, structure, kept)
    except Exception as error:  # foreign code may refuse to be copied by raising anything
        return Verdict("wrong", float("inf"), (f"no slim model can be made: {described(error)}",))
    verdict = verify(masked, small, inputs, structure=structure, kept=kept)
    single = any(p.dtype == torch.float32 for p in model.parameters())
    if verdict.kind == "wrong" and single and verdict.max_error < float("inf"):
        # Rounding, or a mistake?
        double = verify(masked, small, inputs, structure=structure, kept=kept, dtype=torch.float64)
        if double.max_error < float("inf"):
            return double
    return verdict


def _masked(model: nn.Module, structure: Structure, kept: _Kept) -> nn.Module:
    """A copy with zeros in place of what is removed, that shares what has none."""
    removed: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, dim), keep in structure.keep_vectors(kept).items():
        removed.setdefault(name, []).append((dim, torch.from_numpy(np.flatnonzero(~keep))))
    shared: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared or name in removed:
            value = parameter.detach()
            if name in removed:
                value = value.clone()
                for dim, gone in removed[name]:
                    value.index_fill_(dim, gone.to(value.device), 0)
            shared[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, shared)
