"""Rows of a least-squares problem: what a layer looks at, and what it answers.

Shapes: N examples, R rows (examples times positions, or those of them that are looked at), I inputs
times kernel places, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = [
    "MAX_ROWS",
    "Answers",
    "ask",
    "calls_of",
    "inputs_of",
    "rows_of",
    "targets_of",
    "unfit",
    "windows",
]

MAX_ROWS = 4096
"""Rows taken from each batch, drawn without replacement: more cost time and change little."""
MAX_ANSWERS = 1 << 28
"""Numbers that dense layers answered that are kept at once: a gibibyte."""

Answers = dict[str, list[list[Tensor]]]
"""By layer and batch, for each call: the rows of outputs that are looked at, shape (R, O)."""


def unfit(module: nn.Module) -> str:
    """Why a layer can't be reconstructed; "" if it can."""
    if isinstance(module, nn.Linear):
        return ""
    if not isinstance(module, _ConvNd):
        return f"{type(module).__name__} is neither Linear nor a convolution"
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution"
    return "" if module.groups == 1 else "a grouped convolution"


def windows(module: nn.Module, x: Tensor) -> Tensor:
    """What each output of a layer looks at: (N, *positions, I), of a convolution (..., I, *kernel).

    A view of the (padded) input: whoever takes some positions never holds all of them.
    """
    if not isinstance(module, _ConvNd):
        return x
    dims = len(module.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * dims
    for d in range(dims):
        x = F.pad(x, (0, 0) * (dims - 1 - d) + (padding[d], padding[d]))
    # Windows of each dim, one after the other: (N, C, *positions, *kernel).
    for d in range(dims):
        reach = module.dilation[d] * (module.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, reach, module.stride[d])[..., :: module.dilation[d]]
    positions = list(range(2, 2 + dims))
    kernel = list(range(2 + dims, 2 + 2 * dims))
    return x.permute(0, *positions, 1, *kernel)


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies by its weights, of the rows that are looked at: shape (R, I)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    found = windows(module, x)
    return _looked_at(found, found.dim() - weight.dim() + 1).reshape(-1, weight[0].numel())


def targets_of(module: nn.Module, y: Tensor) -> Tensor:
    """A layer's outputs, of the rows that are looked at: shape (R, O)."""
    if isinstance(module, _ConvNd):
        if y.dim() == len(module.kernel_size) + 1:
            y = y.unsqueeze(0)
        y = y.movedim(1, -1)
    return _looked_at(y, y.dim() - 1).flatten(0, -2)


def _looked_at(tensor: Tensor, dims: int) -> Tensor:
    """The rows that are looked at, out of those that the first dims make."""
    shape = tensor.shape[:dims]
    num = shape.numel()
    if num <= MAX_ROWS:
        return tensor
    generator = torch.Generator().manual_seed(num)
    chosen = torch.randperm(num, generator=generator)[:MAX_ROWS]
    return tensor[torch.unravel_index(chosen.to(tensor.device), shape)]


def ask(
    known: Answers,
    names: Sequence[str],
    dense: nn.Module,
    forward: Callable[..., object],
    batches: Sequence[Any],
) -> None:
    """Has the dense model answer for the first of the layers, and for the next if there is room.

    One pass of each batch answers for all of them.
    """
    if names[0] in known:
        return
    modules, asked = dict(dense.named_modules()), list[str]()
    room = MAX_ANSWERS - sum(y.numel() for each in known.values() for batch in each for y in batch)
    for name in (name for name in names if name not in known):
        most = len(batches) * MAX_ROWS * _num_outputs(modules[name])
        if most > room and asked:
            break
        if most > room:
            known.clear()
        asked.append(name)
        room -= most
    handles = []
    try:
        for name in asked:
            known[name] = []

            def hook(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                # A copy: what comes next may work in place.
                known[name][-1].append(targets_of(module, output.detach()).clone())

            handles.append(modules[name].register_forward_hook(hook))
        with torch.no_grad():
            for batch in batches:
                for name in asked:
                    known[name].append([])
                forward(dense, batch)
    finally:
        for handle in handles:
            handle.remove()


def _num_outputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def calls_of(
    model: nn.Module, names: Sequence[str], forward: Callable[..., object], batch: Any
) -> dict[str, int]:
    """How often each layer is called in a pass, in the order of the first calls."""
    seen: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            seen[name] = seen.get(name, 0) + 1

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(count(name)) for name in names]
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Enough(Exception):
    """All calls of the layer were seen; the rest of the pass isn't needed."""


def inputs_of(
    model: nn.Module,
    module: nn.Module,
    forward: Callable[..., object],
    batch: Any,
    calls: int,
) -> list[Tensor]:
    """Inputs of one layer in one pass."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())
        if len(found) == calls:
            raise _Enough

    handle = module.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            forward(model, batch)
    except _Enough:
        return found
    finally:
        handle.remove()
    return found
