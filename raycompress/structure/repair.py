"""Module form must run: what to do where a module's code computes with sizes of its own.

The slim model is tried on the example inputs. Where it stops, remedies (`remedies.py`) are tried in
this order, and one is kept if the model then gets beyond the module that it stopped in:

1. integer attributes follow the sizes that the module saw with their values: all those for which
   there is only one such size, then each attribute with each size;
2. different channels whose numbers the module took for one (`x.reshape(b, n, c)` for heads, where
   `c` is the width of the input) are tied, position by position, and go together;
3. one group of channels stays whole; then 2 and 3 together; then all groups that the module saw.

Attributes are corrected alike in all modules of a class that saw sizes in the same order; other
remedies are tried first there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn

from raycompress.errors import StructureError
from raycompress.structure.draft import Draft, freeze, line_of
from raycompress.structure.fixes import Choices, named, to_fixes
from raycompress.structure.model import Structure
from raycompress.structure.probe import Stop, described, probe, uneven
from raycompress.structure.proof import is_right, wrong_groups
from raycompress.structure.remedies import Remedies, Remedy
from raycompress.structure.trace import Trace

__all__ = ["MISTAKES", "Repair"]

# What a mistake of the analysis raises on a model unlike all others; it must not be the user's.
MISTAKES = (
    StructureError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_log = logging.getLogger(__name__)


class Repair:
    """Makes the drafts of one trace run in module form."""

    def __init__(
        self,
        model: nn.Module,
        seen: Trace,
        collect: Callable[[], Draft],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._model = model
        self._seen = seen
        self._collect = collect
        self._inputs = args, kwargs
        self._chosen = named(seen.sizes, model)
        self._whole: set[str] = set()
        self._remedies = Remedies(model, seen.sizes)
        self._seed = 0
        self._draft = collect()

    def run(self) -> Structure:
        """A structure whose slim models run, and compute what the masked ones do."""
        first, united = self._draft, len(self._seen.space.edges)
        try:
            self._until_it_runs(self._probe(self._structure()))
            self._seed = 1  # what fits by chance for one share of channels doesn't for another
            if not (right := self._right({}, self._kept())):
                stop = self._probe(self._structure())
                self._until_it_runs(stop)
                self._until_it_is_right(known=right if stop is None else None)
            if self._whole:
                self._draft = self._collect()
        except MISTAKES as error:
            _log.warning("channels stay whole, since their repair failed", exc_info=True)
            del self._seen.space.edges[united:]
            self._draft, self._whole = first, set()
            self._keep_all(f"the code of the model can't be repaired ({described(error)})")
            self._draft = self._collect()
        return self._structure()

    def _kept(self) -> dict[str, range]:
        return uneven(self._draft.structure, self._whole, self._seed)

    def _until_it_is_right(self, known: bool | None) -> None:
        while (kept := self._kept()) and not self._corrected(kept, known):
            known = None
            for name, reason in self._wrong(kept).items():
                if not self._corrected({name: kept[name]}):
                    self._keep(name, f"slim is wrong: {reason}")

    def _wrong(self, kept: dict[str, range]) -> dict[str, str]:
        args, kwargs = self._inputs
        return wrong_groups(self._model, self._structure(), kept, kwargs or args)

    def _right(self, more: Choices, kept: dict[str, range]) -> bool:
        args, kwargs = self._inputs
        return is_right(self._model, self._structure(more), kept, kwargs or args)

    def _corrected(self, kept: dict[str, range], known: bool | None = None) -> bool:
        """Whether the slim model is right, if need be by attributes that nothing else asked for.

        Args:
            kept: channels of the groups that are tried.
            known: whether it is right as it is, None if that must be found.
        """
        if self._right({}, kept) if known is None else known:
            return True
        remedies = self._remedies
        changing = [
            n for n, own in remedies.own.items() if not kept.keys().isdisjoint(self._in(own))
        ]
        trials: list[Choices] = []
        for certain in (True, False):
            by_kind: dict[str, Choices] = {}
            for name in changing:
                found = by_kind.setdefault(remedies.kind(name), {})
                own = remedies.own[name]
                for a, p, i in remedies.plain(name, own, self._draft, self._chosen, certain):
                    found[name, a, p] = i
            trials.append({k: v for choices in by_kind.values() for k, v in choices.items()})
            if len(kept) == 1:
                trials += by_kind.values()
        for choices in trials:
            if choices and self._right(choices, kept):
                self._chosen |= choices
                return True
        return False

    def _until_it_runs(self, stop: Stop | None) -> None:
        """Repairs until nothing stops.

        Args:
            stop: where the slim model stops now.
        """
        while stop is not None:
            if len(self._whole) == len(self._draft.structure.groups) or not stop.made:
                self._keep_unmade(stop)
                if len(self._whole) == len(self._draft.structure.groups):
                    return
                stop = self._probe(self._structure())
            else:
                stop = self._accept(*self._find(stop), stop)

    def _keep_unmade(self, stop: Stop) -> None:
        """Whole stays what no slim model can be made of; everything, if there isn't even a copy."""
        wrong = {} if not self._right({}, {}) else self._wrong(self._kept())
        for name, reason in wrong.items():
            self._keep(name, f"slim is wrong: {reason}")
        if not wrong:
            self._keep_all(f"a copy of the model doesn't run: {stop.error}")

    def _structure(self, more: Choices | None = None) -> Structure:
        choices = {**self._chosen, **(more or {})}
        fixes = to_fixes({k: v for k, v in choices.items() if v >= 0}, self._draft.forms)
        return replace(self._draft.structure, fixes=fixes)

    def _probe(self, structure: Structure, whole: Collection[str] = ()) -> Stop | None:
        kept = uneven(structure, {*self._whole, *whole}, self._seed)
        return probe(self._model, structure, kept, *self._inputs)

    def _try(self, remedy: Remedy) -> tuple[Stop | None, Draft]:
        """Where the slim model stops with a remedy, and the draft that it needs."""
        if not remedy.tied:
            stop = self._probe(self._structure(remedy.choices), self._in(remedy.whole))
            return stop, self._draft
        before, draft, whole = len(self._seen.space.edges), self._draft, self._whole
        self._tie(remedy)
        self._whole = set()  # they are frozen, so the new draft lacks them
        try:
            self._draft = tied = self._collect()
            stop = self._probe(self._structure(remedy.choices), self._in(remedy.whole))
            return stop, tied
        finally:
            del self._seen.space.edges[before:]
            self._draft, self._whole = draft, whole

    def _tie(self, remedy: Remedy) -> None:
        for sizes in remedy.tied:
            first, *others = (line_of(self._seen.sizes[i]) for i in sizes)
            for line in others:
                if first is not None and line is not None:
                    self._seen.space.unite(first, line)

    def _find(self, stop: Stop) -> tuple[Remedy, Stop | None, Draft]:
        """The remedy to take, where the slim model then stops, and the draft that it needs."""
        best: tuple[float, Remedy, Stop | None, Draft] | None = None
        for remedy in self._remedies.candidates(
            stop.module, self._draft, self._chosen, self._whole
        ):
            if remedy.whole and best is not None:
                return best[1:]  # a step ahead costs nothing; keeping channels does
            try:
                after, draft = self._try(remedy)
            except MISTAKES:
                _log.warning("a remedy for %r can't be tried", remedy.module, exc_info=True)
                continue
            gained = math.inf if after is None else after.operators
            if after is None or (gained > stop.operators and not after.inside(stop.module)):
                return remedy, after, draft
            if not remedy.whole and gained > max(stop.operators, best[0] if best else 0):
                best = gained, remedy, after, draft
        if best is not None:
            return best[1:]
        everything = Remedy("", whole=tuple(range(len(self._seen.sizes))))
        return everything, *self._try(everything)

    def _accept(self, remedy: Remedy, after: Stop | None, draft: Draft, stop: Stop) -> Stop | None:
        """Takes a remedy, wherever it was learnt for; returns where the slim model stops then."""
        taken = self._remedies.learn(remedy)
        for one in taken:
            self._chosen |= one.choices
            self._tie(one)
        if remedy.tied:
            alone = not any(one.tied for one in taken[1:])
            self._draft = draft if alone else self._collect()
            self._whole = set()
        reason = f"the code of {remedy.module or stop.module!r} computes with this size"
        for name in self._in(remedy.whole):
            self._keep(name, f"{reason} ({stop.error})")
        return after if len(taken) == 1 else self._probe(self._structure())

    def _in(self, sizes: Collection[int]) -> tuple[str, ...]:
        """Groups that these sizes follow, but for those that stay whole."""
        return tuple(n for n in self._draft.groups(sizes) if n not in self._whole)

    def _keep(self, name: str, reason: str) -> None:
        self._whole.add(name)
        freeze(self._seen, self._draft.structure.group(name), reason)

    def _keep_all(self, reason: str) -> None:
        for name in self._draft.structure.names():
            if name not in self._whole:
                self._keep(name, reason)
