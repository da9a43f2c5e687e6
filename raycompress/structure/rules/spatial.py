"""Pooling, interpolation and unfolding: channels pass, labels may not differ along space."""

from __future__ import annotations

from torch import Tensor

from raycompress.structure.labels import Facets, canonical, varying
from raycompress.structure.trace import Call, Rule

__all__ = ["SPATIAL"]


def _along_channels(call: Call, source: Tensor, last: int) -> Facets:
    """Facets without variation along the last dims; a facet only along those is frozen."""
    result = []
    first = source.dim() - last
    for facet in call.facets(source):
        along = [d for d in varying(facet) if d >= first]
        if along and len(along) == len(varying(facet)):
            call.space.freeze(facet, f"size along space is fixed by {call.name}")
            continue
        result.append(call.space.unite_along(facet, along))
    return result


def _pool(call: Call) -> None:
    source: Tensor = call.args[0]
    last = 2
    for digit in "123":
        if f"{digit}d" in call.name:
            last = int(digit)
    facets = _along_channels(call, source, last)
    for out in call.out if isinstance(call.out, (list, tuple)) else [call.out]:
        call.set(out, list(facets))


def _unfold(call: Call) -> None:
    """im2col: (batch, channels, h, w) -> (batch, channels * kernel, positions)."""
    source: Tensor = call.arg("self")
    kernel = call.out.shape[1] // source.shape[1]
    result = []
    for facet in _along_channels(call, source, 2):
        flat = facet.reshape(facet.shape[0], facet.shape[1], 1)
        if facet.shape[1] > 1:
            flat = flat.repeat_interleave(kernel, 1)
        result.append(flat)
    call.set(call.out, result)


def _fold(call: Call) -> None:
    """col2im: (batch, channels * kernel, positions) -> (batch, channels, h, w)."""
    source: Tensor = call.arg("self")
    channels = call.out.shape[1]
    result = []
    for facet in _along_channels(call, source, 1):
        wide = facet.expand(-1, source.shape[1], -1)
        tiled = wide.reshape(facet.shape[0], channels, -1, 1)
        narrow = canonical(call.space.unite_along(tiled, [2]))
        if narrow is not None:
            result.append(narrow)
    call.set(call.out, result)


def _pixel_shuffle(call: Call) -> None:
    """(..., channels * r * r, h, w) -> (..., channels, h * r, w * r)."""
    source: Tensor = call.arg("self")
    dim = source.dim() - 3
    shape = call.out.shape
    result = []
    for facet in _along_channels(call, source, 2):
        if facet.shape[dim] > 1:
            lead = facet.shape[:dim]
            tiled = facet.reshape(*lead, shape[dim], -1, 1, 1)
            facet = call.space.unite_along(tiled, [dim + 1]).squeeze(dim + 1)
        result.append(facet)
    call.set(call.out, result)


def _pixel_unshuffle(call: Call) -> None:
    """(..., channels, h * r, w * r) -> (..., channels * r * r, h, w)."""
    source: Tensor = call.arg("self")
    dim = source.dim() - 3
    repeats = call.out.shape[dim] // source.shape[dim]
    call.set(
        call.out,
        [
            f.repeat_interleave(repeats, dim) if f.shape[dim] > 1 else f
            for f in _along_channels(call, source, 2)
        ],
    )


def _channel_shuffle(call: Call) -> None:
    """(batch, groups * n, ...) -> (batch, n * groups, ...): every group loses the same ones."""
    source: Tensor = call.arg("self")
    groups = int(call.arg("groups"))
    result = []
    for facet in call.facets(source):
        if facet.shape[1] > 1:
            tiled = facet.reshape(facet.shape[0], groups, -1, *facet.shape[2:])
            call.space.keep_rectangular([tiled])
            facet = tiled.transpose(1, 2).reshape(facet.shape)
        result.append(facet)
    call.set(call.out, result)
    call.tracer.saw(source.shape[1], source.shape, call.facets(source), 1)


def _coordinates(call: Call) -> None:
    for tensor in call.tensors():
        for facet in call.facets(tensor):
            call.space.freeze(facet, "coordinates of an affine grid")
    call.set(call.out, [])


def _fourier(call: Call) -> None:
    """A transform mixes positions along its dims; the other dims pass."""
    source: Tensor = call.arg("self")
    dims = {int(d) % source.dim() for d in call.arg("dim")}
    kept = []
    for facet in call.facets(source):
        if dims & set(varying(facet)):
            call.space.freeze(facet, f"{call.name} along channels")
        else:
            kept.append(facet)
    call.set(call.out, kept)


def _grid_sample(call: Call) -> None:
    source: Tensor = call.arg("input")
    for facet in call.facets(call.arg("grid")):
        call.space.freeze(facet, "coordinates of grid_sample")
    call.set(call.out, _along_channels(call, source, source.dim() - 2))


_POOLS = (
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "max_unpool2d max_unpool3d"
).split()

SPATIAL: dict[str, Rule] = {
    **{f"aten::{n}": _pool for n in _POOLS},
    **{f"aten::{n}": _fourier for n in ("_fft_r2c", "_fft_c2r", "_fft_c2c")},
    "aten::pixel_shuffle": _pixel_shuffle,
    "aten::pixel_unshuffle": _pixel_unshuffle,
    "aten::channel_shuffle": _channel_shuffle,
    "aten::native_channel_shuffle": _channel_shuffle,
    "aten::affine_grid_generator": _coordinates,
    "aten::im2col": _unfold,
    "aten::col2im": _fold,
    "aten::grid_sampler_2d": _grid_sample,
    "aten::grid_sampler_3d": _grid_sample,
    "aten::_grid_sampler_2d_cpu_fallback": _grid_sample,
}
