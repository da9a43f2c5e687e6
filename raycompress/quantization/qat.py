"""Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycompress.errors import ConfigError, TaskError
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.quantization.fake_quant import (
    FakeQuantize,
    check_bits,
    observe_ranges,
    quantizers_of,
)
from raycompress.quantization.layers import attach, quantized_layers
from raycompress.quantization.naive import weight_quantizer
from raycompress.quantization.quantizer import Bits, Quantizer, check_parts, default_layers

__all__ = ["QAT", "FoldedWeight", "SettleWeights", "attach_grids", "fold_norms"]


class FoldedWeight(FakeQuantize):
    """Rounds the weight that a layer has once the BatchNorm behind it is folded in.

    w_fold = gamma w / sqrt(running variance + eps) (equation 14) is rounded and divided by that
    factor again, since the norm, which stays where it is, multiplies by it. In eval mode the layer
    and its norm together compute what the folded layer does; in training the norm takes the
    batch's statistics, the factor always the running ones. The factor is no function of gamma to
    the gradient: within the range the two parts of that gradient cancel out but for the rounding.

    Args:
        name: Of the layer.
        norm: Behind it.
        bits: 2 to 8.
        per_channel: A scale for each output channel.
        start_step: Batches seen in training before anything is rounded.
    """

    def __init__(
        self, name: str, norm: nn.Module, bits: int, per_channel: bool, start_step: int = 0
    ) -> None:
        super().__init__(
            f"the weight of {name!r}",
            bits,
            symmetric=True,
            channels=norm.num_features if per_channel else None,  # type: ignore[arg-type]
            start_step=start_step,
        )
        self.__dict__["_norm"] = (norm,)  # it is a part of the model already

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The norm."""
        norm: nn.BatchNorm2d = self.__dict__["_norm"][0]
        return norm

    def factor(self, weight: Tensor) -> Tensor:
        """Gamma / sqrt(running variance + eps), 1 where that is 0, shaped for the weight."""
        with torch.no_grad():
            assert self.norm.running_var is not None
            factor = torch.rsqrt(self.norm.running_var + self.norm.eps)
            if self.norm.affine:
                factor = factor * self.norm.weight
            # A channel that its norm multiplies by 0 is 0, however it is rounded.
            factor = torch.where(factor.abs() > 1e-12, factor, torch.ones_like(factor))
        return factor.view(-1, *[1] * (weight.dim() - 1))

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of any weight; of a grid for all, channels that are 0 whatever they hold have none."""
        if self.dim is None and self.norm.affine:
            alive = self.norm.weight.detach() != 0
            x = x * alive.view(-1, *[1] * (x.dim() - 1))
        return super().range_of(x)

    def forward(self, weight: Tensor) -> Tensor:
        """Weights of one layer, of the same shape."""
        factor = self.factor(weight)
        active = self.active
        rounded = super().forward(weight * factor) / factor
        return rounded if active else weight

    def settle(self, weight: Tensor) -> None:
        """Takes a layer's weight, and its norm, as they are when training ends."""
        self.observe(weight.detach() * self.factor(weight))


@dataclass(frozen=True, kw_only=True)
class SettleWeights(TrainingMethod):
    """Sets the weights' ranges once more when training ends: its last step moved them."""

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Acts when training ends.

        Raises:
            TaskError: Training was too short for a quantizer's start.
        """
        yield
        for quantizer in quantizers_of(run.model):
            if not quantizer.active:
                raise TaskError(
                    f"quant_start_step {quantizer.start_step} is beyond the training: "
                    f"{quantizer.name} saw {quantizer.seen} batches; train longer or start earlier"
                )
        for layer in quantized_layers(run.model).values():
            if isinstance(layer.weight_quantizer, FakeQuantize):
                layer.weight_quantizer.settle(layer.weight)


@dataclass(frozen=True, kw_only=True)
class QAT(Quantizer):
    """Training sees rounded weights and inputs; ranges of inputs follow it.

    Weights have symmetric grids by their minima and maxima, inputs affine ones by exponential
    means of theirs. Biases stay in float: in int32 with the scale S_weight * S_input, as kernels
    have them, they are off by at most half of that.

    Attributes:
        weight_bits: 2 to 8.
        input_bits: 2 to 8.
        per_channel: A scale for each output channel of weights, in place of one for the layer.
        fold_norms: Round weights as they are with the BatchNorm behind them folded in.
        decay: Of the exponential means of ranges, in [0, 1).
        quant_start_step: Training batches before anything is rounded; ranges are followed
            meanwhile. Entries of config_list may have their own.
    """

    weight_bits: int = 8
    input_bits: int = 8
    per_channel: bool = True
    fold_norms: bool = True
    decay: float = 0.99
    quant_start_step: int = 0

    parts: ClassVar[tuple[str, ...]] = ("weight", "input", "output")
    delays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("input_bits", self.input_bits)
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay must be in [0, 1), got {self.decay:g}")
        if self.quant_start_step < 0:
            raise ConfigError(f"quant_start_step must be 0 or more, got {self.quant_start_step}")

    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """All layers."""
        bits = Bits(
            weight=self.weight_bits, input=self.input_bits, start_step=self.quant_start_step
        )
        return dict.fromkeys(default_layers(model), bits)

    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Gives the chosen layers grids; those of inputs and outputs wait for data."""
        check_parts(self, choices)
        attach_grids(model, choices, self.per_channel, self.fold_norms, self.decay)

    def calibrate(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
    ) -> None:
        """Starts the ranges of inputs and outputs at their minima and maxima."""
        observe_ranges(model, forward, batches)

    def methods(self, model: nn.Module) -> tuple[TrainingMethod, ...]:
        """The last step's weights set the ranges too."""
        return (SettleWeights(),)


def attach_grids(
    model: nn.Module,
    choices: Mapping[str, Bits],
    per_channel: bool,
    fold_norms: bool,
    decay: float = 0.0,
) -> None:
    """Gives layers grids of their weights, and such of inputs and outputs that wait for data.

    Args:
        model: In place.
        choices: By the layer's name.
        per_channel: A scale for each output channel of weights.
        fold_norms: Of weights as they are with the BatchNorm behind them folded in.
        decay: Of the exponential means of ranges of inputs and outputs.
    """

    def activations(name: str, bits: int | None, start_step: int) -> FakeQuantize | None:
        if bits is None:
            return None
        return FakeQuantize(name, bits, symmetric=False, decay=decay, start_step=start_step)

    for name, bits in choices.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        made: FakeQuantize | None = None
        if bits.weight is not None and bits.norm and fold_norms:
            norm = model.get_submodule(bits.norm)
            made = FoldedWeight(name, norm, bits.weight, per_channel, bits.start_step)
            made.settle(weight)
        elif bits.weight is not None:
            made = weight_quantizer(name, weight, bits.weight, per_channel)
            made.start_step = bits.start_step
        attach(
            layer,
            weight=made,
            input=activations(f"the input of {name!r}", bits.input, bits.start_step),
            output=activations(f"the output of {name!r}", bits.output, bits.start_step),
        )


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy whose BatchNorms are a part of the layers before them, for inference.

    Only norms that a `FoldedWeight` knows of. The layer's weight becomes w_fold, its bias
    beta + gamma (bias - mean) / sqrt(variance + eps), the norm an `nn.Identity`; the grid stays.

    Args:
        model: Prepared; in eval mode.
    """
    model = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        folded = layer.weight_quantizer
        if not isinstance(folded, FoldedWeight):
            continue
        norm, weight = folded.norm, layer.weight
        assert norm.running_mean is not None and norm.running_var is not None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        shift = torch.zeros_like(factor)
        if norm.affine:
            factor, shift = factor * norm.weight.detach(), norm.bias.detach()
        old = layer.bias.detach() if isinstance(layer.bias, Tensor) else torch.zeros_like(factor)
        with torch.no_grad():
            shaped = factor.view(-1, *[1] * (weight.dim() - 1))
            layer.weight = nn.Parameter(weight * shaped, requires_grad=False)
            layer.bias = nn.Parameter(shift + factor * (old - norm.running_mean))
        plain = FakeQuantize(
            f"the weight of {name!r}",
            folded.bits,
            symmetric=True,
            channels=None if folded.dim is None else len(weight),
            start_step=folded.start_step,
        )
        plain.to(weight.device, folded.scale.dtype)
        plain.load_state_dict(folded.state_dict())
        layer.weight_quantizer = plain.train(folded.training)
        place = next(key for key, module in model.named_modules() if module is norm)
        parent, _, last = place.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
    return model
