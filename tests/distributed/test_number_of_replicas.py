"""A search's every score, its winner and its cost are those of one process, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Toy

from raycompress.budget import Budget
from raycompress.candidate import Candidate
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import ReplicaPool
from raycompress.executor import LedgerExecutor
from raycompress.ledger import Ledger
from raycompress.pruning import CurveSolver, NetAdapt, Pruner, SimulatedAnnealing
from raycompress.pruning.pruner import Problem
from raycompress.search import run_search
from raycompress.testing import ToyTask
from raycompress.weights import WeightStore

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.slow,
    pytest.mark.timeout(600),  # eight replicas start on two cores
]
SEARCHES = [
    SimulatedAnnealing(iterations=3, neighbours=3, chains=2, recalibrate=2),
    NetAdapt(iterations=2, epochs=0.5),
    CurveSolver(),
]
Answers = tuple[Candidate, list[object], float]


def searched(toy: Toy, pruner: Pruner, executor: LedgerExecutor, store: WeightStore) -> Answers:
    """The winner, all that was answered on the way, and what it cost."""
    problem = Problem(
        model=ToyTask().build_model().eval(),
        structure=toy.structure,
        weights=toy.digest,
        executor=executor,
        store=store,
        budget=Budget.of({"params": "40%"}),
    )
    answers: list[object] = []
    before = executor.dfe
    winner = run_search(
        pruner.search(problem),
        executor,
        lambda step, trials: answers.extend(
            (step, t.candidate, t.shards, t.weights, t.failure, t.dropped) for t in trials
        ),
    )
    return winner, answers, executor.dfe - before


def fresh(folder: Path, toy: Toy) -> WeightStore:
    """A store that holds the dense weights alone."""
    store = WeightStore(folder)
    store.put(toy.weights)
    return store


def test_one_two_and_eight_replicas_answer_as_one_process(
    toy: Toy, few: Callable[..., ClusterConfig]
) -> None:
    store = fresh(toy.folder / "local-weights", toy)
    local = toy.local()
    expected = [searched(toy, pruner, local, store) for pruner in SEARCHES]
    for winner, answers, dfe in expected:
        assert winner.kept and len(answers) > 3 and dfe > 1
    for replicas in (1, 2, 8):
        store = fresh(toy.folder / f"weights-{replicas}", toy)
        spec = replace(toy.spec(), store=str(store.folder))
        with (
            Ledger(toy.folder / f"ledger-{replicas}", "a") as ledger,
            ReplicaPool(spec, few(replicas), ledger=ledger) as pool,
        ):
            for pruner, whole in zip(SEARCHES, expected, strict=True):
                winner, answers, dfe = searched(toy, pruner, pool, store)
                assert winner == whole[0], (replicas, pruner)
                assert answers == whole[1], (replicas, pruner)
                assert dfe == pytest.approx(whole[2]), (replicas, pruner)
