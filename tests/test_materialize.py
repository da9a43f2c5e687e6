"""Points of a finished job's table as models, against what the search saw of them."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import raycompress
from raycompress.cli import app
from raycompress.driver import run
from raycompress.errors import ConfigError, RaycompressError, TaskError
from raycompress.ledger import read_ledger
from raycompress.points import read_table, write_table
from raycompress.testing import ToyTask

JOB = {
    "name": "toy",
    "task": "raycompress.testing:ToyTask",
    "model": {"pretrain": {"epochs": 3.0}},
    "pruners": [
        {"type": "SimulatedAnnealing", "iterations": 4, "recalibrate": 1},
        {"type": "NetAdapt", "iterations": 2, "epochs": 0.5},
        {"type": "Level", "sparsity": 0.5},
    ],
    "recover": {"epochs": 1.0},
    "latency": {"batch_sizes": [1], "repeats": 3},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    searches = {**JOB, "pruners": JOB["pruners"][:2], "budgets": [{"params": "50%"}]}
    run({**searches, "output": str(folder / "slim")})
    run({**JOB, "pruners": JOB["pruners"][2:], "output": str(folder / "masked")})
    return folder


def points_of(output):
    return read_table(output / "results" / "pareto.parquet")[0]


def pick(points, **wanted):
    return next(p for p in points if all(getattr(p, k) == v for k, v in wanted.items()))


@pytest.mark.parametrize(
    "wanted",
    [
        {"trial": "SimulatedAnnealing-params50", "stage": "search", "reconstructed": True},
        {"trial": "NetAdapt-params50", "stage": "search", "trained": True},
        {"trial": "NetAdapt-params50", "stage": "final"},
        {"stage": "dense"},
    ],
)
def test_a_point_is_the_model_that_was_judged(output, wanted):
    point = pick(points_of(output / "slim"), **wanted)
    before = [r for r in read_ledger(output / "slim/ledger") if r["kind"] == "evaluation"]
    done = raycompress.materialize(output / "slim", point.id[:8])
    row = done.rows[-1]
    # It was judged on these examples, in this process: the same to the bit.
    assert row.score_validation == point.score
    assert (row.macs, row.params) == (point.macs, point.params)
    if point.stage != "dense":
        assert row.name == "slim" and done.verification.kind == "exact"
    images, labels = ToyTask().dataset("validation").tensors
    recipe, program = done.models
    onto_class = raycompress.load(recipe, ToyTask().build_model()).eval()
    for model in (onto_class, raycompress.load(program)):
        hits = (model(images).argmax(1) == labels).float().mean()
        assert float(hits) == pytest.approx(point.score)
    assert sum(p.numel() for p in onto_class.parameters()) == point.params
    # Nothing was searched: all that is new in the ledger is this model and its masked twin.
    after = [r for r in read_ledger(output / "slim/ledger") if r["kind"] == "evaluation"]
    assert len(after) - len(before) <= 4


def test_masked_points_keep_their_shape(output):
    point = pick(points_of(output / "masked"), stage="search")
    done = raycompress.materialize(output / "masked", point.id)
    assert [row.name for row in done.rows] == ["dense", "masked"] and done.verification is None
    row = done.rows[-1]
    assert row.score_validation == point.score and row.nonzero_params == point.params < row.params


def test_recovered_it_is_what_the_job_would_have_made(output):
    points = points_of(output / "slim")
    final = pick(points, trial="SimulatedAnnealing-params50", stage="final")
    kept = json.loads(final.candidate)["kept"]
    found = [p for p in points if p.trial == final.trial and p.stage == "search"]
    (winner,) = [p for p in found if json.loads(p.candidate)["kept"] == kept]
    done = raycompress.materialize(
        output / "slim", winner.id, trial="SimulatedAnnealing-params50", recover=True
    )
    assert done.recovered and done.folder.endswith(f"{winner.id}/recovered")
    assert done.rows[-1].score_validation == final.score
    other = next(p for p in found if p.id != winner.id)
    longer = raycompress.materialize(
        output / "slim", other.id, recover=True, overrides=["recover.epochs=2"]
    )
    trained = [r for r in read_ledger(output / "slim/ledger") if r["kind"] == "training"]
    assert any(r["candidate"]["training"]["epochs"] == 2.0 for r in trained)
    assert longer.rows[-1].score_validation != other.score


def test_the_command_prints_a_table_and_says_what_is_wrong(output, tmp_path):
    point = pick(points_of(output / "slim"), stage="final", trial="NetAdapt-params50")

    def call(*arguments):
        return CliRunner().invoke(app, ["materialize", *map(str, arguments)])

    done = call(output / "slim", "--point", point.id, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["point"]["id"] == point.id and told["verification"]["kind"] == "exact"
    assert "slim against masked: exact" in done.stderr and "model.pt2" in done.stderr

    wrong = point.id[:-1] + ("0" if point.id[-1] != "0" else "1")
    done = call(output / "slim", "--point", wrong)
    assert done.exit_code == 2 and f"did you mean '{point.id}'" in done.stderr
    done = call(output / "slim", "--point", "nothing")
    assert done.exit_code == 2 and "on the front are" in done.stderr
    done = call(output / "slim", "--point", "")
    assert done.exit_code == 2
    done = call(output / "slim", "--point", point.id, "--trial", "NetAdapt-params5")
    assert done.exit_code == 2 and "did you mean 'NetAdapt-params50'" in done.stderr
    done = call(output / "slim", "--point", point.id, "--trial", "SimulatedAnnealing-params50")
    assert done.exit_code == 2 and "of trial SimulatedAnnealing-params50" in done.stderr
    done = call(tmp_path, "--point", point.id)
    assert done.exit_code == 2 and "holds no finished job" in done.stderr
    (tmp_path / "job.yaml").write_text((output / "slim" / "job.yaml").read_text())
    done = call(tmp_path, "--point", point.id)  # a job that was started, and no more
    assert done.exit_code == 2 and "summary.json" in done.stderr
    done = call(output / "slim", "--point", point.id, "--recover", "--set", "recover=null")
    assert done.exit_code == 2 and "recover.epochs" in done.stderr


def test_what_the_points_speak_of_must_still_be_there(output, tmp_path):
    point = pick(points_of(output / "slim"), stage="search", trained=False)
    with pytest.raises(TaskError, match="its class, what it is made of, or its arguments changed"):
        raycompress.materialize(output / "slim", point.id, overrides=["task_args.num=95"])
    path = output / "slim" / "results" / "pareto.parquet"
    points, origin = read_table(path)
    try:
        write_table(points, path, {**origin, "data": "other"})
        with pytest.raises(TaskError, match="its data changed"):
            raycompress.materialize(output / "slim", point.id)
        twins = [replace(point, id="aaaa1"), replace(point, id="aaaa2")]
        write_table(twins, path, origin)
        with pytest.raises(ConfigError, match="'aaaa' may be aaaa1 or aaaa2"):
            raycompress.materialize(output / "slim", "aaaa")
    finally:
        write_table(points, path, origin)
    ranking = json.loads(point.candidate)["ranking"]
    file = output / "slim" / "rankings" / f"{ranking}.safetensors"
    content = file.read_bytes()
    file.unlink()
    try:
        with pytest.raises(RaycompressError, match=f"ranking {ranking} is not in"):
            raycompress.materialize(output / "slim", point.id)
    finally:
        file.write_bytes(content)


def test_points_of_a_trial_that_failed_can_be_had_as_well(tmp_path, monkeypatch):
    from raycompress.pruning import SimulatedAnnealing

    plain = SimulatedAnnealing.search

    def breaks(self, problem):
        search = plain(self, problem)
        trials = yield next(search)  # the dense model
        yield search.send(trials)  # the first proposals
        raise RuntimeError("it broke")

    job = {**JOB, "pruners": [{"type": "L1Filter"}, JOB["pruners"][0]]}
    monkeypatch.setattr(SimulatedAnnealing, "search", breaks)
    result = run({**job, "budgets": [{"params": "50%"}], "output": str(tmp_path)})
    assert result.trial("SimulatedAnnealing-params50").failure == "RuntimeError: it broke"
    point = pick(points_of(tmp_path), trial="SimulatedAnnealing-params50")
    done = raycompress.materialize(tmp_path, point.id)
    assert done.rows[-1].score_validation == point.score
    assert torch.isfinite(torch.tensor(done.rows[-1].score_test))


@pytest.mark.slow
def test_on_ray_it_is_the_same_model(output):
    point = pick(points_of(output / "slim"), stage="search", reconstructed=True)
    here = raycompress.materialize(output / "slim", point.id)
    (output / "slim/ledger/materialize.jsonl").unlink()  # so that replicas build it, too
    there = raycompress.materialize(
        output / "slim",
        point.id,
        overrides=["cluster.executor=ray", "cluster.replicas=1", "cluster.cpus=0.5"],
    )
    assert [r.score_test for r in there.rows] == [r.score_test for r in here.rows]
    assert there.rows[-1].score_validation == point.score
    workers = {r["worker"] for r in read_ledger(output / "slim/ledger") if "replica" in r["worker"]}
    assert workers == {"replica-0"}
