"""A model's exported graph as plain data: made from `torch.export`, rebuilt as a `torch.fx.Graph`.

Plain, so that a structure in graph form can be pickled and holds no parameter of the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_aggregate

from raycompress.errors import StructureError
from raycompress.structure.quiet import quiet

__all__ = [
    "Instruction",
    "Path",
    "Program",
    "Ref",
    "bind",
    "export",
    "find_target",
    "map_refs",
    "refs_in",
]

Path = tuple[int | str, ...]  # position or name of an argument, then positions inside lists


@dataclass(frozen=True)
class Ref:
    """The result of another instruction."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """One node of the graph.

    Attributes:
        op: "placeholder" | "get_attr" | "call_function" | "output".
        name: unique.
        target: attribute name, or "aten::view.default" for an operator, or "module:function".
        args: with `Ref` in place of nodes.
        kwargs: likewise.
        module: name of the module whose code called it.
    """

    op: str
    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str


@dataclass(frozen=True, eq=False)
class Program:
    """The graph, in order; how inputs and outputs nest; constants that its code made.

    Attributes:
        instructions: in order of execution.
        pytree: argument names and nesting of inputs and outputs, as torch.fx keeps them.
        keywords: names of the keyword arguments, in order.
        constants: attributes of the graph that the model doesn't have.
    """

    instructions: tuple[Instruction, ...]
    pytree: Any
    keywords: tuple[str, ...]
    constants: dict[str, Tensor]

    def graph(self) -> tuple[Graph, dict[str, Node]]:
        """A new graph and its nodes by name."""
        graph = Graph()
        nodes: dict[str, Node] = {}
        for i in self.instructions:
            args, kwargs = map_refs((i.args, i.kwargs), lambda r: nodes[r.name])
            target = find_target(i.target) if i.op == "call_function" else i.target
            node = graph.create_node(i.op, target, tuple(args), dict(kwargs), i.name)
            node._rename(i.name)
            nodes[i.name] = node
        graph.set_codegen(_PyTreeCodeGen(self.pytree))
        return graph, nodes


def map_refs(value: Any, function: Callable[[Ref], Any]) -> Any:
    """The same nesting of lists, tuples and dicts, with each `Ref` replaced."""
    return _mapped(value, lambda v: function(v) if isinstance(v, Ref) else v)


def refs_in(value: Any) -> list[str]:
    """Names of the instructions whose results are read."""
    found: list[str] = []
    map_refs(value, lambda r: found.append(r.name))
    return found


_mapped: Any = map_aggregate  # declared for nodes alone


def find_target(target: str) -> Any:
    """The function that an instruction calls."""
    if "::" in target:
        space, _, rest = target.partition("::")
        name, _, overload = rest.rpartition(".")
        return getattr(getattr(getattr(torch.ops, space), name), overload)
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _target_name(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
        return f"{name}.{node.target._overloadname}"
    if isinstance(node.target, torch._ops.OperatorBase):
        raise StructureError(f"graph form: the exported graph calls {node.target}")
    assert callable(node.target)
    return f"{node.target.__module__}:{node.target.__name__}"


def bind(instruction: Instruction) -> dict[str, tuple[int | str, Any]]:
    """For each argument of an ATen instruction: its position or keyword, and its value."""
    schema = find_target(instruction.target)._schema
    bound: dict[str, tuple[int | str, Any]] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(instruction.args):
            bound[argument.name] = (i, instruction.args[i])
        elif argument.name in instruction.kwargs:
            bound[argument.name] = (argument.name, instruction.kwargs[argument.name])
        elif argument.has_default_value():
            bound[argument.name] = (argument.name, argument.default_value)
    return bound


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, tuple[Any, ...], dict[str, Any]]:
    """Exports a model in evaluation mode with a dynamic batch size (dim 0 of its tensors).

    `torch.no_grad` inside the model's code isn't part of the graph; `detach` is.

    Returns:
        the program, and the inputs that it was exported with: a batch of one is doubled, since
        export takes a size of one for a constant.

    Raises:
        StructureError: the model can't be exported, or only at a fixed batch size.
    """
    tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    batch = tensors[0].shape[0] if tensors else 0
    if batch == 1:
        args, kwargs = _resized((args, kwargs), 1, 2)
        tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        batch = 2
    collection: Any = torch.export.ShapesCollection
    shapes = collection()
    for t in tensors:
        if t.shape[0] == batch:
            shapes[t] = {0: torch.export.Dim.AUTO}
    try:
        with quiet(model):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever foreign code or torch.export raises
        text = str(error).strip().splitlines()
        raise StructureError(
            f"graph form: the model can't be exported: {type(error).__name__}: "
            f"{text[0] if text else ''}"
        ) from error
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    _inline(module)
    _check(model, module, *_resized((args, kwargs), batch, batch + 1))
    return _program(module, model, tuple(kwargs)), args, kwargs


def _program(module: GraphModule, model: nn.Module, keywords: tuple[str, ...]) -> Program:
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    instructions: list[Instruction] = []
    constants: dict[str, Tensor] = {}
    dynamic = False
    for node in module.graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue  # says what the dense model's tensors were
        if node.op == "placeholder":
            shape = getattr(node.meta.get("val"), "shape", ())
            dynamic |= any(isinstance(s, torch.SymInt) for s in shape)
        elif node.op == "get_attr" and node.target not in names:
            value = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, Tensor):
                raise StructureError(
                    f"graph form: the exported graph branches or loops ({node.target!r})"
                )
            constants[str(node.target)] = value.detach().clone()
        args, kwargs = _mapped(
            (node.args, node.kwargs), lambda a: Ref(a.name) if isinstance(a, Node) else a
        )
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = stack[-1][0] if stack and isinstance(stack[-1], tuple) else ""
        instructions.append(
            Instruction(node.op, node.name, _target_name(node), tuple(args), dict(kwargs), path)
        )
    if not dynamic:
        raise StructureError("graph form: the exported graph runs at one batch size only")
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    assert isinstance(info, _PyTreeInfo)
    return Program(tuple(instructions), info, keywords, constants)


def _inline(module: GraphModule) -> None:
    """Puts the bodies of `no_grad` and disabled `autocast` blocks in line."""
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in (
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
        ):
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, Node))
        if name == "wrap_with_autocast" and node.args[2] is True:
            raise StructureError("graph form: the model's code turns autocast on")
        holder = node.args[at]
        body = getattr(module, holder.target)
        _inline(body)
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            out = graph.graph_copy(body.graph, dict(zip(inputs, node.args[at + 1 :], strict=True)))
        if isinstance(out, (tuple, list)):
            for user in list(node.users):
                user.replace_all_uses_with(out[user.args[1]])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(out)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def _flat(value: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(value))


def _check(
    model: nn.Module, module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The graph must compute what the model does, at another batch size too."""
    with quiet(model):
        try:
            outputs = [_flat(m(*args, **kwargs)) for m in (model, module)]
        except Exception as error:  # whatever foreign code raises
            raise StructureError(
                f"graph form: the exported graph runs at one batch size only "
                f"({type(error).__name__})"
            ) from error
    for a, b in zip(*outputs, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            scale = float(torch.nan_to_num(a).abs().max()) if a.numel() else 0.0
            close = a.shape == b.shape and torch.allclose(
                a, b, rtol=0, atol=1e-3 * scale, equal_nan=True
            )
            if not close:
                raise StructureError(
                    "graph form: the exported graph computes something else than the model"
                )


def _resized(value: Any, batch: int, size: int) -> Any:
    """Inputs with another batch size."""

    def resize(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return torch.cat([leaf, leaf])[:size]
        return leaf

    return torch.utils._pytree.tree_map(resize, value)
