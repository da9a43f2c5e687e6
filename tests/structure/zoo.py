"""How the zoo tests build, randomise, prune and compare a foreign architecture."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.structure import Structure, Verdict, analyze, slim, verify


@dataclass(frozen=True)
class Architecture:
    """How one architecture is built, without downloads, and fed.

    Attributes:
        build: makes the model with random weights.
        inputs: batch size -> random inputs for `model(*inputs)` or `model(**inputs)`.
        below: why less than 40 % of its parameters can go when half of every group does, or "".
        dtype: float64 wherever the model's code runs in it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    below: str = ""
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Outcome:
    """What pruning half of every group of an architecture gave."""

    verdict: Verdict
    removed: float  # share of parameters removed
    structure: Structure
    dense: nn.Module
    slim: nn.Module


def declare_torchvision_operators() -> None:
    """torchvision's compiled operators don't load beside the CPU build; nothing here calls them.

    Its Python code registers kernels for them on import, which needs their schemas.
    """
    if not hasattr(declare_torchvision_operators, "library"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor a, Tensor b, float c) -> Tensor",
            "qroi_align(Tensor a, Tensor b, float c, int d, int e, int f, bool g) -> Tensor",
            "roi_align(Tensor a, Tensor b, float c, int d, int e, int f, bool g) -> Tensor",
            "_roi_align_backward(Tensor a, Tensor b, float c, int d, int e, int f, int g, int h,"
            " int i, int j, bool k) -> Tensor",
            "roi_pool(Tensor a, Tensor b, float c, int d, int e) -> (Tensor, Tensor)",
            "_roi_pool_backward(Tensor a, Tensor b, Tensor c, float d, int e, int f, int g,"
            " int h, int i, int j) -> Tensor",
            "ps_roi_align(Tensor a, Tensor b, float c, int d, int e, int f) -> (Tensor, Tensor)",
            "_ps_roi_align_backward(Tensor a, Tensor b, Tensor c, float d, int e, int f, int g,"
            " int h, int i, int j, int k) -> Tensor",
            "ps_roi_pool(Tensor a, Tensor b, float c, int d, int e) -> (Tensor, Tensor)",
            "_ps_roi_pool_backward(Tensor a, Tensor b, Tensor c, float d, int e, int f, int g,"
            " int h, int i, int j) -> Tensor",
            "deform_conv2d(Tensor a, Tensor b, Tensor c, Tensor d, Tensor e, int f, int g, int h,"
            " int i, int j, int k, int l, int m, bool n) -> Tensor",
            "_deform_conv2d_backward(Tensor a, Tensor b, Tensor c, Tensor d, Tensor e, Tensor f,"
            " int g, int h, int i, int j, int k, int l, int m, int n, bool o)"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        ):
            library.define(schema)
        declare_torchvision_operators.library = library  # type: ignore[attr-defined]


def missing(*packages: str) -> str:
    """A reason to skip, or ""."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"{', '.join(absent)} not installed (tests/requirements-zoo.txt)" if absent else ""


def randomise(model: nn.Module) -> None:
    """Every parameter and norm buffer: zero gains and tiny layer scales would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise + 0.5)
            elif name.endswith("running_mean") or (tensor.dim() == 1 and tensor.requires_grad):
                tensor.copy_(noise + 0.5 if "norm" in name or "bn" in name else noise - 0.5)
            elif tensor.requires_grad:
                fan = max(tensor[0].numel(), 1)
                tensor.copy_((noise - 0.5) * 3.4 / fan**0.5)


def half(structure: Structure) -> dict[str, Tensor]:
    """Random half of the channels of every group, not the leading ones."""
    generator = torch.Generator().manual_seed(1)
    return {
        g.name: torch.randperm(g.num_channels, generator=generator)[
            : g.round_up((g.num_channels + 1) // 2)
        ]
        for g in structure.groups
    }


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    result = copy.deepcopy(model)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameters[name].data.mul_(mask)
    return result


def prune(architecture: Architecture) -> Outcome:
    """Prunes half of everything and compares on other inputs, of another batch size."""
    torch.manual_seed(0)
    model = architecture.build()
    randomise(model)
    model = model.to(architecture.dtype).eval()
    structure = analyze(model, _cast(architecture.inputs(2), architecture.dtype))
    kept = half(structure)
    small = slim(model, structure, kept)
    other = _cast(architecture.inputs(3), architecture.dtype)
    verdict = verify(
        masked(model, structure.masks(kept)), small, other, structure=structure, kept=kept
    )
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return Outcome(verdict, 1 - after / before, structure, model, small)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return tuple(_cast(v, dtype) for v in value)
