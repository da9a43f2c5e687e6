"""Executors: how candidates get from a search to a model host and back.

`LedgerExecutor` holds what every executor shares: look up the ledger, cut what is missing into
units, put results together in index order, record them durably before the search sees them.
Where the units run is left to `_run`: `LocalExecutor` (local.py) runs them in this process,
`ReplicaPool` (distributed/pool.py) on Ray.
"""

from __future__ import annotations

import functools
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any, Self

from raycompress.candidate import Candidate, Ranking, Trial, digest_of
from raycompress.dfe import Prices
from raycompress.errors import StorageError
from raycompress.identity import structure_digest
from raycompress.ledger import Ledger
from raycompress.on_runtime import FLOAT_OF
from raycompress.records import Record, answered, recalled, record_of, timing_records
from raycompress.search import Timings
from raycompress.storage import Place
from raycompress.structure import Structure
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import LatencyTable
from raycompress.task import Progress, Split
from raycompress.units import Evaluation, HostInfo, Unit, UnitResult
from raycompress.weights import Weights, WeightStore

__all__ = ["LedgerExecutor"]

TIMED_PASSES = 40
"""Of each model of a search's `Timings`."""
TIMED_SECONDS = 60.0
"""That passes of one of its steps take at most."""


class LedgerExecutor(ABC):
    """Answers searches from the ledger and, for what isn't there, from model hosts.

    Args:
        structure: Of the task's model; prices candidates.
        store: Says what channels trained weights are left with.
        evaluation: Settings.
        ledger: Where finished work is recorded; None keeps it in memory.
        progress: Called with (step, number of steps, loss) while a training unit runs.

    Attributes:
        num_evaluated: Candidates evaluated so far, not counting what the ledger answered.
        rankings: What was published, by digest.
    """

    def __init__(
        self,
        structure: Structure,
        store: WeightStore,
        evaluation: Evaluation,
        ledger: Ledger | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.structure = structure
        self.store = store
        self.evaluation = evaluation
        self.ledger = ledger
        self.progress = progress
        self._dfe = Fraction()
        self.num_evaluated = 0
        self._memory: dict[str, Record] = {}
        self._in_vain: set[str] = set()
        self._structure = structure_digest(structure)
        self._slim: dict[str, dict[str, int]] = {}
        self.rankings: dict[str, Ranking] = {}

    @property
    def dfe(self) -> float:
        """Dense-forward equivalents spent so far, not counting what the ledger answered.

        The sum is exact: the order in which replicas answer doesn't change its last digit.
        """
        return float(self._dfe)

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """How many units run at once."""

    @property
    def num_shards(self) -> int:
        """Parts of the validation split that a race may look at one after the other."""
        return 1 if self.info.whole else self.evaluation.num_shards

    @property
    def timing_place(self) -> Mapping[str, float]:
        """Ray resources of where latency is measured, beyond those of the hosts."""
        return {}

    @property
    @abstractmethod
    def info(self) -> HostInfo:
        """What the hosts are; the same for all of them."""

    @abstractmethod
    def _run(self, units: Sequence[Unit]) -> Iterator[tuple[int, UnitResult]]:
        """Runs units; yields (index, result) as they finish, in any order."""

    @abstractmethod
    def _publish(self, ranking: Ranking) -> None:
        """Sends a ranking to the hosts."""

    @abstractmethod
    def _share(self, digest: str, weights: Weights) -> None:
        """Sends weights to the hosts."""

    @abstractmethod
    def latency(
        self,
        candidates: Mapping[str, Candidate],
        batch_sizes: Sequence[int],
        repeats: int,
        max_seconds: float | None = None,
        runtime: str = "",
    ) -> list[LatencyRow]:
        """Measures candidates against each other on one host with nothing else running.

        Args:
            candidates: By name.
            batch_sizes: Examples in a forward pass.
            repeats: Timed passes of each.
            max_seconds: As of `structure.measure`.
            runtime: Backend that quantized ones are lowered to first; a name that begins with
                `FLOAT_OF` then means the float model that a candidate was made of. "": they run as
                they are.
        """

    @abstractmethod
    def latency_table(
        self, batch_size: int = 1, folder: str | Place | None = None, max_seconds: float = 300.0
    ) -> LatencyTable:
        """The model's latency table, measured on one host with nothing else running.

        Args:
            batch_size: Examples in a forward pass.
            folder: Keeps what was measured, and gives back what is there; None: nothing is kept.
            max_seconds: Aimed at, by taking fewer passes.
        """

    def publish(self, ranking: Ranking) -> None:
        """Makes a ranking known, before a candidate uses it."""
        if ranking.digest not in self.rankings:
            self.rankings[ranking.digest] = ranking
            self._publish(ranking)

    def share(self, digest: str, weights: Weights) -> None:
        """Sends weights to the hosts once, that they would otherwise read from the store."""
        self._slim[digest] = {name: len(kept) for name, kept in weights.kept.items()}
        self._share(digest, weights)

    def counts(self, candidate: Candidate) -> dict[str, int]:
        """Kept channels by group, what its weights have lost included; empty where it is masked."""
        digest = candidate.weights
        if digest not in self._slim:
            if digest not in self.store:  # it will fail
                return {}
            self._slim[digest] = self.store.kept_counts(digest)
        ranking = self.rankings.get(candidate.ranking)
        own = candidate.counts if ranking is not None and ranking.kind == "channels" else {}
        return {**self._slim[digest], **own}

    @functools.cached_property
    def _prices(self) -> Prices:
        return Prices(self.structure, self.evaluation, self.info)

    def close(self) -> None:  # noqa: B027 - an executor may hold nothing
        """Lets the hosts go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def evaluate(self, candidates: Sequence[Candidate], split: Split = "validation") -> list[Trial]:
        """Judges candidates; answers in their order. Equal ones are evaluated once.

        Candidates with training are trained first (once, whatever the split), and what comes out
        is evaluated under the digest of its weights. Those that collect aren't judged. What was
        done is on disk when this returns.
        """
        try:
            return self._answer(candidates, split)
        finally:
            if self.ledger is not None:
                self.ledger.commit()

    def timed(self, asked: Timings) -> list[Trial]:
        """Times candidates on a runtime, together; the ledger answers what was timed before."""
        what = {
            "runtime": asked.runtime,
            "batch_size": asked.batch_size,
            "candidates": [candidate.key() for candidate in asked.candidates],
            "floats": list(asked.floats),
            "place": self.timing_place,
        }
        num = len(asked.candidates)
        keys = [self._key("timing", {**what, "index": index}) for index in range(num)]
        found = [self._find(key) for key in keys]
        records: Sequence[Record] = [record for record in found if record is not None]
        replayed = len(records) == num
        if not replayed:
            records = self._time(asked)
            if records[0]["failure"] is None:  # else another run of the job tries again
                self._store(dict(zip(keys, records, strict=True)))
                if self.ledger is not None:
                    self.ledger.commit()
        return [
            recalled(candidate, record, replayed=replayed)
            for candidate, record in zip(asked.candidates, records, strict=True)
        ]

    def _time(self, asked: Timings) -> list[dict[str, Any]]:
        named = {str(index): candidate for index, candidate in enumerate(asked.candidates)}
        named |= {FLOAT_OF + str(index): asked.candidates[index] for index in asked.floats}
        start = time.perf_counter()
        rows: Sequence[LatencyRow] | str
        try:
            sizes = (asked.batch_size,)
            rows = self.latency(named, sizes, TIMED_PASSES, TIMED_SECONDS, asked.runtime)
        except StorageError:
            raise
        except Exception as error:  # such as a lost replica; whatever it is, it isn't recorded
            rows = f"{type(error).__name__}: {error}"
        return timing_records(asked, rows, time.perf_counter() - start)

    def _answer(self, candidates: Sequence[Candidate], split: Split) -> list[Trial]:
        trained = self._train([c for c in candidates if c.collect is None and c.training])
        collected = self._statistics([c for c in candidates if c.collect is not None])
        judged: list[Candidate | None] = []
        for candidate in candidates:
            if candidate.collect is not None:
                trained[candidate] = collected[candidate]
                judged.append(None)
            elif candidate.training is None:
                judged.append(candidate)
            else:
                weights = trained[candidate].weights
                judged.append(None if weights is None else candidate.trained(weights))
        answers = self._evaluate([c for c in judged if c is not None], split)
        trials = []
        for candidate, asked in zip(candidates, judged, strict=True):
            before = trained.get(candidate)
            if asked is None:
                assert before is not None
                trials.append(before)
                continue
            trial = answers[asked]
            if before is not None:
                trial = replace(
                    trial,
                    candidate=candidate,
                    weights=before.weights,
                    seconds=trial.seconds + before.seconds,
                    dfe=trial.dfe + before.dfe,
                    replayed=trial.replayed and before.replayed,
                )
            trials.append(trial)
        return trials

    def _train(self, candidates: Sequence[Candidate]) -> dict[Candidate, Trial]:
        keys = {c: self._key("training", {"candidate": c.key()}) for c in candidates}
        trials, missing = self._recall(keys)
        units = [Unit(candidate, "train") for candidate in missing]
        for index, result in self._run(units):
            candidate = missing[index]
            dfe = self._prices.training_of(candidate, self.counts(candidate))
            trials[candidate] = self._record(keys[candidate], candidate, [result], dfe)
        return trials

    def _statistics(self, candidates: Sequence[Candidate]) -> dict[Candidate, Trial]:
        keys = {c: self._key("collection", {"candidate": c.key()}) for c in candidates}
        trials, missing = self._recall(keys)
        units = [Unit(candidate, "calibration") for candidate in missing]
        for index, result in self._run(units):
            candidate = missing[index]
            dfe = self._prices.collection_of(candidate)
            trials[candidate] = self._record(keys[candidate], candidate, [result], dfe)
        return trials

    def _evaluate(self, candidates: Sequence[Candidate], split: Split) -> dict[Candidate, Trial]:
        keys = {
            c: self._key("evaluation", {"candidate": c.key(), "split": split}) for c in candidates
        }
        trials, missing = self._recall(keys)
        cut = [self._parts(candidate, len(missing)) for candidate in missing]
        units = [
            Unit(candidate, split, part)
            for candidate, parts in zip(missing, cut, strict=True)
            for part in parts
        ]
        owner = [position for position, parts in enumerate(cut) for _ in parts]
        first = [0, *itertools.accumulate(len(parts) for parts in cut)]
        results: dict[int, UnitResult] = {}
        for index, result in self._run(units):
            results[index] = result
            position = owner[index]
            own = range(first[position], first[position + 1])
            if all(i in results for i in own):
                candidate = missing[position]
                dfe = self._prices.evaluation_of(candidate, self.counts(candidate), split)
                trials[candidate] = self._record(
                    keys[candidate], candidate, [results.pop(i) for i in own], dfe, split
                )
                self.num_evaluated += candidate.shards is None or candidate.shards[0] == 0
        return trials

    def _parts(self, candidate: Candidate, num_candidates: int) -> list[tuple[int, ...]]:
        """The shards of one candidate, cut into more units where workers would stand idle."""
        if self.info.whole:
            return [(0,)]
        start, end = candidate.shards or (0, self.evaluation.num_shards)
        per_candidate = -(-self.num_workers // max(num_candidates, 1))
        num_parts = min(end - start, max(1, per_candidate))
        bounds = [start + (end - start) * i // num_parts for i in range(num_parts + 1)]
        return [tuple(range(a, b)) for a, b in itertools.pairwise(bounds)]

    def _key(self, kind: str, what: Mapping[str, Any]) -> str:
        return digest_of({"kind": kind, **self._facts, **what})

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """What all keys hold."""
        return {
            "task": self.info.task,
            "data": self.info.data,
            "structure": self._structure,
            "evaluation": asdict(self.evaluation),
            "numeric_class": self.info.numeric_class,
        }

    def _recall(
        self, keys: Mapping[Candidate, str]
    ) -> tuple[dict[Candidate, Trial], list[Candidate]]:
        """What the ledger knows, and the candidates that it doesn't (each once, in order)."""
        trials: dict[Candidate, Trial] = {}
        missing = []
        for candidate, key in keys.items():
            record = self._find(key)
            if record is None or (record.get("again") and key not in self._in_vain):
                missing.append(candidate)
            else:
                trials[candidate] = recalled(candidate, record)
        return trials, missing

    def _record(
        self,
        key: str,
        candidate: Candidate,
        results: Sequence[UnitResult],
        dfe: float,
        split: Split | None = None,
    ) -> Trial:
        trial = answered(candidate, results, dfe)
        record = record_of(trial, results, split)
        if trial.failure is not None and any(r.again for r in results):
            # A search that asks once more is answered; another run of the job tries again.
            record["again"] = True
            self._in_vain.add(key)
        self._dfe += Fraction(dfe)
        if trial.failure is not None and record["kind"] != "evaluation":
            return trial  # not recorded: the next run tries again
        self._store({key: record})
        return trial

    def _find(self, key: str) -> Record | None:
        return self._memory.get(key) if self.ledger is None else self.ledger.get(key)

    def _store(self, records: Mapping[str, Record]) -> None:
        if self.ledger is None:
            self._memory |= records
        else:
            self.ledger.append(records)
