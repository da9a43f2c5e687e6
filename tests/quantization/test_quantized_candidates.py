"""Quantized candidates: built, calibrated, trained, stored and judged by a model host."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from raycompress.candidate import Candidate, Ranking, Training, digest_of
from raycompress.dfe import Prices
from raycompress.ledger import Ledger, read_ledger
from raycompress.local import LocalExecutor
from raycompress.quantization import BNN, LSQ, QAT, DoReFa, NaiveQuantizer, Quantization
from raycompress.quantization.layers import quantized_layers
from raycompress.quantization.quantizer import Bits
from raycompress.reconstruction import Reconstruction
from raycompress.search import Probes, Race, answer
from raycompress.structure import analyze, slim
from raycompress.testing import ToyTask, toy_problem
from raycompress.units import Evaluation, HostInfo
from raycompress.weights import Weights, WeightStore, digest_of_state

BITS = Bits(weight=4, input=8)
CHOICES = dict.fromkeys(("conv1", "conv2", "conv3", "fc"), BITS)
FOUR = Quantization.of(QAT(fold_norms=False), CHOICES, 2)


@pytest.fixture
def toy(tmp_path):
    problem, executor = toy_problem(str(tmp_path / "weights"))
    orders = {"conv1": torch.arange(8), "conv3": torch.arange(16)}
    ranking = Ranking("channels", orders)
    executor.publish(ranking)
    return problem, executor, ranking


class AmpTask(ToyTask):
    """Trains under bfloat16 autocast."""

    def train(self, model, **options):
        with torch.autocast("cpu", torch.bfloat16):
            super().train(model, **options)


def test_digests_of_what_isnt_quantized_are_those_of_older_versions():
    candidate = Candidate(
        "0123456789abcdef",
        (("conv1", 4),),
        "fedcba9876543210",
        2,
        Training(0.5, 0.01, 3),
        shards=(0, 2),
    )
    assert digest_of(candidate.key()) == "2ef53a5d925976c1"
    assert digest_of_state(Weights({"a": torch.arange(3.0)}, {"g": (0, 2)})) == "653974fe14079c07"


def test_travels_as_plain_data():
    candidate = Candidate("w", quantize=FOUR)
    assert Candidate.from_key(json.loads(json.dumps(candidate.key()))) == candidate
    keys = {
        digest_of(replace(candidate, quantize=how).key())
        for how in (
            None,
            FOUR,
            replace(FOUR, batches=3),
            replace(FOUR, quantizer=QAT()),
            Quantization.of(FOUR.quantizer, {**CHOICES, "fc": Bits(weight=2)}, 2),
        )
    }
    assert len(keys) == 5
    assert not candidate.is_plain and Candidate("w").is_plain


def test_a_slim_quantized_candidate_scores_as_one_made_by_hand(toy):
    problem, executor, ranking = toy
    candidate = replace(problem.candidate({"conv3": 8}, ranking), quantize=FOUR)
    trial = executor.evaluate([candidate])[0]
    model = slim(problem.model, problem.structure, {"conv3": torch.arange(8, 16)})
    task = executor.host.task
    FOUR.prepare(model)
    data = task.dataset("calibration")
    FOUR.quantizer.calibrate(
        model.eval(), task.forward, task.batches(data, range(96), 256, torch.device("cpu"))
    )
    images, labels = task.dataset("validation").tensors
    with torch.no_grad():
        outputs = model(images)
    right = (outputs.argmax(dim=1) == labels).double().mean()
    assert trial.score == pytest.approx(float(right), abs=1e-9)
    loss = torch.nn.functional.cross_entropy(outputs, labels)
    assert trial.loss == pytest.approx(float(loss), rel=1e-5)
    assert trial.loss != executor.evaluate([replace(candidate, quantize=None)])[0].loss


def test_fewer_bits_are_further_from_float(toy):
    problem, executor, _ = toy
    hows = [
        Quantization.of(FOUR.quantizer, dict.fromkeys(CHOICES, Bits(weight=b)), 2)
        for b in (8, 4, 2)
    ]
    float_model = executor.host.build(Candidate(problem.weights))
    images = executor.host.task.dataset("validation").tensors[0]
    errors = []
    with torch.no_grad():
        for how in hows:
            model = executor.host.build(Candidate(problem.weights, quantize=how))
            errors.append(float((model(images) - float_model(images)).abs().mean()))
    assert errors == sorted(errors) and errors[0] > 0


def test_shards_probes_and_races_see_the_same_model(toy):
    problem, executor, _ = toy
    candidate = Candidate(problem.weights, quantize=FOUR)
    whole = executor.evaluate([candidate])[0]
    part = answer(Probes((replace(candidate, shards=(0, 2)),)), executor)[0]
    assert part.shards == whole.shards[:2] and part.probe
    raced = answer(Race((candidate, Candidate(problem.weights))), executor)
    assert raced[0].shards == whole.shards[: len(raced[0].shards)]


@pytest.mark.parametrize(
    "quantizer",
    [QAT(), LSQ(), DoReFa(weight_bits=3, activation_bits=4)],
    ids=lambda q: type(q).__name__,
)
def test_what_is_trained_is_stored_whole_and_judged_by_its_digest(toy, quantizer):
    problem, executor, ranking = toy
    how = Quantization.of(quantizer, quantizer.choose(problem.model), 2)
    asked = replace(
        problem.candidate({"conv1": 5}, ranking, recalibrate=1, training=Training(0.5, 0.01)),
        quantize=how,
        reconstruct=Reconstruction(problem.weights),
    )
    trial = executor.evaluate([asked])[0]
    assert trial.failure is None
    stored = problem.store.get(trial.trained())
    assert Quantization.from_key(stored.quantization) == how
    assert len(stored.kept["conv1"]) == 5
    assert digest_of_state(stored) == trial.weights  # also read back from JSON
    for again in (Candidate(trial.weights), Candidate(trial.weights, quantize=how)):
        assert executor.evaluate([again])[0].shards == trial.shards
    # Trained on, it isn't calibrated anew: without a step nothing changes.
    more = Candidate(trial.weights, quantize=how, training=Training(0.0))
    assert executor.evaluate([more])[0].weights == trial.weights


def test_a_calibrated_model_is_stored_untrained(toy):
    problem, executor, _ = toy
    candidate = Candidate(problem.weights, quantize=FOUR)
    stored = executor.evaluate([candidate.with_training(Training(0.0))])[0]
    assert stored.shards == executor.evaluate([candidate])[0].shards
    state = problem.store.get(stored.trained()).state
    before = problem.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert state["fc.input_quantizer.scale"] > 0


def test_another_process_rebuilds_it(toy):
    problem, executor, ranking = toy
    asked = replace(problem.candidate({"conv3": 9}, ranking, training=Training(0.3)), quantize=FOUR)
    trial = executor.evaluate([asked])[0]
    code = (
        "from raycompress.testing import toy_problem\n"
        "from raycompress.search import Candidate\n"
        f"_, executor = toy_problem({str(problem.store.folder)!r})\n"
        f"trial = executor.evaluate([Candidate({trial.trained()!r})])[0]\n"
        "print([[s.count, s.score.hex(), s.loss.hex()] for s in trial.shards])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = [[s.count, s.score.hex(), s.loss.hex()] for s in trial.shards]
    assert out.stdout.strip() == str(expected)


def test_a_replayed_search_trains_and_calibrates_nothing(toy, tmp_path):
    problem, _, _ = toy
    asked = [
        Candidate(problem.weights, quantize=FOUR),
        Candidate(problem.weights, quantize=FOUR, training=Training(0.3)),
    ]
    answers = []
    for _ in range(2):
        with Ledger(tmp_path / "ledger", "a") as ledger:
            executor = LocalExecutor(ToyTask(), problem.structure, problem.store, ledger=ledger)
            answers.append((executor.evaluate(asked), executor.dfe))
    (first, spent), (again, nothing) = answers
    assert spent > 0 == nothing
    assert all(trial.replayed for trial in again)
    assert [t.shards for t in first] == [t.shards for t in again]
    assert [t.weights for t in first] == [t.weights for t in again]
    records = read_ledger(tmp_path / "ledger")
    kinds = sorted(each["kind"] for each in records if "quantize" in each["candidate"])
    assert kinds == ["evaluation", "training"]


def test_an_evaluation_changes_no_buffer_and_models_travel(toy):
    problem, executor, _ = toy
    model = executor.host._model(Candidate(problem.weights, quantize=FOUR))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    executor.evaluate([Candidate(problem.weights, quantize=FOUR)])
    assert executor.host._model(Candidate(problem.weights, quantize=FOUR)) is model
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    images = executor.host.task.dataset("test").tensors[0]
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("quantizer", [QAT(weight_bits=4, input_bits=4), LSQ()])
def test_training_under_autocast(tmp_path, quantizer):
    task = AmpTask()
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(tmp_path)
    digest = store.put(Weights(model.state_dict(), {}))
    executor = LocalExecutor(task, structure, store)
    how = Quantization.of(quantizer, quantizer.choose(model), 2)
    before, trial = executor.evaluate(
        [
            Candidate(digest, quantize=how),
            Candidate(digest, quantize=how, training=Training(3.0, 0.01)),
        ]
    )
    assert trial.loss < before.loss
    layers = quantized_layers(executor.host.build(Candidate(trial.trained())))
    for name, layer in layers.items():
        weight = layer.quantized_weight()
        assert weight.dtype == torch.float32
        if name == "conv2":  # four bits, whatever computed with them
            assert max(len(channel.unique()) for channel in weight) <= 16


def test_training_that_a_quantizer_asks_for(toy):
    problem, executor, _ = toy

    def failure(quantizer, choices, training=None):
        how = Quantization.of(quantizer, choices, 2)
        asked = Candidate(problem.weights, quantize=how, training=training)
        return executor.evaluate([asked])[0].failure

    one = {"conv2": Bits(weight=1, input=1)}
    assert "BNN has to be trained: epochs must be above 0" in failure(BNN(), one)
    assert "BNN has to be trained" in failure(BNN(), one, Training(0.0))
    weight = {"conv2": Bits(weight=8)}
    assert "NaiveQuantizer isn't trained" in failure(NaiveQuantizer(), weight, Training(0.5))
    late = {"conv2": Bits(weight=8, input=8, start_step=4)}
    assert "start_step 4 of 'conv2' is beyond" in failure(QAT(), late)
    assert "which has 3 steps" in failure(QAT(), late, Training(1.0))
    assert failure(QAT(), late, Training(2.0)) is None


def test_quantized_weights_stay_as_they_are(toy):
    problem, executor, ranking = toy
    stored = executor.evaluate([Candidate(problem.weights, quantize=FOUR, training=Training(0.0))])[
        0
    ].trained()
    other = replace(FOUR, batches=1)
    for asked, said in (
        (Candidate(stored, quantize=other), "can't be quantized in another way now"),
        (problem.candidate({"conv3": 8}, ranking, weights=stored), "can't be pruned now"),
        (Candidate(stored, recalibrate=1), "can't be recalibrated now"),
        (Candidate(stored, reconstruct=Reconstruction(problem.weights)), "reconstructed now"),
    ):
        assert said in executor.evaluate([asked])[0].failure
    asked = replace(problem.candidate({"conv3": 8}, ranking), reconstruct=Reconstruction(stored))
    assert "are quantized: float ones are needed" in executor.evaluate([asked])[0].failure


def test_single_weights_that_are_masked_stay_0_in_integers(toy):
    problem, executor, _ = toy
    ranking = Ranking("weights", {"conv2.weight": torch.arange(8 * 8 * 9)})
    executor.publish(ranking)
    asked = replace(
        problem.candidate({"conv2.weight": 100}, ranking, training=Training(0.5, 0.05)),
        quantize=FOUR,
    )
    trial = executor.evaluate([asked])[0]
    model = executor.host.build(Candidate(trial.trained()))
    weight = quantized_layers(model)["conv2"].quantized_weight().flatten()
    assert not weight[: 8 * 8 * 9 - 100].any() and weight.any()


def test_calibration_costs_its_passes(toy):
    problem, _, _ = toy
    sizes = {"train": 1000, "calibration": 100, "validation": 200, "test": 400}
    info = HostInfo("t", "d", sizes, 10, "cpu", False)
    prices = Prices(problem.structure, Evaluation(batch_size=32, num_shards=4), info)
    half = problem.structure.cost({"conv3": 8}).macs / problem.structure.cost().macs
    asked = Candidate("w", quantize=FOUR)  # two batches: 64 of 200 examples
    assert prices.evaluation_of(asked, {}) == pytest.approx(1.32)
    assert prices.evaluation_of(asked, {"conv3": 8}) == pytest.approx(1.32 * half)
    assert prices.evaluation_of(replace(asked, shards=(2, 4)), {}) == pytest.approx(0.5)
    naive = Quantization.of(NaiveQuantizer(), {"fc": Bits(weight=8)})
    assert prices.evaluation_of(Candidate("w", quantize=naive), {}) == 1.0
    trained = asked.with_training(Training(0.5))
    assert prices.training_of(trained, {}) == pytest.approx(7.5 + 0.32)
