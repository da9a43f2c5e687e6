"""Jobs that quantize, in this process, over the toy task, on a backend that is made up here."""

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import raycompress.quantized
from raycompress.driver import run, validate
from raycompress.errors import ConfigError, InterruptedJob, VerificationError
from raycompress.ledger import read_ledger
from raycompress.measured import final_model
from raycompress.quantization.layers import quantized_layers
from raycompress.quantization.lowering import BACKENDS, Lowered
from raycompress.quantized import quantized_model
from raycompress.results import JobResult
from raycompress.testing import ToyTask
from raycompress.tracking.report import report_markdown
from raycompress.weights import WeightStore

JOB = {
    "name": "toy",
    "task": "raycompress.testing:ToyTask",
    "model": {"pretrain": {"epochs": 4.0}},
    "pruners": [{"type": "L1Filter"}],
    "budgets": [{"macs": "50%"}],
    "recover": {"epochs": 1.0},
    "quantize": {"type": "QAT", "training": {"epochs": 1.0}, "lower": "made_up", "dense": True},
    "latency": {"batch_sizes": [1, 8], "repeats": 3},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


class Noisy(nn.Module):
    """Computes something else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 1.3 * self.model(x)


class Backend(types.ModuleType):
    """Files hold the weights; what runs is the simulation itself."""

    def __init__(self):
        super().__init__("made_up_backend")
        self.calls, self.fed, self.wrong, self.missing = 0, 0, False, 0
        self.untimed: tuple[str, ...] = ()

    def check(self):
        pass

    def lower(self, model, float_model, example_inputs, folder, feed, how):
        self.calls += 1
        if folder.name in self.untimed:  # numbered where models are timed
            raise VerificationError("no such kernel there")
        counted = []
        handle = model.register_forward_hook(lambda *_: counted.append(1))
        feed(model)
        handle.remove()
        self.fed = len(counted)
        names = tuple(quantized_layers(model))
        path, reference = folder / "quantized.bin", folder / "float.bin"
        save_file({n: p.detach().half() for n, p in float_model.named_parameters()}, path)
        save_file({n: p.detach() for n, p in float_model.named_parameters()}, reference)
        return Lowered(
            backend="made_up",
            model=Noisy(model) if self.wrong else model,
            reference=float_model,
            path=path,
            file_bytes=path.stat().st_size,
            reference_bytes=reference.stat().st_size,
            layers_asked=names,
            layers_integer=names[self.missing :],
        )


@pytest.fixture
def backend(monkeypatch):
    return add_backend(monkeypatch)


def add_backend(monkeypatch):
    made = Backend()
    monkeypatch.setitem(BACKENDS, "made_up", "made_up_backend")
    monkeypatch.setitem(sys.modules, "made_up_backend", made)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        made = add_backend(patched)
        return output, run({**JOB, "output": str(output)}), made


def changed(output, **section):
    return {**JOB, "output": str(output), "quantize": {**JOB["quantize"], **section}}


@pytest.mark.parametrize("bits", [8, 3])
def test_packed_models_are_small_and_say_that_they_run_in_simulation(tmp_path, bits):
    entries = [{"op_types": ["Conv2d", "Linear"], "quant_types": ["weight"], "quant_bits": bits}]
    result = run(changed(tmp_path, lower="packed", config_list=entries))
    for trial in result.trials:
        found, lowered = trial.quantized, trial.row("lowered")
        assert (found.backend, found.runs, found.layers_integer) == ("packed", "simulation", 0)
        assert found.agreement == 1.0 and found.difference == 0.0
        assert lowered.score_test == trial.row("quantized").score_test
        assert found.file_bytes == Path(found.file).stat().st_size
        assert lowered.latency == ()  # nothing of its own to be timed
        codes = load_file(found.file)
        weights = {k: v for k, v in codes.items() if k.endswith(".weight.codes")}
        assert len(weights) == found.num_layers and {v.dtype for v in weights.values()} == {
            torch.uint8
        }
    report = report_markdown(result)
    assert "simulation" in report


def trainings(output):
    return [r for r in read_ledger(output / "ledger") if r["kind"] == "training"]


def test_a_pruned_and_the_dense_model_are_quantized_and_lowered(backend, whole):
    tmp_path, result, backend = whole
    pruned, dense = result.trials
    assert [row.name for row in pruned.rows] == ["dense", "masked", "slim", "quantized", "lowered"]
    assert [row.name for row in dense.rows] == ["dense", "quantized", "lowered"]
    assert (pruned.pruner, dense.pruner, dense.name) == ("L1Filter", "", "dense")
    plan, store = validate(JOB), WeightStore(tmp_path / "weights")
    images, labels = ToyTask().dataset("test").tensors
    for trial in result.trials:
        quantized, lowered = trial.row("quantized"), trial.row("lowered")
        before = trial.rows[-3]
        assert quantized.macs == lowered.macs == before.macs
        assert quantized.latency == () and [e.batch_size for e in lowered.latency] == [1, 8]
        found = trial.quantized
        assert (found.quantizer, found.bits, found.backend) == ("QAT", "W8 A8", "made_up")
        assert found.layers_integer == found.layers_asked == found.num_layers > 2
        assert found.agreement == 1.0 and found.difference == 0.0  # it runs the simulation
        assert lowered.score_test == quantized.score_test > 0.6
        assert lowered.score_validation == quantized.score_validation
        assert lowered.file_bytes == found.file_bytes == Path(found.file).stat().st_size
        assert 0.4 < found.file_bytes / found.float_bytes < 0.8
        assert [e.batch_size for e in found.float_latency] == [1, 8]
        # The score is that of the stored weights, rebuilt by hand.
        stored = store.get(found.weights)
        small = final_model(plan, store.get(trial.weights))
        model = quantized_model(small, plan.quantize.how, stored.state)
        hits = (model(images).argmax(1) == labels).float().mean()
        assert float(hits) == pytest.approx(quantized.score_test)
        assert sum(p.numel() for p in small.parameters()) == before.params
    assert pruned.row("quantized").macs < dense.row("quantized").macs
    assert backend.fed == min(8, 96 // 256 + 1)
    assert JobResult.from_json((tmp_path / "results/summary.json").read_text()) == result
    text = report_markdown(result)
    assert "## On made_up" in text
    lines = [line for line in text.splitlines() if line.startswith("| dense: QAT")]
    layers = dense.quantized.num_layers
    assert len(lines) == 1 and f"| W8 A8 | {layers} of {layers} |" in lines[0]
    assert "dense: float | - | - |" in text and text.index("dense: QAT |") < text.index("50: QAT |")


def test_a_job_without_pruners_quantizes_the_dense_model(backend, tmp_path):
    job = {k: v for k, v in JOB.items() if k not in ("pruners", "budgets", "recover")}
    section = {"type": "QAT", "lower": "none", "batches": 2}  # calibrated alone
    result = run({**job, "quantize": section, "output": str(tmp_path)})
    (trial,) = result.trials
    assert [row.name for row in trial.rows] == ["dense", "quantized"]
    assert trial.row("quantized").score_test == pytest.approx(result.dense.score_test, abs=0.05)
    assert result.best == "dense" and backend.calls == 0
    assert "run in simulation" in report_markdown(result)
    kinds = [r["candidate"].get("quantize") for r in trainings(tmp_path)]
    assert len(kinds) == 2 and kinds[1]["batches"] == 2


@pytest.mark.parametrize("place", ["quantize_candidate", "lower_model", "look", "time_quantized"])
def test_a_stopped_job_continues_between_any_two_stages(
    backend, whole, tmp_path, monkeypatch, place
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(raycompress.quantized, place, stop)
        with pytest.raises(InterruptedJob):
            run({**JOB, "output": str(tmp_path / "stopped")})
    before = len(trainings(tmp_path / "stopped"))
    result = run({**JOB, "output": str(tmp_path / "stopped")})
    after = trainings(tmp_path / "stopped")
    assert (
        before == {"quantize_candidate": 2, "lower_model": 3, "look": 3, "time_quantized": 4}[place]
    )
    assert len(after) == len(trainings(whole[0])) == 4  # nothing was trained twice
    for one, two in zip(result.trials, whole[1].trials, strict=True):
        assert one.quantized.weights == two.quantized.weights
        assert one.row("lowered").score_test == two.row("lowered").score_test


@pytest.mark.parametrize("untimed", [("0",), ("1",), ("0", "1")])
def test_models_that_cant_be_timed_are_published_without_latency(backend, tmp_path, untimed):
    backend.untimed = untimed
    result = run({**JOB, "output": str(tmp_path)})
    timed = [trial.row("lowered").latency for trial in result.trials]
    assert [not latency for latency in timed] == [str(i) in untimed for i in range(2)]
    for trial, latency in zip(result.trials, timed, strict=True):
        assert len(latency) == len(trial.quantized.float_latency) and trial.failure is None
    lines = [line for line in report_markdown(result).splitlines() if ": QAT |" in line]
    assert len(lines) == 2 and len({line.count("|") for line in lines}) == 1


def test_another_model_on_the_backend_is_not_published(backend, tmp_path):
    backend.wrong = True
    with pytest.raises(VerificationError, match=r"relative difference 0\.3, at most 0\.1"):
        run({**JOB, "output": str(tmp_path)})


def test_what_cannot_run_in_integers_is_refused_before_anything_is_trained(backend, tmp_path):
    backend.missing = 1
    with pytest.raises(ConfigError) as caught:
        run({**JOB, "output": str(tmp_path)})
    text = str(caught.value)
    assert text.startswith("quantize.lower: made_up can't run this model quantized: made_up: ")
    assert "layers run in integers; in float are conv1" in text
    assert trainings(tmp_path) == []


def test_zeros_stay_zero_in_a_quantized_masked_model(backend, tmp_path):
    job = {**changed(tmp_path, dense=False), "budgets": []}
    result = run({**job, "pruners": [{"type": "Level", "sparsity": 0.5}]})
    (trial,) = result.trials
    assert [row.name for row in trial.rows] == ["dense", "masked", "quantized", "lowered"]
    masks = load_file(trial.masks)
    state = WeightStore(tmp_path / "weights").get(trial.quantized.weights).state
    name = next(name for name in masks if "conv" in name)
    assert not state[name][~masks[name].bool()].any() and state[name].any()


def test_a_quantizer_that_fails_fails_its_trials(backend, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such range")

    monkeypatch.setattr("raycompress.quantization.qat.QAT.calibrate", fail)
    with pytest.raises(Exception, match=r"quantizing L1Filter-macs50 failed: .*no such range"):
        run(changed(tmp_path, lower="none", dense=False))


def test_the_same_job_with_quantization_added_goes_on(backend, tmp_path):
    first = run({**JOB, "output": str(tmp_path), "quantize": None})
    again = run({**JOB, "output": str(tmp_path)})
    assert again.trials[0].weights == first.trials[0].weights
    assert len(trainings(tmp_path)) == 4
    assert again.trials[0].rows[1].score_test == first.trials[0].rows[1].score_test
