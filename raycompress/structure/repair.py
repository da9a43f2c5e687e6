"""Module form must run: what to do where a module's code computes with sizes of its own.

The slim model is tried on the example inputs. Where it stops, remedies are tried in this order,
and one is kept if the model then gets beyond the module that it stopped in:

1. integer attributes follow the sizes that the module saw with their values: all those for which
   there is only one such size, then each attribute with each size;
2. different channels whose numbers the module took for one (`x.reshape(b, n, c)` for heads, where
   `c` is the width of the input) are tied, position by position, and go together;
3. one group of channels stays whole; then 2 and 3 together; then all groups that the module saw.

Attributes are corrected alike in all modules of a class that saw sizes in the same order; other
remedies are tried first there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.fixes import Choices, integers, named, to_fixes
from raycompress.structure.model import ChannelGroup, Structure
from raycompress.structure.probe import Stop, probe, uneven
from raycompress.structure.proof import is_right, wrong_groups
from raycompress.structure.trace import SizeSeen, Trace

__all__ = ["Draft", "Repair", "freeze"]

_REACH = 3  # a module and how many around it may hold the attribute or the size at fault


@dataclass(frozen=True)
class Draft:
    """A structure, and which of its sizes each size seen in the trace is."""

    structure: Structure
    forms: list[int]


@dataclass(frozen=True)
class _Remedy:
    """What to try for a module.

    Attributes:
        module: where it applies.
        places: attributes to correct: (attribute, position) -> a size seen, or -1 for as it was.
        tied: sizes seen that become one, each tuple for itself.
        whole: sizes seen whose channels stay whole.
    """

    module: str
    places: tuple[tuple[str, int | None, int], ...] = ()
    tied: tuple[tuple[int, ...], ...] = ()
    whole: tuple[int, ...] = ()


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
        self._modules = dict(model.named_modules())
        self._seen = seen
        self._collect = collect
        self._inputs = args, kwargs
        self._chosen = named(seen.sizes, model)
        self._whole: set[str] = set()
        self._own: dict[str, list[int]] = {}
        for i, s in enumerate(seen.sizes):
            self._own.setdefault(s.module, []).append(i)
        self._learnt: dict[str, list[_Remedy]] = {}
        self._seed = 0
        self._draft = collect()

    def run(self) -> Structure:
        """A structure whose slim models run, and compute what the masked ones do."""
        self._until_it_runs()
        self._seed = 1  # what fits by chance for one share of channels doesn't for another
        if not self._right({}, self._kept()):
            self._until_it_runs()
            self._until_it_is_right()
        if self._whole:
            self._draft = self._collect()
        return self._structure()

    def _kept(self) -> dict[str, range]:
        return uneven(self._draft.structure, self._whole, self._seed)

    def _until_it_is_right(self) -> None:
        while not self._corrected(kept := self._kept()):
            for name, reason in self._wrong(kept).items():
                if not self._corrected({name: kept[name]}):
                    group = self._draft.structure.group(name)
                    freeze(self._seen, group, f"slim is wrong: {reason}")
                    self._whole.add(name)

    def _wrong(self, kept: dict[str, range]) -> dict[str, str]:
        args, kwargs = self._inputs
        return wrong_groups(self._model, self._structure(), kept, kwargs or args)

    def _right(self, more: Choices, kept: dict[str, range]) -> bool:
        args, kwargs = self._inputs
        return is_right(self._model, self._structure(more), kept, kwargs or args)

    def _corrected(self, kept: dict[str, range]) -> bool:
        """Whether the slim model is right, if need be by attributes that nothing else asked for."""
        if self._right({}, kept):
            return True
        changing = [
            n for n, own in self._own.items() if not kept.keys().isdisjoint(self._groups(own))
        ]
        trials: list[Choices] = []
        for certain in (True, False):
            by_kind: dict[str, Choices] = {}
            for name in changing:
                found = by_kind.setdefault(self._kind(name), {})
                for a, p, i in self._plain(name, self._own[name], certain):
                    found[name, a, p] = i
            trials.append({k: v for choices in by_kind.values() for k, v in choices.items()})
            if len(kept) == 1:
                trials += by_kind.values()
        for choices in trials:
            if choices and self._right(choices, kept):
                self._chosen |= choices
                return True
        return False

    def _until_it_runs(self) -> None:
        while (stop := self._probe(self._structure())) is not None:
            if len(self._whole) == len(self._draft.structure.groups):
                raise StructureError(f"a copy of the model doesn't run: {stop.error}")
            self._accept(self._find(stop), stop)

    def _structure(self, more: Choices | None = None) -> Structure:
        choices = {**self._chosen, **(more or {})}
        fixes = to_fixes({k: v for k, v in choices.items() if v >= 0}, self._draft.forms)
        return replace(self._draft.structure, fixes=fixes)

    def _probe(self, structure: Structure, whole: Collection[str] = ()) -> Stop | None:
        kept = uneven(structure, {*self._whole, *whole}, self._seed)
        return probe(self._model, structure, kept, *self._inputs)

    def _try(self, remedy: _Remedy) -> Stop | None:
        if not remedy.tied:
            return self._probe(self._structure(_placed(remedy)), self._groups(remedy.whole))
        before, draft = len(self._seen.space.edges), self._draft
        self._tie(remedy)
        self._draft = self._collect()
        try:
            return self._probe(self._structure(_placed(remedy)), self._groups(remedy.whole))
        finally:
            del self._seen.space.edges[before:]
            self._draft = draft

    def _tie(self, remedy: _Remedy) -> None:
        for sizes in remedy.tied:
            first, *others = (_line(self._seen.sizes[i]) for i in sizes)
            for line in others:
                if first is not None and line is not None:
                    self._seen.space.unite(first, line)

    def _find(self, stop: Stop) -> _Remedy:
        best: tuple[float, _Remedy] | None = None
        for remedy in self._candidates(stop):
            if remedy.whole and best is not None:
                return best[1]  # a step ahead costs nothing; keeping channels does
            after = self._try(remedy)
            gained = math.inf if after is None else after.operators
            if after is None or (gained > stop.operators and not after.inside(stop.module)):
                return remedy
            if not remedy.whole and gained > max(stop.operators, best[0] if best else 0):
                best = gained, remedy
        return best[1] if best else _Remedy("", whole=tuple(range(len(self._seen.sizes))))

    def _accept(self, remedy: _Remedy, stop: Stop) -> None:
        learnt = self._learnt.setdefault(self._kind(remedy.module), [])
        taken = [remedy]
        # A tie costs freedom: it becomes the habit of a class only where it was needed twice.
        if remedy.places or (remedy.tied and any(r.tied for r in learnt)):
            peers = (self._translated(remedy, n) for n in self._modules)
            taken += [r for r in peers if r is not None and not r.whole]
        learnt.insert(0, remedy)
        for one in taken:
            self._chosen |= _placed(one)
            self._tie(one)
        if remedy.tied:
            self._draft = self._collect()
            self._whole = set()
        for name in self._groups(remedy.whole) if remedy.whole else ():
            self._keep(name, stop, remedy.module)

    def _keep(self, name: str, stop: Stop, module: str) -> None:
        self._whole.add(name)
        reason = f"the code of {module or stop.module!r} computes with this size ({stop.error})"
        freeze(self._seen, self._draft.structure.group(name), reason)

    def _kind(self, name: str) -> str:
        return type(self._modules[name]).__qualname__

    def _candidates(self, stop: Stop) -> Iterator[_Remedy]:
        around = _ancestors(stop.module)
        for name in around:
            for learnt in self._learnt.get(self._kind(name), []):
                again = self._translated(learnt, name)
                if again is not None:
                    yield again
        for name in around[:_REACH]:
            yield from self._attributes(name, stop.module)
        ties = [t for name in around[:_REACH] for t in self._ties(name)]
        yield from ties
        for name in around:
            own = self._own.get(name, [])
            forms = {self._draft.forms[i]: i for i in own if self._groups([i])}
            for i in forms.values():
                yield _Remedy(name, whole=(i,))
            for tie in ties:
                for i in forms.values():
                    yield replace(tie, whole=(i,))
            yield _Remedy(name, whole=tuple(own))

    def _attributes(self, name: str, stopped: str) -> Iterator[_Remedy]:
        """The module's integers as sizes that had their values."""
        own = [*self._own.get(name, []), *(self._own.get(stopped, []) if name != stopped else [])]
        plain = self._plain(name, own)
        if len(plain) > 1:
            yield _Remedy(name, places=tuple(plain))
        other = []
        for attribute, position, value in integers(self._modules[name]):
            current = self._chosen.get((name, attribute, position), -1)
            for form, i in self._options(own, value).items():
                if current < 0 or self._draft.forms[current] != form:
                    other.append((attribute, position, i))
            if current >= 0:
                other.append((attribute, position, -1))
        for place in [*plain, *(o for o in other if o not in plain)]:
            yield _Remedy(name, places=(place,))

    def _plain(
        self, name: str, own: list[int], certain: bool = True
    ) -> list[tuple[str, int | None, int]]:
        """Integers left as they were that equal one size passed which changes.

        Args:
            name: the module.
            own: sizes that it saw.
            certain: no other size passed had that value, not even one that stays.
        """
        found = []
        for attribute, position, value in integers(self._modules[name]):
            passed = {self._draft.forms[i]: i for i in own if self._means(i, value)}
            changing = [i for i in passed.values() if self._slope(i).any()]
            unset = self._chosen.get((name, attribute, position), -1) < 0
            if unset and len(changing) == 1 and (len(passed) == 1 or not certain):
                found.append((attribute, position, changing[0]))
        return found

    def _means(self, i: int, value: int) -> bool:
        size = self._seen.sizes[i]
        return size.passed and not size.attribute and size.value == value

    def _options(self, own: list[int], value: int) -> dict[int, int]:
        """Changing sizes of that value: form -> the first size seen of it."""
        found: dict[int, int] = {}
        for i in own:
            if self._seen.sizes[i].value == value and self._slope(i).any():
                found.setdefault(self._draft.forms[i], i)
        return found

    def _ties(self, name: str) -> Iterator[_Remedy]:
        own = self._own.get(name, [])
        values = dict.fromkeys(self._seen.sizes[i].value for i in own)
        whole = [i for i in own if _line(self._seen.sizes[i]) is not None]
        several = [tuple(o.values()) for v in values if len(o := self._options(whole, v)) > 1]
        for sizes in several:
            yield _Remedy(name, tied=(sizes,))
        if len(several) > 1:
            yield _Remedy(name, tied=tuple(several))

    def _slope(self, i: int) -> Any:
        return self._draft.structure.sizes.slope[self._draft.forms[i]]

    def _groups(self, sizes: Collection[int]) -> tuple[str, ...]:
        """Names of the groups that these sizes depend on, but for those that stay whole."""
        found = {int(g) for i in sizes for g in np.flatnonzero(self._slope(i))}
        names = (self._draft.structure.groups[g].name for g in sorted(found))
        return tuple(n for n in names if n not in self._whole)

    def _translated(self, remedy: _Remedy, name: str) -> _Remedy | None:
        """The remedy for another module of the class that saw sizes in the same order."""
        if name == remedy.module or self._kind(name) != self._kind(remedy.module):
            return None
        theirs, mine = self._own.get(remedy.module, []), self._own.get(name, [])
        to = {-1: -1, **dict(zip(theirs, mine, strict=False))}
        used = [*(i for _, _, i in remedy.places), *remedy.whole, *sum(remedy.tied, ())]
        if len(theirs) != len(mine) or any(i not in to for i in used):
            return None
        for sizes in remedy.tied:
            lines = [_line(self._seen.sizes[to[i]]) for i in sizes]
            if any(
                line is None or lines[0] is None or len(line) != len(lines[0]) for line in lines
            ):
                return None
        held = {(a, p): v for a, p, v in integers(self._modules[name])}
        for attribute, position, i in remedy.places:
            if i >= 0 and held.get((attribute, position)) != self._seen.sizes[to[i]].value:
                return None
        return _Remedy(
            name,
            tuple((a, p, to[i]) for a, p, i in remedy.places),
            tuple(tuple(to[i] for i in sizes) for sizes in remedy.tied),
            tuple(to[i] for i in remedy.whole),
        )


def freeze(seen: Trace, group: ChannelGroup, reason: str) -> None:
    """Nothing of the group may be removed."""
    leaves = {leaf.name: leaf for leaf in seen.leaves}
    for m in group.members:
        ids = leaves[m.parameter].starts[m.dim] + m.indices.ravel()
        seen.space.freeze(torch.from_numpy(ids), reason)


def _placed(remedy: _Remedy) -> Choices:
    return {(remedy.module, a, p): i for a, p, i in remedy.places}


def _ancestors(module: str) -> list[str]:
    """The module, the one around it, and so on to the model itself."""
    found = [module]
    while module:
        module = module.rpartition(".")[0]
        found.append(module)
    return found


def _line(size: SizeSeen) -> Tensor | None:
    """Labels along the dim of a size, shape (value,); None where it only counts groups of them."""
    for facet in size.facets:
        if facet.shape[size.dim] == size.value:
            for d in range(facet.dim()):
                if d != size.dim:
                    facet = facet.narrow(d, 0, 1)
            return facet.reshape(-1)
    return None
