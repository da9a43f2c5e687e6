"""Pruners that train: on replicas, and after a restart, they end in the weights of this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Toy
from test_criteria import winner_of

from raycompress.budget import Budget
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import ReplicaPool
from raycompress.ledger import Ledger
from raycompress.pruning import (
    ADMM,
    AGP,
    AutoCompress,
    LotteryTicket,
    MovementPruning,
    NNISimulatedAnnealing,
    SimulatedAnnealing,
    SoftFilter,
)
from raycompress.weights import WeightStore

pytestmark = pytest.mark.usefixtures("cluster")

PRUNERS = [
    AGP(criterion="taylor", final_sparsity=0.5, end=2),
    AGP(final_sparsity=0.75, end=1, shape="linear"),
    LotteryTicket(sparsity=0.75, rounds=2, rewind_steps=2),
    MovementPruning(sparsity=0.5, epochs=2),
    ADMM(sparsity=0.5, iterations=2),
    SoftFilter(sparsity=0.5, intervals=2),
]

SEARCHES = [
    SimulatedAnnealing(iterations=3, neighbours=2, chains=3, recalibrate=2),
    NNISimulatedAnnealing(),
    AutoCompress(
        rounds=2, iterations=2, neighbours=2, admm_iterations=1, admm_epochs=0.5, retrain_epochs=0.5
    ),
]


def test_weights_are_those_of_the_local_executor(
    toy: Toy, few: Callable[..., ClusterConfig]
) -> None:
    local = toy.local()
    local.host.store.put(toy.weights)
    expected = [winner_of(toy, pruner, local, local.host.store) for pruner in PRUNERS]
    assert len({winner.weights for winner in expected}) == len(PRUNERS)
    store = WeightStore(toy.folder / "weights")
    with Ledger(toy.folder / "ledger", "a") as ledger:
        with ReplicaPool(toy.spec(), few(2), ledger=ledger) as pool:
            assert [winner_of(toy, p, pool, store) for p in PRUNERS] == expected
            assert pool.dfe > 0
        # A job that starts again is answered by the ledger: nothing is trained twice.
        with ReplicaPool(toy.spec(), few(1), ledger=ledger) as pool:
            assert [winner_of(toy, p, pool, store) for p in PRUNERS] == expected
            assert pool.dfe == 0
    for winner in expected:
        stored = [each.get(winner.weights) for each in (store, local.host.store)]
        assert stored[0].kept == stored[1].kept


def test_searches_within_a_budget_win_alike_with_any_number_of_workers(
    toy: Toy, few: Callable[..., ClusterConfig]
) -> None:
    """Slim, trained parents included."""
    budget = Budget.of({"macs": "30%"})
    local = toy.local()
    local.host.store.put(toy.weights)
    expected = [winner_of(toy, p, local, local.host.store, budget) for p in SEARCHES]
    store = WeightStore(toy.folder / "weights")
    with Ledger(toy.folder / "ledger", "a") as ledger:
        with ReplicaPool(toy.spec(), few(2), ledger=ledger) as pool:
            assert [winner_of(toy, p, pool, store, budget) for p in SEARCHES] == expected
            assert pool.dfe > 0
        with ReplicaPool(toy.spec(), few(1), ledger=ledger) as pool:
            assert [winner_of(toy, p, pool, store, budget) for p in SEARCHES] == expected
            assert pool.dfe == 0
    for winner in expected:
        cost = toy.structure.cost(winner.counts)
        assert budget.excess(cost, toy.structure.cost()) <= 1
