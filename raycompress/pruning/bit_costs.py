"""What a model with so many bits in each layer takes: bytes, bit operations, milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from raycompress.errors import ConfigError
from raycompress.pruning.integer_times import IntegerTimes
from raycompress.quantization.quantizer import default_layers
from raycompress.structure import Structure

__all__ = ["FLOAT", "BitCosts", "Choice", "LayerSize"]

Choice = tuple[int, int | None]
"""Bits of a layer's weight (32: float) and of its input; None: the input stays in float."""

FLOAT = 32
"""Bits of what isn't quantized."""

CHANNEL = 9
"""Bytes beside the codes for each output channel, at most: a scale, a zero point, and the factor
of the norm behind the layer."""

INPUT = 24
"""Bytes of the range of a layer's input."""


@dataclass(frozen=True)
class LayerSize:
    """A layer whose bits are chosen.

    Attributes:
        weights: Numbers in its weight.
        channels: Of its output.
        macs: Multiply-adds of one example.
    """

    weights: int
    channels: int
    macs: int


@dataclass(frozen=True)
class BitCosts:
    """Of one model, dense or pruned.

    Attributes:
        layers: Whose bits are chosen, by name.
        other_bytes: Of all else: biases, norms and layers that stay in float.
        other_macs: Of these.
        float_size: Bytes of the dense model in float.
        float_bit_ops: Bit operations of the dense model in float.
        times: On a runtime; None: nothing was timed.
        float_ms: Of the dense model in float on that runtime.
    """

    layers: Mapping[str, LayerSize]
    other_bytes: int
    other_macs: int
    float_size: int
    float_bit_ops: int
    times: IntegerTimes | None = None
    float_ms: float = 0.0

    @staticmethod
    def of(
        model: nn.Module, structure: Structure, counts: Mapping[str, int] | None = None
    ) -> BitCosts:
        """Of a dense model with kept counts; layers that share their weight stay in float.

        Buffers count as the dense model's.

        Raises:
            ConfigError: No layer can be quantized.
        """
        shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        rows = {row.name: row for row in structure.cost_table(counts)}
        layers = {}
        for name in default_layers(model):
            module = model.get_submodule(name)
            weight = module.get_parameter("weight")
            if shared[id(weight)] > 1 or name not in rows:
                continue
            row = rows[name]
            channels = row.output[-1 if weight.dim() == 2 else 1]
            bias = 0 if getattr(module, "bias", None) is None else channels
            layers[name] = LayerSize(row.params - bias, channels, row.macs)
        if not layers:
            raise ConfigError("no layer has a weight of its own that can be quantized")
        dense, kept = structure.cost(), structure.cost(counts)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        return BitCosts(
            layers,
            4 * (kept.params - sum(layer.weights for layer in layers.values())) + buffers,
            kept.macs - sum(layer.macs for layer in layers.values()),
            4 * dense.params + buffers,
            32 * 32 * dense.macs,
        )

    def size(self, choices: Mapping[str, Choice]) -> int:
        """Bytes of the tensors in a packed file; its header comes on top."""
        total = self.other_bytes
        for name, (bits, given) in choices.items():
            layer = self.layers[name]
            total += -(-layer.weights * bits // 8) + (
                CHANNEL * layer.channels if bits < FLOAT else 0
            )
            total += 0 if given is None else INPUT
        return total

    def bit_ops(self, choices: Mapping[str, Choice]) -> int:
        """Multiply-adds of one example, each times the bits of its weight and of its input."""
        own = sum(
            self.layers[name].macs * bits * (32 if given is None else given)
            for name, (bits, given) in choices.items()
        )
        return own + self.other_macs * 32 * 32

    def latency_ms(self, choices: Mapping[str, Choice]) -> float:
        """Milliseconds of a forward pass, where layers of 32 bits run in float."""
        assert self.times is not None
        return self.times.latency_ms([n for n, (bits, _) in choices.items() if bits == FLOAT])

    def value(self, key: str, choices: Mapping[str, Choice]) -> float:
        """`size`, `bit_ops` or `latency_ms`."""
        costs = {"size": self.size, "bit_ops": self.bit_ops, "latency_ms": self.latency_ms}
        return costs[key](choices)

    def dense(self, key: str) -> float:
        """The same of the dense model in float."""
        whole = {"size": self.float_size, "bit_ops": self.float_bit_ops}
        return {**whole, "latency_ms": self.float_ms}[key]

    def within(self, choices: Mapping[str, Choice], limits: Mapping[str, float]) -> bool:
        """Whether choices meet all limits."""
        return all(self.value(key, choices) <= limit for key, limit in limits.items())
