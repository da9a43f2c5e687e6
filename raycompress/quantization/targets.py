"""Which layers are quantized, which of their parts, and with how many bits: NNI's `config_list`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from raycompress.errors import ConfigError
from raycompress.quantization.layers import QUANTIZED
from raycompress.quantization.norms import norms_behind
from raycompress.quantization.quantizer import Bits, Quantizer, check_parts
from raycompress.targets import Target, read_entries
from raycompress.wording import near

__all__ = ["QuantTarget", "choices_of", "quant_config_list"]

Part = Literal["weight", "input", "output"]
PARTS: tuple[Part, ...] = ("weight", "input", "output")


@dataclass(frozen=True, kw_only=True)
class QuantTarget:
    """One entry of the list.

    Attributes:
        op_types: Module class names such as "Conv2d"; "default": all; empty: any.
        op_names: Module names; empty: any.
        op_names_re: Regular expressions that match whole module names; empty: any.
        exclude: Matching layers stay in float.
        quant_types: Parts that are quantized: weight, input, output; empty: the quantizer's own.
        quant_bits: Bits of all parts, or of each, such as {weight: 8, input: 8}; 32: float; None:
            the quantizer's own.
        quant_start_step: Training batches before anything is rounded; None: the quantizer's own.
    """

    op_types: tuple[str, ...] = ()
    op_names: tuple[str, ...] = ()
    op_names_re: tuple[str, ...] = ()
    exclude: bool = False
    quant_types: tuple[Part, ...] = ()
    quant_bits: int | dict[str, int] | None = None
    quant_start_step: int | None = None

    def __post_init__(self) -> None:
        self.target()
        for kind in self.quant_types:
            if kind not in PARTS:
                raise ConfigError(f"quant_types must be of {', '.join(PARTS)}, got {kind!r}")
        if isinstance(self.quant_bits, dict):
            for part, bits in self.quant_bits.items():
                if part not in PARTS:
                    raise ConfigError(
                        f"quant_bits: no part {part!r}{near(part, PARTS)}; there are "
                        f"{', '.join(PARTS)}"
                    )
                if self.quant_types and part not in self.quant_types:
                    raise ConfigError(f"quant_bits: {part!r} is none of quant_types")
                _check_bits(f"quant_bits.{part}", bits)
        elif self.quant_bits is not None:
            _check_bits("quant_bits", self.quant_bits)
        start = self.quant_start_step
        if start is not None and (type(start) is not int or start < 0):
            raise ConfigError(f"quant_start_step must be an integer, 0 or more, got {start!r}")
        asked = self.quant_types or self.quant_bits or self.quant_start_step
        if self.exclude and asked:
            raise ConfigError("an entry with exclude can't have quant_types, quant_bits or a start")

    def target(self) -> Target:
        """The part that says which layers."""
        return Target(
            op_types=self.op_types,
            op_names=self.op_names,
            op_names_re=self.op_names_re,
            exclude=self.exclude,
        )

    def bits(self, default: Bits, quantizer: Quantizer) -> Bits:
        """What is asked for, where the entry is silent the default."""
        own = {part: getattr(default, part) for part in PARTS}
        if isinstance(self.quant_bits, dict):
            parts = self.quant_types or tuple(p for p in PARTS if p in self.quant_bits)
            values = {part: self.quant_bits.get(part, own[part]) for part in parts}
        else:
            parts = self.quant_types or tuple(p for p in PARTS if own[p] is not None)
            values = {p: own[p] if self.quant_bits is None else self.quant_bits for p in parts}
        for part, bits in values.items():
            if bits is None:
                raise ConfigError(f"quant_bits: {type(quantizer).__name__} must be told {part}'s")
        start = default.start_step if self.quant_start_step is None else self.quant_start_step
        kept = {part: bits for part, bits in values.items() if bits != 32}
        return Bits(**kept, start_step=start)


def _check_bits(key: str, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= 8 or bits == 32):
        raise ConfigError(f"{key} must be between 1 and 8 (32: float), got {bits!r}")


def quant_config_list(
    entries: Iterable[Mapping[str, Any] | QuantTarget],
) -> tuple[QuantTarget, ...]:
    """Entries from plain mappings, such as [{"quant_bits": 8, "op_types": ["Conv2d"]}].

    Raises:
        ConfigError: No list, or an unknown key, with what it may have meant.
    """
    targets = []
    for index, entry in read_entries(entries, QuantTarget):
        if isinstance(entry, QuantTarget):
            targets.append(entry)
            continue
        try:
            targets.append(QuantTarget(**entry))
        except ConfigError as error:
            raise ConfigError(f"config_list[{index}]: {error}") from None
    return tuple(targets)


def choices_of(
    model: nn.Module,
    quantizer: Quantizer,
    targets: Sequence[QuantTarget],
    example_inputs: tuple[Any, ...],
) -> dict[str, Bits]:
    """Bits of each layer that is quantized, by name, with the norm behind it.

    Later entries win where they overlap. With entries that only exclude, everything else is as the
    quantizer chooses.

    Args:
        model: In float, on the CPU.
        quantizer: Chooses where nothing is asked for.
        targets: Empty: the quantizer chooses.
        example_inputs: For one forward pass, to find norms.

    Raises:
        ConfigError: An entry matches nothing, or what can't be quantized; bits that the quantizer
            doesn't have; nothing is left.
    """
    layers = {n: type(m).__name__ for n, m in model.named_modules() if type(m) in QUANTIZED}
    chosen: dict[str, Bits] = {}
    if all(entry.exclude for entry in targets):
        chosen = quantizer.choose(model)
    for index, entry in enumerate(targets):
        matching = _matching(model, entry, layers, f"config_list[{index}]")
        for name in matching:
            chosen.pop(name, None)
            if not entry.exclude:
                defaults = quantizer.choose(model)
                default = defaults.get(name, next(iter(defaults.values())))
                try:
                    chosen[name] = entry.bits(default, quantizer)
                except ConfigError as error:
                    raise ConfigError(f"config_list[{index}].{error}") from None
    if not chosen:
        raise ConfigError("config_list excludes every layer that could be quantized")
    check_parts(quantizer, chosen)
    norms = norms_behind(model, example_inputs)
    return {name: replace(bits, norm=norms.get(name, "")) for name, bits in chosen.items()}


def _matching(
    model: nn.Module, entry: QuantTarget, layers: Mapping[str, str], key: str
) -> list[str]:
    modules = {name: type(module).__name__ for name, module in model.named_modules() if name}
    allowed = ", ".join(kind.__name__ for kind in QUANTIZED)
    for name in entry.op_names:
        if name not in modules:
            raise ConfigError(f"{key}.op_names: no layer {name!r}{near(name, layers)}")
        if name not in layers:
            raise ConfigError(
                f"{key}.op_names: {name!r} is of type {modules[name]}, which can't be quantized; "
                f"those that can are {allowed}"
            )
    for kind in entry.op_types:
        if kind == "default" or kind in layers.values():
            continue
        if kind in modules.values():
            raise ConfigError(
                f"{key}.op_types: {kind} can't be quantized; those that can are {allowed}"
            )
        raise ConfigError(
            f"{key}.op_types: the model has no layer of type {kind!r}"
            f"{near(kind, sorted(set(layers.values())))}"
        )
    target = entry.target()
    matching = [name for name, kind in layers.items() if target.matches(name, kind)]
    if not matching:
        raise ConfigError(f"{key}: no layer that can be quantized matches")
    return matching
