"""Cross-layer equalisation (Nagel et al. 2019, arXiv 1906.04721, section 4.1).

Between two layers with f(s x) = s f(x) for s > 0, such as ReLU, channel i can be divided by s_i in
the first and multiplied by it in the second: the net stays the same, and s_i = sqrt(r1_i r2_i) /
r2_i (equation 11) gives both the range sqrt(r1_i r2_i) there, so that one scale for all channels
suits all of them. The paper's absorption of high biases isn't done: the observers see the inputs.

Shapes: C channels between the two layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.quantization.fake_quant import FakeQuantize
from raycompress.quantization.layers import in_float, quantized_layers
from raycompress.quantization.qat import FoldedWeight
from raycompress.structure import ChannelGroup, analyze
from raycompress.structure.leaves import flat, mapped
from raycompress.structure.readers import noise_like

__all__ = ["Pair", "equalize", "pairs_of"]

SWEEPS = 100
TOLERANCE = 1e-3
"""Of |log2 s|: a pair that is so close to equal is left alone."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers with C channels between them, and nothing that stops scaling them.

    Attributes:
        first: The name of the layer that makes them.
        norm: Of the BatchNorm behind it that is folded in; "" if there is none.
        second: Of the layer that alone reads them.
        rows: Each channel's index in the first layer's outputs, shape (C,).
        columns: Each channel's indices in the second layer's inputs, shape (C, multiplicity).
        depthwise: Whether the second has one input for each output: its rows are scaled.
    """

    first: str
    norm: str
    second: str
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    depthwise: bool

    def ranges(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """r1 and r2, the largest weight of each channel with norms folded in; each of shape (C,).

        The paper's are twice these, which s doesn't depend on.
        """
        first = _folded(model.get_submodule(self.first)).abs().flatten(1).amax(dim=1)
        second = _folded(model.get_submodule(self.second)).abs()
        if not self.depthwise:
            second = second.transpose(0, 1)
        each = second.flatten(1).amax(dim=1)[torch.from_numpy(self.columns)]
        return first[torch.from_numpy(self.rows)], each.amax(dim=1)

    def scale(self, model: nn.Module, s: Tensor) -> None:
        """Divides the channels in the first layer and multiplies them in the second.

        Args:
            model: In place.
            s: Shape (C,), above 0.
        """
        maker = model.get_submodule(self.norm or self.first)
        second = model.get_submodule(self.second).get_parameter("weight").data
        inverse = torch.ones(len(maker.get_parameter("weight"))).to(second)
        inverse[torch.from_numpy(self.rows)] = 1 / s.to(second)
        for tensor in (maker.weight, maker.bias, getattr(maker, "float_bias", None)):
            if isinstance(tensor, Tensor):
                tensor.data.mul_(inverse.view(-1, *[1] * (tensor.dim() - 1)))
        dim = 0 if self.depthwise else 1
        factors = torch.ones(second.shape[dim]).to(second)
        factors[torch.from_numpy(self.columns)] = s.to(second)[:, None]
        second.mul_(factors.view(*[1] * dim, -1, *[1] * (second.dim() - dim - 1)))


def equalize(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batch: Any
) -> tuple[Pair, ...]:
    """Equalises all pairs, in place, until none moves; a second time then changes nothing.

    Args:
        model: Prepared, in eval mode.
        forward: `forward(model, batch)`.
        batch: On which the pairs are found.

    Returns:
        The pairs.
    """
    pairs = pairs_of(model, forward, batch)
    for _ in range(SWEEPS):
        moved = False
        for pair in pairs:
            first, second = pair.ranges(model)
            # A channel that is 0 on either side, or as good as, has no range to share.
            alive = (first > 1e-8 * first.max()) & (second > 1e-8 * second.max())
            s = torch.where(alive, (first / second).sqrt(), 1.0)
            if bool((s.log2().abs() > TOLERANCE).any()):
                pair.scale(model, s)
                moved = True
        if not moved:
            break
    for layer in quantized_layers(model).values():
        if isinstance(layer.weight_quantizer, FakeQuantize):
            layer.weight_quantizer.settle(layer.weight)
    return pairs


def pairs_of(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batch: Any
) -> tuple[Pair, ...]:
    """Pairs of quantized layers whose channels can be scaled without changing the model.

    Which layers share channels comes from the model's structure; that whatever lies between them
    lets scales through is proven by running it. Powers of two up and down, on the batch and on the
    same numbers in another order, must change no bit of the outputs. A channel that several layers
    read, or that is a sum, is in no pair, nor are those of grouped convolutions but depthwise ones.

    Args:
        model: Prepared, in eval mode; only read.
        forward: `forward(model, batch)`.
        batch: In any containers.
    """
    with in_float(model):
        plain = copy.deepcopy(model).cpu()
    batch = mapped(batch, lambda x: x.cpu() if isinstance(x, Tensor) else x)
    # A function, not a method: what copies the model then doesn't copy the method's owner.
    called = _Called(plain, lambda model, batch: forward(model, batch))
    names = {id(module): name for name, module in model.named_modules()}
    norms = {
        name: names[id(layer.weight_quantizer.norm)]
        for name, layer in quantized_layers(model).items()
        if isinstance(layer.weight_quantizer, FoldedWeight)
    }
    quantized = [*quantized_layers(model)]
    found = [
        pair
        for group in analyze(called, (batch,), form="module").groups
        for pair in _candidates(group, plain, quantized, norms)
    ]
    batches = [batch, noise_like(batch, torch.Generator().manual_seed(0))]
    if _proven(called, found, batches):
        return tuple(found)
    return tuple(pair for pair in found if _proven(called, [pair], batches))


class _Called(nn.Module):
    """A model with the way it is called; also as a copy."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, batch: Any) -> Any:
        return self.run(self.model, batch)


def _candidates(
    group: ChannelGroup, model: nn.Module, quantized: Sequence[str], norms: dict[str, str]
) -> Iterator[Pair]:
    """Pairs of neighbours, where a group's channels pass from one layer to the next."""
    makers: dict[str, NDArray[np.int64]] = {}
    readers: dict[str, NDArray[np.int64]] = {}
    for member in group.members:
        layer, _, last = member.parameter.removeprefix("model.").rpartition(".")
        if last != "weight" or member.role not in ("producer", "consumer"):
            continue
        if layer not in quantized:
            return
        (makers if member.role == "producer" else readers)[layer] = member.indices
    if len(readers) != 1:
        return
    order = [name for name in quantized if name in makers]
    starts = [name for name in order if not _is_depthwise(model.get_submodule(name))]
    (reader, columns), *_ = readers.items()
    if (
        len(starts) != 1
        or reader in makers
        or getattr(model.get_submodule(reader), "groups", 1) > 1
    ):
        return
    chain = [*starts, *(name for name in order if name not in starts)]
    if any(makers[name].shape[1] != 1 for name in chain):
        return
    for first, second in zip(chain, [*chain[1:], reader], strict=True):
        deep = second != reader
        norm = norms.get(first, "")
        if norm and not model.get_submodule(norm).affine:
            continue
        yield Pair(
            first=first,
            norm=norm,
            second=second,
            rows=makers[first][:, 0],
            columns=makers[second] if deep else columns,
            depthwise=deep,
        )


def _is_depthwise(layer: nn.Module) -> bool:
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == layer.in_channels == layer.out_channels


def _proven(called: _Called, pairs: Sequence[Pair], batches: Sequence[Any]) -> bool:
    if not pairs:
        return True
    for sign in (1, -1):
        scaled = copy.deepcopy(called)
        for pair in pairs:
            channels = torch.arange(len(pair.rows))
            powers = sign * (2 * (channels % 2) - 1) * (8 + channels % 5)
            pair.scale(scaled.model, torch.ldexp(torch.ones(len(channels)), powers))
        for batch in batches:
            with torch.no_grad():
                exact, other = flat(called(batch)), flat(scaled(batch))
            if not all(torch.equal(a, b) for a, b in zip(exact, other, strict=True)):
                return False
    return True


def _folded(layer: nn.Module) -> Tensor:
    """A layer's weight with the norm behind it folded in."""
    weight = layer.get_parameter("weight").detach()
    quantizer = layer.weight_quantizer
    return weight * quantizer.factor(weight) if isinstance(quantizer, FoldedWeight) else weight
