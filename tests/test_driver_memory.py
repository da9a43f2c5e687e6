"""What the driver keeps of each candidate, and what a large ledger costs to read."""

from __future__ import annotations

import gc
import json
import random
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raycompress.budget import Budget
from raycompress.candidate import Candidate, Ranking, Shard, Trial
from raycompress.executor import LedgerExecutor
from raycompress.ledger import Ledger
from raycompress.pruning import SimulatedAnnealing
from raycompress.pruning.pruner import Problem
from raycompress.search import run_search
from raycompress.structure import Structure, analyze
from raycompress.units import Evaluation, HostInfo, Unit, UnitResult
from raycompress.weights import Weights, WeightStore

NUM_GROUPS = 20


class InstantExecutor(LedgerExecutor):
    """All that an executor does but the work: hosts that know every answer."""

    num_workers = 64
    info = HostInfo("task", "data", {"validation": 96, "calibration": 96}, 3, "cpu", False)

    def _run(self, units: Sequence[Unit]) -> Iterator[tuple[int, UnitResult]]:
        for index, unit in enumerate(units):
            loss = random.Random(repr(unit.candidate.kept)).random()
            sums = tuple(Shard(24, 24 * (1 - loss), 24 * loss + shard) for shard in unit.shards)
            yield index, UnitResult(sums, seconds=0.0123, worker="replica-7")

    def _publish(self, ranking: Ranking) -> None:
        pass

    def _share(self, digest: str, weights: Weights) -> None:
        pass

    def latency(self, *_: Any) -> Any:
        raise NotImplementedError

    def latency_table(self, *_: Any) -> Any:
        raise NotImplementedError


class Chain:
    """A model with twenty groups, its weights in a store, and who answers."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        layers: list[nn.Module] = [nn.Conv2d(2, 16, 3, padding=1)]
        for _ in range(NUM_GROUPS - 1):
            layers += [nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
        self.model = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
        ).eval()
        self.structure: Structure = analyze(self.model, (torch.zeros(2, 2, 6, 6),))
        self.store = WeightStore(folder / "weights")
        weights = Weights(self.model.state_dict(), {})
        self.digest = self.store.put(weights)
        self.executor = InstantExecutor(self.structure, self.store, Evaluation(), ledger)
        self.executor.share(self.digest, weights)

    def candidates(self, num: int) -> Iterator[Candidate]:
        rng = random.Random(0)
        groups = self.structure.groups
        orders = {group.name: torch.arange(group.num_channels) for group in groups}
        ranking = Ranking("channels", orders)
        self.executor.publish(ranking)
        for _ in range(num):
            counts = {group.name: rng.randrange(1, group.num_channels) for group in groups}
            yield Candidate.of(counts, ranking, weights=self.digest)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with Ledger(tmp_path / "ledger", "a") as ledger:
        chain = Chain(tmp_path, ledger)
        assert len(chain.structure.groups) == NUM_GROUPS
        chain.executor.evaluate(list(chain.candidates(10)))  # what is made once
        tracemalloc.start()
        yield chain
        tracemalloc.stop()


def held() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_an_answered_candidate_leaves_its_record_alone(chain: Chain) -> None:
    """80 MB for 100,000: a key of 16 digits, and the record, compressed."""
    candidates, before = chain.candidates(1010), held()
    for _ in range(101):
        chain.executor.evaluate([next(candidates) for _ in range(10)])
    assert chain.executor.num_evaluated == 1010  # the first ten were known
    assert (held() - before) / 1000 < 800


def test_one_step_of_many_candidates(chain: Chain) -> None:
    """At most 300 MB for 100,000 at once, with the list and its answers."""
    asked = list(chain.candidates(1000))
    before = held()
    tracemalloc.reset_peak()
    trials = chain.executor.evaluate(asked)
    assert len(trials) == 1000 and all(trial.shards for trial in trials)
    assert (tracemalloc.get_traced_memory()[1] - before) / 1000 < 3000


def test_a_walk_that_remembers_all_that_it_saw(chain: Chain) -> None:
    """200 MB for 100,000: candidates and their sums, besides the records."""
    marks: dict[int, tuple[int, int]] = {}

    def on_step(step: int, trials: Sequence[Trial]) -> None:
        if step in (10, 40):
            marks[step] = (chain.executor.num_evaluated, held())

    annealing = SimulatedAnnealing(iterations=45, recalibrate=0, reconstruct=False)
    problem = Problem(
        model=chain.model,
        structure=chain.structure,
        weights=chain.digest,
        executor=chain.executor,
        store=chain.store,
        budget=Budget.of({"macs": "50%"}),
    )
    run_search(annealing.search(problem), chain.executor, on_step)
    (few, least), (many, most) = marks.values()
    assert many - few > 80
    assert (most - least) / (many - few) < 2000


def record(number: int) -> Mapping[str, Any]:
    kept = [[f"layer{group}.conv", 1 + (number + group) % 15] for group in range(NUM_GROUPS)]
    return {"candidate": {"weights": "w" * 16, "kept": kept}, "shards": [[24, 12.5, 7.25]] * 4}


def test_a_ledger_of_10000_records_opens_in_a_second_and_stays_small(tmp_path: Path) -> None:
    lines = (json.dumps({"key": f"{n:016x}", **record(n)}) + "\n" for n in range(10_000))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines))
    start = time.process_time()
    with Ledger(tmp_path, "a") as ledger:
        seconds = time.process_time() - start
        assert len(ledger) == 10_000
        assert ledger.get(f"{17:016x}") == {"key": f"{17:016x}", **record(17)}
    assert seconds < 3  # in proportion to their number: 100,000 in seconds
