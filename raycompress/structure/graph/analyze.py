"""From a model to its structure in graph form: export, trace, and a slim graph that is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node

from raycompress.errors import StructureError
from raycompress.structure.draft import Draft, freeze
from raycompress.structure.graph.handlers import HANDLERS
from raycompress.structure.graph.plan import apart, plan_of, slim_graph
from raycompress.structure.graph.program import export
from raycompress.structure.graph.trace import GraphTrace
from raycompress.structure.leaves import tensors_of
from raycompress.structure.model import Structure
from raycompress.structure.probe import uneven
from raycompress.structure.proof import wrong_groups
from raycompress.structure.quiet import quiet
from raycompress.structure.trace import Trace, trace

__all__ = ["graph_structure"]

_MAX_REPAIRS = 64


def graph_structure(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    protect: Callable[[Trace], None],
    collect: Callable[[Trace], Draft],
) -> Structure:
    """The structure of a model in graph form.

    Args:
        model: any module.
        args: example positional arguments.
        kwargs: example keyword arguments.
        protect: freezes what the user protects.
        collect: makes a structure of a trace.

    Raises:
        StructureError: the model can't be exported with a dynamic batch size, or its graph
            doesn't run on labels.
    """
    program, args, kwargs = export(model, args, kwargs)
    named = tensors_of(model)
    run = GraphTrace(program, named, HANDLERS)
    try:
        seen = trace(model, args, kwargs, run.find, forward=run.run)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise StructureError(
            f"graph form: the exported graph doesn't run: {type(error).__name__}: {error}"
        ) from error
    protect(seen)
    for _ in range(_MAX_REPAIRS):
        draft = collect(seen)
        plan = plan_of(run, draft.structure, draft.forms)
        structure = apart(draft.structure, plan, set(named))
        stop = _stops_at(model, structure, args, kwargs)
        if stop is None:
            wrong = wrong_groups(model, structure, uneven(structure, (), 0), kwargs or args)
            for name, reason in wrong.items():
                freeze(seen, structure.group(name), f"slim is wrong: {reason}")
            if not wrong:
                return structure
            continue
        name, problem = stop
        for facet in run.met.get(name, []):
            seen.space.freeze(facet, f"{name} in the exported graph needs this size ({problem})")
    raise StructureError("graph form: no slim graph of this model computes what it should")


def _stops_at(
    model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, str] | None:
    """(instruction, error) where a slim graph stops; None if it runs."""
    for seed in (0, 1):
        small = slim_graph(model, structure, uneven(structure, (), seed))
        interpreter = _Stopping(small)
        with quiet(small):
            try:
                interpreter.boxed_run(list(torch.utils._pytree.tree_leaves((args, kwargs))))
            except Exception as error:  # an operator raises what it likes
                text = (str(error).splitlines() or [""])[0][:120]
                return interpreter.at, f"{type(error).__name__}: {text}"
    return None


class _Stopping(Interpreter):
    """Knows which instruction is running."""

    at = ""

    def run_node(self, n: Node) -> Any:
        self.at = n.name
        return super().run_node(n)
