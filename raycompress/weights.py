"""The weight store: trained weights by content address, as safetensors.

Whoever trains puts its weights here before the result is used, so that a replayed search loads
them instead of training again, and so that what travels between processes is a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from raycompress.errors import RaycompressError
from raycompress.storage import ObjectPath, Place, place_of, writing

__all__ = ["WeightStore", "Weights", "digest_of_state"]

_EXTRA = "extra:"
CACHE_BYTES = 20_000_000_000
"""Of weights from object stores that a node's disk keeps."""


@dataclass(frozen=True)
class Weights:
    """A state dict, and the channels that it is left with.

    Attributes:
        state: Tensors by name, on the CPU. Shared: never written in place.
        kept: Kept channel indices for each channel group that lost some; empty for dense shapes.
        extra: What a training method leaves beside the state, such as scores.
        quantization: `Quantization.key()` of a quantized model, whose `state` then holds its
            quantizers' too; None in float.
    """

    state: Mapping[str, Tensor]
    kept: Mapping[str, tuple[int, ...]]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None


def digest_of_state(weights: Weights) -> str:
    """SHA-256 over names, shapes, bytes, kept channels and quantization, as 16 hex digits."""
    content = hashlib.sha256()
    tensors = _tensors(weights)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        content.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    kept = {name: list(indices) for name, indices in weights.kept.items()}
    content.update(json.dumps(kept, sort_keys=True).encode())
    if weights.quantization is not None:
        content.update(json.dumps(weights.quantization, sort_keys=True).encode())
    return content.hexdigest()[:16]


def _tensors(weights: Weights) -> dict[str, Tensor]:
    return {**weights.state, **{f"{_EXTRA}{name}": t for name, t in weights.extra.items()}}


class WeightStore:
    """A folder of `<digest>.safetensors`, on storage that all workers see.

    What comes from an object store is kept on the node's own disk, once for all of its processes.

    Args:
        folder: Path or URI; made when something is first put.
    """

    def __init__(self, folder: str | Path | ObjectPath) -> None:
        self.folder = place_of(folder)

    def path(self, digest: str) -> Place:
        """Where the weights of a digest are."""
        return self.folder / f"{digest}.safetensors"

    def put(self, weights: Weights) -> str:
        """Stores weights and returns their digest; the file appears whole or not at all.

        Raises:
            StorageError: There is no space left.
        """
        digest = digest_of_state(weights)
        path = self.path(digest)
        if not path.exists():
            state = {
                # A copy: safetensors refuses tensors that share memory, as tied weights do.
                name: tensor.detach().cpu().contiguous().clone()
                for name, tensor in _tensors(weights).items()
            }
            kept = {name: list(indices) for name, indices in weights.kept.items()}
            metadata = {"kept": json.dumps(kept)}
            if weights.quantization is not None:
                metadata["quantization"] = json.dumps(weights.quantization)
            if isinstance(path, ObjectPath):
                path.write_bytes(save(state, metadata))
                return digest
            with writing(path, sum(tensor.nbytes for tensor in state.values())):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
                os.close(handle)
                try:
                    save_file(state, temporary, metadata=metadata)
                    with open(temporary, "rb") as file:
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                except (OSError, SafetensorError):
                    os.unlink(temporary)  # it would take the room that there is
                    raise
        return digest

    def get(self, digest: str) -> Weights:
        """Loads weights.

        Raises:
            RaycompressError: They aren't there, or are damaged.
        """
        return _read(self._here(digest))

    def kept_counts(self, digest: str) -> dict[str, int]:
        """Number of kept channels by group; reads no tensor. Empty for dense shapes."""
        with safe_open(self._here(digest), framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get("kept", "{}"))
        return {name: len(indices) for name, indices in kept.items()}

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()

    def _here(self, digest: str) -> Path:
        """The file on a disk of this node."""
        path = self.path(digest)
        if isinstance(path, ObjectPath):
            return _cached(path, digest)
        if not path.exists():
            raise RaycompressError(f"weights {digest} are not in {self.folder}")
        return path


def _read(path: Path) -> Weights:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    kept = json.loads(metadata.get("kept", "{}"))
    extra = {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)}
    state = {name: t for name, t in tensors.items() if not name.startswith(_EXTRA)}
    return Weights(
        state,
        {name: tuple(indices) for name, indices in kept.items()},
        extra,
        json.loads(metadata.get("quantization", "null")),
    )


def _cached(path: ObjectPath, digest: str) -> Path:
    """Weights of an object store on this node's disk; checked when they are fetched."""
    folder = _cache()
    file = folder / path.name
    if file.exists():
        with contextlib.suppress(FileNotFoundError):
            os.utime(file)  # what was used last goes last
            return file
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RaycompressError(f"weights {digest} are not in {path.parent}") from None
    temporary = folder / f".{digest}.{os.getpid()}.partial"
    with writing(temporary, len(data)):
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, len(data))
        try:
            temporary.write_bytes(data)
        except OSError:
            temporary.unlink(missing_ok=True)  # it would take the room that there is
            raise
    try:
        found = digest_of_state(_read(temporary))
    except SafetensorError as error:
        found = f"unknown ({error})"
    if found != digest:
        temporary.unlink()
        raise RaycompressError(f"weights {path} are damaged: their digest is {found}")
    os.replace(temporary, file)
    return file


def _cache() -> Path:
    """`$RAYCOMPRESS_CACHE`, or a folder of the user's cache."""
    own = os.environ.get("RAYCOMPRESS_CACHE")
    if own:
        return Path(own) / "weights"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "raycompress" / "weights"


def _make_room(folder: Path, num_bytes: int) -> None:
    """Removes what was used longest ago; files that others have open stay readable."""
    files = []
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room as well
            files.append((file.stat().st_mtime, file.stat().st_size, file))
    total = num_bytes + sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= CACHE_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= size
