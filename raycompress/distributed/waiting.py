"""Units that no replica has yet, in the order in which they are sent."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from raycompress.candidate import Candidate
from raycompress.units import Unit

__all__ = ["Waiting"]


class Waiting:
    """Any number of units; each look at them takes a time that doesn't depend on it.

    Args:
        units: All of them wait, in this order; they are spoken of by index.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._order = OrderedDict.fromkeys(range(len(units)))
        self._raced: dict[Candidate, list[int]] = defaultdict(list)
        for index, unit in enumerate(units):
            if unit.candidate.shards is not None:
                self._raced[replace(unit.candidate, shards=None)].append(index)

    def __len__(self) -> int:
        return len(self._order)

    def next_of(self, built: Iterable[Candidate]) -> int:
        """The unit to send to a replica that keeps models of these candidates.

        What it has built for a race's last round, it goes on with; else it gets the first of all.
        """
        own = (i for each in built for i in self._raced.get(each, ()) if i in self._order)
        index = next(own, None)
        return next(iter(self._order)) if index is None else index

    def remove(self, index: int) -> None:
        """It is sent."""
        del self._order[index]

    def put_back(self, index: int, *, last: bool) -> None:
        """It is to be sent again, behind the others or before them."""
        self._order[index] = None
        self._order.move_to_end(index, last=last)
