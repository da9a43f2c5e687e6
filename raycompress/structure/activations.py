"""Where a model's activations show: after norms and activation functions, at any operator.

Hooks on modules see neither functional activations nor which of several calls of a shared module is
meant. So one pass with labels (`trace.py`) finds the operators whose outputs carry a group's
channels, and they are counted: the n-th of the watched operators of one pass is the n-th of any
other on inputs of the same shapes. A pass whose operators differ is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.closure import close
from raycompress.structure.labels import Facets, LabelSpace, varying
from raycompress.structure.model import Structure
from raycompress.structure.pools import along
from raycompress.structure.rules.operators import find_rule
from raycompress.structure.trace import Call, Rule, Trace, trace

__all__ = ["WATCHED", "Site", "Sites", "activation_sites", "operator_name", "output_of"]

Ids = NDArray[np.int64]

_ACTIVATIONS = frozenset(
    f"aten::{n}"
    for n in (
        "relu gelu silu mish elu celu leaky_relu rrelu_with_noise _prelu_kernel hardswish "
        "threshold clamp clamp_min glu log_sigmoid_forward softshrink hardshrink "
        "sigmoid hardsigmoid tanh softplus hardtanh"
    ).split()
)
# Where the result multiplies something, it is a gate or a part of an activation written out.
_GATES = frozenset(f"aten::{n}" for n in "sigmoid hardsigmoid tanh softplus hardtanh".split())
_PRODUCTS = frozenset(f"aten::{n}" for n in "mul addcmul lerp".split())
# Operands, and the dim over which they are summed.
_CONTRACTED = {
    "aten::convolution": (("input", 1),),
    "aten::addmm": (("mat1", -1), ("mat2", -2)),
    "aten::mm": (("self", -1), ("mat2", -2)),
    "aten::bmm": (("self", -1), ("mat2", -2)),
    "aten::baddbmm": (("batch1", -1), ("batch2", -2)),
}
WATCHED = _ACTIVATIONS | set(_CONTRACTED)
"""Names of the operators that are counted."""
_GATE = "_raycompress_gate"


@dataclass(frozen=True, eq=False)
class Site:
    """A tensor of the forward pass that carries channels of a group.

    Attributes:
        group: name of the group.
        name: the module whose code runs the operator, the operator, and which such call of the
            group's it is, as in "layer1.0 relu 2". Sites of one name hold parts of the channels.
        ordinal: which of the watched operators.
        operand: name of the argument; "" for the operator's output.
        dim: the channels lie along this dim,
        size: which has this size.
        positions: indices along the dim that belong to the group, shape (n,).
        channels: the channel of each, shape (n,).
    """

    group: str
    name: str
    ordinal: int
    operand: str
    dim: int
    size: int
    positions: Ids
    channels: Ids


@dataclass(frozen=True, eq=False)
class Sites:
    """All sites of a model on inputs of certain shapes.

    Attributes:
        operators: the watched operators of the pass, in order.
        found: the sites of all groups.
    """

    operators: tuple[str, ...]
    found: tuple[Site, ...]


def activation_sites(
    model: nn.Module, structure: Structure, forward: Callable[[Any], Any], batch: Any
) -> Sites:
    """Finds the sites of every channel group.

    They are the outputs of activation functions that carry the group's channels, after residual
    sums and concatenations as before them. A sigmoid, tanh or the like that multiplies something is
    a gate, and none. A group without any (a linear bottleneck, a residual stream, the product of
    gates) is seen where it is read: at the inputs of the layers that consume it. Where no tensor
    carries all channels of a group, those that carry some are its sites together.

    Args:
        model: dense; its mode is left as it was.
        structure: of the model.
        forward: runs the model on a batch.
        batch: tensors in lists, tuples and dicts.
    """
    finder = _Finder()
    seen = trace(_Forward(model, forward), (batch,), {}, finder.find)
    numbers, group_of, channel_of = _owners(seen, structure)
    activations = [o for o in finder.activations if o.ordinal not in finder.gates]
    found: list[Site] = []
    for operators in (activations, finder.inputs):
        done = {site.group for site in found}
        carrying: dict[int, list[Site]] = defaultdict(list)
        for each in operators:
            called = f"{each.module} {finder.operators[each.ordinal].partition('::')[2]}".strip()
            for dim, line in each.lines(numbers):
                for number in np.unique(group_of[line[line > 0]]).tolist():
                    positions = np.flatnonzero(group_of[line] == number)
                    channels = channel_of[line[positions]]
                    place = each.ordinal, each.operand, dim, len(line)
                    name = structure.groups[number].name
                    carrying[number].append(Site(name, called, *place, positions, channels))
        for number, sites in carrying.items():
            group = structure.groups[number]
            if group.name not in done:
                found += _comparable(sites, group.num_channels)
    return Sites(tuple(finder.operators), tuple(found))


def _comparable(sites: list[Site], num_channels: int) -> list[Site]:
    """Sites with all channels, numbered; or parts that have all of them together; or none."""
    whole = [site for site in sites if len(np.unique(site.channels)) == num_channels]
    if whole:
        numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(1))
        return [replace(site, name=f"{site.name} {next(numbers[site.name])}") for site in whole]
    together = np.unique(np.concatenate([site.channels for site in sites]))
    return [replace(s, name="parts") for s in sites] if len(together) == num_channels else []


class _Forward(nn.Module):
    """A model with the way it is called."""

    def __init__(self, model: nn.Module, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, batch: Any) -> Any:
        return self.run(batch)


@dataclass(frozen=True, eq=False)
class _Operator:
    ordinal: int
    module: str
    facets: Facets
    operand: str = ""
    dim: int | None = None

    def lines(self, numbers: Ids) -> list[tuple[int, Ids]]:
        """(dim, numbers of the channels that lie along it)."""
        found = []
        for facet in self.facets:
            own = numbers[facet.numpy()]
            if (own == own.flat[0]).all():  # one channel has all of them, along any dim
                dim = varying(facet)[-1]
                found.append((dim, np.full(facet.shape[dim], own.flat[0])))
            else:
                found += along(facet, numbers)
        return [(dim, line) for dim, line in found if self.dim in (None, dim)]


@dataclass
class _Finder:
    """Looks over the rules' shoulders while a pass is traced."""

    operators: list[str] = field(default_factory=list)
    activations: list[_Operator] = field(default_factory=list)
    inputs: list[_Operator] = field(default_factory=list)
    gates: set[int] = field(default_factory=set)

    def find(self, func: Any) -> Rule | None:
        """The rule of an operator, which also remembers what is watched."""
        rule = find_rule(func)
        look = self._look(operator_name(func))
        if rule is None:
            return None

        def both(call: Call) -> None:
            rule(call)
            look(call)

        return both

    def _look(self, name: str) -> Rule:
        if name in _ACTIVATIONS:
            return self._activation
        return self._layer if name in _CONTRACTED else self._passed

    def _activation(self, call: Call) -> None:
        out, ordinal = output_of(call.out), len(self.operators)
        name = operator_name(call.func)
        self.operators.append(name)
        if not call.tracer.is_data(out):
            return
        self.activations.append(_Operator(ordinal, _module(call), list(call.facets(out))))
        if name in _GATES:
            setattr(out, _GATE, ordinal)

    def _layer(self, call: Call) -> None:
        ordinal = len(self.operators)
        name = operator_name(call.func)
        self.operators.append(name)
        for operand, dim in _CONTRACTED[name]:
            tensor: Tensor = call.arg(operand)
            if call.tracer.is_data(tensor):
                facets = list(call.facets(tensor))
                self.inputs.append(
                    _Operator(ordinal, _module(call), facets, operand, dim % tensor.dim())
                )

    def _passed(self, call: Call) -> None:
        """Moved, scaled and shifted by numbers, it still is the same gate."""
        tensors = [t for t in call.tensors() if t.dim()]
        gates = [getattr(t, _GATE) for t in tensors if hasattr(t, _GATE)]
        if len(tensors) == 1 and gates and isinstance(call.out, Tensor):
            setattr(call.out, _GATE, gates[0])
        elif operator_name(call.func) in _PRODUCTS:
            self.gates.update(gates)


def _owners(seen: Trace, structure: Structure) -> tuple[Ids, Ids, Ids]:
    """For each label the number of its channel (0: none), and each number's group and channel.

    The structure says what goes together, in whichever form it was found; here it is only followed
    along the pass: what is united has one channel, and so has a conjunction of that channel alone.
    """
    space = seen.space
    root = close(LabelSpace(space.count, list(space.edges))).root
    leaves = {leaf.name.removeprefix("model."): leaf for leaf in seen.leaves}
    group_of, channel_of = [np.array([-1])], [np.array([-1])]
    number = np.zeros(int(root.max()) + 1, dtype=np.int64)
    first = 1
    for at, group in enumerate(structure.groups):
        mine = np.arange(first, first + group.num_channels)
        for member in group.members:
            starts = leaves[member.parameter].starts
            if starts and starts[member.dim]:
                classes = root[starts[member.dim] + member.indices]
                other = (number[classes] != 0) & (number[classes] != mine[:, None])
                if other.any():
                    raise StructureError("the structure is of another model")
                number[classes] = mine[:, None]
        group_of.append(np.full(group.num_channels, at))
        channel_of.append(np.arange(group.num_channels))
        first += group.num_channels
    number[root[0]] = 0
    found = -1
    while found < np.count_nonzero(number):
        found = int(np.count_nonzero(number))
        for c in space.conjunctions:
            children = number[root[c.children]]
            same = (children == children[:, :1]).all(axis=1) & (c.ids != 0)
            same &= number[root[c.ids]] == 0
            number[root[c.ids[same]]] = children[same, 0]
    return number[root], np.concatenate(group_of), np.concatenate(channel_of)


def operator_name(func: Any) -> str:
    """Name of an operator without overload and without the underscore of in-place variants."""
    name: str = func._schema.name
    return name.removesuffix("_")


def _module(call: Call) -> str:
    return call.tracer.module.removeprefix("model").removeprefix(".")


def output_of(out: Any) -> Tensor:
    """The first tensor that an operator returned."""
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first
