"""Weights times input norms (Sun et al. 2023, arXiv 2306.11695, equation 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from raycompress.collect import Probe
from raycompress.criteria.criterion import Criterion
from raycompress.errors import ConfigError, EvaluationError
from raycompress.structure import Structure

__all__ = ["Wanda"]

# Untyped in torch.
_WEIGHT_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}


@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """|W_ij| * ||X_j||_2: X_j is everything that the weight is multiplied with.

    The paper has linear layers; in a convolution each weight meets its input channel at the
    positions that its place in the kernel reaches, padding included, and the norm is over those.

    Attributes:
        batches: Calibration batches looked at; 0: all.
    """

    batches: int = 0

    kind: ClassVar[Literal["channels", "weights"]] = "weights"
    needs_data: ClassVar[bool] = True

    def check(self, model: nn.Module, structure: Structure, names: Sequence[str]) -> None:
        """Refuses layers that multiply no inputs by weights."""
        modules = dict(model.named_modules())
        for name in names:
            if not _has_inputs(modules[name]):
                raise ConfigError(
                    f"Wanda scores Linear and (not transposed) convolution layers; {name!r} is "
                    f"{type(modules[name]).__name__}: leave it out by targets"
                )

    def collect(self, probe: Probe) -> dict[str, Tensor]:
        """Sums of squares by layer: shape (I,), for convolutions (I, *K)."""
        sums: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            for name, module in probe.model.named_modules():
                if _has_inputs(module):
                    hooks.callback(_watch(module, name, sums))
            for index, batch in enumerate(probe.batches()):
                if self.batches and index == self.batches:
                    break
                probe.task.forward(probe.model, batch)
        return sums

    def weight_scores(self, name: str, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """|W| times the root of the sums, of the shape of `weight`.

        Raises:
            EvaluationError: The layer was never called on calibration data.
        """
        if name not in statistics:
            raise EvaluationError(
                f"layer {name!r} was never called on calibration data (its weight may be used "
                "without it, as in nn.MultiheadAttention), so Wanda knows no inputs of it: exclude "
                "it in targets, or take another criterion"
            )
        norms = statistics[name].double().sqrt()
        if weight.dim() > 2 and len(norms) != weight.shape[1]:  # grouped: inputs of each output
            groups = len(norms) // weight.shape[1]
            norms = norms.reshape(groups, *weight.shape[1:])
            norms = norms.repeat_interleave(weight.shape[0] // groups, dim=0)
        return weight.double().abs() * norms


def _has_inputs(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    )


def _watch(module: nn.Module, name: str, sums: dict[str, Tensor]) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        squares = args[0].detach().double().square()
        if isinstance(module, _ConvNd):
            total = _seen_by_kernel(module, squares)
        else:
            total = squares.flatten(0, -2).sum(dim=0)
        total = total.cpu()
        sums[name] = sums[name] + total if name in sums else total

    return module.register_forward_pre_hook(add).remove


def _seen_by_kernel(module: _ConvNd, squares: Tensor) -> Tensor:
    """Sum over examples and positions of what each kernel place meets: shape (I, *K).

    It is the gradient of a convolution's sum of outputs with respect to its weight.
    """
    dims = len(module.kernel_size)
    if squares.dim() == dims + 1:
        squares = squares.unsqueeze(0)
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        squares = F.pad(squares, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * dims
    size, kernel = squares.shape[2:], module.kernel_size
    reach = [module.dilation[d] * (kernel[d] - 1) + 1 for d in range(dims)]
    spatial = [(size[d] + 2 * padding[d] - reach[d]) // module.stride[d] + 1 for d in range(dims)]
    ones = squares.new_ones((squares.shape[0], 1, *spatial))
    gradient = _WEIGHT_GRADIENT[dims](
        squares,
        (1, squares.shape[1], *module.kernel_size),
        ones,
        module.stride,
        padding,
        module.dilation,
    )
    return gradient[0]
