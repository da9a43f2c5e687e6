"""Layers that read removed channels, and what those channels add to their outputs.

Measured, not derived: while the masked model runs, each reader runs again without the removed
part of its weight, and the difference is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.structure.inputs import Inputs, as_call
from raycompress.structure.model import Structure
from raycompress.structure.quiet import quiet

__all__ = ["Reader", "find_readers", "noise_like", "run", "tolerance"]

_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
Vectors = Mapping[tuple[str, int], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


@dataclass(eq=False)
class Reader:
    """A module that reads removed channels through one of its parameters.

    Attributes:
        name: of the module, "" for the model itself.
        module: of the masked model.
        parameter: what reads them.
        kept: which of its entries stay, 1 or 0, broadcastable to it.
        inputs: how many inputs the module loses.
        outputs: which outputs stay, bool of shape (outputs,), or None for all.
        axis: of the module's output, for its outputs.
        problem: why a constant can't go into a bias of this module, "" if it can.
        total: sum of what the lost inputs add, shape (outputs,); None before it ran.
        positions: over how many examples and positions.
        scale: largest absolute output.
        unfolded: largest absolute number that the lost inputs add.
        error: the same once the mean is added.
        steady: whether the lost inputs were alike for all examples and positions.
    """

    name: str
    module: nn.Module
    parameter: Tensor
    kept: Tensor
    inputs: int
    outputs: Tensor | None
    axis: int
    problem: str
    total: Tensor | None = None
    positions: int = 0
    scale: float = 0.0
    unfolded: float = 0.0
    error: float = 0.0
    steady: bool = True
    _first: Tensor | None = None

    @property
    def constant(self) -> Tensor:
        """The mean of what the lost inputs add, shape (outputs,)."""
        assert self.total is not None
        return self.total / self.positions

    @property
    def bias(self) -> Tensor | None:
        """The module's bias."""
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None

    def add(self, call: _Call) -> None:
        """First pass: the mean."""
        out = self._without(call)
        if not isinstance(out, Tensor) and not self.problem:
            self.problem = f"{type(self.module).__name__} returns no single tensor"
        if self.problem:
            return
        added = (call.out - out).movedim(self.axis, -1).flatten(0, -2)
        self.total = added.sum(0) + (0 if self.total is None else self.total)
        self.positions += len(added)

    def compare(self, call: _Call) -> None:
        """Later passes: what is left of the difference once the mean is added."""
        pairs = zip(_floats(call.out), _floats(self._without(call)), strict=True)
        for before, after in pairs:
            self.scale = max(self.scale, float(before.abs().max()))
            self.unfolded = max(self.unfolded, self._largest(before - after))
        if self.total is not None:
            self.error = max(self.error, self._largest(call.out - self._without(call, fold=True)))
            self._watch(call)

    def _without(self, call: _Call, *, fold: bool = False) -> Any:
        """What the module returns without the lost inputs, with the mean in its bias if asked."""
        bias = self.bias if fold else None
        swaps = [(self.parameter, self.parameter.data * self.kept)]
        if bias is not None:
            swaps.append((bias, bias.data + self.constant.to(bias)))
        saved = [tensor.data for tensor, _ in swaps]
        try:
            for tensor, data in swaps:
                tensor.data = data
            # Not through __call__: this runs inside a hook of the module.
            out = self.module.forward(*call.args, **call.kwargs)
        finally:
            for (tensor, _), data in zip(swaps, saved, strict=True):
                tensor.data = data
        if fold and bias is None:
            out = (out.movedim(self.axis, -1) + self.constant).movedim(-1, self.axis)
        return out

    def _largest(self, left: Tensor) -> float:
        left = left.movedim(self.axis, -1)
        if self.outputs is not None and left.shape[-1] == len(self.outputs):
            left = left[..., self.outputs.to(left.device)]
        return float(left.abs().max()) if left.numel() else 0.0

    def _watch(self, call: _Call) -> None:
        source = call.args[0] if call.args else None
        if not isinstance(source, Tensor) or source.shape[self.axis] != self.kept.numel():
            return
        lost = (self.kept.reshape(-1) == 0).nonzero().flatten()
        values = source.movedim(self.axis, -1)[..., lost].flatten(0, -2)
        self._first = values[:1] if self._first is None else self._first
        limit = tolerance(source) * float(source.abs().max())
        self.steady &= float((values - self._first).abs().max()) <= limit


def find_readers(masked: nn.Module, structure: Structure, vectors: Vectors) -> list[Reader]:
    """The modules that read removed channels, in order of their first call."""
    consumed = {
        (m.parameter, m.dim) for g in structure.groups for m in g.members if m.role == "consumer"
    }
    tensors = dict(masked.named_parameters(remove_duplicate=False))
    modules = dict(masked.named_modules())
    readers = []
    for (name, dim), vector in vectors.items():
        if (name, dim) not in consumed:
            continue
        leaf = structure.leaves[name]
        shape = [1] * len(leaf.shape)
        shape[dim] = -1
        for alias in (name, *leaf.aliases):
            owner, _, attribute = alias.rpartition(".")
            readers.append(
                Reader(
                    name=owner,
                    module=modules[owner],
                    parameter=tensors[alias],
                    kept=torch.from_numpy(vector).reshape(shape).to(tensors[alias]),
                    inputs=int((~vector).sum()),
                    outputs=_outputs(owner, modules[owner], structure, vectors),
                    axis=-max(len(leaf.shape) - 1, 1),
                    problem=_unfit(modules[owner], attribute, len(leaf.shape)),
                )
            )
    order = {name: i for i, name in enumerate(structure.sizes.layers)}
    return sorted(readers, key=lambda r: order.get(r.name, len(order)))


def _unfit(module: nn.Module, attribute: str, dims: int) -> str:
    kind = type(module).__name__
    if attribute != "weight" or dims < 2 or not hasattr(module, "bias"):
        return f"{kind} has no weight with a bias of its own behind it"
    if module.bias is None and not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return f"{kind} has no bias, and may not take one"
    return ""


def _outputs(
    owner: str, module: nn.Module, structure: Structure, vectors: Vectors
) -> Tensor | None:
    prefix = f"{owner}." if owner else ""
    first = {a: leaf.name for leaf in structure.leaves.values() for a in leaf.aliases}
    bias, weight = (first.get(f"{prefix}{n}", f"{prefix}{n}") for n in ("bias", "weight"))
    dim = 1 if getattr(module, "transposed", False) else 0
    vector = vectors.get((bias, 0)) if bias in structure.leaves else vectors.get((weight, dim))
    return None if vector is None else torch.from_numpy(vector)


def run(
    model: nn.Module,
    readers: list[Reader],
    inputs: Inputs,
    action: Callable[[Reader, _Call], None],
) -> None:
    """Runs the model; each reader acts on each of its calls."""
    args, kwargs = as_call(inputs)
    with quiet(model), _hooked(readers, action):
        model(*args, **kwargs)


@contextmanager
def _hooked(readers: list[Reader], action: Callable[[Reader, _Call], None]) -> Iterator[None]:
    handles = []
    busy: list[Reader] = []

    for reader in readers:

        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any, reader: Reader = reader) -> None:
            if not busy:  # a reader that runs again runs its own parts again
                busy.append(reader)
                action(reader, _Call(args, kwargs, out))
                busy.clear()

        handles.append(reader.module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def noise_like(value: Any, generator: torch.Generator) -> Any:
    """The same containers with the same numbers in another order; where all are alike, noise."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel() and bool((value == value.min()).all()):
            return value + torch.randn(value.shape, generator=generator).to(value)
        order = torch.randperm(value.numel(), generator=generator)
        return value.flatten()[order.to(value.device)].reshape(value.shape)
    if isinstance(value, Mapping):
        return {k: noise_like(v, generator) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(noise_like(v, generator) for v in value)
    if isinstance(value, list):
        return [noise_like(v, generator) for v in value]
    return value


def tolerance(tensor: Tensor) -> float:
    """Rounding, relative to the largest value."""
    return _TOLERANCE.get(tensor.dtype, 2e-2)


def _floats(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() and out.numel() else []
    if isinstance(out, (list, tuple)):
        return [t for o in out for t in _floats(o)]
    return []
