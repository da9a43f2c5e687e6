"""Ray Tune's searchers as a study's, without a cluster."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from raycompress.distributed.searcher import TuneSearcher
from raycompress.errors import ConfigError
from raycompress.tuning import Sample, SearchSpace
from raycompress.tuning.searchers import NotYet

SPACE = SearchSpace.of(
    [
        {
            "type": "A",
            "c": {"choice": ["a", "b"]},
            "n": {"int": [1, 3]},
            "x": {"s": {"uniform": [0, 1]}},
        },
        {"type": "B", "r": {"loguniform": [1e-3, 1]}},
    ]
)


def make_optuna(space: Any, metric: Any, mode: Any, seed: int) -> Searcher:
    return OptunaSearch(space, metric=metric, mode=mode, seed=seed)


def make_limited(space: Any, metric: Any, mode: Any, seed: int) -> Searcher:
    return ConcurrencyLimiter(make_optuna(space, metric, mode, seed), max_concurrent=1)


class Listener(Searcher):
    """Suggests the ends of what it is given, twice, and keeps what it is told."""

    def __init__(self, space: Any, **settings: Any) -> None:
        super().__init__()
        self.space, self.settings, self.told, self.num = space, settings, [], 0

    def suggest(self, trial_id: str) -> Any:
        self.num += 1
        return self.FINISHED if self.num > 2 else {"pruner": 0, "0.c": "a", "0.n": 1, "0.x.s": 0.5}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.told.append((trial_id, result, error))


def here(name: str) -> str:
    return f"{__name__}:{name}"


def test_suggestions_are_points_of_the_space() -> None:
    searcher = TuneSearcher(here("make_optuna"), SPACE, ["score", "macs"], 0)
    seen = set()
    history: list[Sample] = []
    for number in range(12):
        point = searcher.propose(number, history)
        assert SPACE.entry(point)["type"] == "AB"[point["pruner"]]
        seen.add(point["pruner"])
        history.append(Sample(number, point, "finished", (0.5, 100.0)))
    assert seen == {0, 1}


def test_it_is_told_what_came_of_each_and_knows_the_end() -> None:
    searcher = TuneSearcher(here("Listener"), SPACE, ["loss"], 3)
    told = searcher.searcher.told
    assert searcher.searcher.settings == {"metric": "loss", "mode": "min", "seed": 3}
    assert set(searcher.searcher.space) == {"pruner", "0.c", "0.n", "0.x.s", "1.r"}
    first = searcher.propose(0, [])
    assert first == {"pruner": 0, "0.c": "a", "0.n": 1, "0.x.s": 0.5}
    assert searcher.propose(1, [Sample(0, first, "finished", (0.25,))]) == first
    assert told == [("0", {"loss": 0.25, "done": True}, False)]
    history = [Sample(0, first, "finished", (0.25,)), Sample(1, first, "failed", (), "why")]
    assert searcher.propose(2, history) is None
    assert told[1:] == [("1", None, True)]


def test_it_may_wait() -> None:
    searcher = TuneSearcher(here("make_limited"), SPACE, ["score"], 0)
    point = searcher.propose(0, [])
    with pytest.raises(NotYet):
        searcher.propose(1, [Sample(0, point)])
    assert searcher.propose(1, [Sample(0, point, "finished", (0.5,))]) is not None


def test_one_that_starts_again_is_told_what_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    point = {"pruner": 1, "1.r": 0.1}
    history = [Sample(0, point, "finished", (0.5,)), Sample(1, point, "failed", (), "why")]
    searcher = TuneSearcher(here("make_optuna"), SPACE, ["score"], 0)
    assert searcher.propose(2, history) is not None
    assert [trial.value for trial in searcher.searcher._ot_study.trials[:1]] == [0.5]
    with caplog.at_level(logging.WARNING, "raycompress"):
        TuneSearcher(here("Listener"), SPACE, ["score"], 0).propose(2, history)
    assert "Listener can't be told of sample 0" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{__name__}:SPACE", "can't make a searcher: TypeError"),
        ("builtins:dict", "must return a ray.tune.search.Searcher, got"),
        ("nowhere:make", "can't make a searcher: ModuleNotFoundError"),
    ],
)
def test_what_makes_no_searcher_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"tune.searcher: {path} {message}"):
        TuneSearcher(path, SPACE, ["score"], 0)
