"""Units that wait for replicas: who gets which."""

from __future__ import annotations

import time
from collections import deque

from raycompress.candidate import Candidate
from raycompress.distributed.waiting import Waiting
from raycompress.units import Unit


def candidate(number: int) -> Candidate:
    return Candidate("w", recalibrate=number)


def raced(num: int, parts: int = 1) -> list[Unit]:
    """A race's second round: each candidate on shards 2 and 3, in one or two units."""
    shards = [(2, 3)] if parts == 1 else [(2,), (3,)]
    return [
        Unit(Candidate("w", recalibrate=number, shards=(2, 4)), shards=own)
        for number in range(num)
        for own in shards
    ]


def test_units_go_in_order_and_what_was_lost_before_or_behind_them() -> None:
    waiting = Waiting([Unit(candidate(i)) for i in range(4)])
    assert waiting.next_of([candidate(3)]) == 0  # nothing races: nothing is kept for it
    for index in (0, 1):
        waiting.remove(index)
    waiting.put_back(0, last=True)  # it may be the cause
    waiting.put_back(1, last=False)
    got = []
    while waiting:
        got.append(waiting.next_of(()))
        waiting.remove(got[-1])
    assert got == [1, 2, 3, 0]


def test_a_replica_goes_on_with_what_it_has_built() -> None:
    waiting = Waiting(raced(3, parts=2))
    assert [waiting.next_of(())] == [0]
    for expected in (4, 5, 0):  # both parts of candidate 2, then as everyone
        index = waiting.next_of([candidate(2)])
        assert index == expected
        waiting.remove(index)
    waiting.put_back(5, last=True)
    assert waiting.next_of([candidate(2), candidate(1)]) == 5


def test_twenty_thousand_candidates_in_one_race_are_given_out_at_once() -> None:
    num = 20_000
    waiting, kept = Waiting(raced(num)), deque((candidate(num - 1 - i) for i in range(8)), 8)
    start = time.process_time()
    while waiting:
        index = waiting.next_of(kept)
        waiting.remove(index)
        kept.append(candidate(index))
    # A look through all that wait, for each unit, takes minutes.
    assert time.process_time() - start < 5
