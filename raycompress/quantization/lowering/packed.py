"""Quantized weights as a file of as many bits as they have.

No stock kernel computes with fewer than eight bits on CPUs: what is loaded runs in simulation, in
float, with the very numbers that were quantized. The file is small for real.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.artifacts.recipe import apply_recipe, read_recipe, to_recipe, write_recipe
from raycompress.errors import ArtifactError, InputError
from raycompress.plain import from_plain, to_plain
from raycompress.quantization.layers import QuantizedLayer, quantized_layers
from raycompress.quantization.lowering.bits import pack, unpack
from raycompress.quantization.quantizer import Bits, Quantizer

__all__ = ["Packed", "PackedLayer", "load_packed", "save_packed"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weight in the file.

    Attributes:
        name: Of the layer.
        num: Weights.
        bits: Of each code, as many as its values need: at most what was asked; None: in float.
        reason: Why it is in float.
    """

    name: str
    num: int
    bits: int | None
    reason: str = ""


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes:
        path: The file.
        file_bytes: Its size.
        float_bytes: What tensors of the same model take unpacked.
        layers: The quantized layers.
    """

    path: Path
    file_bytes: int
    float_bytes: int
    layers: tuple[PackedLayer, ...]

    def __str__(self) -> str:
        """For people: what is packed, and that it runs in simulation."""
        return f"{self.file_bytes} bytes ({self.float_bytes} in float). {_note(self.layers)}"


def save_packed(
    model: nn.Module, path: str | Path, quantizer: Quantizer, choices: Mapping[str, Bits]
) -> Packed:
    """Writes a quantized model: codes in place of quantized weights, the rest as it is.

    The weights before quantization are not stored: what is loaded isn't trained any further.

    Args:
        model: Prepared (and calibrated, and trained) by `quantizer`; it isn't changed.
        path: Of the file, ending in .safetensors.
        quantizer: That prepared it.
        choices: That it was prepared with.

    Raises:
        ArtifactError: The model can't be stored, or the suffix is another one.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path}: packed weights are .safetensors")
    final = copy.deepcopy(model).eval()
    tied = _tied(final)
    layers, coded = [], {}
    for name, layer in quantized_layers(final).items():
        if layer.weight_quantizer is None:
            continue
        with torch.no_grad():
            weight = layer.quantized_weight().detach()
            codes = _by_grid(layer, weight) or _by_levels(weight)
        if f"{name}.weight" in tied or codes is None:
            reason = "its values are more than 256" if codes is None else "another layer has it too"
            layers.append(PackedLayer(name, weight.numel(), None, reason))
            continue
        layers.append(PackedLayer(name, weight.numel(), codes.bits))
        coded[name] = codes
        layer.weight_quantizer = None
        layer.weight.data = weight
    tensors, recipe = to_recipe(path, final)
    float_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    packed = {}
    for name, codes in coded.items():
        shape = list(tensors.pop(f"{name}.weight").shape)
        packed[name] = {"bits": codes.bits, "shape": shape}
        tensors[f"{name}.weight.codes"] = pack(codes.codes, codes.bits)
        tensors |= {f"{name}.weight.{key}": tensor for key, tensor in codes.tables.items()}
    plain = {name: dataclasses.asdict(bits) for name, bits in choices.items()}
    recipe |= {"packed": packed, "quantizer": to_plain(quantizer), "choices": plain}
    write_recipe(path, tensors, recipe)
    return Packed(path, path.stat().st_size, float_bytes, tuple(layers))


def load_packed(
    path: str | Path, model: nn.Module, quantizer: Quantizer | None = None
) -> nn.Module:
    """Makes a new float instance of the class, in place, the quantized model that was saved.

    Args:
        path: Of the file.
        model: As its class makes it, with the same arguments as the dense model.
        quantizer: That prepared it, if it is your own: a file doesn't say what code is imported.

    Raises:
        ArtifactError: The file is damaged, is of another class, or needs `quantizer`.
    """
    path = Path(path)
    tensors, recipe = read_recipe(path)
    try:
        kind = str(recipe["quantizer"]["type"])
        if quantizer is None and not kind.startswith("raycompress.quantization."):
            raise ArtifactError(f"{path} was quantized by {kind}: pass `quantizer`")
        if quantizer is None:
            quantizer = from_plain(recipe["quantizer"], Quantizer)
        choices = {str(name): Bits(**bits) for name, bits in recipe["choices"].items()}
        packed = {
            str(name): (int(each["bits"]), [int(size) for size in each["shape"]])
            for name, each in recipe["packed"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise ArtifactError(f"{path} holds no packed weights: {error!r}") from error
    weights = {name: _unpack(path, tensors, name, *each) for name, each in packed.items()}
    try:
        quantizer.prepare(model, choices)
    except (AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} doesn't fit a {type(model).__name__}: {error}") from error
    layers = quantized_layers(model)
    for name, weight in weights.items():
        if name not in layers:
            raise ArtifactError(f"{path}: {name!r} is no quantized layer of the model")
        layers[name].weight_quantizer = None
        tensors[f"{name}.weight"] = weight
    apply_recipe(path, model, tensors, recipe)
    # Quantizers take what they know of their buffers when a state dict is loaded.
    model.load_state_dict(model.state_dict())
    found = [PackedLayer(n, weights[n].numel(), bits) for n, (bits, _) in packed.items()]
    _log.info("%s: %s", path, _note(found))
    return model


@dataclass(frozen=True)
class _Codes:
    """A weight as integers and the small tables that give them their values."""

    codes: Tensor
    bits: int
    tables: dict[str, Tensor]


def _by_levels(weight: Tensor) -> _Codes | None:
    """A table of all values that the weight has: for any quantizer at all."""
    levels = torch.unique(weight)
    if len(levels) > 256:
        return None
    bits = max(1, (len(levels) - 1).bit_length())
    return _Codes(torch.searchsorted(levels, weight), bits, {"levels": levels})


def _by_grid(layer: QuantizedLayer, weight: Tensor) -> _Codes | None:
    """A grid's integers from 0, with scales and zero points; None if it isn't on one grid.

    A quantizer's `grid` has scales and zero points, for the tensor or each output channel, the
    lowest integer, and `integers`; its `factor`, if there is one, is what the weight is multiplied
    by before it is rounded, and divided by after.
    """
    quantizer = layer.weight_quantizer
    if not hasattr(quantizer, "grid"):
        return None
    assert quantizer is not None
    grid: Any = quantizer.grid
    zero = (grid.zero_point - grid.low).to(torch.uint8)
    tables = {"scale": grid.scale, "zero_point": zero}
    whole = layer.weight
    if hasattr(quantizer, "factor"):
        factor: Tensor = quantizer.factor(whole)  # type: ignore[operator]
        if factor.numel() != len(whole):
            return None
        tables["factor"] = factor.flatten()
        whole = whole * factor
    codes = grid.integers(whole) - grid.low
    bits = int(quantizer.bits)  # type: ignore[arg-type]
    # To the last bit, or not at all.
    return _Codes(codes, bits, tables) if torch.equal(_values(codes, tables), weight) else None


def _values(codes: Tensor, tables: dict[str, Tensor]) -> Tensor:
    if "levels" in tables:
        return tables["levels"][codes.long()]
    scale = tables["scale"]
    shape = [-1, *[1] * (codes.dim() - 1)] if scale.dim() else []
    zero = tables["zero_point"].to(scale.dtype)
    values = (codes.to(scale.dtype) - zero.view(shape)) * scale.view(shape)
    if "factor" in tables:
        values = values / tables["factor"].view(-1, *[1] * (codes.dim() - 1))
    return values


def _unpack(
    path: Path, tensors: dict[str, Tensor], name: str, bits: int, shape: list[int]
) -> Tensor:
    kinds = ("levels", "scale", "zero_point", "factor")
    keys = {kind: f"{name}.weight.{kind}" for kind in kinds}
    tables = {kind: tensors.pop(key) for kind, key in keys.items() if key in tensors}
    try:
        codes = unpack(tensors.pop(f"{name}.weight.codes"), bits, math.prod(shape))
        return _values(codes.view(shape), tables)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: weights of {name!r}: {error}") from error


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that have other names as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for found in names.values() if len(found) > 1 for name in found}


def _note(layers: Sequence[PackedLayer]) -> str:
    counts: dict[str, int] = {}
    for layer in layers:
        kind = f"{layer.bits} bits" if layer.bits else "float"
        counts[kind] = counts.get(kind, 0) + 1
    stored = ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
    return (
        f"Weights of quantized layers: {stored}. They run in simulation, in float: fewer than 8 "
        "bits have no kernel here, and 8 bits run in integers where a backend lowers them."
    )
