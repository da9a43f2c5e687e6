"""Training methods, statistics, and training that goes on from slim weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from raycompress.candidate import Candidate, Training
from raycompress.collect import Collector, Probe
from raycompress.criteria import L1
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.steps import after_step, before_step
from raycompress.testing import toy_problem


@dataclass(frozen=True, kw_only=True)
class Count(TrainingMethod):
    """Counts steps and leaves the number beside the weights."""

    unit: str = "steps"

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        seen = torch.zeros(2)

        def before(_: torch.optim.Optimizer) -> None:
            assert all(p.grad is not None for p in run.model.parameters())
            seen[0] += 1

        def after(_: torch.optim.Optimizer) -> None:
            seen[1] += 1

        with before_step(run.model, before), after_step(run.model, after):
            yield
        assert run.step == run.num_steps > 0
        run.extra[self.unit] = seen


@dataclass(frozen=True, kw_only=True)
class ChannelSums(Collector):
    """Sums of |w| of what is alive, and examples seen."""

    def collect(self, probe: Probe) -> dict[str, Tensor]:
        weight = probe.model.get_parameter("conv3.weight")
        examples = sum(len(batch[1]) for batch in probe.batches())
        return {"alive": weight.abs().sum((1, 2, 3)) > 0, "examples": torch.tensor(examples)}


def test_method_acts_on_every_step_and_leaves_what_it_found(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    training = Training(2.0, methods=(Count(),))
    trial = executor.evaluate([Candidate(problem.weights, training=training)])[0]
    stored = executor.host.store.get(trial.weights)
    assert stored.extra["steps"].tolist() == [6, 6]  # 96 examples in batches of 32
    assert set(stored.state) == set(problem.model.state_dict())
    # Hooks are gone: nothing counts any more, and a plain training has no extra.
    again = executor.evaluate([Candidate(problem.weights, training=Training(2.0))])[0]
    assert not executor.host.store.get(again.weights).extra
    for name, tensor in executor.host.store.get(again.weights).state.items():
        assert torch.equal(tensor, stored.state[name]), name


def test_hooks_ignore_other_models_optimizers():
    ours, theirs = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    calls = []
    with before_step(ours, calls.append):
        torch.optim.SGD(theirs.parameters(), lr=0.1).step()
        assert not calls
        torch.optim.SGD(ours.parameters(), lr=0.1).step()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    assert len(calls) == 1


def test_statistics_are_collected_once_in_dense_shapes(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    ranking = problem.ranking(
        "channels", L1().scores(problem.model, problem.structure, ["conv3"], {})
    )
    small = problem.candidate({"conv3": 6}, ranking, training=Training(0.0))
    weights = executor.evaluate([small])[0].weights
    asked = Candidate(weights, collect=ChannelSums())
    first, again = executor.evaluate([asked])[0], executor.evaluate([asked])[0]
    assert again.replayed and first.weights == again.weights and not first.shards
    found = executor.host.store.get(first.weights).state
    kept = executor.host.store.get(weights).kept["conv3"]
    assert found["alive"].nonzero().flatten().tolist() == list(kept)
    assert found["examples"] == 96


def test_candidate_with_methods_and_statistics_survives_json():
    for candidate in (
        Candidate("w", training=Training(1.0, methods=(Count(unit="n"),))),
        Candidate("w", collect=ChannelSums()),
    ):
        assert Candidate.from_key(json.loads(json.dumps(candidate.key()))) == candidate


def test_rounds_of_pruning_go_on_from_slim_weights(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    names = ["conv1", "conv3"]

    def ranking(weights):
        search = problem.rank(L1(), names, weights)
        with pytest.raises(StopIteration) as stop:
            next(search)  # a criterion without data asks for nothing
        return stop.value.value

    first = problem.candidate(
        {"conv1": 6, "conv3": 10}, ranking(problem.weights), training=Training(1.0)
    )
    parent = executor.evaluate([first])[0].weights
    second = problem.candidate(
        {"conv1": 3, "conv3": 7}, ranking(parent), weights=parent, training=Training(1.0)
    )
    trial = executor.evaluate([second])[0]
    assert trial.failure is None
    before, after = (executor.host.store.get(w).kept for w in (parent, trial.weights))
    for name, count in {"conv1": 3, "conv3": 7}.items():
        assert len(after[name]) == count and set(after[name]) < set(before[name])
    # What survives starts from the parent's weights, not from the dense model's.
    untrained = executor.host.build(second.with_training(None))
    rows = torch.tensor(after["conv3"])
    columns = torch.tensor(after["conv1"])
    expected = problem.dense(parent).get_parameter("conv3.weight")[rows][:, columns]
    assert torch.equal(untrained.get_parameter("conv3.weight"), expected)


def test_channels_that_are_gone_cant_come_back(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    scores = L1().scores(problem.model, problem.structure, ["conv3"], {})
    small = problem.candidate(
        {"conv3": 6}, problem.ranking("channels", scores), training=Training(0.0)
    )
    parent = executor.evaluate([small])[0].weights
    reversed_ = problem.ranking("channels", {"conv3": -scores["conv3"]})
    trial = executor.evaluate([problem.candidate({"conv3": 6}, reversed_, weights=parent)])[0]
    assert "lack channels" in str(trial.failure)


def test_failed_collection_ends_the_search_with_its_reason(tmp_path):
    problem, executor = toy_problem(str(tmp_path))

    trial = executor.evaluate([Candidate(problem.weights, collect=Broken())])[0]
    assert trial.failure == "ValueError: no such layer"
    assert executor.evaluate([Candidate(problem.weights, collect=Broken())])[0].replayed is False


@dataclass(frozen=True, kw_only=True)
class Broken(Collector):
    def collect(self, probe: Probe) -> dict[str, Tensor]:
        raise ValueError("no such layer")


def test_only_importable_dataclasses_travel():
    @dataclass(frozen=True, kw_only=True)
    class Local(Collector):
        def collect(self, probe: Probe) -> dict[str, Tensor]:
            return {}

    with pytest.raises(TypeError, match="top level"):
        Candidate("w", collect=Local()).key()
