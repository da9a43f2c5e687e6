"""Searchers are functions of seed, number and history; studies go on where they were stopped."""

from __future__ import annotations

import random
import statistics

import pytest

from raycompress.tuning import TPE, Grid, Halving, Random, Sample, SearchSpace, Study

SPACE = SearchSpace.of(
    [
        {
            "type": {"choice": ["A", "B"]},
            "x": {"uniform": [-2, 2]},
            "n": {"int": [1, 9]},
            "r": {"loguniform": [1e-3, 10]},
        },
        {"type": "C", "y": {"uniform": [0, 1]}},
    ]
)


def value(point):
    """Largest, 0, at entry 0 with type B, x = 1, n = 5."""
    if point["pruner"]:
        return -3.0 - point["1.y"]
    return -((point["0.x"] - 1) ** 2) - abs(point["0.n"] - 5) / 4 - (point["0.type"] == "A")


def searched(searcher, num, states=("finished",)):
    history = []
    for number in range(num):
        point = searcher.propose(number, history)
        state = states[number % len(states)]
        objectives = () if state in ("failed", "running") else (value(point),)
        history.append(Sample(number, point, state, objectives))
    return history


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_proposals_are_functions_of_seed_number_and_history(kind):
    def make(seed):
        return Random(SPACE, seed) if kind == "random" else TPE(SPACE, seed, ("max",))

    states = ("finished", "failed", "finished", "stopped", "finished", "running")
    first = searched(make(0), 25, states)
    assert first == searched(make(0), 25, states)
    assert make(0).propose(20, first[:20]) == first[20].point
    assert [s.point for s in first] != [s.point for s in searched(make(1), 25, states)]
    for sample in first:
        assert SPACE.entry(sample.point)["type"] in ("A", "B", "C")


def test_tpe_finds_what_random_does_not():
    def best(searcher):
        return max(sample.objectives[0] for sample in searched(searcher, 50))

    learnt = statistics.median(best(TPE(SPACE, seed, ("max",))) for seed in range(5))
    drawn = statistics.median(best(Random(SPACE, seed)) for seed in range(5))
    assert learnt > drawn / 2  # both are below 0, the optimum


def test_tpe_takes_several_objectives():
    searcher = TPE(SPACE, 0, ("max", "min"))
    history = []
    for number in range(20):
        point = searcher.propose(number, history)
        history.append(Sample(number, point, "finished", (value(point), float(number))))
    assert history[-1].point != Random(SPACE, 0).propose(19, [])


def test_a_grid_has_an_end():
    space = SearchSpace.of([{"type": "A", "n": {"int": [1, 3]}, "c": {"choice": ["a", "b"]}}])
    points = [sample.point for sample in searched_grid(Grid(space))]
    assert points == [{"n": n, "c": c} for n in (1, 2, 3) for c in "ab"]


def searched_grid(searcher):
    history = []
    while (point := searcher.propose(len(history), history)) is not None:
        history.append(Sample(len(history), point))
    return history


def told(objective=None, state="finished"):
    return {"state": state, "figures": {"score": objective}, "failure": None}


def study(folder, searcher=None, num=12, key="k", objectives=("score",)):
    return Study(searcher or TPE(SPACE, 3, ("max",)), num, objectives, folder, "tuned", key)


def finish(one):
    while (sample := one.ask()) is not None:
        one.tell(sample.number, told(value(sample.point)))
    return one.samples


def test_a_study_that_is_stopped_anywhere_ends_as_a_whole_one(tmp_path):
    with study(tmp_path / "whole") as whole:
        expected = finish(whole)
    for stop in (0, 1, 7, 11):
        folder = tmp_path / str(stop)
        with study(folder) as first:
            for _ in range(stop):
                sample = first.ask()
                first.tell(sample.number, told(value(sample.point)))
            if stop % 2:
                first.ask()  # running when it stopped
        with study(folder) as again:
            assert again.num_left == 12 - stop
            asked = []
            while (sample := again.ask()) is not None:
                asked.append(sample.number)
                again.tell(sample.number, told(value(sample.point)))
            assert asked == list(range(stop, 12))
            assert again.samples == expected
        with study(folder, num=13) as more:
            assert more.ask().number == 12
        with study(folder, key="other") as other:
            assert other.samples == []


def test_what_failed_or_was_stopped_is_not_asked_for_again(tmp_path):
    with study(tmp_path, num=3) as one:
        for state in ("failed", "stopped", "finished"):
            one.tell(one.ask().number, told(None if state == "failed" else 0.5, state))
    with study(tmp_path, num=3) as again:
        assert [s.state for s in again.samples] == ["failed", "stopped", "finished"]
        assert again.ask() is None and again.num_left == 0


def test_the_front_and_the_ranking(tmp_path):
    class Given:
        def propose(self, number, history):
            return {"n": number}

    costs = [(0.9, 90), (0.8, 50), (0.8, 60), (0.7, 50), (0.6, 10), (0.9, 90)]
    with study(tmp_path, Given(), len(costs), objectives=("score", "macs")) as one:
        for both in costs:
            figures = dict(zip(("score", "macs"), both, strict=True))
            one.tell(one.ask().number, {"state": "finished", "figures": figures, "failure": None})
        assert [s.number for s in one.best()] == [0, 1, 4]
        assert [s.number for s in one.ranked()] == [0, 1, 4, 5, 2, 3]


def test_halving_by_hand():
    halving = Halving(grace=2, factor=3)
    assert not halving.stops("g", "a", 1, 9.0)  # no rung
    assert not halving.stops("g", "a", 2, 9.0)  # the first: 1 of ceil(1/3)
    assert not halving.stops("g", "b", 2, 5.0)
    assert halving.stops("g", "c", 2, 7.0)  # ceil(3/3) = 1 goes on, and b is better
    assert not halving.stops("g", "d", 2, 6.0)  # ceil(4/3) = 2 go on, and b alone is better
    assert halving.stops("g", "e", 2, 6.5)
    assert not halving.stops("other", "e", 2, 6.5)
    assert not halving.stops("g", "f", 2, float("inf"))  # nothing to judge by
    assert not halving.stops("g", "b", 3, 5.0)
    assert not halving.stops("g", "b", 6, 5.0)  # the next rung
    assert halving.stops("g", "d", 6, 6.0)
    assert not halving.stops("g", "h", 6, 5.0)  # a tie goes on


def test_halving_keeps_about_a_factor_at_each_rung():
    rng = random.Random(0)
    halving = Halving(grace=1, factor=4)
    alive = [(f"t{i}", rng.random()) for i in range(256)]
    numbers = []
    for steps in (1, 4, 16):
        alive = [(name, loss) for name, loss in alive if not halving.stops("g", name, steps, loss)]
        numbers.append(len(alive))
    assert 64 <= numbers[0] <= 90 and numbers[1] <= numbers[0] / 2 and numbers[2] >= 1
