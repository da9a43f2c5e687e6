"""Tuned jobs in this process, over the toy task."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from typer.testing import CliRunner

from raycompress.cli import app
from raycompress.config import JobConfig
from raycompress.driver import run, validate
from raycompress.errors import ConfigError, EvaluationError
from raycompress.ledger import read_ledger
from raycompress.loading import job_key, json_schema, load_job, parse_job
from raycompress.results import JobResult

SPACE: dict[str, Any] = {
    "type": "FixedAllocation",
    "criterion": {"choice": ["l1", "fpgm"]},
    "sparsities": {"*": {"uniform": [0.05, 0.95], "each": True}},
}


def job(output: Any, **keys: Any) -> dict[str, Any]:
    return {
        "name": "tuned",
        "task": "raycompress.testing:ToyTask",
        "model": {"pretrain": {"epochs": 4.0}},
        "pruners": [SPACE],
        "tune": {"num_samples": 8},
        "budgets": [{"params": "50%"}],
        "latency": {"batch_sizes": [1], "repeats": 1},
        "cluster": {"executor": "local"},
        "tracking": {"uri": "none"},
        "output": str(output),
        **keys,
    }


def points(result: JobResult) -> list[Any]:
    return [(row.name, row.settings, row.state, row.score, row.loss) for row in result.samples]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("tuned")
    return output, run(job(output))


def test_every_sample_meets_the_budget_and_the_best_is_measured(done: Any) -> None:
    output, result = done
    assert [row.name for row in result.samples] == [f"tuned-params50-{i:03d}" for i in range(8)]
    for row in result.samples:
        assert row.state == "finished" and row.params <= 0.5 * result.dense.params
        assert set(row.settings) == {"type", "criterion", "sparsities.conv1", "sparsities.conv3"}
    best = max(result.samples, key=lambda row: row.score)
    assert [row.name for row in result.samples if row.best] == [best.name]
    (trial,) = result.trials
    assert trial.name == result.best == best.name
    assert trial.budget_met and trial.row("slim").params == best.params
    assert trial.row("slim").score_validation == best.score
    assert JobResult.from_json((output / "results/summary.json").read_text()) == result
    report = (output / "results/report.md").read_text()
    assert "8 samples: 8 finished." in report and f"| **{best.name}** |" in report
    with (output / "results/samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [row.score for row in result.samples]
    assert rows[3]["sparsities.conv1"] == str(result.samples[3].settings["sparsities.conv1"])


def test_the_same_seed_gives_the_same_samples_and_another_others(done: Any, tmp_path: Any) -> None:
    _, result = done
    assert points(run(job(tmp_path / "again"))) == points(result)
    other = run(job(tmp_path / "other", seeds=[1]))
    assert [row.settings for row in other.samples] != [row.settings for row in result.samples]


def test_a_stopped_job_goes_on_and_runs_nothing_twice(done: Any, tmp_path: Any) -> None:
    folder, whole = done
    part = run(job(tmp_path, tune={"num_samples": 5}))
    assert points(part) == points(whole)[:5]
    log = tmp_path / "studies/tuned-params50.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))  # the last one was running when it was stopped
    (tmp_path / "trials/tuned-params50-004/result.json").unlink()
    again = run(job(tmp_path))
    assert points(again) == points(whole)
    records = read_ledger(tmp_path / "ledger")
    keys = [record["key"] for record in records]
    assert len(set(keys)) == len(keys)
    assert {r["key"] for r in read_ledger(folder / "ledger")} <= set(keys)


def test_budgets_and_seeds_make_studies(tmp_path: Any) -> None:
    plan = validate(job(tmp_path, budgets=[{"macs": "50%"}, {"params": "30%"}], seeds=[0, 3]))
    names = [study.name for study in plan.studies]
    assert plan.trials == () and names == [
        "tuned-macs50-seed0",
        "tuned-macs50-seed3",
        "tuned-params30-seed0",
        "tuned-params30-seed3",
    ]
    assert {(trial.budget.label, trial.entry["criterion"]) for trial in plan.checked} == {
        (label, criterion) for label in ("macs50", "params30") for criterion in ("l1", "fpgm")
    }


def test_several_objectives_keep_their_front(tmp_path: Any) -> None:
    tune = {"num_samples": 12, "objectives": ["score", "macs"], "keep": 20}
    result = run(job(tmp_path, tune=tune, budgets=[]))
    front = [row for row in result.samples if row.best]
    assert len(front) > 1 and len(result.trials) == 12
    assert {t.name for t in result.trials[: len(front)]} == {row.name for row in front}
    for row in result.samples:
        beaten = any(o.score >= row.score and o.macs < row.macs for o in result.samples)
        assert row.best != beaten or not row.best
        assert not (row.best and beaten)


def test_a_grid_over_pruners_with_training_before_the_verdict(tmp_path: Any) -> None:
    result = run(
        job(
            tmp_path,
            pruners=[
                {"type": {"choice": ["L1Filter", "FPGM"]}, "round_to": {"int": [1, 2]}},
                {"type": "RandomFilter"},
            ],
            tune={"searcher": "grid", "train": {"epochs": 0.5}},
        )
    )
    assert [row.settings for row in result.samples] == [
        {"type": name, "round_to": step} for name in ("L1Filter", "FPGM") for step in (1, 2)
    ] + [{"type": "RandomFilter"}]
    (trial,) = result.trials
    untrained, trained = trial.curve
    assert trained.loss < untrained.loss
    assert (
        trial.row("slim").score_validation
        == trained.score
        == max(row.score for row in result.samples)
    )


class TestFailures:
    def task(self, output: Any, below: int, **keys: Any) -> dict[str, Any]:
        return job(
            output,
            task="tests.failing_tasks:FailingTask",
            task_args={"how": "raise", "below": below},
            model={},
            **keys,
        )

    def test_a_sample_that_fails_is_told_and_not_run_again(self, tmp_path: Any) -> None:
        result = run(self.task(tmp_path, 5))
        states = [row.state for row in result.samples]
        assert 0 < states.count("failed") < 8 and states.count("finished") >= 1
        for row in result.samples:
            if row.state == "failed":
                assert "ValueError: no score for such a small model" in row.failure
                assert row.score is None
        before = read_ledger(tmp_path / "ledger")
        assert points(run(self.task(tmp_path, 5))) == points(result)
        assert read_ledger(tmp_path / "ledger") == before

    def test_all_failing_is_one_clear_error(self, tmp_path: Any) -> None:
        with pytest.raises(
            EvaluationError,
            match=r"^all 8 samples failed: EvaluationError: its winner failed: ValueError: no sc",
        ):
            run(self.task(tmp_path, 8, budgets=[{"macs": "30%"}]))


def annealing(output: Any, **keys: Any) -> dict[str, Any]:
    pruner = {
        "type": "SimulatedAnnealing",
        "iterations": 9,
        "neighbours": 2,
        "recalibrate": 0,
        "criterion": {"choice": ["l1", "random", "fpgm"]},
        "perturbation": {"uniform": [0.01, 0.5]},
    }
    tune = {"num_samples": 6, "searcher": "random", "scheduler": "asha", "grace": 1, "factor": 3}
    return job(output, pruners=[pruner], tune=tune, **keys)


def test_hopeless_samples_are_stopped_and_not_run_again(tmp_path: Any) -> None:
    result = run(annealing(tmp_path))
    stopped = [row for row in result.samples if row.state == "stopped"]
    assert stopped and any(row.state == "finished" for row in result.samples)
    for row in result.samples:
        found = json.loads((tmp_path / "trials" / row.name / "result.json").read_text())
        if row.state == "stopped":
            assert found["stopped"] + 1 in (1, 3, 9) and len(found["curve"]) == found["stopped"] + 1
            assert row.score == found["curve"][-1]["best_score"]
        else:
            assert found["stopped"] is None and found["winner"] is not None
    losses = {  # of all that came to the first rung
        row.name: json.loads((tmp_path / "trials" / row.name / "result.json").read_text())["curve"][
            0
        ]["within_loss"]
        for row in result.samples
    }
    assert min(losses, key=losses.__getitem__) not in {
        row.name for row in stopped if row.name not in _later(tmp_path, stopped)
    }
    before = read_ledger(tmp_path / "ledger")
    again = run(annealing(tmp_path))
    assert points(again) == points(result) and read_ledger(tmp_path / "ledger") == before


def _later(folder: Any, rows: Any) -> set[str]:
    """Samples that were stopped after the first rung."""
    found = {
        row.name: json.loads((folder / "trials" / row.name / "result.json").read_text())["stopped"]
        for row in rows
    }
    return {name for name, step in found.items() if step > 0}


def test_a_sweep_is_halved_too_within_each_budget(tmp_path: Any) -> None:
    pruners = [
        {"type": "SimulatedAnnealing", "iterations": 5, "criterion": c, "recalibrate": 0}
        for c in ("l1", "random", "fpgm", "l2")
    ]
    sweep = job(
        tmp_path,
        pruners=pruners,
        tune={"scheduler": "asha", "grace": 1, "factor": 4},
        budgets=[{"params": "60%"}, {"params": "30%"}],
    )
    result = run(sweep)
    assert result.samples == ()
    for budget in ("params 60%", "params 30%"):
        own = [trial for trial in result.trials if trial.budget == budget]
        whole = [trial for trial in own if trial.stopped is None]
        assert 1 <= len(whole) < len(own)  # the others of a budget don't count
        assert all(trial.rows == () and trial.curve for trial in own if trial not in whole)
    assert "- STOPPED after step" in (tmp_path / "results/report.md").read_text()
    before = read_ledger(tmp_path / "ledger")
    again = run(sweep)
    assert [t.stopped for t in again.trials] == [t.stopped for t in result.trials]
    assert read_ledger(tmp_path / "ledger") == before


def test_searches_on_their_way_to_the_budget_are_not_judged(tmp_path: Any) -> None:
    pruners = [
        {"type": "NetAdapt", "iterations": 3, "epochs": 0.1, "criterion": c} for c in ("l1", "l2")
    ]
    result = run(
        job(
            tmp_path,
            pruners=pruners,
            tune={"scheduler": "asha", "grace": 1, "factor": 8},
            budgets=[{"macs": "40%"}],
        )
    )
    infinite = [step.within_loss == float("inf") for step in result.trials[0].curve]
    assert infinite[0] and not infinite[-1]
    assert all(t.stopped is None or t.stopped == len(t.curve) - 1 for t in result.trials)


def test_mlflow_has_a_run_for_each_sample_with_its_settings(tmp_path: Any) -> None:
    import mlflow

    result = run(job(tmp_path, tune={"num_samples": 3}, tracking={}))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tuned").experiment_id])
    children = {r.info.run_name: r for r in runs if "raycompress.trial" in r.data.tags}
    assert set(children) == {row.name for row in result.samples}
    for row in result.samples:
        child = children[row.name]
        assert child.info.status == "FINISHED"
        for name, value in row.settings.items():
            assert child.data.params[name] == str(value)
        assert child.data.params["study"] == row.study
        assert child.data.metrics["sample/score"] == row.score
        assert child.data.tags["mlflow.parentRunId"] == result.run_id


YAML = """\
name: tuned
task: raycompress.testing:ToyTask
pruners:
  - type: FixedAllocation
    criterion: {choice: [l1, fpgm]}
    sparsities:
      "conv*": {uniform: [0.1, 0.9]}
tune: {num_samples: 4}
budgets: [{macs: 50%}]
cluster: {executor: local}
tracking: {uri: none}
"""


def test_the_terminal_tells_of_samples(tmp_path: Any) -> None:
    (tmp_path / "job.yaml").write_text(YAML)
    path = str(tmp_path / "job.yaml")
    checked = CliRunner().invoke(app, ["validate", path])
    assert checked.exit_code == 0
    assert (
        "study   tuned-macs50 (keep macs 50%): 4 samples by tpe of criterion, sparsities.conv*"
        in checked.output
    )
    done = CliRunner().invoke(app, ["run", path, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "tuned-macs50: 4 samples (4 finished); best: tuned-macs50-0" in done.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "uniform: [0.1, 0.9]",
            "uniform: [0.9, 0.1]",
            "line 7: pruners[0].sparsities.conv*.uniform must be [low, high] with low below high, "
            "got [0.9, 0.1]",
        ),
        (
            "uniform: [0.1, 0.9]",
            "uniform: [0.1, 1.5]",
            "line 6: pruners[0].sparsities: 'conv*' must be in [0, 1), got 1.5",
        ),
        (
            "choice: [l1, fpgm]",
            "choice: [l1, level]",
            "line 5: pruners[0].criterion: 'level' scores weights",
        ),
        (
            "type: FixedAllocation",
            "type: {choice: [FixedAllocation, L1Filter]}",
            "line 5: pruners[0].criterion is no key of L1Filter",  # and so is the next line's
        ),
        ("num_samples: 4", "num_samples: 0", "tune.num_samples must be above 0, got 0"),
        ("num_samples: 4", "searcher: random", "tune.num_samples is missing"),
        (
            "num_samples: 4",
            "num_samples: 4, searcher: tep",
            "tune.searcher: no searcher 'tep'; did you mean 'tpe'?",
        ),
        (
            "num_samples: 4",
            "num_samples: 4, searcher: 'my:make'",
            "tune.searcher: searchers of Ray Tune need executor 'ray'",
        ),
        (
            "num_samples: 4",
            "num_samples: 4, objectives: [score, speed]",
            "tune.objectives[1] must be one of 'score', 'loss', 'macs', 'params', got 'speed'",
        ),
        (
            "num_samples: 4",
            "num_samples: 4, scheduler: asha, objectives: [score, macs]",
            "tune.scheduler 'asha' compares losses",
        ),
        ("num_samples: 4", "num_samples: 4, scheduler: asha, factor: 1", "tune.factor must be at"),
        ("tune: {num_samples: 4}\n", "", "pruners[0] holds a space, which needs tune"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    old: str, new: str, message: str, tmp_path: Any
) -> None:
    assert old in YAML
    (tmp_path / "job.yaml").write_text(YAML.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / "job.yaml")
    lines = str(caught.value).splitlines()
    assert message in lines[0] and len(lines) == (2 if "L1Filter" in new else 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tune": {"searcher": "grid"}},
            r"pruners\[0\]\.sparsities\.conv1: a grid takes spaces of choice and int alone",
        ),
        (
            {"pruners": [{**SPACE, "sparsities": {"cnov*": {"uniform": [0.1, 0.2]}}}]},
            r"FixedAllocation\.sparsities: 'cnov\*' matches no layer",
        ),
        ({"budgets": [{"macs": "0.01%"}]}, "budget macs 0.01% can't be reached"),
        ({"pruners": [{"type": "L1Filter"}]}, "tune.num_samples: one pruner without spaces"),
        (
            {"pruners": [{"type": "L1Filter"}], "tune": {}},
            "tune has nothing to do: pruners hold no space",
        ),
    ],
)
def test_mistakes_that_take_the_model_are_found_too(
    keys: dict[str, Any], message: str, tmp_path: Any
) -> None:
    with pytest.raises(ConfigError if "budget" not in message else Exception, match=message):
        validate(job(tmp_path, **keys))


def test_more_samples_go_on_with_the_same_run_and_other_spaces_do_not(tmp_path: Any) -> None:
    def key(**keys: Any) -> str:
        return job_key(parse_job(job(tmp_path, **keys)))

    assert key(tune={"num_samples": 80, "keep": 2}) == key()
    assert key(tune={"num_samples": 8, "searcher": "random"}) != key()
    assert key(pruners=[{**SPACE, "criterion": "l1"}]) != key()
    assert isinstance(parse_job(job(tmp_path)), JobConfig)


def test_the_schema_takes_spaces() -> None:
    schema = json_schema()
    criterion = schema["$defs"]["FixedAllocation"]["properties"]["criterion"]
    assert criterion["anyOf"][1] == {"$ref": "#/$defs/Space"} and criterion["description"]
    below = schema["$defs"]["FixedAllocation"]["properties"]["sparsities"]["anyOf"][0]
    assert below["additionalProperties"]["anyOf"][1] == {"$ref": "#/$defs/Space"}
    assert set(schema["$defs"]["TuneConfig"]["properties"]) >= {"num_samples", "objectives"}


@pytest.mark.slow
def test_a_killed_study_ends_as_an_undisturbed_one(tmp_path: Any) -> None:
    (tmp_path / "job.yaml").write_text(
        YAML.replace("{num_samples: 4}", "{num_samples: 14, train: {epochs: 0.5}}")
    )

    def start(output: str) -> subprocess.Popen[bytes]:
        command = ["run", str(tmp_path / "job.yaml"), "--quiet", "--output"]
        return subprocess.Popen(
            [sys.executable, "-m", "raycompress", *command, str(tmp_path / output)],
            stdout=subprocess.DEVNULL,
        )

    def summary(output: str) -> JobResult:
        return JobResult.from_json((tmp_path / output / "results/summary.json").read_text())

    assert start("whole").wait() == 0
    log = tmp_path / "killed/studies/tuned-macs50.jsonl"
    for lines in (7, 16):  # of 28: a sample is asked for, and told
        driver = start("killed")
        deadline = time.monotonic() + 60
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.005)
        driver.kill()
        driver.wait()
        assert log.read_bytes().count(b"\n") < 28
    assert start("killed").wait() == 0
    assert points(summary("killed")) == points(summary("whole"))
    keys = [record["key"] for record in read_ledger(tmp_path / "killed/ledger")]
    assert len(set(keys)) == len(keys)
