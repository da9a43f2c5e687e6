"""The front against brute force, and the table of a job against its ledger."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycompress.candidate import Trial
from raycompress.ledger import read_ledger
from raycompress.pareto import Point, front, marked
from raycompress.points import Pricer, Recorder, read_points, read_table, write_table
from raycompress.search import Race
from raycompress.testing import toy_problem

NUMBERS = st.one_of(st.integers(0, 4).map(float), st.just(math.inf), st.just(math.nan))
JOB = {
    "name": "toy",
    "task": "raycompress.testing:ToyTask",
    "model": {"pretrain": {"epochs": 3.0}},
    "pruners": [
        {"type": "SimulatedAnnealing", "iterations": 3, "recalibrate": 1},
        {"type": "NetAdapt", "iterations": 2, "epochs": 0.5},
        {"type": "L1Filter"},
    ],
    "budgets": [{"params": "50%"}],
    "recover": {"epochs": 1.0},
    "latency": {"batch_sizes": [1], "repeats": 3},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


def dominated(a, b):
    """Whether point b dominates point a; the definition, in words of one pair."""
    no_worse = b[0] <= a[0] and b[1] >= a[1]
    return no_worse and (b[0] < a[0] or b[1] > a[1])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30))
def test_the_front_is_what_nothing_dominates(points):
    finite = [p for p in points if all(map(math.isfinite, p))]
    expected = [
        all(map(math.isfinite, p)) and not any(dominated(p, other) for other in finite)
        for p in points
    ]
    assert front([p[0] for p in points], [p[1] for p in points]) == expected


def point(name, macs, score, **other):
    return Point(id=name, macs=macs, params=macs, score=score, loss=-score, **other)


def test_what_was_seen_in_part_is_on_no_front_and_final_models_are_on_one():
    points = marked(
        [
            point("dense", 100, 0.9, stage="dense"),
            point("cheap", 30, 0.5),
            point("better", 30, 0.95, complete=False),
            point("tuned", 30, 0.8, stage="final", latency_ms=1.0),
        ]
    )
    assert [p.fronts for p in points] == [
        ("macs", "params"),
        (),
        (),
        ("macs", "params", "latency_ms"),
    ]
    assert [p.search_fronts for p in points] == [("macs", "params")] * 2 + [()] * 2


def test_a_table_comes_back_as_it_was_written(tmp_path):
    points = marked(
        [
            point("a", 3, 0.5, candidate='{"kept": [["conv1", 3]]}', trial="t", step=4),
            point("b", 2, 0.5, candidate='{"kept": []}', latency_ms=0.5, complete=False),
        ]
    )
    write_table(points, tmp_path / "p.parquet", {"task": "x"})
    assert read_table(tmp_path / "p.parquet") == (points, {"task": "x"})
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    assert table["kept"].to_pylist() == ['{"conv1": 3}', "{}"]
    assert table["on_front_macs"].to_pylist() == [True, False]


def test_a_race_leaves_a_point_for_each_model_and_says_which_were_dropped(tmp_path):
    import torch

    problem, executor = toy_problem(str(tmp_path / "w"))
    ranking = problem.ranking("channels", {"conv3": torch.arange(16.0)})
    asked = [problem.candidate({"conv3": count}, ranking) for count in (4, 8, 12)]
    dropped = Trial(asked[0], executor.evaluate(asked[:1])[0].shards[:2], dropped=True)
    whole = Race(tuple(asked[1:]), confidence=0.999999).run(executor)
    path = tmp_path / "points.jsonl"
    recorder = Recorder(path, Pricer(executor, problem.weights, problem.model), "t")
    recorder.add(0, [dropped, *whole])
    recorder.add(1, [whole[0], Trial(asked[0], failure="it failed")])  # nothing new
    found = read_points(path)
    assert [p.complete for p in found] == [False, True, True]
    assert [json.loads(p.candidate)["kept"] for p in found] == [
        [["conv3", 4]],
        [["conv3", 8]],
        [["conv3", 12]],
    ]
    recorder.add(2, executor.evaluate([replace(asked[0], shards=(0, 3))]))  # a probe
    assert [p.complete for p in read_points(path)] == [False, True, True]
    recorder.add(3, executor.evaluate(asked[:1]))  # judged in full in the end
    assert [p.complete for p in read_points(path)] == [True] * 3
    with path.open("a") as file:
        file.write('{"id": "torn')
    assert len(read_points(path)) == 3


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from raycompress.driver import run

    output = tmp_path_factory.mktemp("job")
    return output, run({**JOB, "output": str(output)})


def test_the_table_holds_everything_that_was_judged_on_validation_data(done):
    output, result = done
    points, _ = read_table(output / "results" / "pareto.parquet")
    judged = {}
    for record in read_ledger(output / "ledger"):
        if record["kind"] == "evaluation" and record["split"] == "validation":
            key = json.dumps(record["candidate"], sort_keys=True)
            judged[key] = sum(s[1] for s in record["shards"]) / sum(s[0] for s in record["shards"])
    assert {p.candidate: p.score for p in points}.items() <= judged.items()
    # All that is missing: looks at the dense model, and masked models beside the slim ones.
    kept = {key for key in judged if json.loads(key)["kept"]}
    assert kept == {p.candidate for p in points if p.stage != "dense"}
    assert [p.stage for p in points].count("final") == 3
    assert len({p.id for p in points}) == result.num_points
    for trial in result.trials:
        (final,) = [p for p in points if p.trial == trial.name and p.stage == "final"]
        slim = trial.row("slim")
        assert (final.score, final.macs, final.params) == (
            slim.score_validation,
            slim.macs,
            slim.params,
        )
        steps = [p.step for p in points if p.trial == trial.name and p.stage == "search"]
        assert max(steps) <= len(trial.curve) - 1
    trained = {p.trial for p in points if p.trained and p.stage == "search"}
    assert trained == {"NetAdapt-params50"}


def test_the_report_names_the_front_and_the_cost_and_no_test_score_marks_it(done):
    output, result = done
    assert {p.id for p in result.front} == {
        p.id
        for p in read_table(output / "results" / "pareto.parquet")[0]
        if p.fronts or p.search_fronts
    }
    text = (output / "results" / "report.md").read_text()
    assert f"Of {result.num_points} models that were evaluated" in text
    assert all(f"`{p.id}`" in text for p in result.front if "macs" in p.fronts)
    total = sum(record["dfe"] for record in read_ledger(output / "ledger"))
    assert result.dfe == pytest.approx(total) == pytest.approx(result.run_dfe)
    assert f"| whole job, this run | {total:.1f} |" in text
    shown = subprocess.run(
        [sys.executable, "-m", "raycompress", "report", str(output)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Fronts of" in shown and "whole job, this run" in shown


def test_the_same_job_again_tells_what_it_cost_in_all(done):
    from raycompress.driver import run

    output, first = done
    again = run({**JOB, "output": str(output)})
    assert again.front == first.front and again.dfe == first.dfe
    assert again.run_dfe == 0 < first.run_dfe
