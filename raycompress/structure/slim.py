"""Really smaller models, and the way back to dense shapes; graph form is made in `graph.py`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.attention import fit_attention
from raycompress.structure.layers import correct_layer
from raycompress.structure.leaves import tensors_of
from raycompress.structure.model import AnyMasks, Kept, Structure

__all__ = ["cut_tensors", "expand", "slim"]

_Vectors = dict[tuple[str, int], NDArray[np.bool_]]


def slim(
    model: nn.Module,
    structure: Structure,
    kept: Kept | None = None,
    *,
    masks: AnyMasks | None = None,
) -> nn.Module:
    """A copy of the model with only the kept channels, smaller and trainable.

    It is of the same class, or the exported graph if the structure is in graph form (`analyze`).

    Args:
        model: the dense model that was analysed, with any weights.
        structure: its structure.
        kept: group name -> kept channel indices; groups left out stay whole.
        masks: complete masks of whole channels instead of `kept`, see `Structure.kept`.

    Raises:
        StructureError: `kept`, `masks` or the model doesn't fit the structure.
    """
    if (kept is None) == (masks is None):
        raise StructureError("slim takes either kept channels or masks")
    if kept is None:
        assert masks is not None
        kept = structure.kept(masks)
    if structure.plan is not None:
        from raycompress.structure.graph.plan import slim_graph  # it needs `cut_tensors`

        return slim_graph(model, structure, kept)
    # Cut tensors enter the copy through deepcopy's memo, so the dense ones are never copied and
    # tied parameters stay tied.
    memo: dict[int, Any] = dict(cut_tensors(model, structure, kept))
    vectors = structure.keep_vectors(kept)
    tensors = tensors_of(model)
    for name, dim, factors in _narrowed(structure, vectors):
        cut, kept_factors = memo[id(tensors[name])], factors[vectors[name, dim]]
        cut.data *= _along(kept_factors, dim, cut)
    small = copy.deepcopy(model, memo)
    counts = {name: len(index) for name, index in structure.indices(kept).items()}
    sizes = structure.sizes.values(structure.counts(counts))
    modules = dict(small.named_modules())
    for fix in structure.fixes:
        fix.apply(modules[fix.module], int(sizes[fix.size]))
    dense = dict(model.named_modules(remove_duplicate=False))
    cut_in: dict[str, dict[tuple[str, int], NDArray[np.bool_]]] = {}
    for (name, dim), vector in vectors.items():
        for alias in (name, *structure.leaves[name].aliases):
            owner, _, attribute = alias.rpartition(".")
            cut_in.setdefault(owner, {})[attribute, dim] = vector
    for owner, own in cut_in.items():
        correct_layer(small.get_submodule(owner), dense[owner], own)
    fit_attention(small)
    return small


def _narrowed(
    structure: Structure, vectors: _Vectors
) -> Iterator[tuple[str, int, NDArray[np.float64]]]:
    """(parameter, dim, factor of each dense index) of queries whose heads became narrower."""
    for rows in structure.query_rows:
        vector = vectors.get((rows.parameter, rows.dim))
        if vector is not None:
            factors = rows.factors(vector)
            if (factors != 1).any():
                yield rows.parameter, rows.dim, factors


def _along(factors: NDArray[np.float64], dim: int, tensor: Tensor) -> Tensor:
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.from_numpy(factors).to(tensor.device, tensor.dtype).reshape(shape)


def cut_tensors(model: nn.Module, structure: Structure, kept: Kept) -> dict[int, Tensor]:
    """Slim copies of the parameters and buffers that lose something, by the dense one's id."""
    by_name: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, dim), vector in structure.keep_vectors(kept).items():
        by_name.setdefault(name, []).append((dim, torch.from_numpy(np.flatnonzero(vector))))
    result: dict[int, Tensor] = {}
    for name, tensor in _tensors(model, structure, by_name).items():
        if name not in by_name:
            continue
        cut = tensor.detach()
        for dim, index in by_name[name]:
            cut = cut.index_select(dim, index.to(cut.device))
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        result[id(tensor)] = cut
    return result


def _tensors(model: nn.Module, structure: Structure, cut: Collection[str]) -> dict[str, Tensor]:
    """Parameters and buffers by first name, checked against the structure.

    Buffers that aren't cut may have any shape: a forward pass may have made them anew.
    """
    found = tensors_of(model)
    for name, leaf in structure.leaves.items():
        if not leaf.is_parameter and name not in cut:
            continue
        if name not in found or tuple(found[name].shape) != leaf.shape:
            got = tuple(found[name].shape) if name in found else "nothing"
            raise StructureError(
                f"the model isn't the one analysed: {name!r} has shape {got}, not {leaf.shape}"
            )
    return found


def expand(
    structure: Structure, model: nn.Module, slim_state_dict: Mapping[str, Tensor], kept: Kept
) -> dict[str, Tensor]:
    """A dense state dict with the slim weights in place and zeros elsewhere.

    The running variance of removed channels is 1. Loaded into the dense model, it computes what
    the slim model does.

    Args:
        structure: of the dense model.
        model: the dense model, for shapes, dtypes and what isn't in the structure.
        slim_state_dict: of the slim model.
        kept: the indices that the slim model was made with.
    """
    vectors = structure.keep_vectors(kept)
    first = {a: leaf.name for leaf in structure.leaves.values() for a in leaf.aliases}
    result: dict[str, Tensor] = {}
    for key, dense in model.state_dict().items():
        if key not in slim_state_dict:
            raise StructureError(f"the slim state dict lacks {key!r}")
        small = slim_state_dict[key]
        name = first.get(key, key)
        places = {d: v for (n, d), v in vectors.items() if n == name}
        index = [
            torch.from_numpy(np.flatnonzero(places[d])) if d in places else torch.arange(size)
            for d, size in enumerate(dense.shape)
        ]
        expected = tuple(len(i) for i in index)
        if tuple(small.shape) != expected:
            raise StructureError(
                f"slim {key!r} has shape {tuple(small.shape)}, the kept channels give {expected}"
            )
        if not places:
            result[key] = small.clone()
            continue
        fill = 1.0 if key.endswith("running_var") else 0.0
        full = torch.full_like(dense, fill, dtype=small.dtype, device=small.device)
        full[torch.meshgrid(*[i.to(small.device) for i in index], indexing="ij")] = small
        result[key] = full
    for name, dim, factors in _narrowed(structure, vectors):
        for key in (name, *structure.leaves[name].aliases):
            if key in result:
                result[key] /= _along(factors, dim, result[key])
    return result
