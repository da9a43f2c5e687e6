"""Jobs with latency budgets; no claim on speed, which is a benchmark's business."""

import json
import shutil

import pytest

from raycompress.driver import run, validate
from raycompress.errors import BudgetError, ConfigError
from raycompress.loading import parse_job
from raycompress.results import JobResult
from raycompress.structure.latency import points as latency_points

JOB = {
    "name": "latency",
    "task": "raycompress.testing:ToyTask",
    "task_args": {"width": 16},
    "model": {"pretrain": {"epochs": 1.0}},
    "pruners": [
        {"type": "L1Filter"},
        {"type": "SimulatedAnnealing", "iterations": 1, "neighbours": 2, "recalibrate": 1},
    ],
    "budgets": [{"latency_ms": "70%"}, {"latency_ms": "80%", "macs": "40%"}],
    # Large enough a batch for channels to cost more time than calls.
    "latency": {"batch_sizes": [128, 1], "repeats": 3, "max_seconds": 4.0},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    output = tmp_path_factory.mktemp("job")
    return output, run({**JOB, "output": str(output)})


def never(*args, **kwargs):
    raise AssertionError("nothing may be measured here")


def test_predicted_and_measured_are_in_the_result(done):
    output, result = done
    assert [trial.name for trial in result.trials] == [
        "L1Filter-latency_ms70",
        "L1Filter-latency_ms80-macs40",
        "SimulatedAnnealing-latency_ms70",
        "SimulatedAnnealing-latency_ms80-macs40",
    ]
    for trial in result.trials:
        limits = {limit.resource: limit for limit in trial.limits}
        limit = limits["latency_ms"]
        slim, dense = trial.row("slim"), trial.row("dense")
        assert limit.measured == slim.at(128).median_ms
        assert limit.dense == dense.at(128).median_ms
        assert limit.limit == pytest.approx(float(limit.asked[:-1]) / 100 * limit.dense)
        assert limit.predicted > 0 and limit.asked in ("70%", "80%")
        assert 0 < slim.at(128).peak_bytes < dense.at(128).peak_bytes
        assert slim.params < dense.params
        if "macs" in limits:
            assert limits["macs"].predicted is None and limits["macs"].met
    assert JobResult.from_json((output / "results/summary.json").read_text()) == result
    (note,) = (note for note in result.notes if note.startswith("Latency table"))
    assert "at batch size 128" in note and "8 random slim models" in note
    report = (output / "results/report.md").read_text()
    assert "the search counted with" in report and "MB, batch 128" in report


def test_every_prediction_is_within_its_budget(done):
    output, result = done
    plan = validate({**JOB, "output": str(output)})
    from raycompress.local import LocalExecutor
    from raycompress.weights import WeightStore

    store = WeightStore(output / "weights")
    with LocalExecutor(plan.task, plan.structure, store, plan.config.evaluation) as executor:
        table = executor.latency_table(128, output / "latency")
    for trial in result.trials:
        limit = next(limit for limit in trial.limits if limit.resource == "latency_ms")
        kept = {name: count for name, count, _ in trial.counts}
        assert limit.predicted == table.latency_ms(kept)
        assert limit.predicted <= float(limit.asked[:-1]) / 100 * table.dense_ms


def test_a_job_that_goes_on_measures_no_table_and_prices_alike(done, tmp_path, monkeypatch):
    output, first = done
    copied = tmp_path / "o"
    shutil.copytree(output, copied)
    shutil.rmtree(copied / "trials")  # as if it had been stopped before the first search ended
    monkeypatch.setattr(latency_points, "visit", never)
    again = run({**JOB, "output": str(copied)})
    for one, two in zip(first.trials, again.trials, strict=True):
        assert one.counts == two.counts and one.weights == two.weights
        assert [x.predicted for x in one.limits] == [x.predicted for x in two.limits]


def test_another_table_is_another_search(done, tmp_path):
    """What was found with other prices isn't taken over."""
    output, _ = done
    copied = tmp_path / "o"
    shutil.copytree(output, copied)
    (path,) = (copied / "latency").iterdir()
    content = json.loads(path.read_text())
    for visits in content["visits"].values():  # all layers and passes twice as slow
        for visit in visits:
            visit[0], visit[1] = 2 * visit[0], [2 * time for time in visit[1]]
    path.write_text(json.dumps(content))
    before = (copied / "trials/L1Filter-latency_ms70/result.json").stat().st_mtime_ns
    run({**JOB, "output": str(copied)})
    assert (copied / "trials/L1Filter-latency_ms70/result.json").stat().st_mtime_ns > before


def test_validating_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(latency_points, "visit", never)
    job = {**JOB, "output": str(tmp_path / "o"), "budgets": [{"latency_ms": "0.01%"}]}
    plan = validate(job)
    assert str(plan.trials[0].budget) == "latency_ms 0.01%"
    assert not (tmp_path / "o").exists()


def test_unreachable_latency_ends_before_the_search(done, tmp_path):
    output, _ = done
    copied = tmp_path / "o"
    shutil.copytree(output, copied)
    job = {**JOB, "output": str(copied), "budgets": [{"latency_ms": 1e-6}]}
    with pytest.raises(BudgetError, match=r"latency_ms 1e-06 can't be reached.*keeps latency_ms"):
        run(job, changed=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [{"latency": "60%"}]}, "did you mean 'latency_ms'"),
        ({"budgets": [{"latency_ms": "fast"}]}, r"budgets\[0\].latency_ms must be a percentage"),
        ({"budgets": [{"latency_ms": -1}]}, r"budgets\[0\].latency_ms must be"),
        ({"latency": {"max_seconds": 0}}, "latency.max_seconds must be above 0"),
    ],
)
def test_mistakes_in_a_job(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_job({**JOB, **change})


def test_single_weights_save_no_time():
    job = {**JOB, "pruners": [{"type": "Level"}], "budgets": [{"latency_ms": "60%"}]}
    with pytest.raises(ConfigError, match="can't be latency_ms 60%"):
        validate(job)


def test_a_pruner_by_itself_measures_its_table():
    from raycompress.pruning import L1Filter
    from raycompress.testing import ToyTask

    task = ToyTask(width=16)
    model = task.build_model().eval()
    masks = L1Filter().prune(model, task, budget={"latency_ms": "99%", "macs": "50%"})
    assert set(masks) <= {name for name, _ in model.named_parameters()} and masks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_on_ray_use_the_table_of_the_job(tmp_path):
    job = {
        **JOB,
        "cluster": {"replicas": 2, "cpus": 0.5, "unit_timeout": 60.0},
        "output": str(tmp_path / "o"),
    }
    result = run(job)
    assert len(list((tmp_path / "o/latency").iterdir())) == 1
    for trial in result.trials:
        limit = next(limit for limit in trial.limits if limit.resource == "latency_ms")
        assert limit.predicted > 0 and limit.measured == trial.row("slim").at(128).median_ms
    again = run({**job, "cluster": {"executor": "local"}})  # the same table, the same prices
    for one, two in zip(result.trials, again.trials, strict=True):
        assert one.counts == two.counts and one.limits[0].predicted == two.limits[0].predicted
