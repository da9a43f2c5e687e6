"""Quantized weights as a file of as many bits as they have.

No stock kernel computes with fewer than eight bits on CPUs: what is loaded runs in simulation, in
float, with the very numbers that were quantized. The file is small for real.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.artifacts.recipe import apply_recipe, read_recipe, to_recipe, write_recipe
from raycompress.errors import ArtifactError
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
    """Writes a quantized model: codes and levels in place of quantized weights, the rest as it is.

    The weights before quantization are not stored: what is loaded isn't trained any further.

    Args:
        model: Prepared (and trained) by `quantizer`; it isn't changed.
        path: Of the file, ending in .safetensors.
        quantizer: That prepared the model.
        choices: That it was prepared with.

    Raises:
        ArtifactError: The model can't be stored, or the suffix is another one.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path}: packed weights are .safetensors")
    final = copy.deepcopy(model).eval()
    tied = _tied(final)
    layers, codes = [], {}
    for name, layer in quantized_layers(final).items():
        if layer.weight_quantizer is None:
            continue
        with torch.no_grad():
            weight = layer.quantized_weight().detach()
        levels = torch.unique(weight)
        reason = ""
        if f"{name}.weight" in tied:
            reason = "another layer has the same weight"
        elif len(levels) > 256:
            reason = f"it has {len(levels)} different values"
        if reason:
            layers.append(PackedLayer(name, weight.numel(), None, reason))
            continue
        bits = max(1, (len(levels) - 1).bit_length())
        layers.append(PackedLayer(name, weight.numel(), bits))
        codes[name] = (pack(torch.searchsorted(levels, weight), bits), levels)
        _finalize(layer, weight)
    tensors, recipe = to_recipe(path, final)
    float_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    shapes = {}
    for name, (packed, levels) in codes.items():
        shapes[name] = list(tensors.pop(f"{name}.weight").shape)
        tensors[f"{name}.weight.codes"], tensors[f"{name}.weight.levels"] = packed, levels
    bits_of = {layer.name: layer.bits for layer in layers if layer.bits is not None}
    recipe["packed"] = {n: {"bits": bits_of[n], "shape": shapes[n]} for n in codes}
    recipe["quantizer"] = to_plain(quantizer)
    recipe["choices"] = {name: dataclasses.asdict(bits) for name, bits in choices.items()}
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
        plain = dict(recipe["quantizer"])
        if quantizer is None and not str(plain["type"]).startswith("raycompress.quantization."):
            raise ArtifactError(f"{path} was quantized by {plain['type']}: pass `quantizer`")
        quantizer = from_plain(plain, Quantizer) if quantizer is None else quantizer
        choices = {str(name): Bits(**bits) for name, bits in recipe["choices"].items()}
        packed = {
            str(name): (int(each["bits"]), [int(size) for size in each["shape"]])
            for name, each in recipe["packed"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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
    _log.info(
        "%s: %s",
        path,
        _note([PackedLayer(n, weights[n].numel(), bits) for n, (bits, _) in packed.items()]),
    )
    return model


def _finalize(layer: QuantizedLayer, weight: Tensor) -> None:
    layer.weight_quantizer = None
    layer.weight.data = weight


def _unpack(
    path: Path, tensors: dict[str, Tensor], name: str, bits: int, shape: list[int]
) -> Tensor:
    num = 1
    for size in shape:
        num *= size
    try:
        codes = unpack(tensors.pop(f"{name}.weight.codes"), bits, num)
        levels = tensors.pop(f"{name}.weight.levels")
        return levels[codes.long()].view(shape)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: weights of {name!r}: {error}") from error


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that have other names as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for found in names.values() if len(found) > 1 for name in found}


def _note(layers: Any) -> str:
    counts: dict[str, int] = {}
    for layer in layers:
        kind = f"{layer.bits} bits" if layer.bits else "float"
        counts[kind] = counts.get(kind, 0) + 1
    stored = ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
    return (
        f"Weights of quantized layers: {stored}. They run in simulation, in float: there is no "
        "kernel for them here."
    )
