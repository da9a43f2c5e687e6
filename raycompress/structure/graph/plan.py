"""Graph form: the exported graph with sliced parameters and rewritten numbers.

For models whose code computes with sizes that are written into it. Every number that stands for a
size is known as a function of the kept channels (`trace.py`); slimming sets it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node

from raycompress.structure.graph.model import SlimGraph, assemble
from raycompress.structure.graph.program import Path, Program, Ref, find_target, map_refs, refs_in
from raycompress.structure.graph.trace import GraphTrace, Number, Reindex
from raycompress.structure.leaves import tensors_of
from raycompress.structure.model import Kept, Member, Structure

__all__ = ["GraphPlan", "apart", "plan_of", "slim_graph"]


@dataclass(frozen=True)
class Size:
    """`sizes[form] - offset`, with the sizes of the cost model."""

    form: int
    offset: int

    def of(self, sizes: NDArray[np.int64]) -> int:
        """Its value for the kept counts."""
        return int(sizes[self.form]) - self.offset


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """The exported graph of a dense model and how it changes with the kept channels.

    Attributes:
        program: the dense graph.
        numbers: (instruction, argument, value): integers to set.
        cuts: (instruction, dim, sizes of the parts): splits to rewrite.
        reindexed: constant positions to rewrite.
        scalars: what the instructions that compute numbers gave when traced.
        sizes_read: value of each instruction that reads a tensor's size.
        lines: what each group removes that is no parameter: lines of labels and constants.
        widths: length of each line, by name and dim.
    """

    program: Program
    numbers: tuple[tuple[str, Path, Size], ...]
    cuts: tuple[tuple[str, int, tuple[Size, ...]], ...]
    reindexed: tuple[Reindex, ...]
    scalars: dict[str, Any]
    sizes_read: dict[str, Size]
    lines: dict[str, tuple[Member, ...]]
    widths: dict[tuple[str, int], int]


def plan_of(run: GraphTrace, structure: Structure, forms: list[int]) -> GraphPlan:
    """The plan that a trace gives, with `lines` still empty (`apart` fills them).

    Args:
        run: the trace.
        structure: what was found in it.
        forms: which of the structure's sizes each size seen is.
    """

    def size(number: Number) -> Size:
        return Size(forms[number.seen], number.offset)

    def changes(one: Size) -> bool:
        return bool(structure.sizes.slope[one.form].any())

    arguments = {i.name: (i.args, i.kwargs) for i in run.program.instructions}
    numbers = []
    for n in run.numbers:
        # A computed number may change by itself even where its dim must not.
        if changes(size(n)) or isinstance(_argument(*arguments[n.instruction], n.path), Ref):
            numbers.append((n.instruction, n.path, size(n)))
    cuts = [(c.instruction, c.dim, tuple(size(p) for p in c.parts)) for c in run.cuts]
    return GraphPlan(
        program=run.program,
        numbers=tuple(numbers),
        cuts=tuple(c for c in cuts if any(changes(p) for p in c[2])),
        reindexed=tuple(run.reindexed),
        scalars=dict(run.scalars),
        sizes_read={n.instruction: size(n) for n in run.sizes_read},
        lines={},
        widths={},
    )


def _argument(args: Any, kwargs: Any, path: Path) -> Any:
    value = kwargs.get(path[0]) if isinstance(path[0], str) else args[path[0]]
    for step in path[1:]:
        value = value[step]
    return value


def _set_argument(node: Node, path: Path, value: Any) -> None:
    first, *rest = path
    if rest:
        items = list(_argument(node.args, node.kwargs, path[:1]))
        items[int(rest[0])] = value
        value = items
    if isinstance(first, str):
        node.update_kwarg(first, value)
    else:
        node.update_arg(first, value)


def apart(structure: Structure, plan: GraphPlan, parameters_and_buffers: set[str]) -> Structure:
    """The structure in graph form: what isn't the model's moves from its groups to the plan."""
    groups, lines, widths = [], {}, {}
    for group in structure.groups:
        own = tuple(m for m in group.members if m.parameter in parameters_and_buffers)
        lines[group.name] = tuple(m for m in group.members if m not in own)
        for m in lines[group.name]:
            widths[m.parameter, m.dim] = structure.leaves[m.parameter].shape[m.dim]
        groups.append(replace(group, members=own))
    return replace(
        structure,
        groups=tuple(groups),
        leaves={n: s for n, s in structure.leaves.items() if n in parameters_and_buffers},
        fixes=(),
        plan=replace(plan, lines=lines, widths=widths),
    )


def slim_graph(model: nn.Module, structure: Structure, kept: Kept) -> SlimGraph:
    """A slim copy of a model in graph form; see `slim`."""
    plan = structure.plan
    assert plan is not None
    indices = structure.indices(kept)
    sizes = structure.sizes.values(structure.counts({n: len(i) for n, i in indices.items()}))
    stays = _stays(plan, structure, indices)
    graph, nodes = plan.program.graph()
    constants = {name: _cut(tensor, name, stays) for name, tensor in plan.program.constants.items()}
    scalars = _scalars(plan, sizes)
    for name, path, size in plan.numbers:
        node = nodes[name]
        old = _argument(node.args, node.kwargs, path)
        _set_argument(node, path, _scaled(node, old, size.of(sizes), scalars))
    for name, dim, parts in plan.cuts:
        node = nodes[name]
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], [p.of(sizes) for p in parts], dim), {}
    device = next((t.device for t in tensors_of(model).values()), None)
    for number, edit in enumerate(plan.reindexed):
        made = _reindex(nodes[edit.instruction], edit, stays, f"_positions_{number}")
        constants |= {name: positions.to(device) for name, positions in made.items()}
    return assemble(model, structure, kept, graph, constants)


def _stays(
    plan: GraphPlan, structure: Structure, indices: Mapping[str, NDArray[np.int64]]
) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """For each line: which elements stay."""
    stays = {key: np.ones(width, dtype=np.bool_) for key, width in plan.widths.items()}
    for name, index in indices.items():
        gone = np.ones(structure.group(name).num_channels, dtype=np.bool_)
        gone[index] = False
        for m in plan.lines[name]:
            stays[m.parameter, m.dim][m.indices[gone].ravel()] = False
    return stays


def _cut(tensor: Tensor, name: str, stays: Mapping[tuple[str, int], NDArray[np.bool_]]) -> Tensor:
    for dim in range(tensor.dim()):
        if (name, dim) in stays:
            index = torch.from_numpy(np.flatnonzero(stays[name, dim]))
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.clone()


def _scalars(plan: GraphPlan, sizes: NDArray[np.int64]) -> dict[str, Any]:
    """What the instructions that compute numbers give in the slim graph, for the traced inputs."""
    values: dict[str, Any] = {}
    for i in plan.program.instructions:
        if i.name not in plan.scalars:
            continue
        values[i.name] = plan.scalars[i.name]
        if i.name in plan.sizes_read:
            values[i.name] = plan.sizes_read[i.name].of(sizes)
        elif all(r in values for r in refs_in((i.args, i.kwargs))):
            args, kwargs = map_refs((i.args, i.kwargs), lambda r: values[r.name])
            values[i.name] = find_target(i.target)(*args, **kwargs)
    return values


def _scaled(node: Node, old: Any, value: int, slim: Mapping[str, Any]) -> Any:
    """The new argument; a computed one is scaled, so that it still follows the batch size."""
    if not isinstance(old, Node):
        return value
    have = int(slim[old.name])
    if have == value:
        return old
    common = math.gcd(have, value)
    graph = node.graph
    with graph.inserting_before(node):
        scaled = graph.call_function(operator.mul, (old, value // common))
        return graph.call_function(operator.floordiv, (scaled, have // common))


def _reindex(
    node: Node, edit: Reindex, stays: Mapping[tuple[str, int], NDArray[np.bool_]], name: str
) -> dict[str, Tensor]:
    """Rewrites positions along a dim; returns the constant that it adds."""
    out = stays.get((edit.out, 0))
    source = stays.get((edit.source, 0))
    if (out is None or out.all()) and (source is None or source.all()):
        return {}
    graph = node.graph
    if not edit.source:
        assert out is not None
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        with graph.inserting_after(node):
            taken = graph.call_function(
                torch.ops.aten.index_select.default, (node, edit.dim, constant)
            )
        node.replace_all_uses_with(taken, delete_user_cb=lambda user: user is not taken)
        return {name: torch.from_numpy(np.flatnonzero(out))}
    positions = np.asarray(edit.positions, dtype=np.int64)
    if out is not None:
        positions = positions[out]
    if source is not None:
        positions = np.cumsum(source)[positions] - 1
    with graph.inserting_before(node):
        constant = graph.get_attr(name)
    if edit.path:
        _set_argument(node, edit.path, constant)
    else:
        node.target = torch.ops.aten.index_select.default
        node.args, node.kwargs = (node.args[0], edit.dim, constant), {}
    return {name: torch.from_numpy(positions)}
