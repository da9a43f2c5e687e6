"""Normalisations: parameters follow the channels; statistics across channels are inexact."""

from __future__ import annotations

from torch import Tensor

from raycompress.structure.labels import Facets, varying
from raycompress.structure.merge import merge
from raycompress.structure.trace import Call, Rule

__all__ = ["NORMS", "in_training"]


def _follow(call: Call, facets: Facets, shape: tuple[int, ...], at: int, names: str) -> Facets:
    """Merges affine parameters and statistics, whose last dim lies at dim `at` of the input."""
    for name in names.split():
        tensor: Tensor | None = call.before.get(name)
        if tensor is None:
            continue
        own = call.facets(tensor)
        call.tracer.role(own, "norm")
        lead = at + 1 - tensor.dim()
        trail = len(shape) - at - 1
        wide = [f.reshape((1,) * lead + tuple(f.shape) + (1,) * trail) for f in own]
        wide_shape = (1,) * lead + tuple(tensor.shape) + (1,) * trail
        facets = merge(call.space, facets, shape, wide, wide_shape)
    return facets


def _weight_norm(call: Call) -> None:
    """Masked filters have norm 0, by which the parametrization divides: nothing can be masked."""
    reason = (
        f"weight norm in {call.tracer.module!r}: remove the parametrization first "
        "(torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.remove_weight_norm)"
    )
    for tensor in call.tensors():
        for facet in call.facets(tensor):
            call.space.freeze(facet, reason)
    call.set(call.out[0], [])


def in_training(call: Call) -> bool:
    """Whether a batch norm uses the statistics of its own input, over all dims but 1."""
    return call.name == "aten::_batch_norm_with_update" or bool(call.before.get("training", False))


def _batch_norm(call: Call) -> None:
    source: Tensor = call.arg("input")
    if in_training(call):  # so weights are standardised, whose other dims are channels too
        for facet in call.facets(source):
            if any(d != 1 for d in varying(facet)):
                reason = f"batch norm over channels in {call.tracer.module!r}"
                call.space.mark_inexact(facet, reason)
    facets = _follow(
        call,
        list(call.facets(source)),
        tuple(source.shape),
        1,
        "weight bias running_mean running_var",
    )
    call.set(call.out[0], facets)
    for statistic in call.out[1:3]:
        if statistic.numel() == source.shape[1]:
            call.set(statistic, [f.reshape(-1) for f in facets if varying(f) == (1,)])


def _layer_norm(call: Call) -> None:
    source: Tensor = call.arg("input")
    dims = set(range(source.dim() - len(call.arg("normalized_shape")), source.dim()))
    facets = list(call.facets(source))
    for facet in facets:
        if set(varying(facet)) & dims:
            call.space.mark_inexact(facet, f"LayerNorm {call.tracer.module!r}")
    for statistic in call.out[1:3]:
        call.set(statistic, [f for f in facets if not set(varying(f)) & dims])
    call.set(
        call.out[0], _follow(call, facets, tuple(source.shape), source.dim() - 1, "weight bias")
    )
    for dim in sorted(dims):
        call.tracer.saw(source.shape[dim], source.shape, call.facets(call.out[0]), dim)


def _rms_norm(call: Call) -> None:
    source: Tensor = call.arg("input")
    dims = set(range(source.dim() - len(call.arg("normalized_shape")), source.dim()))
    facets = list(call.facets(source))
    for facet in facets:
        if set(varying(facet)) & dims:
            call.space.mark_inexact(facet, f"RMSNorm {call.tracer.module!r}")
    out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
    call.set(out, _follow(call, facets, tuple(source.shape), source.dim() - 1, "weight"))


def _group_norm(call: Call) -> None:
    """Whole groups go where there are several: that keeps the result exact."""
    source: Tensor = call.arg("input")
    groups = int(call.arg("group"))
    facets = list(call.facets(source))
    channels = source.shape[1]
    for statistic in call.out[1:3]:  # (batch, groups)
        step = channels // groups
        call.set(
            statistic,
            [
                f[:, ::step].reshape(f.shape[0], -1)
                for f in facets
                if groups > 1 and all(d < 2 for d in varying(f))
            ],
        )
    for facet in facets:
        if facet.shape[1] == 1:
            continue
        if groups == 1:
            call.space.mark_inexact(facet, f"GroupNorm {call.tracer.module!r} with one group")
        elif groups < channels:
            shape = (facet.shape[0], groups, channels // groups, *facet.shape[2:])
            tiled = facet.reshape(shape)
            call.space.unite_along(tiled, [2])
            call.tracer.saw(groups, shape, [tiled], 1, "num_groups")
        else:
            call.tracer.saw(groups, source.shape, [facet], 1, "num_groups")
    call.set(call.out[0], _follow(call, facets, tuple(source.shape), 1, "weight bias"))


NORMS: dict[str, Rule] = {
    "aten::_weight_norm_interface": _weight_norm,
    **{
        f"aten::{n}": _batch_norm
        for n in (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "batch_norm",
            "cudnn_batch_norm",
        )
    },
    "aten::native_layer_norm": _layer_norm,
    "aten::native_group_norm": _group_norm,
    "aten::_fused_rms_norm": _rms_norm,
    "aten::rms_norm": _rms_norm,
}
