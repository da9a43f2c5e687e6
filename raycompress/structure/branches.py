"""Branches of a model that run in training only, such as auxiliary classifiers.

Their parameters must be cut with the channels that they read, or the slim model couldn't train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.structure.leaves import flat
from raycompress.structure.trace import Trace

__all__ = ["with_training_branches"]

_log = logging.getLogger(__name__)
_Forward = Callable[[Trace, tuple[Any, ...], dict[str, Any]], Any]


def with_training_branches(model: nn.Module, forward: _Forward) -> _Forward:
    """The forward pass for `trace`, followed by one in training where parameters weren't read.

    The second pass adds labels and what unites them, and no cost. It leaves batch statistics and
    the random state alone.
    """

    def run(tracer: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = forward(tracer, args, kwargs)
        if all(leaf.facets is not None for leaf in tracer.leaves if leaf.is_parameter):
            return out
        terms, depth = len(tracer.terms), len(tracer.stack)
        with _training(model), torch.random.fork_rng(devices=[]):
            try:
                again = model(*args, **kwargs)
            except Exception as error:  # it may ask for targets in training
                _log.info("branches that run in training only weren't seen: %s", error)
                again = None
        del tracer.terms[terms:], tracer.stack[depth:]
        for tensor in flat(again):
            if isinstance(tensor, Tensor):
                for facet in tracer.facets(tensor):
                    tracer.space.freeze(facet, "reaches the model's output in training")
        return out

    return run


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training for the modules that choose branches, not for layers with statistics or noise."""
    changed = [m for m in model.modules() if next(m.children(), None) and not m._buffers]
    before = [m.training for m in changed]
    for module in changed:
        module.training = True
    try:
        yield
    finally:
        for module, training in zip(changed, before, strict=True):
            module.training = training
