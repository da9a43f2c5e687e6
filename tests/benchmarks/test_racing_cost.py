"""What races save: the winner of full evaluations at a part of their cost.

    pytest -m benchmark -s tests/benchmarks/test_racing_cost.py

48 allocations of a net at 40 % of its multiply-adds are judged on 32 shards of 10,000 images; 200
seeded races of 12 of them are then answered from what was measured.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from jobs.tasks.fashion import ROOT, Fashion
from raycompress.budget import Allocator, Budget
from raycompress.candidate import Candidate, Ranking, Shard, Training, Trial
from raycompress.criteria import criterion
from raycompress.local import LocalExecutor
from raycompress.pruning import Problem
from raycompress.search import Race, Search, run_search
from raycompress.structure import analyze
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

NUM_SHARDS = 32


class Measured:
    """Answers from shards that were measured before, and counts those that are asked for."""

    num_shards = NUM_SHARDS

    def __init__(self, trials: list[Trial]) -> None:
        self.shards: dict[Candidate, tuple[Shard, ...]] = {t.candidate: t.shards for t in trials}
        self.asked = 0

    def publish(self, ranking: Ranking) -> None:
        raise AssertionError("nothing is ranked here")

    def evaluate(self, candidates, split="validation"):
        trials = []
        for each in candidates:
            start, end = each.shards or (0, NUM_SHARDS)
            whole = Candidate.from_key({k: v for k, v in each.key().items() if k != "shards"})
            trials.append(Trial(each, shards=self.shards[whole][start:end]))
            self.asked += end - start
        return trials


@pytest.mark.benchmark
@pytest.mark.skipif(not Path(ROOT).exists(), reason="needs dataset-fashion-mnist")
def test_races_find_the_winner_at_a_third_of_the_cost(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    task = Fashion(size=14, num_train=12_000)
    torch.manual_seed(0)
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(tmp_path)
    initial = store.put(Weights(model.state_dict(), {}))
    executor = LocalExecutor(task, structure, store, Evaluation(num_shards=NUM_SHARDS))
    weights = executor.evaluate([Candidate(initial, training=Training(4.0))])[0].trained()
    model.load_state_dict(dict(store.get(weights).state))
    problem = Problem(
        model=model, structure=structure, weights=weights, executor=executor, store=store
    )
    names = list(problem.groups())
    fitter = Allocator(structure, tuple(names), Budget.of({"macs": "40%"}))
    rng = random.Random(0)

    def all_of_them() -> Search:
        ranking = yield from problem.rank(criterion("l1", "criterion", "channels"), names)
        asked = dict.fromkeys(
            problem.candidate(
                fitter.fit({name: rng.uniform(0.3, 1.0) for name in names}), ranking, recalibrate=4
            )
            for _ in range(60)
        )
        trials.extend((yield list(asked)[:48]))
        return trials[0].candidate

    trials: list[Trial] = []
    run_search(all_of_them(), executor)
    same = asked = 0
    num_runs = 200
    for seed in range(num_runs):
        chosen = random.Random(seed).sample(trials, 12)
        measured = Measured(chosen)
        raced = Race(tuple(trial.candidate for trial in chosen)).run(measured)
        winner = min(range(12), key=lambda i: raced[i].loss)
        same += winner == min(range(12), key=lambda i: chosen[i].loss)
        asked += measured.asked
    losses = sorted(trial.loss for trial in trials)
    cost = asked / (num_runs * 12 * NUM_SHARDS)
    print(
        f"\nlosses {losses[0]:.3f} to {losses[-1]:.3f}, median {losses[24]:.3f}; "
        f"same winner in {same} of {num_runs} races at {cost:.3f} of the shards"
    )
    assert same >= 0.95 * num_runs
    assert cost <= 1 / 3
