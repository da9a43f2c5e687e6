"""Masks: which entries of which parameters stay.

Masks are plain data, `dict[parameter name, bool tensor of the parameter's shape]`, True = kept. A
parameter that isn't named stays whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.steps import after_step, stepped

__all__ = [
    "Masks",
    "hold",
    "load_masks",
    "masked_copy",
    "num_kept",
    "prune_order",
    "save_masks",
    "weight_masks",
]

Masks = dict[str, Tensor]


def num_kept(num: int, sparsity: float, *, round_to: int = 1, min_kept: int = 1) -> int:
    """How many of `num` units stay: floor(num * sparsity) go, the rest is rounded up.

    Args:
        num: Number of units, such as channels.
        sparsity: Fraction removed, in [0, 1).
        round_to: The kept count is rounded up to a multiple of this, but never above `num`.
        min_kept: Never fewer than this.
    """
    # 1e-9: 10 * 0.3 is 2.9999999999999996 in floating point, and means 3.
    kept = max(num - int(num * sparsity + 1e-9), min_kept)
    return min(-(-kept // round_to) * round_to, num)


def prune_order(scores: Tensor) -> Tensor:
    """Unit indices in the order in which they go: lowest score first, ties by index.

    Args:
        scores: Higher = keep; shape (n,).

    Returns:
        An int64 permutation of shape (n,).

    Raises:
        ValueError: A score is NaN.
    """
    if torch.isnan(scores).any():
        raise ValueError(f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN")
    return torch.argsort(scores.flatten(), stable=True)


def _parameters(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in tensors:
            raise StructureError(f"mask {name!r} names no parameter of {type(model).__name__}")
        if mask.shape != tensors[name].shape or mask.dtype != torch.bool:
            raise StructureError(
                f"mask {name!r} must be a bool tensor of shape {tuple(tensors[name].shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    return {name: tensors[name] for name in masks}


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model whose masked entries are zero.

    Raises:
        StructureError: A mask names no parameter, or has another shape.
    """
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in _parameters(result, masks).items():
            tensor.mul_(masks[name].to(tensor.device))
    return result


@contextmanager
def hold(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Keeps masked entries exactly zero while the model trains, whatever the optimizer does.

    Momentum and weight decay revive masked weights where only their gradient is masked; so the
    entries are zeroed again after every `optimizer.step()` of any optimizer in this process that
    holds one of the parameters. The model gets no wrapper: state-dict keys, deepcopy and pickle
    stay as they are.

    Raises:
        StructureError: A mask names no parameter, or has another shape.
    """
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in _parameters(model, masks).items():
        removed = (~masks[name]).to(tensor.device)
        if id(tensor) in held:  # tied: what any of its names removes
            removed = removed | held[id(tensor)][1]
        held[id(tensor)] = (tensor, removed)

    def zero(tensors: Iterator[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for tensor, removed in tensors:
                tensor.masked_fill_(removed, 0)

    def again(optimizer: torch.optim.Optimizer) -> None:
        zero(held[key] for key in stepped(optimizer) if key in held)

    zero(iter(held.values()))
    with after_step(model, again):
        yield model


def weight_masks(model: nn.Module, kept: Mapping[str, Tensor]) -> Masks:
    """Masks of single weights: for each parameter name, the flat indices that stay."""
    parameters = model.named_parameters(remove_duplicate=False)
    shapes = {name: parameter.shape for name, parameter in parameters}
    masks = {}
    for name, indices in kept.items():
        mask = torch.zeros(shapes[name].numel(), dtype=torch.bool)
        mask[indices] = True
        masks[name] = mask.view(shapes[name])
    return masks


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes masks as safetensors."""
    save_file({name: mask.contiguous() for name, mask in masks.items()}, path)


def load_masks(path: str | Path) -> Masks:
    """Reads masks that `save_masks` wrote.

    Raises:
        StructureError: The file is no safetensors file, or holds anything but bool tensors.
    """
    try:
        masks: Masks = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StructureError(f"masks can't be read from {path}: {error}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise StructureError(f"mask {name!r} in {path} must be bool, got {mask.dtype}")
    return masks
