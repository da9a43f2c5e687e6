"""Binarized networks (Courbariaux et al. 2016, arXiv 1602.02830): weights and inputs of one bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.errors import ConfigError, TaskError
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.quantization.layers import attach, quantized_layers
from raycompress.quantization.quantizer import Bits, Quantizer, default_layers
from raycompress.steps import after_step, stepped

__all__ = ["BNN", "ClipWeights", "SignInput", "SignWeight", "binarize"]


class _Sign(torch.autograd.Function):
    """sign(x) with sign(0) = 1; the gradient of hard tanh (equation 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # NaN stays: as a sign it would pass for an answer.
        signs: Tensor = torch.where(x < 0, -1.0, torch.where(x >= 0, 1.0, x))
        return signs.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inside: Tensor = x.abs() <= 1
        return gradient * inside


def binarize(x: Tensor) -> Tensor:
    """1 where x >= 0 and -1 elsewhere; its gradient is 1 where |x| <= 1 and 0 outside."""
    signs: Tensor = _Sign.apply(x)  # type: ignore[no-untyped-call]
    return signs


class SignWeight(nn.Module):
    """`binarize` for weights."""

    bits = 1

    def forward(self, weight: Tensor) -> Tensor:
        """Weights of one layer, of the same shape."""
        return binarize(weight)


class SignInput(nn.Module):
    """`binarize` for what a layer is given.

    Attributes:
        name: Of the layer, for the error.
    """

    bits = 1

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._checked = False

    def forward(self, x: Tensor) -> Tensor:
        """Activations of any shape, of the same shape.

        Raises:
            TaskError: The first batch in training has no negative number.
        """
        if self.training and not self._checked:
            if bool((x >= 0).all()):
                raise TaskError(
                    f"the inputs of {self.name!r} are never negative, so all of their signs are 1: "
                    "a binary network has a norm, or Hardtanh, before its layers where others "
                    "have ReLU; change the model, or leave the layer out with "
                    f"{{op_names: [{self.name}], exclude: true}}"
                )
            self._checked = True
        return binarize(x)


@dataclass(frozen=True, kw_only=True)
class ClipWeights(TrainingMethod):
    """Brings weights back into [-1, 1] after every step (section 1.4, algorithm 1).

    Beyond it their sign could no longer change by small steps.

    Attributes:
        parameters: Names of the binary layers' weights; norms and biases are not clipped.
    """

    parameters: tuple[str, ...]

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Clips at once, and after every step of an optimizer that holds them."""
        weights = [run.model.get_parameter(name) for name in self.parameters]

        def clip(optimizer: torch.optim.Optimizer | None = None) -> None:
            now = None if optimizer is None else stepped(optimizer)
            with torch.no_grad():
                for weight in weights:
                    if now is None or id(weight) in now:
                        weight.clamp_(-1, 1)

        clip()
        with after_step(run.model, clip):
            yield


@dataclass(frozen=True, kw_only=True)
class BNN(Quantizer):
    """Weights and inputs are -1 or 1; layers in the order layer, pooling, norm, Hardtanh.

    Attributes:
        first: The first layer: "float", or "weights": binary weights on the input as it is (the
            paper's, whose input has 8 bits; section 1.5).
        last: The last layer: "float", or "binary" (the paper's, with a norm behind it).
    """

    first: Literal["float", "weights"] = "float"
    last: Literal["float", "binary"] = "float"

    needs_data: ClassVar[bool] = False
    trains: ClassVar = "yes"

    def __post_init__(self) -> None:
        for name, allowed in (("first", ("float", "weights")), ("last", ("float", "binary"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )

    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """All layers; the first and the last as their fields say."""
        names = default_layers(model)
        choices = dict.fromkeys(names, Bits(weight=1, input=1))
        if self.last == "float":
            del choices[names[-1]]
        if self.first == "weights":
            choices[names[0]] = Bits(weight=1)
        else:
            choices.pop(names[0], None)
        return choices

    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Takes the signs of weights and inputs of the chosen layers."""
        for name, bits in choices.items():
            if bits.output is not None or {bits.weight, bits.input} - {1, None}:
                raise ConfigError(
                    f"BNN has one bit for weights and inputs, and none for outputs: {name}: {bits}"
                )
        for name, bits in choices.items():
            attach(
                model.get_submodule(name),
                weight=None if bits.weight is None else SignWeight(),
                input=None if bits.input is None else SignInput(name),
            )

    def methods(self, model: nn.Module) -> tuple[TrainingMethod, ...]:
        """Keeps the binary layers' weights within [-1, 1]."""
        layers = quantized_layers(model)
        binary = [n for n, m in layers.items() if isinstance(m.weight_quantizer, SignWeight)]
        return (ClipWeights(parameters=tuple(f"{name}.weight" for name in binary)),)
