"""Least-squares reconstruction: what is left of a layer imitates what the dense layer answered.

For each layer that lost inputs (channels) or weights, in the order of the forward pass, with X its
inputs in the pruned model, W its weights and Y the outputs of the same layer in the dense model:

    min over D of  ||X (W + D) - Y||^2 + damping * mean(diag G) * ||D||^2,   G = X^T X,

where D is zero wherever W was removed. Layers before are reconstructed already, so errors don't add
up. It is the weight update of OBS (Hassibi & Stork 1993) for all removed weights at once; the same
problem per layer as SparseGPT (arXiv 2301.00774) and channel pruning (1707.06168), solved exactly.

Shapes: R rows (examples times positions), I inputs times kernel places (and 1 for a bias), O
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from raycompress.structure import Structure
from raycompress.structure.model import Kept

__all__ = [
    "LayerError",
    "Reconstruction",
    "lost_inputs",
    "reconstruct",
    "solve",
    "unfit",
    "windows",
]

MAX_ROWS = 4096
"""Rows taken from each batch, drawn without replacement: more cost time and change little."""


@dataclass(frozen=True)
class Reconstruction:
    """How a candidate is reconstructed.

    Attributes:
        dense: Digest of the weights whose layers are imitated, in dense shapes: what they have lost
            is zero.
        batches: Calibration batches, at least 1.
        damping: Ridge, as a fraction of the mean of G's diagonal.
    """

    dense: str
    batches: int = 4
    damping: float = 0.01


@dataclass(frozen=True)
class LayerError:
    """What reconstruction did to one layer.

    Attributes:
        layer: Its name.
        before: ||XW - Y||^2 / ||Y||^2 over the rows that were looked at.
        after: The same afterwards.
        skipped: Why the layer was left as it is; "" if it wasn't.
    """

    layer: str
    before: float = 0.0
    after: float = 0.0
    skipped: str = ""


def reconstruct(
    pruned: nn.Module,
    dense: nn.Module,
    layers: Mapping[str, Tensor | None],
    outputs: Mapping[str, Tensor],
    forward: Callable[[nn.Module, Any], object],
    batches: Sequence[Any],
    *,
    damping: float = 0.01,
) -> list[LayerError]:
    """Changes weights and biases of layers of the pruned model in place.

    Args:
        pruned: Slim or masked, in eval mode.
        dense: The model that is imitated, on the same device, in eval mode.
        layers: Names of the layers that lost inputs, each with the mask of its weight (True =
            free to change), or None where all that is left may change.
        outputs: For layers that lost outputs as well: indices of those that are left.
        forward: Runs a model on a batch.
        batches: Calibration batches.
        damping: See above.

    Returns:
        One entry for each layer, in the order of the forward pass.
    """
    order = _calls(pruned, list(layers), forward, batches[0])
    report = [LayerError(n, skipped="not called by the model") for n in layers if n not in order]
    pruned_modules, dense_modules = dict(pruned.named_modules()), dict(dense.named_modules())
    for name, calls in order.items():
        module = pruned_modules[name]
        reason = unfit(module)
        if reason:
            report.append(LayerError(name, skipped=reason))
            continue
        sums = _Sums(module)
        for batch in batches:
            inputs = _seen(pruned, module, forward, batch, calls, inputs=True)
            targets = _seen(dense, dense_modules[name], forward, batch, calls, inputs=False)
            for x, y in zip(inputs, targets, strict=True):
                if name in outputs:
                    dim = 1 if isinstance(module, _ConvNd) else -1
                    y = y.index_select(dim, outputs[name].to(y.device))
                sums.add(x, y)
        report.append(_update(name, module, sums, layers[name], damping))
    return report


def lost_inputs(
    structure: Structure, kept: Kept
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Layers of a slim model that lost inputs, and the outputs that those which lost some have.

    Args:
        structure: Of the dense model.
        kept: Kept channel indices by group.

    Returns:
        `layers` and `outputs` of `reconstruct`.
    """
    vectors = structure.keep_vectors(kept)
    layers: dict[str, Tensor | None] = {}
    outputs: dict[str, Tensor] = {}
    for name, dim in vectors:
        layer, _, parameter = name.rpartition(".")
        if parameter == "weight" and dim == 1:
            layers[layer] = None
            if (name, 0) in vectors:
                outputs[layer] = torch.from_numpy(vectors[name, 0].nonzero()[0])
    return layers, outputs


def solve(gram: Tensor, right: Tensor, mask: Tensor | None, damping: float) -> Tensor:
    """D of shape (I, O) that minimises tr(D^T G D) - 2 tr(D^T B) + ridge * ||D||^2.

    Args:
        gram: G, shape (I, I), double.
        right: B = X^T (Y - XW), shape (I, O).
        mask: Shape (I, O): where D may differ from zero; None: everywhere.
        damping: The ridge is this times the mean of G's diagonal.
    """
    ridge = damping * float(gram.diagonal().mean())
    matrix = gram + max(ridge, 1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if mask is None:
        return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
    # Each output has a support of its own: conjugate gradients on all of them at once, with the
    # diagonal as preconditioner; a product with G is one matrix product for all outputs.
    free = mask.to(right.dtype)
    scale = free / matrix.diagonal()[:, None]
    solution = torch.zeros_like(right)
    residual = right * free
    direction = z = scale * residual
    energy = (residual * z).sum(dim=0)
    goal = 1e-20 * energy.clamp_min(1e-300)
    for _ in range(4 * len(gram)):
        if bool((energy <= goal).all()):
            break
        product = (matrix @ direction) * free
        curvature = (direction * product).sum(dim=0)
        step = torch.where(energy > goal, energy / curvature.clamp_min(1e-300), 0)
        solution += step * direction
        residual -= step * product
        z = scale * residual
        before, energy = energy, (residual * z).sum(dim=0)
        direction = z + direction * (energy / before.clamp_min(1e-300))
    return solution


class _Sums:
    """G, X^T Y and ||Y||^2, summed over batches in double precision."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.gram = self.cross = torch.zeros(())
        self.square = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        rows, targets = _rows(self._module, x), _targets(self._module, y)
        if len(rows) > MAX_ROWS:
            generator = torch.Generator().manual_seed(len(rows))
            chosen = torch.randperm(len(rows), generator=generator)[:MAX_ROWS].to(rows.device)
            rows, targets = rows[chosen], targets[chosen]
        rows, targets = rows.double(), targets.double()
        if self._module.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.gram = self.gram.to(rows.device) + rows.T @ rows
        self.cross = self.cross.to(rows.device) + rows.T @ targets
        self.square += float(targets.square().sum())


def _update(
    name: str, module: nn.Module, sums: _Sums, mask: Tensor | None, damping: float
) -> LayerError:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    matrix = weight.detach().double().flatten(1).T
    free = None if mask is None else mask.to(matrix.device).flatten(1).T
    if isinstance(bias, Tensor):
        matrix = torch.cat([matrix, bias.detach().double()[None]])
        if free is not None:
            free = torch.cat([free, free.new_ones(1, free.shape[1])])
    residual = sums.cross - sums.gram @ matrix
    change = solve(sums.gram, residual, free, damping)
    before, after = (_error(sums, m) for m in (matrix, matrix + change))
    if not after < before:  # nothing was lost, or the layer can't be helped
        return LayerError(name, before, before)
    matrix = matrix + change
    with torch.no_grad():
        if isinstance(bias, Tensor):
            bias.copy_(matrix[-1])
            matrix = matrix[:-1]
        weight.copy_(matrix.T.reshape(weight.shape))
    return LayerError(name, before, after)


def _error(sums: _Sums, matrix: Tensor) -> float:
    """||XW - Y||^2 / ||Y||^2 from the sums."""
    value = (matrix * (sums.gram @ matrix)).sum() - 2 * (matrix * sums.cross).sum()
    return max(float(value) + sums.square, 0.0) / max(sums.square, 1e-300)


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


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies by its weights: shape (R, I)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return windows(module, x).reshape(-1, weight[0].numel())


def _targets(module: nn.Module, y: Tensor) -> Tensor:
    """A layer's outputs: shape (R, O)."""
    if not isinstance(module, _ConvNd):
        return y.flatten(0, -2)
    if y.dim() == len(module.kernel_size) + 1:
        y = y.unsqueeze(0)
    return y.movedim(1, -1).flatten(0, -2)


def _calls(
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


def _seen(
    model: nn.Module,
    module: nn.Module,
    forward: Callable[..., object],
    batch: Any,
    calls: int,
    *,
    inputs: bool,
) -> list[Tensor]:
    """Inputs or outputs of one layer in one pass."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append((args[0] if inputs else output).detach())
        if len(found) == calls:
            raise _Enough

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            forward(model, batch)
    except _Enough:
        return found
    finally:
        handle.remove()
    return found
