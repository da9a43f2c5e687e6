"""The exported graph run on labels: which number in it stands for the size of which dim?

Every instruction runs under the label tracer. A number that an instruction carries (a size of a
view, the place of a cut, the groups of a convolution) is tied to the labels of the dim that it
stands for, so that it becomes a function of the kept channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from raycompress.structure.graph.program import (
    Instruction,
    Path,
    Program,
    Ref,
    bind,
    find_target,
    map_refs,
    refs_in,
)
from raycompress.structure.graph.rules import CUTS, GRAPH_RULES
from raycompress.structure.labels import Facets, varying
from raycompress.structure.leaves import Leaf, flat
from raycompress.structure.rules.operators import find_rule
from raycompress.structure.trace import Rule, Trace

__all__ = ["Cut", "GraphTrace", "Handler", "Number", "Ran", "Reindex"]


@dataclass(frozen=True)
class Number:
    """An integer that is one of the sizes seen in the trace, less `offset`.

    Attributes:
        instruction: which.
        path: its argument.
        seen: position in `Trace.sizes`.
        offset: what the size counts besides.
    """

    instruction: str
    path: Path
    seen: int
    offset: int = 0


@dataclass(frozen=True)
class Cut:
    """An instruction that cuts a dim into parts; `parts` are their sizes."""

    instruction: str
    dim: int
    parts: tuple[Number, ...]


@dataclass(frozen=True)
class Reindex:
    """Elements of a dim that are taken by constant positions.

    Attributes:
        instruction: which.
        path: argument that holds the positions; () where the instruction is replaced by an
            `index_select`, or followed by one if `source` is "".
        dim: of the first argument.
        positions: shape (n,), in the dense model.
        source: watched line of labels of the dim that is read.
        out: watched line of labels of what is taken.
    """

    instruction: str
    path: Path
    dim: int
    positions: tuple[int, ...]
    source: str
    out: str


@dataclass(frozen=True)
class Ran:
    """An instruction that has run: the values of its arguments by name, and its result."""

    instruction: Instruction
    values: Mapping[str, Any]
    out: Any

    @property
    def source(self) -> Tensor:
        """The tensor that it works on."""
        tensor: Tensor = self.values["self"]
        return tensor

    @property
    def dim(self) -> int:
        """The dim that it works along, not negative."""
        return int(self.values["dim"]) % self.source.dim()

    def given(self, argument: str) -> tuple[int | str, Any]:
        """Where an argument stands, and what is written there."""
        return bind(self.instruction)[argument]


Handler = Callable[["GraphTrace", Ran], Instruction | None]


class GraphTrace:
    """Runs a program under the label tracer and collects what depends on sizes.

    Attributes:
        numbers: integer arguments.
        cuts: instructions that split a dim.
        reindexed: constant positions.
        scalars: value of each instruction that computes a number, for the traced inputs.
        sizes_read: of these, the ones that read the size of a tensor's dim.
        met: facets of the tensors that each instruction read, by its name.
        program: with what had to be written out before any channel is removed.
    """

    def __init__(
        self, program: Program, tensors: Mapping[str, Tensor], handlers: Mapping[str, Handler]
    ) -> None:
        self.numbers: list[Number] = []
        self.cuts: list[Cut] = []
        self.reindexed: list[Reindex] = []
        self.scalars: dict[str, Any] = {}
        self.sizes_read: list[Number] = []
        self.met: dict[str, list[Tensor]] = {}
        self.program = program
        self._tensors = tensors
        self._handlers = handlers
        self._instructions = list(program.instructions)
        self._operator = ""
        self.tracer: Trace

    def find(self, func: Any) -> Rule | None:
        """The rule of an operator: graph form's own where its instruction is rewritten."""
        name = func._schema.name
        if self._operator in CUTS and name in GRAPH_RULES:
            return GRAPH_RULES[name]
        return find_rule(func)

    def run(self, tracer: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Executes the program on inputs; returns what the model would."""
        self.tracer = tracer
        for name, constant in self.program.constants.items():
            tracer.add(Leaf(name, (), constant, is_parameter=False))
        kwargs = {name: kwargs[name] for name in self.program.keywords}
        inputs = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
        uses = Counter(r for i in self.program.instructions for r in refs_in((i.args, i.kwargs)))
        env: dict[str, Any] = {}
        result: Any = None
        for at, instruction in enumerate(self.program.instructions):
            if instruction.op == "placeholder":
                env[instruction.name] = next(inputs)
            elif instruction.op == "get_attr":
                constant_or_none = self.program.constants.get(instruction.target)
                env[instruction.name] = (
                    self._tensors[instruction.target]
                    if constant_or_none is None
                    else constant_or_none
                )
            else:
                values = map_refs((instruction.args, instruction.kwargs), lambda r: env[r.name])
                if instruction.op == "output":
                    result = values[0][0]
                    break
                env[instruction.name] = self._call(at, instruction, *values)
            for name in refs_in((instruction.args, instruction.kwargs)):
                uses[name] -= 1
                if not uses[name]:
                    del env[name]
        self.program = replace(self.program, instructions=tuple(self._instructions))
        return torch.utils._pytree.tree_unflatten(result, self.program.pytree.out_spec)

    def _call(
        self, at: int, instruction: Instruction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tracer = self.tracer
        tracer.stack[:] = [instruction.module]
        if instruction.module not in tracer.called:
            tracer.called.append(instruction.module)
        self._operator = instruction.target.partition(".")[0]
        self.met[instruction.name] = [
            f for t in flat((args, kwargs)) if isinstance(t, Tensor) for f in tracer.facets(t)
        ]
        before = len(tracer.sizes)
        out = find_target(instruction.target)(*args, **kwargs)
        if not isinstance(out, Tensor) and isinstance(out, (int, float)):
            self.scalars[instruction.name] = out
        if "::" not in instruction.target:
            return out
        bound = bind(instruction)
        for i in range(before, len(tracer.sizes)):
            key = tracer.sizes[i].attribute
            if key in ("groups", "num_groups") and key in bound:
                self.numbers.append(Number(instruction.name, (bound[key][0],), i))
        handler = self._handlers.get(self._operator)
        if handler is not None:
            values = {n: _actual(k, args, kwargs, v) for n, (k, v) in bound.items()}
            with _disable_current_modes():  # arithmetic on labels carries no labels
                changed = handler(self, Ran(instruction, values, out))
            if changed is not None:
                self._instructions[at] = changed
        return out

    def number(
        self,
        ran: Ran,
        path: Path,
        tensor: Tensor,
        dim: int,
        part: tuple[int, int] | None = None,
    ) -> Number:
        """An argument that is the size of a dim, or of part (start, stop) of it."""
        facets = self.tracer.facets(tensor)
        offset = 0
        if part is not None:
            # Zeros outside the part: the size is that of the part plus a constant.
            offset = tensor.shape[dim] - (part[1] - part[0])
            masked: Facets = []
            for facet in facets:
                if facet.shape[dim] > 1:
                    inside = torch.zeros_like(facet)
                    inside.narrow(dim, part[0], part[1] - part[0]).copy_(
                        facet.narrow(dim, part[0], part[1] - part[0])
                    )
                    masked.append(inside)
            facets = masked
        shape = tuple(tensor.shape)
        self.tracer.saw(shape[dim], shape, facets, dim)
        return Number(ran.instruction.name, path, len(self.tracer.sizes) - 1, offset)

    def sizes(self, ran: Ran, argument: str, out: Tensor, first: int = 0) -> None:
        """A list of sizes that stand for the dims of `out` from `first` on."""
        key, given = ran.given(argument)
        for i, size in enumerate(given):
            if isinstance(size, Ref) or size >= 0:
                self.numbers.append(self.number(ran, (key, i), out, first + i))

    def free(self, tensor: Tensor, dims: Sequence[int]) -> None:
        """Gives dims of a tensor labels: what fills them follows whatever it meets."""
        facets = self.tracer.facets(tensor)
        missing = [d for d in dims if all(f.shape[d] == 1 for f in facets)]
        made = self.tracer.space.constant_facets(tensor.shape, missing)
        self.tracer.set(tensor, [*facets, *made])

    def fill(self, tensor: Tensor, dim: int, start: int, stop: int) -> bool:
        """Gives the padding of a labelled dim labels; False if the dim has none."""
        facets = list(self.tracer.facets(tensor))
        for i, facet in enumerate(facets):
            if varying(facet) == (dim,):
                filled = facet.clone()
                fresh = self.tracer.space.fresh(stop - start)
                self.tracer.space.flexible.append((int(fresh[0]), self.tracer.space.count))
                filled.view(-1)[start:stop] = fresh
                facets[i] = filled
                self.tracer.set(tensor, facets)
                return True
        return False

    def watch(self, name: str, tensor: Tensor, dim: int) -> bool:
        """Lets groups list which elements of a labelled dim they remove, under a name."""
        lines = [f for f in self.tracer.facets(tensor) if varying(f) == (dim,)]
        if not lines:
            return False
        leaf = Leaf(name, (), torch.empty(tensor.shape[dim]), is_parameter=False)
        self.tracer.add(leaf)
        for own in self.tracer.facets(leaf.tensor):
            self.tracer.space.flexible.append((int(own[0]), self.tracer.space.count))
            self.tracer.space.unite(own, lines[0].reshape(-1))
        return True


def _actual(key: int | str, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any) -> Any:
    if isinstance(key, int):
        return args[key] if key < len(args) else default
    return kwargs.get(key, default)
