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
from torch import Tensor, nn

from raycompress.layer_rows import Answers, ask, calls_of, inputs_of, rows_of, unfit
from raycompress.structure import Structure
from raycompress.structure.model import Kept

__all__ = [
    "LayerError",
    "Reconstruction",
    "lost_inputs",
    "reconstruct",
    "solve",
]


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
    known: Answers | None = None,
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
        known: What the dense model answered to these batches before; grows.

    Returns:
        One entry for each layer, in the order of the forward pass.
    """
    order = calls_of(pruned, list(layers), forward, batches[0])
    report = [LayerError(n, skipped="not called by the model") for n in layers if n not in order]
    modules, answers = dict(pruned.named_modules()), {} if known is None else known
    left = [name for name in order if not unfit(modules[name])]
    for name, calls in order.items():
        module = modules[name]
        reason = unfit(module)
        if reason:
            report.append(LayerError(name, skipped=reason))
            continue
        ask(answers, left[left.index(name) :], dense, forward, batches)
        sums = _Sums(module)
        for batch, targets in zip(batches, answers[name], strict=True):
            inputs = inputs_of(pruned, module, forward, batch, calls)
            for x, y in zip(inputs, targets, strict=True):
                if name in outputs:
                    y = y.index_select(1, outputs[name].to(y.device))
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

    def add(self, x: Tensor, targets: Tensor) -> None:
        """Inputs of one call, and the rows of outputs that are looked at."""
        rows, targets = rows_of(self._module, x).double(), targets.double()
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
