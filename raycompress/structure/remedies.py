"""What may make a slim model run where it stops in a module's code; `repair.py` tries them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from raycompress.structure.draft import Draft, line_of
from raycompress.structure.fixes import Choices, integers
from raycompress.structure.trace import SizeSeen

__all__ = ["Remedies", "Remedy"]

_REACH = 3  # a module and how many around it may hold the attribute or the size at fault
_Place = tuple[str, int | None, int]  # attribute, position, size seen (-1: as it was)


@dataclass(frozen=True)
class Remedy:
    """What to try for a module.

    Attributes:
        module: where it applies.
        places: attributes to correct: (attribute, position) -> a size seen, or -1 for as it was.
        tied: sizes seen that become one, each tuple for itself.
        whole: sizes seen whose channels stay whole.
    """

    module: str
    places: tuple[_Place, ...] = ()
    tied: tuple[tuple[int, ...], ...] = ()
    whole: tuple[int, ...] = ()

    @property
    def choices(self) -> Choices:
        """The attributes that it corrects."""
        return {(self.module, a, p): i for a, p, i in self.places}


class Remedies:
    """Remedies for each place, best first, and what was learnt from those that helped."""

    def __init__(self, model: nn.Module, sizes: list[SizeSeen]) -> None:
        self._modules = dict(model.named_modules())
        self._sizes = sizes
        self._learnt: dict[str, list[Remedy]] = {}
        self.own: dict[str, list[int]] = {}
        for i, s in enumerate(sizes):
            self.own.setdefault(s.module, []).append(i)

    def kind(self, module: str) -> str:
        """What a module's remedies are learnt for."""
        return type(self._modules[module]).__qualname__

    def learn(self, remedy: Remedy) -> list[Remedy]:
        """Remembers what helped; returns it for all modules where it is taken at once."""
        learnt = self._learnt.setdefault(self.kind(remedy.module), [])
        taken = [remedy]
        # A tie costs freedom: it becomes the habit of a class only where it was needed twice.
        if remedy.places or (remedy.tied and any(r.tied for r in learnt)):
            peers = (self._translated(remedy, n) for n in self._modules)
            taken += [r for r in peers if r is not None and not r.whole]
        learnt.insert(0, remedy)
        return taken

    def candidates(
        self, stopped: str, draft: Draft, chosen: Choices, whole: Collection[str]
    ) -> Iterator[Remedy]:
        """Remedies in the order in which to try them.

        Args:
            stopped: the module that the slim model stopped in.
            draft: the structure so far.
            chosen: attributes corrected so far.
            whole: groups that stay whole.
        """
        around = _ancestors(stopped)
        for name in around:
            for learnt in self._learnt.get(self.kind(name), []):
                again = self._translated(learnt, name)
                if again is not None:
                    yield again
        for name in around[:_REACH]:
            yield from self._attributes(name, stopped, draft, chosen)
        ties = [t for name in around[:_REACH] for t in self._ties(name, draft)]
        yield from ties
        for name in around:
            own = self.own.get(name, [])
            forms = {draft.forms[i]: i for i in own if set(draft.groups([i])) - set(whole)}
            for i in forms.values():
                yield Remedy(name, whole=(i,))
            for tie in ties:
                for i in forms.values():
                    yield replace(tie, whole=(i,))
            yield Remedy(name, whole=tuple(own))

    def plain(
        self,
        module: str,
        own: list[int],
        draft: Draft,
        chosen: Mapping[tuple[str, str, int | None], int],
        certain: bool = True,
    ) -> list[_Place]:
        """Integers left as they were that equal one size passed which changes.

        Args:
            module: the module.
            own: sizes that it saw.
            draft: the structure so far.
            chosen: attributes corrected so far.
            certain: no other size passed had that value, not even one that stays.
        """
        found = []
        for attribute, position, value in integers(self._modules[module]):
            passed = {draft.forms[i]: i for i in own if self._means(i, value)}
            changing = [i for i in passed.values() if draft.changes(i)]
            unset = chosen.get((module, attribute, position), -1) < 0
            if unset and len(changing) == 1 and (len(passed) == 1 or not certain):
                found.append((attribute, position, changing[0]))
        return found

    def _attributes(
        self, name: str, stopped: str, draft: Draft, chosen: Choices
    ) -> Iterator[Remedy]:
        """The module's integers as sizes that had their values."""
        own = [*self.own.get(name, []), *(self.own.get(stopped, []) if name != stopped else [])]
        plain = self.plain(name, own, draft, chosen)
        if len(plain) > 1:
            yield Remedy(name, places=tuple(plain))
        other = []
        for attribute, position, value in integers(self._modules[name]):
            current = chosen.get((name, attribute, position), -1)
            for form, i in self._options(own, value, draft).items():
                if current < 0 or draft.forms[current] != form:
                    other.append((attribute, position, i))
            if current >= 0:
                other.append((attribute, position, -1))
        for place in [*plain, *(o for o in other if o not in plain)]:
            yield Remedy(name, places=(place,))

    def _means(self, i: int, value: int) -> bool:
        size = self._sizes[i]
        return size.passed and not size.attribute and size.value == value

    def _options(self, own: list[int], value: int, draft: Draft) -> dict[int, int]:
        """Changing sizes of that value: form -> the first size seen of it."""
        found: dict[int, int] = {}
        for i in own:
            if self._sizes[i].value == value and draft.changes(i):
                found.setdefault(draft.forms[i], i)
        return found

    def _ties(self, name: str, draft: Draft) -> Iterator[Remedy]:
        own = self.own.get(name, [])
        values = dict.fromkeys(self._sizes[i].value for i in own)
        whole = [i for i in own if line_of(self._sizes[i]) is not None]
        several = [
            tuple(o.values()) for v in values if len(o := self._options(whole, v, draft)) > 1
        ]
        for sizes in several:
            yield Remedy(name, tied=(sizes,))
        if len(several) > 1:
            yield Remedy(name, tied=tuple(several))

    def _translated(self, remedy: Remedy, name: str) -> Remedy | None:
        """The remedy for another module of the class that saw sizes in the same order."""
        if name == remedy.module or self.kind(name) != self.kind(remedy.module):
            return None
        theirs, mine = self.own.get(remedy.module, []), self.own.get(name, [])
        to = {-1: -1, **dict(zip(theirs, mine, strict=False))}
        used = [*(i for _, _, i in remedy.places), *remedy.whole, *sum(remedy.tied, ())]
        if len(theirs) != len(mine) or any(i not in to for i in used):
            return None
        for sizes in remedy.tied:
            lines = [line_of(self._sizes[to[i]]) for i in sizes]
            if any(
                line is None or lines[0] is None or len(line) != len(lines[0]) for line in lines
            ):
                return None
        held = {(a, p): v for a, p, v in integers(self._modules[name])}
        for attribute, position, i in remedy.places:
            if i >= 0 and held.get((attribute, position)) != self._sizes[to[i]].value:
                return None
        return Remedy(
            name,
            tuple((a, p, to[i]) for a, p, i in remedy.places),
            tuple(tuple(to[i] for i in sizes) for sizes in remedy.tied),
            tuple(to[i] for i in remedy.whole),
        )


def _ancestors(module: str) -> list[str]:
    """The module, the one around it, and so on to the model itself."""
    found = [module]
    while module:
        module = module.rpartition(".")[0]
        found.append(module)
    return found
