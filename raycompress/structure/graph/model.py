"""The module that a slim graph becomes: parameters under their old names, and a mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from raycompress.structure.model import Kept, Structure
from raycompress.structure.slim import cut_tensors

__all__ = ["SlimGraph", "assemble"]

_TRAINS = "raycompress_trains"  # key of a node's meta: the argument that follows the mode


class SlimGraph(GraphModule):
    """A slim model in graph form: parameter and buffer names are those of the dense model.

    `train()` and `eval()` set the mode of dropout and of norms with running statistics, which an
    exported graph holds as arguments. What the model's code did in training only (stochastic
    depth, dropout inside attention, counting batches) isn't in the graph, which was exported in
    evaluation mode. A layer that was always in evaluation mode follows `train()` too, and a
    BatchNorm with `momentum=None` keeps its statistics, since it averages over counted batches.
    `to(...)` also moves what the graph creates.
    """

    def train(self, mode: bool = True) -> SlimGraph:
        """Sets the mode, also of the graph's instructions."""
        for node in self.graph.nodes:
            key = node.meta.get(_TRAINS)
            if isinstance(key, int):
                node.update_arg(key, mode)
            elif key is not None:
                node.update_kwarg(key, mode)
        self.recompile()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> SlimGraph:
        old = _place(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        new = _place(self)
        if old is not None and new is not None and old != new:
            for node in self.graph.nodes:
                _move(node, *old, *new)
            self.recompile()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimGraph:
        result = super().__deepcopy__(memo)
        assert isinstance(result, SlimGraph)
        for name, module in self.named_modules():
            # torch.fx forgets which buffers don't belong to the state dict
            result.get_submodule(
                name
            )._non_persistent_buffers_set |= module._non_persistent_buffers_set
        _in_order(result, [name for name, _ in self.named_modules()][1:])
        return result


def _in_order(module: nn.Module, names: list[str]) -> None:
    """Sorts submodules: torch.fx adds them in an order of its own.

    The first name of a tied parameter is that of the module which comes first.
    """
    rank: dict[str, int] = {}
    for i, name in enumerate(names):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            rank.setdefault(".".join(parts[:depth]), i)
    for prefix, parent in module.named_modules():
        start = f"{prefix}." if prefix else ""
        children = parent._modules
        ordered = sorted(children, key=lambda c: rank.get(f"{start}{c}", len(names)))
        parent._modules = {name: children[name] for name in ordered}


_FILLS = frozenset("zeros ones full empty new_zeros new_ones new_full new_empty".split())


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and type of a module's first floating tensor."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None


def _move(
    node: Node, device: torch.device, dtype: torch.dtype, to: torch.device, as_type: torch.dtype
) -> None:
    """Devices that are written in an instruction follow, and types of what it fills."""

    def moved(value: Any) -> Any:
        return to if isinstance(value, torch.device) and value == device else value

    mapped: Any = map_aggregate  # declared for nodes alone
    node.args, node.kwargs = mapped(node.args, moved), mapped(node.kwargs, moved)
    if getattr(node.target, "_opname", "") in _FILLS and node.kwargs.get("dtype") == dtype:
        node.update_kwarg("dtype", as_type)


def _follow_mode(node: Node) -> None:
    """Notes the argument that was False because the model was exported in evaluation mode."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("train", "training"):
            if i < len(node.args) and node.args[i] is False:
                node.meta[_TRAINS] = i
            elif node.kwargs.get(argument.name) is False:
                node.meta[_TRAINS] = argument.name


def assemble(
    model: nn.Module,
    structure: Structure,
    kept: Kept,
    graph: Graph,
    constants: dict[str, Tensor],
) -> SlimGraph:
    """Puts the slim tensors and the graph together."""
    cut = cut_tensors(model, structure, kept)
    made: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = dict(constants)
    hidden = set(constants)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            hidden.add(f"{prefix}.{name}" if prefix else name)
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if id(tensor) not in made:
            small = cut.get(id(tensor))
            made[id(tensor)] = copy.deepcopy(tensor.detach()) if small is None else small
            if isinstance(tensor, nn.Parameter) and small is None:
                made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
        tensors[name] = made[id(tensor)]
    for node in graph.nodes:
        _follow_mode(node)
    used = {n.target for n in graph.nodes if n.op == "get_attr"}
    start = next(iter(graph.nodes))
    with graph.inserting_before(start):
        for name in tensors:
            if name not in used and name not in constants:
                graph.get_attr(name)  # torch.fx drops what no node names
    result = SlimGraph({n: t for n, t in tensors.items() if n not in constants or n in used}, graph)
    _in_order(result, [name for name in tensors if name not in constants])
    for name in hidden & set(tensors):
        owner, _, field = name.rpartition(".")
        module = result.get_submodule(owner)
        if field in module._buffers:
            module._non_persistent_buffers_set.add(field)
    result.eval()
    return result
