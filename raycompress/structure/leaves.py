"""The parameters and buffers of a model, and the tensors in what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from raycompress.structure.labels import Facets

__all__ = ["Leaf", "flat", "leaves_of", "mapped", "replaced", "shapes_of", "tensors_of"]


@dataclass
class Leaf:
    """A parameter or buffer of the model.

    Attributes:
        name: its first name; `aliases` holds the others where it is tied.
        facets: one for each dim of size > 1, made when an operator first reads the leaf.
        starts: first label id along each dim (0: no labels).
    """

    name: str
    aliases: tuple[str, ...]
    tensor: Tensor
    is_parameter: bool
    facets: Facets | None = None
    starts: list[int] = field(default_factory=list)
    roles: dict[int, str] = field(default_factory=dict)


def leaves_of(model: nn.Module) -> list[Leaf]:
    """Every parameter and buffer once, with all its names."""
    found: dict[int, Leaf] = {}
    named: list[tuple[str, Tensor, bool]] = [
        (n, t, True) for n, t in model.named_parameters(remove_duplicate=False)
    ]
    named += [(n, t, False) for n, t in model.named_buffers(remove_duplicate=False)]
    for name, tensor, is_parameter in named:
        if id(tensor) in found:
            found[id(tensor)].aliases += (name,)
        else:
            found[id(tensor)] = Leaf(name, (), tensor, is_parameter)
    return list(found.values())


def replaced(model: nn.Module, leaves: list[Leaf]) -> list[Leaf]:
    """Leaves of which the model now holds another shape, or nothing."""
    now = tensors_of(model)
    return [x for x in leaves if x.name not in now or now[x.name].shape != x.tensor.shape]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter and buffer."""
    return {name: tuple(t.shape) for name, t in tensors_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A nesting of containers with the function applied to what they hold."""
    if isinstance(value, dict):
        return {k: mapped(v, function) for k, v in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(mapped(v, function) for v in value)
    if isinstance(value, list):
        return [mapped(v, function) for v in value]
    return function(value)


def flat(value: Any) -> list[Any]:
    """Tensors in any nesting of containers; objects are searched by their attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, (list, tuple, set)):
        return [t for v in value for t in flat(v)]
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        return [t for v in vars(value).values() for t in flat(v)]
    return []
