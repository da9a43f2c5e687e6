"""How the zoo tests build, randomise, prune, compare and train a foreign architecture."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycompress.structure import Structure, Verdict, analyze, slim, verify
from raycompress.structure.leaves import flat

ENOUGH = 0.4  # share of the parameters that goes when half of every group does


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


def images(size: int) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (torch.rand(batch, 3, size, size),)


def need(*packages: str) -> None:
    """Skips, with the reason, where the zoo isn't installed."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        names = ", ".join(absent)
        pytest.skip(f"{names} not installed: pip install --no-deps -r tests/requirements-zoo.txt")
    if "torchvision" in packages:
        _declare_torchvision_operators()


def check(name: str, architecture: Architecture, record: Callable[[str, object], None]) -> None:
    """All that a zoo test asks of an architecture."""
    began = time.process_time()
    outcome = prune(architecture)
    verdict = outcome.verdict
    record(
        "zoo",
        {
            "architecture": name,
            "groups": len(outcome.structure.groups),
            "removed": outcome.removed,
            "verdict": verdict.kind,
            "masked": verdict.max_error,
            "reference": verdict.reference_error,
            "below": architecture.below,
            "seconds": time.process_time() - began,
        },
    )
    assert verdict.kind in ("exact", "inexact"), verdict
    frozen = {f.reason for f in outcome.structure.frozen}
    if architecture.below:
        assert outcome.removed < ENOUGH, "no longer below: take it off the list"
    else:
        assert outcome.removed >= ENOUGH, (outcome.removed, frozen)
    train(outcome, _cast(architecture.inputs(3), architecture.dtype))


def prepared(architecture: Architecture) -> tuple[nn.Module, Structure, Any]:
    """The randomised model, its structure, and other inputs of another batch size."""
    torch.manual_seed(0)
    model = architecture.build()
    randomise(model)
    model = model.to(architecture.dtype)
    _settle(model, _cast(architecture.inputs(4), architecture.dtype))
    structure = analyze(model, _cast(architecture.inputs(2), architecture.dtype))
    return model, structure, _cast(architecture.inputs(3), architecture.dtype)


def prune(architecture: Architecture) -> Outcome:
    """Prunes half of everything and compares."""
    model, structure, other = prepared(architecture)
    kept = half(structure)
    small = slim(model, structure, kept)
    verdict = verify(
        masked(model, structure.masks(kept)), small, other, structure=structure, kept=kept
    )
    assert _responds(small, other, _cast(architecture.inputs(3), architecture.dtype))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return Outcome(verdict, 1 - after / before, structure, model, small)


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
            elif name.endswith("running_mean"):
                tensor.copy_(noise - 0.5)
            elif not tensor.requires_grad:
                continue  # constants of the architecture, such as rotary frequencies
            elif tensor.dim() < 2:
                # Gains and layer scales away from zero; biases may have any value.
                tensor.copy_((noise - 0.5) / 2 if name.endswith("bias") else noise + 0.5)
            else:
                # He's variance: the input must still show in the output of a deep model.
                tensor.copy_((noise - 0.5) * (24 / max(tensor[0].numel(), 1)) ** 0.5)


def _settle(model: nn.Module, inputs: Any) -> None:
    """Random batch statistics near those of the data: the input must show in a deep model."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        _call(model, inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.running_mean is not None:
                norm.running_var *= torch.rand_like(norm.running_var) + 0.5
                norm.running_mean += torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
    model.eval()


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


def train(outcome: Outcome, inputs: Any) -> None:
    """One step: gradients reach what they reach in the dense model, and change it."""
    dense = _backward(outcome.dense, inputs)
    del dense["running"]
    small = outcome.slim
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    found = _backward(small, inputs)
    assert found.pop("running"), "BatchNorm statistics didn't move"
    assert {n for n, g in found.items() if g is not None} == {
        n for n, g in dense.items() if g is not None
    }
    optimizer.step()
    for name, parameter in small.named_parameters():
        grad = found[name]
        if grad is None:
            continue
        assert torch.isfinite(grad).all(), name
        if (0.1 * grad.abs() > 1e-9 * before[name].abs() + 1e-12).any():
            assert not torch.equal(parameter, before[name]), name


def _backward(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Gradients by name in train mode; "running": whether all batch statistics moved."""
    torch.manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    called: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, _a, _o: called.append(m)) for m in norms]
    before = {m: m.running_mean.clone() for m in norms if m.running_mean is not None}
    model.train()
    model.zero_grad(set_to_none=True)
    outputs = [t for t in flat(_call(model, inputs)) if t.requires_grad]
    sum(t.square().mean() for t in outputs).backward()
    for handle in handles:
        handle.remove()
    moved = all(not torch.equal(m.running_mean, before[m]) for m in called if m in before)
    return {"running": moved, **{n: p.grad for n, p in model.named_parameters()}}


def _responds(model: nn.Module, one: Any, other: Any) -> bool:
    """Whether the outputs tell inputs apart: constant ones would agree whatever was cut."""
    model.eval()
    with torch.no_grad():
        a, b = (flat(_call(model, x)) for x in (one, other))
    floats = [(s, t) for s, t in zip(a, b, strict=True) if s.is_floating_point()]
    return all((s - t).abs().max() > 1e-4 * s.abs().max() for s, t in floats)


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return tuple(_cast(v, dtype) for v in value)


def _declare_torchvision_operators() -> None:
    """torchvision's compiled operators don't load beside the CPU build; nothing here calls them.

    Its Python code registers kernels for them on import, which needs their schemas.
    """
    if not hasattr(_declare_torchvision_operators, "library"):
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
        _declare_torchvision_operators.library = library  # type: ignore[attr-defined]
