"""What replicas are made of: plain data that travels to them, the large parts only once.

Weights travel as arrays of bytes: numpy arrays are mapped, not copied, from Ray's shared memory,
and every dtype (bfloat16, float8, bool) has bytes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch

from raycompress.errors import ClusterError
from raycompress.structure import Structure
from raycompress.units import Evaluation
from raycompress.weights import Weights

__all__ = ["PackedWeights", "PoolSpec", "SharedSpec", "TrialSpec", "import_object"]


def import_object(path: str) -> Any:
    """The object that "package.module:Name" names."""
    module, _, name = path.partition(":")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


@dataclass(frozen=True)
class PackedWeights:
    """Weights as they lie in the object store.

    Attributes:
        digest: Their content address.
        tensors: For each name its bytes (uint8, one dimension), dtype and shape.
        kept: As in `Weights`.
        quantization: As in `Weights`.
    """

    digest: str
    tensors: Mapping[str, tuple[np.ndarray, torch.dtype, tuple[int, ...]]]
    kept: Mapping[str, tuple[int, ...]]
    quantization: Mapping[str, Any] | None = None

    @staticmethod
    def pack(digest: str, weights: Weights) -> PackedWeights:
        """Views weights as bytes."""
        tensors = {}
        for name, tensor in weights.state.items():
            flat = tensor.detach().cpu().contiguous().flatten()
            tensors[name] = (flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))
        return PackedWeights(digest, tensors, dict(weights.kept), weights.quantization)

    def unpack(self) -> Weights:
        """Tensors over the same memory. It is shared by all processes of a node: never write."""
        with warnings.catch_warnings():
            # True, and known: the host copies weights into its model (`load_state_dict`).
            warnings.filterwarnings("ignore", message=".*array is not writable.*")
            state = {
                name: torch.from_numpy(data).view(dtype).view(shape)
                for name, (data, dtype, shape) in self.tensors.items()
            }
        return Weights(state, self.kept, quantization=self.quantization)


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """What the replicas of a job host.

    Attributes:
        task: Import path of the task, "package.module:Class".
        task_args: Its keyword arguments.
        structure: Of its model.
        store: Folder of the weight store, on storage that all nodes see.
        evaluation: Settings.
        import_paths: Absolute folders put on the replicas' `sys.path`, such as the driver's
            current directory.
        weights: Initial weights by digest, shared through the object store.
    """

    task: str
    structure: Structure
    store: str
    task_args: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    import_paths: Sequence[str] = ()
    weights: Mapping[str, Weights] = field(default_factory=dict)

    def share(self) -> SharedSpec:
        """Puts the large parts into the object store, once for any number of pools."""
        if not ray.is_initialized():
            raise ClusterError("Ray isn't connected: use raycompress.distributed.cluster.connect")
        return SharedSpec(
            task=self.task,
            task_args=dict(self.task_args),
            store=str(self.store),
            evaluation=self.evaluation,
            import_paths=tuple(str(path) for path in self.import_paths),
            structure=ray.put(self.structure),
            weights=tuple(
                ray.put(PackedWeights.pack(digest, weights))
                for digest, weights in self.weights.items()
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """A `PoolSpec` whose large parts are in the object store; small, and travels to trials.

    Attributes:
        structure: Reference to the structure.
        weights: References to packed weights.
    """

    task: str
    task_args: Mapping[str, Any]
    store: str
    evaluation: Evaluation
    import_paths: tuple[str, ...]
    structure: Any
    weights: tuple[Any, ...]


@dataclass(frozen=True)
class TrialSpec:
    """One pruner run.

    Attributes:
        name: Deterministic, and usable as a folder's name.
        payload: Plain data for the trial function.
    """

    name: str
    payload: Mapping[str, Any] = field(default_factory=dict)
