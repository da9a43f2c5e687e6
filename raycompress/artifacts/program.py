"""What the program inside a .pt2 archive may say.

`torch.export.load` runs some of this text as Python: sizes go through sympy's `eval`, guards and
the names of values become source code, operators are looked up by any dotted path below `torch`.
So each text must be of the kind that stands in its place, whatever wrote it.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

# Registers the operators of quantized programs.
import torch.ao.quantization.fx._decomposed

__all__ = ["NAMESPACES", "UnsafeProgram", "checked_program", "namespaces_of"]

# Operators that compute on tensors and nothing else.
NAMESPACES = frozenset(
    {"aten", "prims", "onednn", "quantized", "quantized_decomposed", "torchvision"}
)
_TOUCH_FILES = frozenset({"torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out"})
_HIGHER_ORDER = frozenset(
    {"associative_scan", "cond", "map_impl", "scan", "while_loop", "wrap_with_autocast"}
    | {"wrap_with_set_grad_enabled"}
)
_SCALAR = frozenset(
    "_operator." + f.__name__
    for f in (
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
        *(operator.mod, operator.pow, operator.neg, operator.pos, operator.eq, operator.ne),
        *(operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
        *(operator.lshift, operator.rshift, operator.getitem),
    )
)
_PATHS = re.compile(r"torch\.sym_[a-z]+|math\.[a-z]+[0-9]*")

# What sizes are written with: sympy's and torch's own arithmetic, no way to anything else.
_FUNCTIONS = frozenset(
    "Abs Add And CeilDiv CeilToInt CleanDiv Eq Equality FloatPow FloatTrueDiv Float FloorDiv "
    "FloorToInt GreaterThan Identity IntTrueDiv Integer LShift LessThan Max Min Mod "
    "ModularIndexing Mul Ne Not Or Piecewise Pow PowByNatural PythonMod RShift Rational "
    "RoundDecimal RoundToInt StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat "
    "TruncToInt Unequality Where ceiling floor isnan".split()
)
_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop),
    *(ast.boolop, ast.cmpop, ast.Name, ast.Load, ast.Subscript, ast.keyword, ast.Tuple),
)

_WORD = re.compile(r"\w*")
# Of a module, parameter or type: no quotes, no brackets, no way into Python's own attributes.
_PATH = re.compile(r"(?!__|.*\.__)[\w.\-:/+@$ ]*")
_NUMBER = re.compile(r"-?(Infinity|inf|NaN|nan)|\w*")
_TEXT = re.compile(r"[\w.\-/ ]*")


class UnsafeProgram(ValueError):
    """A text in the program isn't of the kind that belongs in its place."""


def checked_program(program: dict[str, Any], namespaces: Collection[str]) -> dict[str, Any]:
    """The program without notes on its origin (source lines, paths of files).

    Args:
        program: the parsed `models/model.json`, or the table of a folder's tensors.
        namespaces: of operators that may be called, beside `NAMESPACES`.

    Raises:
        UnsafeProgram: a text could run code, or calls what isn't an operator on tensors.
    """
    allowed = NAMESPACES | set(namespaces)
    checks: dict[str, Callable[[str], bool]] = {
        "as_float": _matches(_NUMBER),
        "as_operator": lambda text: _is_operator(text, allowed),
        "as_string": lambda text: True,  # written into code by `repr`
        "buffer_name": _matches(_PATH),
        "expr_str": _is_arithmetic,
        "field_names": _matches(_WORD),
        "fqn": _matches(_PATH),
        "guards_code": _is_arithmetic,
        "in_spec": _imports_nothing,
        "out_spec": _imports_nothing,
        "parameter_name": _matches(_PATH),
        "target": lambda text: _is_operator(text, allowed),
        "tensor_constant_name": _matches(_PATH),
        "torch_version": _matches(_PATH),
    }
    checks["as_strings"] = checks["as_string"]
    checks["as_floats"] = checks["as_float_lists"] = checks["real"] = checks["as_float"]
    checks["imag"] = checks["min_val"] = checks["max_val"] = checks["as_float"]

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, str):
            if not checks.get(key, _matches(_WORD))(value):
                raise UnsafeProgram(f"{key or 'a name'} holds {value[:80]!r}")
            return value
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        if isinstance(value, dict):
            # Notes are texts alone; a value of the graph that is called "metadata" is not.
            if key == "metadata" and all(isinstance(v, str) for v in value.values()):
                return {}
            names = _PATH if key in ("config", "treespec_namedtuple_fields") else _WORD
            for name in value:
                if not names.fullmatch(name):
                    raise UnsafeProgram(f"{key or 'a name'} holds {name[:80]!r}")
            return {name: walk(v, name) for name, v in value.items()}
        return value

    return {name: walk(value, name) for name, value in program.items()}


def namespaces_of(program: torch.export.ExportedProgram) -> set[str]:
    """Namespaces of the operators that a program calls."""
    return {
        node.target.namespace
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def _matches(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


def _is_operator(path: str, namespaces: Collection[str]) -> bool:
    if path in _SCALAR or _PATHS.fullmatch(path):
        return True
    parts = path.split(".")
    if parts[:2] != ["torch", "ops"] or path in _TOUCH_FILES:
        return False
    if parts[2:3] == ["higher_order"]:
        return len(parts) == 4 and parts[3] in _HIGHER_ORDER
    if len(parts) != 5 or parts[2] not in namespaces:
        return False
    packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
    return isinstance(getattr(packet, parts[4], None), torch._ops.OpOverload)


def _is_arithmetic(text: str) -> bool:
    """Whether an expression of sizes calls nothing but arithmetic and `tensor.size()`."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in nodes:
        if isinstance(node, ast.Constant):
            plain = isinstance(node.value, bool | int | float | None)
            if not plain and not (isinstance(node.value, str) and _TEXT.fullmatch(node.value)):
                return False
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr != "size" and (owner, node.attr) not in (
                ("math", "isnan"),
                ("math", "inf"),
            ):
                return False
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                if node.func.id not in _FUNCTIONS:
                    return False
            elif not isinstance(node.func, ast.Attribute):
                return False
        elif not isinstance(node, _NODES):
            return False
    return True


def _imports_nothing(spec: str) -> bool:
    # An "__enum__" in the description of inputs makes torch import the module that it names.
    return not any("__enum__" in text for text in _texts(spec))


def _texts(value: Any) -> Iterator[str]:
    """All texts in JSON, also in JSON that is a text in it."""
    if isinstance(value, str):
        yield value
        try:
            yield from _texts(json.loads(value))
        except ValueError:
            return
    elif isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
