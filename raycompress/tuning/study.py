"""A study: samples that were asked for, and what came of them, durable and resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raycompress.ledger import Ledger, read_ledger
from raycompress.storage import Place
from raycompress.tuning.searchers import OBJECTIVES, Sample, Searcher

__all__ = ["Study"]


class Study:
    """Asks a searcher for samples and keeps what came of them; a context manager.

    Every sample is on disk before it runs, and what came of it before the next is asked for. A
    study that starts again knows all of that: it gives out those that were running first, with the
    points that they had, and asks its searcher for the rest only.

    Args:
        searcher: Proposes points.
        num_samples: At most; None: until the searcher has no more.
        objectives: Names from `OBJECTIVES`.
        folder: Of the log.
        name: Of the study, usable as a file's name.
        key: Digest of everything that its samples depend on; those of another aren't taken up.

    Attributes:
        samples: By number.
    """

    def __init__(
        self,
        searcher: Searcher,
        num_samples: int | None,
        objectives: Sequence[str],
        folder: Place,
        name: str,
        key: str,
    ) -> None:
        self.searcher, self.num_samples, self.key = searcher, num_samples, key
        self.objectives = tuple(objectives)
        self.samples: list[Sample] = []
        self._log = Ledger(folder, name)
        for record in read_ledger(folder):
            study, number, event = record["key"].split(":")
            if study != key:
                continue
            if event == "asked":
                self.samples.append(Sample(int(number), record["point"]))
            else:
                self._settle(int(number), record["told"])
        self._again = [s.number for s in self.samples if s.state == "running"]

    @property
    def num_left(self) -> int | None:
        """How many samples are still to be given out; None: as many as the searcher has."""
        if self.num_samples is None:
            return None
        return max(self.num_samples - len(self.samples), 0) + len(self._again)

    def ask(self) -> Sample | None:
        """The next sample to run; None: all have been given out."""
        if self._again:
            return self.samples[self._again.pop(0)]
        number = len(self.samples)
        if self.num_samples is not None and number >= self.num_samples:
            return None
        point = self.searcher.propose(number, self.samples)
        if point is None:
            return None
        self._log.put({f"{self.key}:{number}:asked": {"point": point}})
        self.samples.append(Sample(number, point))
        return self.samples[-1]

    def tell(self, number: int, told: Mapping[str, Any]) -> Sample:
        """What came of a sample.

        Args:
            number: The sample's.
            told: "state", "figures" and "failure" of a `Sample`; figures hold the objectives.
        """
        self._log.put({f"{self.key}:{number}:told": {"told": dict(told)}})
        return self._settle(number, told)

    def _settle(self, number: int, told: Mapping[str, Any]) -> Sample:
        figures, state = told["figures"], told["state"]
        values = [figures.get(name) for name in self.objectives if state != "failed"]
        self.samples[number] = replace(
            self.samples[number],
            state=state,
            objectives=() if None in values else tuple(values),
            failure=told["failure"],
            figures=figures,
        )
        return self.samples[number]

    def reopen(self, number: int) -> None:
        """Gives a sample out again, for what came of it has been lost."""
        self.samples[number] = Sample(number, self.samples[number].point)
        self._again = sorted({*self._again, number})

    def best(self) -> list[Sample]:
        """Finished samples that none beats in every objective, the first objective's best first.

        With one objective: the best one, the first of equals.
        """
        done = [sample for sample in self.samples if sample.state == "finished"]
        costs = {s.number: self._costs(s) for s in done}
        front: list[Sample] = []
        for sample in sorted(done, key=lambda s: (costs[s.number], s.number)):
            own = costs[sample.number]
            if not any(_dominates(costs[other.number], own) for other in front):
                front.append(sample)
        return front

    def ranked(self) -> list[Sample]:
        """Finished samples: the front first, then the rest by the first objective."""
        front = self.best()
        taken = {sample.number for sample in front}
        rest = [s for s in self.samples if s.state == "finished" and s.number not in taken]
        return front + sorted(rest, key=lambda s: (self._costs(s), s.number))

    def _costs(self, sample: Sample) -> tuple[float, ...]:
        return tuple(
            -value if OBJECTIVES[name] == "max" else value
            for name, value in zip(self.objectives, sample.objectives, strict=True)
        )

    def close(self) -> None:
        """Releases the log."""
        self._log.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """At least as good in everything; equal points count as one."""
    return all(a <= b for a, b in zip(one, other, strict=True))
