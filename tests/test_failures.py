"""What fails ends as failed with its reason, and the rest goes on: whole jobs in this process."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from raycompress.cli import app
from raycompress.driver import run
from raycompress.errors import EvaluationError
from raycompress.ledger import read_ledger
from raycompress.results import JobResult

REASONS = {
    "raise": "ValueError: no score for such a small model",
    "nan score": "TaskError: score and loss must be finite, got nan and ",
    "nan loss": "TaskError: score and loss must be finite, got ",
    "out of memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
}
ANNEALING = {"type": "SimulatedAnnealing", "iterations": 4, "neighbours": 3, "recalibrate": 0}


def job(output: Any, task: str, args: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {
        "name": "failing",
        "task": f"tests.failing_tasks:{task}",
        "task_args": args,
        "latency": {"batch_sizes": [1], "repeats": 1},
        "cluster": {"executor": "local"},
        "tracking": {"uri": "none"},
        "output": str(output),
        **keys,
    }


@pytest.mark.parametrize("how", REASONS)
def test_a_trial_that_fails_does_not_take_down_the_others(how, tmp_path):
    both = job(
        tmp_path,
        "FailingTask",
        {"how": how, "below": 4},
        pruners=[{"type": "L1Filter"}],
        budgets=[{"macs": "15%"}, {"macs": "60%"}],
    )
    result = run(both)
    bad, good = result.trials
    assert bad.failure is not None and REASONS[how] in bad.failure
    assert bad.rows == () and good.failure is None and good.row("slim") is not None
    assert result.best == good.name
    assert JobResult.from_json((tmp_path / "results/summary.json").read_text()) == result
    report = (tmp_path / "results/report.md").read_text()
    assert f"- FAILED: {bad.failure}" in report
    assert (tmp_path / "results/figures/pareto.png").exists()
    again = run(both)
    assert again.trials[0].failure == bad.failure and again.trials[1].counts == good.counts


@pytest.mark.parametrize("how", REASONS)
def test_annealing_goes_on_past_candidates_that_fail(how, tmp_path):
    result = run(
        job(
            tmp_path,
            "FailingTask",
            {"how": how, "below": 6},
            pruners=[ANNEALING],
            budgets=[{"params": "60%"}],
        )
    )
    (trial,) = result.trials
    failures = [r["failure"] for r in read_ledger(tmp_path / "ledger") if r["failure"]]
    assert failures and all(REASONS[how] in failure for failure in failures)
    assert sum(step.failed for step in trial.curve) >= len(failures)  # some are asked twice
    assert trial.failure is None and len(trial.curve) >= 2
    assert dict((name, kept) for name, kept, _ in trial.counts)["conv1"] >= 6
    note = f"{len(failures)} candidates failed, first: {failures[0]}"
    assert any(note in each for each in result.notes)


@pytest.mark.parametrize("how", ["raise", "nan training"])
def test_net_adapt_takes_the_best_of_what_is_left(how, tmp_path):
    result = run(
        job(
            tmp_path,
            "FailingTask",
            {"how": how, "below": 8},  # so that conv1's every proposal fails
            pruners=[{"type": "NetAdapt", "iterations": 2, "epochs": 0.5}],
            budgets=[{"params": "60%"}],
        )
    )
    (trial,) = result.trials
    assert trial.failure is None and trial.budget_met
    assert [step.failed for step in trial.curve] == [1, 1]
    assert dict((name, kept) for name, kept, _ in trial.counts)["conv1"] == 8


@pytest.mark.parametrize(
    "pruner",
    [
        {"type": "L1Filter"},
        ANNEALING,
        {"type": "NetAdapt", "iterations": 2},
        {"type": "Iterative", "rounds": 2},
    ],
)
def test_all_failing_is_one_clear_error(pruner, tmp_path):
    bad = job(
        tmp_path,
        "FailingTask",
        {"how": "raise", "below": 8},
        pruners=[pruner, {"type": "L2Filter"}],
        budgets=[{"macs": "30%"}],
        targets=[{"op_names": ["conv1", "conv2"]}],
    )
    with pytest.raises(EvaluationError, match="all 2 trials failed: ") as caught:
        run(bad)
    assert str(caught.value).count(REASONS["raise"]) == 2 and "\n" not in str(caught.value)


def test_a_metric_that_is_nan_fails_the_candidate(tmp_path):
    with pytest.raises(EvaluationError, match="evaluate must return a finite number, got nan"):
        run(
            job(
                tmp_path,
                "NaNMetric",
                {},
                pruners=[{"type": "L1Filter", "sparsity": 0.5}],
            )
        )


def test_weights_that_training_spoilt_are_not_kept(tmp_path):
    with pytest.raises(EvaluationError, match=r"left NaN or infinity in 'conv3\.weight'"):
        run(
            job(
                tmp_path,
                "OwnLoop",
                {},
                pruners=[{"type": "L1Filter", "sparsity": 0.25}],
                recover={"epochs": 1.0},
            )
        )


def test_what_a_later_run_mended_is_no_failure_any_more(tmp_path):
    faults, output = tmp_path / "faults", tmp_path / "out"
    faults.mkdir()
    (faults / "small").touch()
    short = {
        **job(output, "", {"folder": str(faults)}, pruners=[{"type": "L1Filter", "sparsity": 0.5}]),
        "task": "tests.distributed.faulty_task:FaultyTask",
    }
    with pytest.raises(EvaluationError, match=r"all 1 trials failed: .*allocate memory"):
        run(short)
    (faults / "small").unlink()
    result = run(short)
    found = read_ledger(output / "ledger")
    failed = {record["key"] for record in found if record["failure"] is not None}
    mended = {record["key"] for record in found if record["failure"] is None}
    assert failed and failed < mended
    assert result.trials[0].failure is None
    assert not any("failed" in note for note in result.notes), result.notes


def test_the_terminal_names_what_failed(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "name: failing\ntask: tests.failing_tasks:FailingTask\n"
        "task_args: {how: raise, below: 4}\npruners: [{type: L1Filter}]\n"
        "budgets: [{macs: 15%}, {macs: 60%}]\nlatency: {batch_sizes: [1], repeats: 1}\n"
        "cluster: {executor: local}\ntracking: {uri: none}\n"
    )
    done = CliRunner().invoke(
        app, ["run", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 0
    assert "L1Filter-macs15 failed: " in done.output and REASONS["raise"] in done.output
