"""LSQ (Esser et al. 2020, arXiv 1902.08153): the step size of a quantizer is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.errors import ConfigError
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.quantization.fake_quant import Grid
from raycompress.quantization.layers import attach
from raycompress.quantization.quantizer import Bits, Quantizer, default_layers
from raycompress.steps import after_step, before_step, stepped

__all__ = ["LSQ", "LearnedStep", "StepSizes", "first_step_size", "quantize_with_step"]


class _LSQ(torch.autograd.Function):
    """Equations 1 to 3 and 5 of the paper."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:
        ratio = v.float() / step
        ctx.save_for_backward(ratio)
        ctx.low, ctx.high, ctx.scale, ctx.step_shape = low, high, scale, step.shape
        return (torch.round(ratio.clamp(low, high)) * step).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (ratio,) = ctx.saved_tensors
        below, above = ratio <= ctx.low, ratio >= ctx.high
        inside = ~(below | above)
        slope = torch.where(inside, torch.round(ratio) - ratio, 0.0)
        slope = torch.where(below, float(ctx.low), torch.where(above, float(ctx.high), slope))
        to_step = (gradient.float() * slope).sum() * ctx.scale
        return gradient * inside, to_step.view(ctx.step_shape), None, None, None


def quantize_with_step(v: Tensor, step: Tensor, low: int, high: int, count: int) -> Tensor:
    """round(clip(v / s, low, high)) * s, with the paper's gradients to v and to s.

    To v (equation 5): 1 where low < v / s < high, else 0. To s (equation 3): low or high where v is
    clipped, round(v / s) - v / s elsewhere, times 1 / sqrt(count * high) (section 2.2).

    Args:
        v: Weights or activations.
        step: s, one element, above 0.
        low: -Q_N, the lowest integer: -2^(b-1), or 0 without sign.
        high: Q_P, the highest: 2^(b-1) - 1, or 2^b - 1 without sign.
        count: Weights of the layer, or features (elements of one example).
    """
    scale = 1 / math.sqrt(count * high)
    quantized: Tensor = _LSQ.apply(v, step, low, high, scale)  # type: ignore[no-untyped-call]
    return quantized


def first_step_size(v: Tensor, high: int) -> Tensor:
    """2 mean|v| / sqrt(Q_P) (section 2.1), and 1 where all v are 0; a scalar."""
    mean = v.detach().float().abs().mean()
    return torch.where(mean > 0, 2 * mean / math.sqrt(high), torch.ones_like(mean))


class LearnedStep(nn.Module):
    """Quantizes by a step size that is a parameter; the first batch in training sets it.

    Until then nothing is quantized. That batch also tells whether the integers have a sign.

    Args:
        bits: 2 to 8. One bit with a sign has no positive integer.
        weight: Start with these weights, and count them; None: for activations.
    """

    limits: Tensor

    def __init__(self, bits: int, weight: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.count = None if weight is None else weight.numel()
        device = None if weight is None else weight.device
        self.step = nn.Parameter(torch.ones((), device=device))
        # The integers' range, 0 and 0 before it is known: as a buffer for state dicts, and as
        # numbers for what is traced.
        self.register_buffer("limits", torch.zeros(2, dtype=torch.int32, device=device))
        self.low = self.high = 0
        if weight is not None:
            self._start(weight, signed=True)

    @property
    def grid(self) -> Grid:
        """What it rounds to, once it has started."""
        zero = torch.zeros((), dtype=torch.int32, device=self.step.device)
        return Grid(self.step.detach(), zero, self.low, self.high)

    def forward(self, v: Tensor) -> Tensor:
        """Weights, or activations of shape (n, ...)."""
        if not self.high:
            if not self.training:
                return v
            self._start(v, signed=bool((v < 0).any()))
        count = v[0].numel() if self.count is None else self.count
        return quantize_with_step(v, self.step, self.low, self.high, count)

    def _start(self, v: Tensor, signed: bool) -> None:
        half = 2 ** (self.bits - 1)
        self.low, self.high = (-half, half - 1) if signed else (0, 2 * half - 1)
        with torch.no_grad():
            self.limits.copy_(torch.tensor([self.low, self.high]))
            self.step.copy_(first_step_size(v, self.high))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.low, self.high = (int(limit) for limit in self.limits)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"bits={self.bits}"


@dataclass(frozen=True, kw_only=True)
class StepSizes(TrainingMethod):
    """Lets the task's own optimizer train the step sizes, without weight decay and above 0.

    For the time of a step they are in a parameter group of their own, so that decay of any kind
    passes them by while a scheduler sees the groups that it knows. And a step at most halves them:
    one of plain gradient descent could make a small step size negative.

    A step size is to follow the weights' learning rate; an optimizer that was made without it
    doesn't train it.
    """

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Acts around every step of an optimizer that holds a step size."""
        layers = [m for m in run.model.modules() if isinstance(m, LearnedStep)]
        steps = {id(layer.step): layer.step for layer in layers}
        before: dict[int, Tensor] = {}
        home: dict[int, list[list[Any]]] = {}

        def take_out(optimizer: torch.optim.Optimizer) -> None:
            own = [steps[key] for key in steps.keys() & stepped(optimizer)]
            before.update({id(step): step.detach().clone() for step in own})
            home[id(optimizer)] = [group["params"] for group in optimizer.param_groups]
            apart = []
            for group in optimizer.param_groups:
                ours = [p for p in group["params"] if id(p) in steps]
                group["params"] = [p for p in group["params"] if id(p) not in steps]
                apart.append({**group, "params": ours, "weight_decay": 0.0})
            optimizer.param_groups.extend(group for group in apart if group["params"])

        def put_back(optimizer: torch.optim.Optimizer) -> None:
            groups = home.pop(id(optimizer))
            del optimizer.param_groups[len(groups) :]
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
            with torch.no_grad():
                for key in steps.keys() & stepped(optimizer):
                    steps[key].clamp_(min=before[key] / 2)

        with ExitStack() as around:
            around.enter_context(before_step(run.model, take_out))
            around.enter_context(after_step(run.model, put_back))
            yield


@dataclass(frozen=True, kw_only=True)
class LSQ(Quantizer):
    """Step sizes of weights and inputs are learned with the weights.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        end_bits: Of weights and inputs of the first and the last layer, 2 to 8 (section 3).
    """

    weight_bits: int = 4
    activation_bits: int = 4
    end_bits: int = 8

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "end_bits"):
            _check(name, getattr(self, name))

    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """All layers; the first and the last with `end_bits`."""
        names = default_layers(model)
        choices = dict.fromkeys(names, Bits(weight=self.weight_bits, input=self.activation_bits))
        ends = Bits(weight=self.end_bits, input=self.end_bits)
        return {**choices, names[0]: ends, names[-1]: ends}

    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Gives the chosen layers step sizes; those of inputs wait for data."""
        for name, bits in choices.items():
            if bits.output is not None:
                raise ConfigError(f"LSQ quantizes no outputs, got {bits.output} bits: {name}")
            for part in ("weight", "input"):
                if getattr(bits, part) is not None:
                    _check(f"{part} bits of {name}", getattr(bits, part))
        for name, bits in choices.items():
            layer = model.get_submodule(name)
            weight = layer.get_parameter("weight")
            attach(
                layer,
                weight=None if bits.weight is None else LearnedStep(bits.weight, weight),
                input=None if bits.input is None else LearnedStep(bits.input),
            )

    def calibrate(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
    ) -> None:
        """Sets the step sizes of inputs by the first batch, layer after layer, and nothing else."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        for module in modes:
            if isinstance(module, LearnedStep):
                module.train()
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
                break
        for module, mode in modes.items():
            module.training = mode

    def methods(self, model: nn.Module) -> tuple[TrainingMethod, ...]:
        """Step sizes aren't decayed and stay above 0."""
        return (StepSizes(),)


def _check(name: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ConfigError(
            f"{name} must be between 2 and 8, got {bits}; DoReFa and BNN have one bit"
        )
