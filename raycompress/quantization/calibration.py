"""Scales and zero points as files: what was calibrated or trained, without the weights.

`calibration.json` has for each layer and part (weight, input, output) the bits, the scheme, the
integers' range and the shape; `calibration.safetensors` the tensors `<layer>.<part>.scale` and
`<layer>.<part>.zero_point`. Real numbers are scale * (integer - zero point). The scales of a weight
that is "folded" are those of the weight with the BatchNorm behind its layer folded in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raycompress.errors import ArtifactError, ConfigError
from raycompress.quantization.fake_quant import FakeQuantize
from raycompress.quantization.layers import quantized_layers
from raycompress.quantization.lsq import LearnedStep

__all__ = ["CALIBRATION", "export_calibration", "load_calibration"]

CALIBRATION = ("calibration.json", "calibration.safetensors")
"""Names of the two files."""
FORMAT = "raycompress calibration 1"

_Grids = dict[str, dict[str, dict[str, Any]]]


def export_calibration(model: nn.Module, folder: str | Path) -> tuple[Path, Path]:
    """Writes the grids of a quantized model.

    Args:
        model: Quantized by a quantizer with scales: PTQ, QAT, LSQ, Naive; calibrated or trained.
        folder: Is made if it isn't there; files of the same names are replaced.

    Returns:
        The paths of the JSON and of the tensors.

    Raises:
        ConfigError: A layer has no scale, or the model isn't quantized.
    """
    grids, tensors = _grids_of(model)
    for name, parts in grids.items():
        for part, grid in parts.items():
            if not grid.pop("ready"):
                raise ConfigError(
                    f"the {part} of {name!r} has no range: it saw neither calibration data nor a "
                    "training step"
                )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain, values = (folder / name for name in CALIBRATION)
    save_file(tensors, values)
    plain.write_text(json.dumps({"format": FORMAT, "layers": grids}, indent=2) + "\n")
    return plain, values


def load_calibration(model: nn.Module, folder: str | Path) -> None:
    """Gives a prepared model, in place, the grids that were written.

    Args:
        model: Prepared by a quantizer with the same layers, parts, bits and schemes.
        folder: With the two files.

    Raises:
        ConfigError: A layer of the model has no scale, or it isn't quantized.
        ArtifactError: A file is missing or damaged, or doesn't fit the model; it is left alone
            then.
    """
    own, _ = _grids_of(model)
    plain, values = (Path(folder) / name for name in CALIBRATION)
    try:
        content = json.loads(plain.read_text())
        if content["format"] != FORMAT:
            raise ArtifactError(f"{plain} is of format {content['format']!r}, not {FORMAT!r}")
        given: _Grids = {n: {p: dict(g) for p, g in ps.items()} for n, ps in _items(content)}
        tensors = load_file(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} holds no calibration: {error!r}") from error
    problems = _differences(own, given) or _unusable(given, tensors)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ArtifactError(f"{folder} doesn't fit the model: {'; '.join(problems[:5])}{more}")
    for name, layer in quantized_layers(model).items():
        for part in given.get(name, {}):
            quantizer = layer.get_submodule(f"{part}_quantizer")
            key = f"{name}.{part}"
            _set(
                quantizer, given[name][part], tensors[f"{key}.scale"], tensors[f"{key}.zero_point"]
            )


def _items(content: Mapping[str, Any]) -> Any:
    return content["layers"].items()


def _grids_of(model: nn.Module) -> tuple[_Grids, dict[str, Tensor]]:
    """What a model's quantizers are like, with "ready" for those that have a range."""
    grids: _Grids = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized_layers(model).items():
        for part in ("weight", "input", "output"):
            quantizer = getattr(layer, f"{part}_quantizer")
            if quantizer is None:
                continue
            if isinstance(quantizer, FakeQuantize):
                low, high = quantizer.integers
                symmetric, ready = quantizer.symmetric, quantizer.ready
                scale, zero = quantizer.scale, quantizer.zero_point
            elif isinstance(quantizer, LearnedStep):
                low, high = quantizer.low, quantizer.high
                symmetric, ready = low < 0, bool(high)
                scale = quantizer.step.detach()
                zero = torch.zeros(scale.shape, dtype=torch.int32)
            else:
                raise ConfigError(
                    f"the {part} of {name!r} has no scale: a {type(quantizer).__name__} isn't "
                    "affine; those that are come from PTQ, QAT, LSQ and Naive"
                )
            grids.setdefault(name, {})[part] = {
                "bits": quantizer.bits,
                "scheme": "symmetric" if symmetric else "affine",
                "low": low,
                "high": high,
                "shape": list(scale.shape),
                "folded": hasattr(quantizer, "factor"),
                "ready": ready,
            }
            tensors[f"{name}.{part}.scale"] = scale.detach().cpu().contiguous().clone()
            tensors[f"{name}.{part}.zero_point"] = zero.cpu().contiguous().clone()
    if not grids:
        raise ConfigError("the model isn't quantized: no layer has a quantizer")
    return grids, tensors


def _differences(own: _Grids, given: _Grids) -> list[str]:
    """What of the files isn't as in the model, in words."""
    found = [f"it has no layer {name!r}" for name in own if name not in given]
    found += [f"the model quantizes no layer {name!r}" for name in given if name not in own]
    for name in (name for name in own if name in given):
        mine, theirs = own[name], given[name]
        found += [f"it has no {part} of {name!r}" for part in mine if part not in theirs]
        found += [f"the model has no {part} of {name!r}" for part in theirs if part not in mine]
        for part in (part for part in mine if part in theirs):
            for key, value in mine[part].items():
                got = theirs[part].get(key)
                # Before it saw data a step size doesn't know whether its integers have a sign.
                unknown = not mine[part]["ready"] and key in ("low", "high", "scheme")
                if key == "ready" or (unknown and type(got) is type(value)):
                    continue
                if got != value:
                    found.append(f"the {part} of {name!r} has {key} {got!r}, the model's {value!r}")
    return found


def _unusable(given: _Grids, tensors: Mapping[str, Tensor]) -> list[str]:
    """What of the tensors no grid can have, in words."""
    found = []
    for name, parts in given.items():
        for part, grid in parts.items():
            key, shape = f"{name}.{part}", list(grid["shape"])
            missing = [k for k in (f"{key}.scale", f"{key}.zero_point") if k not in tensors]
            if missing:
                found.append(f"tensor {missing[0]!r} is missing")
                continue
            scale, zero = tensors[f"{key}.scale"], tensors[f"{key}.zero_point"]
            if list(scale.shape) != shape or list(zero.shape) != shape:
                found.append(f"{key}: scale of shape {list(scale.shape)}, not {shape}")
            elif not scale.is_floating_point() or not bool(
                (torch.isfinite(scale) & (scale > 0)).all()
            ):
                found.append(f"{key}: a scale isn't a finite number above 0")
            elif not bool(((zero >= grid["low"]) & (zero <= grid["high"])).all()):
                found.append(f"{key}: a zero point is outside of {grid['low']} to {grid['high']}")
    return found


def _set(quantizer: nn.Module, grid: Mapping[str, Any], scale: Tensor, zero: Tensor) -> None:
    with torch.no_grad():
        if isinstance(quantizer, LearnedStep):
            quantizer.low, quantizer.high = grid["low"], grid["high"]
            quantizer.limits.copy_(torch.tensor([grid["low"], grid["high"]]))
            quantizer.step.copy_(scale)
            return
        assert isinstance(quantizer, FakeQuantize)
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero)
        quantizer.low.copy_((grid["low"] - zero) * scale)
        quantizer.high.copy_((grid["high"] - zero) * scale)
        quantizer.ready = True
