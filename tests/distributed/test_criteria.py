"""Statistics are collected on replicas as in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Toy

from raycompress.budget import Budget
from raycompress.candidate import Candidate
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import ReplicaPool
from raycompress.local import LocalExecutor
from raycompress.pruning import (
    ActivationAPoZRank,
    ActivationMeanRank,
    Problem,
    Pruner,
    TaylorFO,
)
from raycompress.search import Executor, run_search
from raycompress.testing import ToyTask
from raycompress.weights import WeightStore

pytestmark = pytest.mark.usefixtures("cluster")


def winner_of(
    toy: Toy,
    pruner: Pruner,
    executor: Executor,
    store: WeightStore,
    budget: Budget | None = None,
) -> Candidate:
    model = ToyTask().build_model().eval()
    problem = Problem(
        model=model,
        structure=toy.structure,
        weights=toy.digest,
        executor=executor,
        store=store,
        budget=budget,
    )
    return run_search(pruner.search(problem), executor)


def test_masks_are_those_of_the_local_executor(toy: Toy, few: Callable[..., ClusterConfig]) -> None:
    pruners = [
        ActivationAPoZRank(sparsity=0.5),
        ActivationMeanRank(sparsity=0.5, scope="global"),
        TaylorFO(sparsity=0.5),
        TaylorFO(form="weight", sparsity=0.5, scope="global", batch_size=16),
    ]
    local: LocalExecutor = toy.local()
    expected = [winner_of(toy, pruner, local, local.host.store) for pruner in pruners]
    with ReplicaPool(toy.spec(), few(2)) as pool:
        store = WeightStore(toy.folder / "weights")
        found = [winner_of(toy, pruner, pool, store) for pruner in pruners]
    assert found == expected  # counts, and the digest of the ranking
    assert len({candidate.ranking for candidate in found}) == len(pruners)
    masks = [local.host.masks(candidate) for candidate in found]
    assert all(mask["conv3.weight"].flatten(1).any(dim=1).sum() < 16 for mask in masks)
