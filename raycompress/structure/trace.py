"""One eager forward pass with labels beside every tensor.

Each ATen operator is intercepted below autograd. The rule for it (in `rules/`) computes the facets
of the outputs from those of the inputs. An operator without a rule freezes what it touches, is
listed, and never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raycompress.structure.labels import Facets, LabelSpace, apart, varying
from raycompress.structure.leaves import Leaf, flat, leaves_of, mapped
from raycompress.structure.model import QueryRows
from raycompress.structure.quiet import quiet
from raycompress.structure.views import remember_views, write_back

__all__ = ["Call", "Leaf", "Rule", "SizeSeen", "Term", "Trace", "trace"]

_LABELS = "_raycompress_facets"
_DATA = "_raycompress_data"
# Their schemas don't say so, but they write nothing.
_UNDECLARED_VIEWS = {
    "aten::_unsafe_view",
    "aten::unsafe_chunk",
    "aten::unsafe_split",
    "aten::unsafe_split_with_sizes",
}


@dataclass(frozen=True)
class Term:
    """coefficient * product of the sizes of a tensor whose facets say what may disappear."""

    kind: str  # "macs" | "bytes"
    module: str
    coefficient: int
    shape: tuple[int, ...]
    facets: tuple[Tensor, ...]


@dataclass(frozen=True)
class SizeSeen:
    """A size that the code of a module passed to an operator, and the dim that it stands for.

    `attribute` names the module's attribute where the operator says which it is. A size that
    wasn't `passed` was only there to be read: from what the module got, or what its parts gave.
    """

    module: str
    value: int
    shape: tuple[int, ...]
    facets: tuple[Tensor, ...]
    dim: int
    attribute: str = ""
    passed: bool = True


@dataclass
class Call:
    """One operator call, as a rule sees it."""

    tracer: Trace
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: dict[str, Any]
    first_shape: tuple[int, ...] = ()
    first_layout: tuple[tuple[int, ...], int] = ((), 0)  # strides, offset

    @property
    def space(self) -> LabelSpace:
        """The labels of this trace."""
        return self.tracer.space

    def arg(self, name: str) -> Any:
        """The argument of that name in the operator's schema."""
        return self.before[name]

    def has(self, name: str) -> bool:
        """Whether the schema has such an argument."""
        return name in self.before

    def tensors(self) -> list[Tensor]:
        """All tensor arguments, also those in lists."""
        found: list[Tensor] = []
        for value in self.before.values():
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found += [v for v in value if isinstance(v, Tensor)]
        return found

    def facets(self, tensor: Tensor) -> Facets:
        """Facets of an argument."""
        return self.tracer.facets(tensor)

    def set(self, tensor: Tensor, facets: Facets) -> None:
        """Gives an output its facets."""
        self.tracer.set(tensor, facets)


Rule = Callable[[Call], None]


@dataclass
class Trace:
    """What one forward pass showed."""

    space: LabelSpace
    leaves: list[Leaf]
    terms: list[Term] = field(default_factory=list)
    sizes: list[SizeSeen] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)  # operator -> module where it was first
    called: list[str] = field(default_factory=list)  # modules, in order of their first call
    outputs: dict[str, tuple[tuple[int, ...], Facets]] = field(default_factory=dict)  # of modules
    batch: int = 1
    output: Any = None  # what the model returned
    query_rows: tuple[QueryRows, ...] = ()
    _by_id: dict[int, Leaf] = field(default_factory=dict)
    _by_storage: dict[tuple[int, tuple[int, ...]], Leaf] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    _spans: list[tuple[int, Leaf, int]] = field(default_factory=list)
    _mark: object = field(default_factory=object)

    def __post_init__(self) -> None:
        for leaf in self.leaves:
            self._by_id[id(leaf.tensor)] = leaf
            if leaf.tensor.numel():
                self._by_storage[leaf.tensor.data_ptr(), tuple(leaf.tensor.shape)] = leaf

    def add(self, leaf: Leaf) -> None:
        """A tensor that isn't the model's gets labels of its own, as a parameter does."""
        self.leaves.append(leaf)
        self._by_id[id(leaf.tensor)] = leaf

    @property
    def module(self) -> str:
        """Name of the module whose forward is running."""
        return self.stack[-1] if self.stack else ""

    def leaf(self, tensor: Tensor) -> Leaf | None:
        """The parameter or buffer that this tensor is, or None."""
        leaf = self._by_id.get(id(tensor))
        if leaf is None and self._by_storage and self._labels(tensor) is None:
            # `parameter.data` and tensors from a flattened list are other objects.
            try:
                pointer = tensor.data_ptr()
            except RuntimeError:
                return None
            leaf = self._by_storage.get((pointer, tuple(tensor.shape)))
            if leaf is not None and leaf.tensor.stride() != tensor.stride():
                return None
        return leaf

    def facets(self, tensor: Tensor) -> Facets:
        """Facets of any tensor; reading a leaf for the first time gives it fresh labels."""
        known = self._labels(tensor)
        if known is not None:
            return known
        leaf = self.leaf(tensor)
        if leaf is None:
            return []
        if leaf.facets is None:
            leaf.facets = []
            for dim, size in enumerate(tensor.shape):
                if size > 1 and tensor.is_floating_point():
                    leaf.starts.append(self.space.count)
                    self._spans.append((self.space.count, leaf, dim))
                    shape = [1] * tensor.dim()
                    shape[dim] = size
                    leaf.facets.append(self.space.fresh(size).reshape(shape))
                else:
                    leaf.starts.append(0)
        return leaf.facets

    def set(self, tensor: Tensor, facets: Facets) -> None:
        """Gives a tensor its facets."""
        for f in facets:
            assert f.dim() == tensor.dim(), (tuple(f.shape), tuple(tensor.shape))
        leaf = self._by_id.get(id(tensor))
        if leaf is None:
            setattr(tensor, _LABELS, (self._mark, [f for f in facets if varying(f)]))

    def _labels(self, tensor: Tensor) -> Facets | None:
        """What `set` gave it; a tensor that the model keeps may bear those of another trace."""
        mark, facets = getattr(tensor, _LABELS, (None, None))
        return facets if mark is self._mark else None

    def is_data(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the model's input."""
        return bool(getattr(tensor, _DATA, False))

    def role(self, facets: Facets, role: str) -> None:
        """Remembers which role the leaves play whose labels these facets carry."""
        starts = np.array([first for first, _, _ in self._spans])
        for facet in facets:
            ids = np.unique(facet.numpy())
            for at in np.unique(np.searchsorted(starts, ids, side="right") - 1):
                first, leaf, dim = self._spans[at]
                # Labels between the spans are conjunctions, which no leaf owns.
                mine = (ids >= first) & (ids < first + leaf.tensor.shape[dim])
                if at >= 0 and mine.any() and leaf.roles.get(dim) != "producer":
                    leaf.roles[dim] = role

    def multiply_adds(self, coefficient: int, shape: Sequence[int], facets: Facets) -> None:
        """Adds `coefficient * prod(shape)` multiply-adds of the running module."""
        self.counts("macs", coefficient, shape, facets)

    def counts(
        self, kind: str, coefficient: int, shape: Sequence[int], facets: Sequence[Tensor]
    ) -> None:
        """Adds a term of the cost."""
        sizes, axes = apart(shape, list(facets))
        self.terms.append(Term(kind, self.module, coefficient, sizes, tuple(axes)))

    def saw(
        self, value: int, shape: Sequence[int], facets: Facets, dim: int, attribute: str = ""
    ) -> None:
        """Remembers a size that the module's code depends on."""
        self.sizes.append(SizeSeen(self.module, value, tuple(shape), tuple(facets), dim, attribute))

    def could_read(self, tensors: list[Tensor]) -> None:
        """Remembers the sizes of tensors that the running module's code holds."""
        for t in tensors:
            shape, facets = tuple(t.shape), tuple(self.facets(t))
            self.sizes += [
                SizeSeen(self.module, size, shape, facets, dim, passed=False)
                for dim, size in enumerate(shape)
                if size > 1
            ]


def _outputs(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, (list, tuple)):
        return [t for o in out for t in _outputs(o)]
    return []


class _Mode(TorchDispatchMode):
    def __init__(
        self, tracer: Trace, find: Callable[[Any], Rule | None], run: Callable[[Call], Any]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.find = find
        self.run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        schema = func._schema
        bound: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(args):
                bound[argument.name] = args[i]
            elif argument.name in kwargs:
                bound[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
        name = schema.name.rsplit("::", 1)
        mutated = [
            a.name
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in bound
        ]
        base = name[1].removesuffix("_") if mutated and name[1].endswith("_") else name[1]
        call = Call(tracer, f"{name[0]}::{base}", func, args, kwargs, None, bound)
        inputs = call.tensors()
        for t in inputs:  # labels are made for the shape before an in-place operator changes it
            tracer.facets(t)
        if inputs:
            call.first_shape = tuple(inputs[0].shape)
            call.first_layout = inputs[0].stride(), int(inputs[0].storage_offset())
        data = any(tracer.is_data(t) for t in inputs)
        call.out = self.run(call)
        outputs = _outputs(call.out)
        for t in outputs:
            if data:
                setattr(t, _DATA, True)
        rule = self.find(func)
        if rule is None:
            self._unknown(call, inputs, outputs)
        else:
            rule(call)
        self._written(call, outputs, mutated)
        return call.out

    def _unknown(self, call: Call, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        tracer = self.tracer
        if any(tracer.facets(t) for t in inputs):
            tracer.unknown.setdefault(call.name, tracer.module)
        for t in inputs:
            for facet in tracer.facets(t):
                tracer.space.freeze(facet, f"operator {call.name} has no rule")
        for t in outputs:
            tracer.set(t, [])

    def _written(self, call: Call, outputs: list[Tensor], mutated: list[str]) -> None:
        """Follows writes into views, remembers new views, and counts memory written anew."""
        tracer = self.tracer
        if mutated:
            data = any(tracer.is_data(t) for t in call.tensors())
            for name in mutated:
                if isinstance(call.before[name], Tensor):
                    if data:
                        setattr(call.before[name], _DATA, True)
                    write_back(tracer, call.before[name])
            return
        if any(r.alias_info is not None for r in call.func._schema.returns):
            remember_views(call, outputs)
            return
        if call.name in _UNDECLARED_VIEWS:
            return
        for t in outputs:
            if tracer.is_data(t):
                tracer.counts("bytes", t.element_size(), t.shape, tracer.facets(t))


def _as_written(call: Call) -> Any:
    return call.func(*call.args, **call.kwargs)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    find: Callable[[Any], Rule | None],
    run: Callable[[Call], Any] = _as_written,
    forward: Callable[[Trace, tuple[Any, ...], dict[str, Any]], Any] | None = None,
) -> Trace:
    """Runs the model once and returns what the labels showed.

    Args:
        model: any module.
        args: its positional arguments.
        kwargs: its keyword arguments.
        find: the rule of an operator.
        run: computes an operator's outputs, which must have the usual shapes.
        forward: computes what the model does, in place of the model's own code.
    """
    tracer = Trace(LabelSpace(), leaves_of(model))
    inputs = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
    tracer.batch = next((t.shape[0] for t in inputs if t.dim()), 1)
    handles = []
    for name, module in model.named_modules():

        def enter(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            tracer.stack.append(name)
            if name not in tracer.called:
                tracer.called.append(name)
            tracer.could_read(_outputs([*args, *kwargs.values()]))

        def leave(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            tracer.stack.pop()
            first = next((t for t in _outputs(out)), None)
            if first is not None:
                tracer.outputs.setdefault(name, (tuple(first.shape), tracer.facets(first)))
            tracer.could_read(_outputs(out))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with quiet(model):
            args, kwargs = mapped((args, kwargs), _fresh_input)
            with _Mode(tracer, find, run):
                out = forward(tracer, args, kwargs) if forward else model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    tracer.output = out
    for tensor in flat(out):
        if isinstance(tensor, Tensor):
            for facet in tracer.facets(tensor):
                tracer.space.freeze(facet, "reaches the model's output")
    return tracer


def _fresh_input(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()  # the caller's tensor carries no labels, and isn't written to
    setattr(value, _DATA, True)
    return value
