"""From a model and example inputs to its structure: trace, close, collect."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Literal

import numpy as np
from torch import nn

from raycompress.errors import StructureError
from raycompress.structure.branches import with_training_branches
from raycompress.structure.closure import Classes, close
from raycompress.structure.compile import Sizes
from raycompress.structure.draft import Draft
from raycompress.structure.graph.analyze import graph_structure
from raycompress.structure.inputs import Inputs, as_call, check_model, why_not
from raycompress.structure.leaves import replaced, shapes_of
from raycompress.structure.model import Frozen, LeafShape, Structure
from raycompress.structure.pools import Pools, owner_of
from raycompress.structure.repair import MISTAKES, Repair
from raycompress.structure.rules.operators import find_rule
from raycompress.structure.scale import AttentionCalls, query_rows
from raycompress.structure.trace import Trace, trace

__all__ = ["analyze"]

# How reasons begin that graph form may not have.
_BY_CODE = (
    "the code of",
    "slim is wrong",
    "a copy of the model",
    "cut at a fixed place",
    "one element is picked",
    "picked by",
    "meets a tensor whose size is fixed",
)

_log = logging.getLogger(__name__)


def analyze(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ignore: Collection[str] = (),
    heads: Literal["whole", "dim"] = "whole",
    round_to: int = 1,
    min_kept: int = 1,
    form: Literal["auto", "module", "graph"] = "auto",
) -> Structure:
    """Finds the channel groups and the cost of a model by one eager forward pass.

    A slim model has one of two forms. Module form is the user's own class, with smaller
    parameters and corrected attributes. Graph form is the graph that `torch.export` makes of the
    model in evaluation mode, with the sizes in it rewritten: it can prune channels whose number
    is written into the code (`x.view(b, 64, -1)`), cut them into unequal parts, and be saved for
    use without that code. "auto" takes module form, unless channels had to stay whole there
    because of the code, the model can be exported, and graph form can remove more parameters.

    Args:
        model: any module; its mode and its parameters are left as they were.
        example_inputs: positional arguments (a tuple, or one tensor) or keyword arguments (a
            mapping), with any batch size.
        ignore: module names (a name covers what is below it) or class names whose channels are
            protected.
        heads: attention loses whole heads ("whole") or the same positions of every head ("dim").
        round_to: layers keep a multiple of so many outputs, see `Structure.limited`.
        min_kept: fewest channels that a group keeps.
        form: "module", "graph" or "auto"; a search over many slim models needs "module", which
            keeps the user's class and its state dicts.

    Raises:
        StructureError: the model doesn't run on the example inputs, `ignore` names nothing, or
            the model has no graph form where that is asked for.
    """
    for key, value, allowed in (
        ("heads", heads, ("whole", "dim")),
        ("form", form, ("auto", "module", "graph")),
    ):
        if value not in allowed:
            raise StructureError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    check_model(model)
    args, kwargs = as_call(example_inputs)
    protected = _protected(model, ignore)

    def protect(seen: Trace) -> None:
        for leaf in seen.leaves:
            names = (leaf.name, *leaf.aliases)
            if leaf.facets and any(_inside(owner_of(n), protected) for n in names):
                for facet in leaf.facets:
                    dim = next(d for d, s in enumerate(facet.shape) if s > 1)
                    if leaf.roles.get(dim) != "consumer":
                        seen.space.freeze(facet, "protected by `ignore`")

    def collect(seen: Trace) -> Draft:
        return _collect(seen, model, heads)

    if form == "graph":
        structure = graph_structure(model, args, kwargs, protect, collect)
        return structure.limited(round_to=round_to, min_kept=min_kept)
    shapes = shapes_of(model)
    attention = AttentionCalls()
    try:
        forward = with_training_branches(model, attention.forward(model))
        seen = trace(model, args, kwargs, find_rule, forward=forward)
        if shapes_of(model) != shapes:  # buffers made by the first pass are there in the next
            attention = AttentionCalls()
            forward = with_training_branches(model, attention.forward(model))
            seen = trace(model, args, kwargs, find_rule, forward=forward)
    except Exception as error:
        reason = why_not(model, args, kwargs)
        if reason is None:  # it runs without the tracer, so this isn't the inputs' fault
            raise
        raise StructureError(reason) from error
    for leaf in replaced(model, seen.leaves):
        for facet in leaf.facets or []:
            seen.space.freeze(facet, "the forward pass replaces this buffer")
    seen.query_rows = query_rows(model, seen, attention, args, kwargs, heads)
    protect(seen)
    structure = Repair(model, seen, lambda: collect(seen), args, kwargs).run()
    if form == "auto" and _whole_by_code(structure, seen):
        try:
            graph = graph_structure(model, args, kwargs, protect, collect)
        except StructureError as error:
            _log.info("module form, though channels stay whole in it: %s", error)
        except MISTAKES:
            _log.warning("module form, since graph form failed", exc_info=True)
        else:
            if _fewest(graph) < _fewest(structure):
                structure = graph
    return structure.limited(round_to=round_to, min_kept=min_kept)


def _whole_by_code(structure: Structure, seen: Trace) -> bool:
    """Whether a layer keeps all its outputs because the code computes with their number."""
    produced = {
        (x.name, d) for x in seen.leaves for d, role in x.roles.items() if role == "producer"
    }
    return any(
        f.reason.startswith(_BY_CODE) and (f.parameter, f.dim) in produced for f in structure.frozen
    )


def _fewest(structure: Structure) -> int:
    """Parameters with one channel left in each group."""
    return structure.cost({g.name: g.min_kept for g in structure.groups}).params


def _collect(seen: Trace, model: nn.Module, heads: Literal["whole", "dim"]) -> Draft:
    classes = close(seen.space, heads)
    pools = Pools(seen, classes, model)
    sizes = Sizes(seen, pools)
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    forms = [sizes.of(s.shape, s.facets)[s.dim] for s in seen.sizes]
    structure = Structure(
        groups=pools.groups,
        frozen=_frozen(seen, classes, pools),
        unknown_ops=dict(seen.unknown),
        query_rows=seen.query_rows,
        untouched=tuple(
            leaf.name for leaf in seen.leaves if leaf.facets is None and leaf.is_parameter
        ),
        leaves={
            leaf.name: LeafShape(
                leaf.name, tuple(leaf.tensor.shape), leaf.aliases, leaf.name in parameters
            )
            for leaf in seen.leaves
        },
        module_types={n: type(m).__name__ for n, m in model.named_modules()},
        fixes=(),
        sizes=sizes.model(),
    )
    return Draft(structure, forms)


def _protected(model: nn.Module, ignore: Collection[str]) -> set[str]:
    if isinstance(ignore, str):
        raise StructureError(f"ignore must be a list of names, got {ignore!r}; write [{ignore!r}]")
    modules = dict(model.named_modules())
    found: set[str] = set()
    for name in ignore:
        matching = {n for n, m in modules.items() if n == name or type(m).__name__ == name}
        if not matching:
            raise StructureError(f"ignore: no module is named {name!r} or of that type")
        found |= matching
    return found


def _inside(module: str, protected: set[str]) -> bool:
    return any(module == p or module.startswith(f"{p}.") or p == "" for p in protected)


def _frozen(seen: Trace, classes: Classes, pools: Pools) -> tuple[Frozen, ...]:
    found = []
    for leaf in seen.leaves:
        if not leaf.is_parameter:
            continue
        for dim, start in enumerate(leaf.starts):
            if not start:
                continue
            cls = classes.root[start : start + leaf.tensor.shape[dim]]
            bad = cls[pools.pool_of[cls] < 0]
            if len(bad):
                values, counts = np.unique(bad, return_counts=True)
                top = int(values[np.argmax(counts)])
                reason = classes.reasons.get(top, "no layer produces these")
                found.append(Frozen(leaf.name, dim, reason))
    return tuple(found)
