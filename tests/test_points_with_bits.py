"""Candidates with bits as points of a job's table, and as models made of them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import raycompress
from raycompress.candidate import Candidate
from raycompress.cli import app
from raycompress.driver import run, validate
from raycompress.errors import ConfigError
from raycompress.measured import final_model
from raycompress.pareto import Point, marked
from raycompress.points import read_table, write_table
from raycompress.pruning.bit_costs import BitCosts
from raycompress.quantization import Quantization
from raycompress.quantized import quantized_model
from raycompress.results import JobResult
from raycompress.testing import ToyTask
from raycompress.tracking.figures import pareto_figure
from raycompress.weights import WeightStore

JOB = {
    "name": "toy",
    "task": "raycompress.testing:ToyTask",
    "model": {"pretrain": {"epochs": 3.0}},
    "pruners": [
        {"type": "MixedPrecision", "size": "16%", "pruner": "L1Filter", "widths": [0.6, 0.5]}
    ],
    "quantize": {"type": "QAT", "training": {"epochs": 1.0}, "lower": "packed"},
    "latency": {"batch_sizes": [1], "repeats": 1},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    output = tmp_path_factory.mktemp("job")
    return output, run({**JOB, "output": str(output)})


def points_of(output):
    return read_table(output / "results" / "pareto.parquet")[0]


def test_what_has_bits_competes_by_bytes_alone():
    cheap = {"loss": 0.0, "macs": 10, "params": 10}
    points = marked(
        [
            Point(id="dense", stage="dense", score=0.9, size_bytes=400, **cheap),
            Point(id="eight", score=0.95, size_bytes=100, bits="W8 A8", **cheap),
            Point(id="four", score=0.7, size_bytes=50, bits="W4 A8", **cheap),
            Point(id="worse", score=0.6, size_bytes=50, bits="W4 A4", **cheap),
            Point(id="old", score=0.99, loss=0.0, macs=99, params=9),  # bytes aren't known
        ]
    )
    assert [p.fronts for p in points] == [
        ("macs",),
        ("size_bytes",),
        ("size_bytes",),
        (),
        ("macs", "params"),
    ]


def test_bytes_are_those_of_the_file(job):
    output, result = job
    plan, points = validate({**JOB, "output": str(output)}), points_of(output)
    (dense,) = (p for p in points if p.stage == "dense")
    assert dense.bits == "" and "macs" in dense.fronts
    assert dense.size_bytes == sum(t.nbytes for t in plan.model.state_dict().values())
    (trial,) = result.trials
    slim, quantized = (p for p in points if p.stage == "final")
    small = final_model(plan, WeightStore(output / "weights").get(trial.weights))
    assert slim.bits == ""
    # A norm's channels that went took their running means along; buffers count as the dense one's.
    gone = sum(b.nbytes for b in plan.model.buffers()) - sum(b.nbytes for b in small.buffers())
    assert slim.size_bytes == sum(t.nbytes for t in small.state_dict().values()) + gone
    stored = sum(tensor.nbytes for tensor in load_file(trial.quantized.file).values())
    assert stored == pytest.approx(quantized.size_bytes - gone, rel=0.03)
    assert quantized.bits == trial.quantized.bits and quantized.trained and not slim.trained
    assert quantized.score == trial.row("quantized").score_validation


def test_probes_are_points_of_one_layer_with_bits(job):
    output, _ = job
    probes = [
        (p, how)
        for p in points_of(output)
        if (how := Candidate.from_key(json.loads(p.candidate)).quantize) and len(how.choices) == 1
    ]
    plan = validate({**JOB, "output": str(output)})
    costs = BitCosts.of(plan.model, plan.structure)
    assert len(probes) == 4 * 3 and not any(p.complete or p.fronts for p, _ in probes)
    for point, how in probes:
        ((name, bits),) = how.choices
        layer = costs.layers[name]
        saved = 4 * layer.weights - -(-layer.weights * bits.weight // 8)
        assert point.size_bytes == costs.float_size - saved + 9 * layer.channels + 24


def test_the_report_and_the_figure_show_the_front_by_bytes(job):
    output, result = job
    points = points_of(output)
    on = [p for p in result.front if "size_bytes" in (*p.fronts, *p.search_fronts)]
    bits = [p for p in on if p.bits]
    assert bits and all(p.size_bytes <= 0.16 * on[0].size_bytes for p in bits if p.step is not None)
    assert not any("macs" in p.fronts or "params" in p.fronts for p in points if p.bits)
    text = (output / "results" / "report.md").read_text()
    front = text.split("## Front by bytes")[1].split("##")[0]
    assert all(f"`{p.id}`" in front and f"| {p.bits} |" in front for p in bits)
    assert "--quantize: quantized as well" in front
    assert not any(p.id in text.split("## Front by bytes")[0] for p in bits)
    macs, params, size = pareto_figure(result, points).axes
    assert size.get_xlabel() == "bytes, % of the dense model"
    front = {line.get_label(): line for line in size.lines}["front"]
    dense = next(p for p in points if p.stage == "dense").size_bytes
    drawn = sorted(100 * p.size_bytes / dense for p in points if "size_bytes" in p.fronts)
    assert list(front.get_xdata()) == pytest.approx(drawn)

    def num(axes):
        return sum(len(line.get_xdata()) for line in axes.lines)

    assert num(size) > num(macs) == num(params)
    assert JobResult.from_json(result.to_json()) == result


def test_a_table_without_bytes_is_read(tmp_path):
    import pyarrow.parquet

    point = Point(id="a", macs=3, params=3, score=0.5, loss=0.1, candidate='{"kept": []}')
    write_table(marked([point]), tmp_path / "p.parquet", {})
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    new = ["size_bytes", "bits", "on_front_size", "on_search_front_size"]
    pyarrow.parquet.write_table(table.drop_columns(new), tmp_path / "old.parquet")
    assert read_table(tmp_path / "old.parquet") == (marked([point]), {})


def test_a_point_with_bits_is_made_with_them(job):
    output, _ = job
    point = next(p for p in points_of(output) if p.bits and p.complete and p.step is not None)
    asked = Candidate.from_key(json.loads(point.candidate))
    done = raycompress.materialize(output, point.id)
    assert [row.name for row in done.rows] == ["dense", "masked", "slim", "quantized", "lowered"]
    assert (done.quantized.quantizer, done.quantized.backend) == ("QAT", "packed")
    assert done.quantized.bits == point.bits and done.quantized.difference == 0.0
    store, plan = WeightStore(output / "weights"), validate({**JOB, "output": str(output)})
    stored = store.get(done.quantized.weights)
    how = Quantization.from_key(stored.quantization)
    found = {name: (bits.weight, bits.input) for name, bits in how.choices}
    assert found == {name: (b.weight, b.input) for name, b in asked.quantize.choices}
    # What is stored, rebuilt by hand, has the score that is told.
    kept = {name: list(indices) for name, indices in stored.kept.items()}
    float_model = raycompress.slim(plan.model, plan.structure, kept)
    model = quantized_model(float_model, how, stored.state)
    images, labels = ToyTask().dataset("test").tensors
    hits = (model(images).argmax(1) == labels).float().mean()
    assert float(hits) == pytest.approx(done.rows[-1].score_test)
    assert done.rows[-1].file_bytes == Path(done.quantized.file).stat().st_size
    assert Path(done.quantized.file).is_relative_to(done.folder)
    told = json.loads((Path(done.folder) / "summary.json").read_text())
    assert told["quantized"]["bits"] == point.bits


def test_the_final_point_is_the_jobs_own_model(job):
    output, result = job
    (trial,) = result.trials
    slim, quantized = (p for p in points_of(output) if p.stage == "final")
    done = raycompress.materialize(output, quantized.id)
    assert done.quantized.weights == trial.quantized.weights
    assert done.rows[-2].score_validation == quantized.score
    assert Path(done.quantized.file).read_bytes() == Path(trial.quantized.file).read_bytes()
    # A point in float stays in float, unless it is asked for: then it has the job's own bits.
    assert raycompress.materialize(output, slim.id).quantized is None
    called = CliRunner().invoke(
        app, ["materialize", str(output), "--point", slim.id, "--quantize", "--quiet"]
    )
    assert called.exit_code == 0, called.output
    assert "quantized: QAT W8 A8, on packed, in simulation: " in called.stdout


def test_bits_without_a_quantizer_are_refused(job):
    output, _ = job
    point = next(p for p in points_of(output) if p.bits and p.complete)
    changed = ["quantize=null", "pruners=[{type: L1Filter, sparsity: 0.5}]"]
    with pytest.raises(
        ConfigError, match=rf"{point.id} has bits \({point.bits}\): the job doesn't"
    ):
        raycompress.materialize(output, point.id, overrides=changed)
    with pytest.raises(ConfigError, match="--quantize: the job doesn't say how; give quantize"):
        raycompress.materialize(output, point.id, quantize=True, overrides=changed)
