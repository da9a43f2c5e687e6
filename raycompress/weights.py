"""The weight store: trained weights by content address, as safetensors.

Whoever trains puts its weights here before the result is used, so that a replayed search loads
them instead of training again, and so that what travels between processes is a digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raycompress.errors import RaycompressError

__all__ = ["WeightStore", "Weights", "digest_of_state"]

_EXTRA = "extra:"


@dataclass(frozen=True)
class Weights:
    """A state dict, and the channels that it is left with.

    Attributes:
        state: Tensors by name, on the CPU. Shared: never written in place.
        kept: Kept channel indices for each channel group that lost some; empty for dense shapes.
        extra: What a training method leaves beside the state, such as scores.
    """

    state: Mapping[str, Tensor]
    kept: Mapping[str, tuple[int, ...]]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


def digest_of_state(weights: Weights) -> str:
    """SHA-256 over names, shapes, bytes and kept channels, as 16 hex digits."""
    content = hashlib.sha256()
    tensors = _tensors(weights)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        content.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    kept = {name: list(indices) for name, indices in weights.kept.items()}
    content.update(json.dumps(kept, sort_keys=True).encode())
    return content.hexdigest()[:16]


def _tensors(weights: Weights) -> dict[str, Tensor]:
    return {**weights.state, **{f"{_EXTRA}{name}": t for name, t in weights.extra.items()}}


class WeightStore:
    """A folder of `<digest>.safetensors`, on storage that all workers see.

    Args:
        folder: Made when something is first put.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, digest: str) -> Path:
        """Where the weights of a digest are."""
        return self.folder / f"{digest}.safetensors"

    def put(self, weights: Weights) -> str:
        """Stores weights and returns their digest; the file appears whole or not at all."""
        digest = digest_of_state(weights)
        path = self.path(digest)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            state = {
                # A copy: safetensors refuses tensors that share memory, as tied weights do.
                name: tensor.detach().cpu().contiguous().clone()
                for name, tensor in _tensors(weights).items()
            }
            kept = {name: list(indices) for name, indices in weights.kept.items()}
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            os.close(handle)
            save_file(state, temporary, metadata={"kept": json.dumps(kept)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        return digest

    def get(self, digest: str) -> Weights:
        """Loads weights.

        Raises:
            RaycompressError: They aren't there.
        """
        path = self.path(digest)
        if not path.exists():
            raise RaycompressError(f"weights {digest} are not in {self.folder}")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            kept = json.loads((file.metadata() or {}).get("kept", "{}"))
        extra = {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)}
        state = {name: t for name, t in tensors.items() if not name.startswith(_EXTRA)}
        return Weights(state, {name: tuple(indices) for name, indices in kept.items()}, extra)

    def kept_counts(self, digest: str) -> dict[str, int]:
        """Number of kept channels by group; reads no tensor. Empty for dense shapes."""
        with safe_open(self.path(digest), framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get("kept", "{}"))
        return {name: len(indices) for name, indices in kept.items()}

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()
