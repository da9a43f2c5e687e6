"""Attributes of torch's own layers that only repeat the shapes of their parameters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

__all__ = ["correct_layer"]

_GATES = {"LSTM": 4, "GRU": 3}


def correct_layer(
    module: nn.Module, dense: nn.Module, kept: dict[tuple[str, int], NDArray[np.bool_]]
) -> None:
    """Makes the attributes of a slim layer those of its parameters.

    Args:
        module: the slim layer.
        dense: the layer that it was cut from.
        kept: which indices stay, by (parameter, dim) of this layer, each of shape (size,).
    """
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.weight if module.affine else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if module.affine:
            module.num_channels = len(module.weight)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        recurrent = module.get_parameter("weight_hh_l0")
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        module.hidden_size = recurrent.shape[0] // _GATES.get(module.mode, 1)
        if module.proj_size:
            module.proj_size = recurrent.shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = (
            module.weight_hh.shape[1],
            module.weight_ih.shape[1],
        )
    elif type(module) is nn.MultiheadAttention:
        assert isinstance(dense, nn.MultiheadAttention)
        _correct_attention(module, dense, kept)


def _correct_attention(
    module: nn.MultiheadAttention,
    dense: nn.MultiheadAttention,
    kept: dict[tuple[str, int], NDArray[np.bool_]],
) -> None:
    packed = module.in_proj_weight is not None
    rows = kept.get(("in_proj_weight" if packed else "q_proj_weight", 0))
    if rows is not None:
        queries = rows[: dense.embed_dim].reshape(dense.num_heads, dense.head_dim)
        module.num_heads = int(queries.any(axis=1).sum())
        module.head_dim = int(queries.any(axis=0).sum())
    if packed:
        width = module.in_proj_weight.shape[1]
        module.embed_dim = module.kdim = module.vdim = width
    else:
        assert module.q_proj_weight is not None
        assert module.k_proj_weight is not None and module.v_proj_weight is not None
        module.embed_dim = module.q_proj_weight.shape[1]
        module.kdim = module.k_proj_weight.shape[1]
        module.vdim = module.v_proj_weight.shape[1]
