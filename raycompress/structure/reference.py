"""What a slim model must compute where operations across channels see the kept channels only.

The masked dense model runs at its full size, with labels beside every tensor (`trace.py`). The
labels of its parameters say which positions of each tensor are gone, and `kept_only.py` runs the
operations across channels without those. Everything else runs as written: no parameter is cut and
no attribute corrected, so a mistake of `slim` shows as a difference.

An operator with a rule of the user's own also runs as written, and so does arithmetic with sizes
that the code of a module reads. One case is told apart: a sum that is divided by the number of its
positions is a mean, if that number was read from the shape; see `by_kept`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.graph.handlers import HANDLERS
from raycompress.structure.graph.trace import GraphTrace
from raycompress.structure.kept_only import OnKept, Positions
from raycompress.structure.labels import LabelSpace, varying
from raycompress.structure.leaves import tensors_of
from raycompress.structure.model import Kept, Structure
from raycompress.structure.rules.operators import find_rule
from raycompress.structure.trace import Trace, trace

__all__ = ["Reference", "run_on_kept"]


@dataclass(frozen=True)
class Reference:
    """The output of the masked model whose operations across channels see kept channels only.

    Attributes:
        output: what the model returned.
        operations: the operations whose result differs from that over all channels.
        divides: whether `by_kept` makes a difference.
    """

    output: Any
    operations: tuple[str, ...]
    divides: bool


def run_on_kept(
    masked: nn.Module,
    structure: Structure,
    kept: Kept,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    by_kept: bool = False,
) -> Reference:
    """Runs the masked dense model so that operations across channels see kept channels only.

    Args:
        masked: the dense model with zeros in place of what was removed.
        structure: of the dense model.
        kept: group name -> kept channel indices; groups left out are whole.
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        by_kept: a sum divided by the dense number of its positions is divided by the kept number
            instead, as the code does where it reads that number from the shape.

    Raises:
        StructureError: `kept` doesn't fit, the model isn't zero where it says so, or what is
            removed doesn't fit together on these inputs.
    """
    vectors = structure.keep_vectors(kept)
    parameters = dict(masked.named_parameters(remove_duplicate=False))
    for (name, dim), keep in vectors.items():
        if not structure.leaves[name].is_parameter:
            continue
        if name not in parameters or parameters[name].shape != structure.leaves[name].shape:
            raise StructureError(f"the masked model has no parameter {name!r} of the dense shape")
        removed = torch.from_numpy(np.flatnonzero(~keep)).to(parameters[name].device)
        if bool(parameters[name].detach().index_select(dim, removed).any()):
            raise StructureError(f"the masked model isn't zero where `kept` says so: {name!r}")
    gone = _Gone(vectors)
    runner = OnKept(gone.kept, by_kept)
    if structure.plan is None:
        seen = trace(masked, args, kwargs, find_rule, runner)
    else:  # what its code creates has the sizes that the exported graph says
        graph = GraphTrace(structure.plan.program, tensors_of(masked), HANDLERS)
        seen = trace(masked, args, kwargs, graph.find, runner, graph.run)
    gone.check(seen)
    return Reference(seen.output, tuple(runner.operations), runner.divides)


class _Gone:
    """Which labels are gone: those of removed indices, and conjunctions of such alone."""

    def __init__(self, keep: dict[tuple[str, int], NDArray[np.bool_]]) -> None:
        self._keep = keep
        self._flags = np.zeros(1, dtype=np.bool_)
        self._read: set[int] = set()
        self._conjunctions = 0
        self._edges = 0
        self._links: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def update(self, tracer: Trace) -> NDArray[np.bool_]:
        """One flag for each label that the trace has made so far, shape (labels,)."""
        space, flags = tracer.space, self._flags
        if len(flags) == space.count and len(space.edges) == self._edges:
            return flags
        flags = np.concatenate([flags, np.zeros(space.count - len(flags), dtype=np.bool_)])
        for number, leaf in enumerate(tracer.leaves):
            if leaf.facets is None or number in self._read:
                continue
            self._read.add(number)
            for dim, start in enumerate(leaf.starts):
                keep = self._keep.get((leaf.name, dim))
                if start and keep is not None:
                    flags[start : start + len(keep)] = ~keep
        follows = np.zeros(space.count, dtype=np.bool_)
        for start, stop in space.flexible:
            follows[start:stop] = True
        if space.flexible:
            for a, b in space.edges[self._edges :]:
                self._links += [(x[follows[x]], y[follows[x]]) for x, y in ((a, b), (b, a))]
        new = space.conjunctions[self._conjunctions :]
        self._edges, self._conjunctions = len(space.edges), len(space.conjunctions)
        while True:
            for c in new:
                flags[c.ids] = flags[c.children].all(axis=1)
            before = flags.sum()
            for mine, other in self._links:  # what belongs to no parameter goes with what it meets
                flags[mine[flags[other]]] = True
            if flags.sum() == before:
                break
            new = space.conjunctions
        self._flags = flags
        return flags

    def kept(self, tracer: Trace, tensor: Tensor) -> Positions:
        """Kept indices along each dim of a tensor that has lost something."""
        flags = self.update(tracer)
        found: Positions = {}
        for facet in tracer.facets(tensor):
            gone = torch.from_numpy(flags[facet.numpy()])
            if not gone.any():
                continue
            union = torch.zeros_like(gone)
            for dim in varying(facet):
                others = tuple(d for d in range(gone.dim()) if d != dim)
                line = gone.all(dim=others) if others else gone
                if line.any():
                    shape = [1] * gone.dim()
                    shape[dim] = -1
                    union |= line.reshape(shape)
                    before = found.get(dim)
                    index = torch.nonzero(~line).reshape(-1)
                    if before is not None:
                        index = index[torch.isin(index, before)]
                    found[dim] = index
            if not torch.equal(union, gone):
                raise StructureError("what is removed leaves a tensor that isn't rectangular")
        return {d: index.to(tensor.device) for d, index in found.items()}

    def check(self, tracer: Trace) -> None:
        """What must go together went together, and what can't be removed is there.

        Raises:
            StructureError: otherwise.
        """
        flags = self.update(tracer)
        space: LabelSpace = tracer.space
        for a, b in space.edges:
            if (flags[a] != flags[b]).any():
                raise StructureError("a removed channel meets one that is kept")
        for ids, reason in space.frozen:
            if flags[ids].any():
                raise StructureError(f"something was removed that can't be: {reason}")
