"""Races: who is dropped, what it costs, and that the winner is the one of a full evaluation."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from raycompress.candidate import Candidate, Shard, Trial
from raycompress.search import Race, rungs, worse
from raycompress.testing import toy_problem


class Table:
    """Answers with losses from a table: rows are candidates, columns are shards."""

    def __init__(self, losses: np.ndarray) -> None:
        self.losses, self.num_shards = losses, losses.shape[1]
        self.cost, self.rounds = 0, []

    def publish(self, ranking):
        raise AssertionError

    def evaluate(self, candidates, split="validation"):
        trials = []
        for candidate in candidates:
            start, end = candidate.shards or (0, self.num_shards)
            row = self.losses[int(candidate.weights)][start:end]
            self.cost += end - start
            shards = tuple(Shard(10, 10 * (1 - x), 10 * x) for x in row)
            trials.append(Trial(candidate, shards=shards, seconds=1.0, dfe=0.5))
        self.rounds.append([c.weights for c in candidates])
        return trials


def _candidates(num: int) -> tuple[Candidate, ...]:
    return tuple(Candidate(str(i)) for i in range(num))


def test_rungs():
    assert rungs(1) == [1]
    assert rungs(2) == [2]
    assert rungs(4) == [2, 4]
    assert rungs(16) == [2, 4, 8, 16]
    assert rungs(20) == [2, 4, 8, 16, 20]
    assert rungs(32) == [4, 8, 16, 32]


@pytest.mark.parametrize("seed", range(20))
def test_worse_is_a_paired_t_test(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1, 6), rng.normal(0, 1, 6)
    p = ttest_rel(a, b, alternative="greater").pvalue
    for confidence in (0.6, 0.9, 0.99):
        assert worse(a, b, 0.0, confidence) == (p < 1 - confidence)
        assert worse(a + 0.25, b, 0.25, confidence) == (p < 1 - confidence)


def test_equal_differences_leave_no_doubt():
    assert worse([2.0, 3.0], [1.0, 2.0], 0.0, 0.99)
    assert not worse([1.0, 2.0], [1.0, 2.0], 0.0, 0.99)
    assert not worse([2.0, 3.0], [1.0, 2.0], 1.0, 0.99)


def test_hopeless_candidates_go_and_the_others_are_judged_whole():
    shards = np.arange(16.0)
    losses = np.stack([shards, shards + 5 + 0.1 * (shards % 2), shards - 0.01, shards + 9])
    table = Table(losses)
    trials = Race(_candidates(4)).run(table)
    assert table.rounds[0] == ["0", "1", "2", "3"]
    assert [t.dropped for t in trials] == [True, True, False, True]  # 0 is worse everywhere
    assert trials[2].loss == pytest.approx(losses[2].mean())
    assert trials[2].candidate == Candidate("2")
    assert trials[2].seconds == 4.0 and trials[2].dfe == 2.0  # four rounds
    assert all(math.isinf(t.loss) and t.score == -math.inf for t in trials if t.dropped)
    assert len(trials[3].shards) == 2


def test_margins_and_incumbent():
    shards = np.arange(16.0)
    table = Table(np.stack([shards + 1, shards + 1 + 0.01 * (shards % 3)]))
    incumbent = Trial(Candidate("x"), shards=tuple(Shard(1, 0.0, x) for x in shards))
    kept, gone = Race(_candidates(2), (incumbent, incumbent), margins=(1.5, 0.5)).run(table)
    assert kept.judged and gone.dropped


def test_score_is_the_other_way_round():
    table = Table(np.stack([np.full(16, 0.2), np.linspace(0.5, 0.6, 16)]))
    good, bad = Race(_candidates(2), objective="score").run(table)
    assert good.score == pytest.approx(0.8) and bad.dropped


def test_failed_ones_are_left_alone():
    class Failing(Table):
        def evaluate(self, candidates, split="validation"):
            trials = super().evaluate(candidates)
            return [
                Trial(t.candidate, failure="broken") if t.candidate.weights == "0" else t
                for t in trials
            ]

    table = Failing(np.stack([np.zeros(16), np.ones(16)]))
    failed, judged = Race(_candidates(2)).run(table)
    assert failed.failure == "broken" and not failed.judged
    assert judged.judged and judged.loss == 1.0
    assert table.rounds == [["0", "1"], ["1"], ["1"], ["1"]]


def test_same_winner_as_full_evaluation():
    """In 95 % of runs or more, at a third of the cost or less: losses like those of a search."""
    same, cost, full = 0, 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        quality = 0.4 + rng.exponential(0.2, (12, 1))
        hard = rng.normal(0, 0.1, (1, 32))  # what is hard for all
        losses = quality + hard + rng.normal(0, 0.03, (12, 32))
        table = Table(losses)
        trials = Race(_candidates(12)).run(table)
        winner = min(range(12), key=lambda i: trials[i].loss)
        same += winner == int(losses.mean(axis=1).argmin())
        cost, full = cost + table.cost, full + losses.size
    assert same >= 190
    assert cost <= full / 3


def test_a_race_sums_what_a_whole_evaluation_sums():
    with tempfile.TemporaryDirectory() as folder:
        problem, executor = toy_problem(folder)
        executor.evaluation = replace(executor.evaluation, num_shards=8)
        _, other = toy_problem(f"{folder}/other")
        other.evaluation = replace(other.evaluation, num_shards=8)
        for each in (executor, other):
            each.host._splits = type(each.host._splits)(
                each.host.task, each.evaluation.batch_size, 8, each.host.device
            )
        candidate = Candidate(problem.weights, recalibrate=1)
        raced = Race((candidate,)).run(executor)[0]
        whole = other.evaluate([candidate])[0]
        assert raced.shards == whole.shards and raced.judged
        assert raced.dfe == pytest.approx(whole.dfe)
        assert executor.num_evaluated == 1
        again = Race((candidate,)).run(executor)[0]
        assert again.replayed and again.shards == raced.shards
