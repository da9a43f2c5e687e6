"""Whole jobs in this process, over the toy task."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from raycompress.artifacts import load
from raycompress.cli import app
from raycompress.driver import run
from raycompress.errors import RaycompressError
from raycompress.ledger import read_ledger
from raycompress.results import JobResult
from raycompress.testing import ToyTask

JOB = {
    "name": "toy",
    "task": "raycompress.testing:ToyTask",
    "model": {"pretrain": {"epochs": 6.0}},
    "sensitivity": {"sparsities": [0.5, 0.75]},
    "pruners": [
        {"type": "SimulatedAnnealing", "iterations": 2, "neighbours": 2, "recalibrate": 1},
        {"type": "L1Filter"},
    ],
    "budgets": [{"macs": "50%"}],
    "recover": {"epochs": 2.0},
    "latency": {"batch_sizes": [1, 8], "repeats": 3},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    output = tmp_path_factory.mktemp("job")
    return output, run({**JOB, "output": str(output)})


def test_slim_is_smaller_verified_and_scores_as_masked(done):
    _, result = done
    assert len(result.trials) == 2
    for trial in result.trials:
        masked, slim = trial.row("masked"), trial.row("slim")
        assert trial.budget_met and slim.macs <= 0.5 * result.dense.macs
        assert slim.params < result.dense.params == masked.params
        assert trial.verification.kind == "exact"
        assert slim.score_test == masked.score_test
        assert slim.file_bytes < result.dense.file_bytes
        assert [entry.batch_size for entry in slim.latency] == [1, 8]
    assert result.dense.score_test > 0.6


def test_files_that_a_job_leaves(done):
    output, result = done
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    for name in (
        "job.yaml",
        "results/summary.json",
        "results/report.md",
        "results/sensitivity.parquet",
        "results/sensitivity.csv",
        "results/candidates.parquet",
        "results/figures/sensitivity.png",
        "results/figures/allocation.png",
        "results/figures/search.png",
        "results/figures/pareto.png",
        "results/L1Filter-macs50/masks.safetensors",
        "results/L1Filter-macs50/groups.json",
        "results/L1Filter-macs50/model.safetensors",
    ):
        assert name in names
    assert JobResult.from_json((output / "results/summary.json").read_text()) == result


def test_the_slim_model_is_left_as_a_recipe_for_its_class(done):
    output, result = done
    images, labels = ToyTask().dataset("test").tensors
    for trial in result.trials:
        model = ToyTask().build_model()
        load(output / "results" / trial.name / "model.safetensors", model).eval()
        slim = trial.row("slim")
        assert sum(p.numel() for p in model.parameters()) == slim.params < result.dense.params
        hits = (model(images).argmax(1) == labels).float().mean()
        assert float(hits) == pytest.approx(slim.score_test)


def test_mlflow_keeps_the_recipe_and_the_program_of_one_model(tmp_path):
    job = {**JOB, "pruners": [{"type": "L1Filter"}], "sensitivity": {}, "tracking": {}}
    result = run({**job, "output": str(tmp_path)})
    (recipe,) = (tmp_path / "artifacts").rglob("model.safetensors")
    assert (recipe.parent / "masks.safetensors").exists() and not result.trials[0].model == ""
    (program,) = (tmp_path / "artifacts").rglob("model.pt2")
    x = torch.randn(5, 2, 6, 6)
    slim = load(recipe, ToyTask().build_model()).eval()
    torch.testing.assert_close(load(program)(x), slim(x))


def test_the_same_job_again_does_nothing_twice(done):
    output, first = done
    before = len(read_ledger(output / "ledger"))
    again = run({**JOB, "output": str(output)})
    assert len(read_ledger(output / "ledger")) == before
    for one, two in zip(first.trials, again.trials, strict=True):
        assert one.weights == two.weights and one.counts == two.counts
    assert again.dense == first.dense


def test_a_second_driver_is_refused(done):
    output, _ = done
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(output / "lock")], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RaycompressError, match="another driver"):
            run({**JOB, "output": str(output)})
    finally:
        holder.kill()
        holder.wait()


def test_fine_grained_job_keeps_its_shape(tmp_path):
    job = {**JOB, "pruners": [{"type": "Level", "sparsity": 0.5}], "budgets": []}
    result = run({**job, "output": str(tmp_path / "o"), "sensitivity": {"criterion": "level"}})
    trial = result.trials[0]
    masked = trial.row("masked")
    assert trial.row("slim") is None and masked.params == result.dense.params
    assert masked.nonzero_params < 0.6 * result.dense.params  # also after fine-tuning


def test_model_in_mlflow_loads_elsewhere_at_another_batch_size(tmp_path):
    job = {
        **JOB,
        "output": str(tmp_path / "o"),
        "tracking": {"registered_model": "toy"},
        "pruners": [{"type": "L1Filter"}],
        "sensitivity": None,
    }
    result = run(job)
    code = (
        "import sys, json, mlflow, mlflow.pytorch, torch;"
        "mlflow.set_tracking_uri(sys.argv[1]);"
        "m = mlflow.pytorch.load_model(sys.argv[2]);"
        "torch.manual_seed(0); x = torch.randn(5, 2, 6, 6);"
        "print(json.dumps(m(x).tolist())); assert 'raycompress' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, result.tracking_uri, result.model_uri],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    from raycompress.driver import validate
    from raycompress.measured import final_model
    from raycompress.weights import WeightStore

    plan = validate(job)
    store = WeightStore(tmp_path / "o" / "weights")
    model = final_model(plan, store.get(result.trials[0].weights))
    torch.manual_seed(0)
    x = torch.randn(5, 2, 6, 6)
    loaded = torch.tensor(json.loads(out.splitlines()[-1]))
    torch.testing.assert_close(loaded, model(x).detach(), rtol=1e-4, atol=1e-5)

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=result.tracking_uri)
    parent = client.get_run(result.run_id)
    child = client.get_run(result.trials[0].run_id)
    assert parent.info.status == child.info.status == "FINISHED"
    assert client.get_registered_model("toy").latest_versions[0].run_id == child.info.run_id
    assert child.data.tags["mlflow.parentRunId"] == result.run_id
    assert parent.data.metrics["slim/macs"] <= 0.5 * parent.data.metrics["dense/macs"]
    assert parent.data.metrics["job/dfe"] == pytest.approx(result.dfe) and result.dfe > 6
    assert parent.data.metrics["job/seconds"] > child.data.metrics["search/seconds"] > 0
    assert {"pareto.parquet", "report.md"} <= {a.path for a in client.list_artifacts(result.run_id)}
    again = run(job)  # continues the same runs
    assert again.run_id == result.run_id and again.trials[0].run_id == result.trials[0].run_id
    experiment = parent.info.experiment_id
    assert len(client.search_runs([experiment])) == 2


def test_sensitivity_alone_with_early_stop_and_chosen_layers(tmp_path):
    (tmp_path / "job.yaml").write_text(json.dumps({**JOB, "pruners": [], "recover": None}))
    done = CliRunner().invoke(
        app,
        [
            *("sensitivity", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "o")),
            *("--set", "sensitivity.sparsities=[0.25, 0.5, 0.9]", "--quiet", "--json"),
            *("--set", "sensitivity.early_stop=minimize"),
            *("--set", "sensitivity.early_stop_value=0.99"),
            *("--set", "sensitivity.layers=[conv3]"),
        ],
    )
    assert done.exit_code == 0, done.output
    result = JobResult.from_json((tmp_path / "o/results/summary.json").read_text())
    assert [curve.group for curve in result.sensitivity] == ["conv3"]
    points = result.sensitivity[0].points
    below = [index for index, (_, score) in enumerate(points) if score < 0.99]
    assert below == [] or below[0] == len(points) - 1  # nothing after the first that stops
    assert (tmp_path / "o/results/figures/sensitivity.png").exists()


def test_task_of_a_job_is_found_in_the_working_directory():
    code = (
        "import raycompress.driver as d; print(d.validate('jobs/quickstart.yaml').trials[0].name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SimulatedAnnealing-macs40"


SHIPPED = [
    "quickstart",
    "fashion_annealing",
    "fashion_bits",
    "fashion_front",
    "fashion_quantized",
    "fashion_sensitivity",
    "fashion_tuned",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_jobs_load(name):
    from raycompress.loading import load_job

    assert load_job(f"jobs/{name}.yaml").name == name.replace("_", "-")


def test_report_and_validate_commands(done, tmp_path):
    output, _ = done
    runner = CliRunner()
    shown = runner.invoke(app, ["report", str(output)])
    assert shown.exit_code == 0 and "L1Filter-macs50: slim" in shown.output
    shown = runner.invoke(app, ["report", str(tmp_path)])
    assert shown.exit_code == 2 and "holds no finished job" in shown.output


def test_init_writes_a_job_that_runs(tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "raycompress", *arguments],
            cwd=tmp_path / "demo",
            capture_output=True,
            text=True,
        )

    (tmp_path / "demo").mkdir()
    assert call("init").returncode == 0
    again = call("init")
    assert again.returncode == 2 and "overwrites nothing" in again.stderr
    done = call(
        *("run", "job.yaml", "--json", "--quiet", "--output", str(tmp_path / "out")),
        *("--set", "cluster.executor=local", "--set", "model.pretrain.epochs=1"),
        *("--set", "pruners.0.iterations=1", "--set", "recover.epochs=1"),
        *("--set", "tracking.uri=none"),
    )
    assert done.returncode == 0, done.stderr
    assert len(JobResult.from_json(done.stdout).trials) == 2
