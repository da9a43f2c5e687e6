"""Bits for each layer: the program against brute force, what it costs, probes, race and limits."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from raycompress.candidate import Candidate, Training
from raycompress.driver import run
from raycompress.errors import BudgetError, ConfigError, InputError
from raycompress.ledger import Ledger, read_ledger
from raycompress.loading import parse_job
from raycompress.local import LocalExecutor
from raycompress.plan import prepare
from raycompress.pruning import CurveSolver, MixedPrecision
from raycompress.pruning.bit_allocation import allocate
from raycompress.pruning.bit_costs import BitCosts, LayerSize
from raycompress.quantization import PTQ, QAT, NaiveQuantizer, Quantization
from raycompress.quantization.lowering.packed import save_packed
from raycompress.quantization.quantizer import Bits
from raycompress.quantize_plan import check_found_bits
from raycompress.search import Probes, Race, answer, run_search
from raycompress.structure import analyze
from raycompress.testing import PrunerContract, ToyTask, toy_problem
from raycompress.weights import WeightStore

PERCENT = "20%"


class TestWeights(PrunerContract):
    pruner = MixedPrecision(size=PERCENT)


class TestWeightsAndInputs(PrunerContract):
    pruner = MixedPrecision(input_bits=(8, 4), bit_ops="3%", size="30%", share=1.0, neighbours=1)


class TestPruned(PrunerContract):
    pruner = MixedPrecision(size=PERCENT, pruner="L1Filter")
    budget: ClassVar = {"macs": "50%"}


class TestWidths(PrunerContract):
    pruner = MixedPrecision(size="12%", pruner="L1Filter", widths=(1.0, 0.6, 0.3))


def costs_of(sizes: list[tuple[int, int, int]]) -> BitCosts:
    layers = {f"l{i}": LayerSize(*each) for i, each in enumerate(sizes)}
    return BitCosts(layers, 100, 50, 10_000, 10_000_000)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(1, 4), inputs=st.integers(0, 2))
def test_the_program_is_brute_force(seed, num, inputs):
    rng = np.random.default_rng(seed)
    costs = costs_of([tuple(int(v) for v in rng.integers(1, 500, 3)) for _ in range(num)])
    choices = list(itertools.product((2, 4, 8), [(None,), (8,), (4, 8)][inputs]))
    losses = {}
    for name in costs.layers:
        drawn = rng.integers(0, 30, len(choices)) / 7
        losses[name] = np.maximum.accumulate(drawn[::-1])[::-1].copy()
    everything = [
        dict(zip(costs.layers, each, strict=True))
        for each in itertools.product(choices, repeat=num)
    ]
    limits = {}
    for key in ("size", "bit_ops"):
        values = sorted(costs.value(key, each) for each in everything)
        limits[key] = values[int(rng.integers(len(values)))] + 0.5

    def loss(each):
        return sum(losses[name][choices.index(choice)] for name, choice in each.items())

    within = [each for each in everything if costs.within(each, limits)]
    if not within:
        with pytest.raises(BudgetError):
            allocate(costs, choices, losses, limits)
        return
    found = allocate(costs, choices, losses, limits)
    assert costs.within(found, limits)
    assert loss(found) == pytest.approx(min(map(loss, within)), abs=1e-6)
    # Nothing is left that takes no more than what one layer could have without a loss.
    for name, choice in found.items():
        for more in choices[choices.index(choice) + 1 :]:
            raised = {**found, name: more}
            level = losses[name]
            if level[choices.index(more)] <= level[choices.index(choice)]:
                assert not costs.within(raised, limits)


def test_costs_by_hand(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    costs = BitCosts.of(problem.model, problem.structure)
    assert costs.layers == {
        "conv1": LayerSize(2 * 8 * 9, 8, 2 * 8 * 9 * 36),
        "conv2": LayerSize(8 * 8 * 9, 8, 8 * 8 * 9 * 36),
        "conv3": LayerSize(8 * 16 * 9, 16, 8 * 16 * 9 * 9),
        "fc": LayerSize(16 * 3, 3, 16 * 3),
    }
    biases, norms = 8 + 8 + 16 + 3, 2 * (8 + 8 + 16)
    buffers = 4 * 2 * (8 + 8 + 16) + 3 * 8  # means, variances, and three counters
    assert costs.other_bytes == 4 * (biases + norms) + buffers
    assert costs.float_size == sum(t.nbytes for t in problem.model.state_dict().values())
    choices = {"conv1": (8, 8), "conv2": (4, None), "conv3": (3, 8), "fc": (2, 4)}
    codes = 144 + 288 + 432 + 12
    assert costs.size(choices) == costs.other_bytes + codes + 9 * (8 + 8 + 16 + 3) + 3 * 24
    macs = [layer.macs for layer in costs.layers.values()]
    assert costs.bit_ops(choices) == (
        macs[0] * 64 + macs[1] * 4 * 32 + macs[2] * 3 * 8 + macs[3] * 2 * 4
    )
    assert costs.float_bit_ops == sum(macs) * 1024 and costs.other_macs == 0
    half = BitCosts.of(problem.model, problem.structure, {"conv3": 8})
    assert half.layers["conv3"] == LayerSize(8 * 8 * 9, 8, 8 * 8 * 9 * 9)
    assert half.layers["fc"] == LayerSize(8 * 3, 3, 8 * 3)
    assert half.float_size == costs.float_size


def test_the_packed_file_is_of_that_size(tmp_path):
    problem, executor = toy_problem(str(tmp_path / "weights"))
    winner = run_search(MixedPrecision(size=PERCENT).search(problem), executor)
    model = executor.host.build(winner)
    how = winner.quantize
    path = tmp_path / "model.safetensors"
    save_packed(model, path, how.quantizer, dict(how.choices))
    stored = sum(tensor.nbytes for tensor in load_file(path).values())
    costs = BitCosts.of(problem.model, problem.structure)
    said = costs.size({name: (bits.weight, bits.input) for name, bits in how.choices})
    assert said <= 0.2 * costs.float_size
    # No norm's factors are stored, since no norm is folded here.
    factors = 4 * sum(layer.channels for layer in costs.layers.values())
    assert stored == said - factors


def _asked(pruner, problem, executor):
    """All that a search asks, and its winner."""
    asked = []
    search = pruner.search(problem)
    step = next(search)
    try:
        while True:
            asked.append(step)
            step = search.send(answer(step, executor))
    except StopIteration as stop:
        assert asked.pop() == [stop.value]  # once more, to have its figures
        return asked, stop.value


def test_every_layer_is_probed_alone_once_for_all_limits(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    first, winner = _asked(MixedPrecision(size=PERCENT), problem, executor)
    probes, race = first
    assert isinstance(probes, Probes) and isinstance(race, Race)
    dense, *alone = probes.candidates
    assert dense.is_plain and len(alone) == 4 * 3
    assert all(len(each.quantize.choices) == 1 and not each.kept for each in alone)
    assert len({each.quantize.choices for each in alone}) == 12
    assert all(each.shards == (0, 1) for each in probes.candidates)
    second, _ = _asked(MixedPrecision(size="35%", bit_ops="4%"), problem, executor)
    assert second[0] == probes and second[1] != race
    trials = answer(probes, executor)
    assert all(trial.replayed for trial in trials)
    # The winner is the best of the race, within the limit, with the bits of every layer.
    assert {name for name, _ in winner.quantize.choices} == {"conv1", "conv2", "conv3", "fc"}
    results = answer(race, executor)
    assert winner == min(results, key=lambda trial: trial.loss).candidate
    solution = dict(race.candidates[0].quantize.choices)
    assert len({bits.weight for bits in solution.values()}) > 1


def test_losses_are_those_above_float_and_never_rise_with_bits(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    pruner = MixedPrecision(size=PERCENT, input_bits=(8, 4), share=1.0)
    search = pruner._probes(problem)
    asked = next(search)
    trials = answer(asked, executor)
    with pytest.raises(StopIteration) as stop:
        search.send(trials)
    dense, *alone = trials
    for name, values in stop.value.value.items():
        own = {
            (bits.weight, bits.input): max(trial.loss - dense.loss, 0.0)
            for trial in alone
            for layer, bits in trial.candidate.quantize.choices
            if layer == name
        }
        choices = [(2, 4), (2, 8), (4, 4), (4, 8), (8, 4), (8, 8)]
        assert set(own) == set(choices)
        for (weight, source), value in zip(choices, values, strict=True):
            assert value == max(v for (w, g), v in own.items() if w >= weight and g >= source)
    assert max(values.max() for values in stop.value.value.values()) > 0


def test_limits_and_what_cant_be_met(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    costs = BitCosts.of(problem.model, problem.structure)
    for limit in ({"size": "20%"}, {"bit_ops": "2%"}, {"size": 1800}, {"bit_ops": 1e6}):
        asked, _ = _asked(MixedPrecision(**limit), problem, executor)
        for candidate in asked[-1].candidates:
            choices = {n: (bits.weight, bits.input) for n, bits in candidate.quantize.choices}
            ((key, value),) = limit.items()
            whole = {"size": costs.float_size, "bit_ops": costs.float_bit_ops}[key]
            most = float(value.rstrip("%")) / 100 * whole if isinstance(value, str) else value
            assert costs.value(key, choices) <= most
    with pytest.raises(BudgetError, match=r"size 5% can't be reached: with the fewest bits"):
        MixedPrecision(size="5%").check(problem)


def test_pruned_and_quantized_in_one_candidate(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    pruner = MixedPrecision(size="15%", pruner="CurveSolver", widths=(1.0, 0.5))
    asked, winner = _asked(pruner, problem, executor)
    race = asked[-1]
    # The dense model can't be so small with 2 bits or more: only the pruned one is in the race.
    assert all(each.kept and each.reconstruct for each in race.candidates)
    assert winner.kept and winner.quantize
    trial = executor.evaluate([winner.with_training(Training(0.0))])[0]
    stored = problem.store.get(trial.trained())
    assert stored.kept and stored.quantization == winner.quantize.key()
    assert executor.evaluate([Candidate(trial.trained())])[0].shards == trial.shards
    costs = BitCosts.of(problem.model, problem.structure, winner.counts)
    choices = {name: (bits.weight, bits.input) for name, bits in winner.quantize.choices}
    assert costs.size(choices) <= 0.15 * costs.float_size


def test_a_job_probes_once_before_its_trials(tmp_path):
    problem, _ = toy_problem(str(tmp_path / "weights"))
    pruner = MixedPrecision(size=PERCENT, pruner="CurveSolver", widths=(0.7,))
    with Ledger(tmp_path / "ledger", "a") as ledger:
        executor = LocalExecutor(ToyTask(), problem.structure, problem.store, ledger=ledger)
        problem = replace(problem, executor=executor)
        for shared in (True, False):
            search = pruner.shared(problem) if shared else pruner.search(problem)
            try:
                step = next(search)
                while True:
                    trials = answer(step, executor)
                    if not shared and isinstance(step, Probes):
                        assert all(trial.replayed for trial in trials)
                    step = search.send(trials)
            except StopIteration:
                pass


class Tied(nn.Module):
    """Two linear layers share their weight; a third has its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


def test_layers_that_share_a_weight_stay_in_float(tmp_path):
    model = Tied().eval()
    structure = analyze(model, (torch.randn(2, 6),), form="module")
    costs = BitCosts.of(model, structure)
    assert set(costs.layers) == {"out"}
    assert costs.other_bytes == 4 * (36 + 6 + 6 + 3)
    assert costs.other_macs == 72


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "needs a limit: size, bit_ops or latency_ms, such as size: 15%"),
        ({"size": "0%"}, "MixedPrecision.size must be a percentage"),
        ({"size": "5%", "weight_bits": (8, 1)}, "weight_bits must be different numbers from 2"),
        ({"size": "5%", "weight_bits": ()}, "weight_bits must not be empty"),
        ({"size": "5%", "input_bits": (8, 8)}, "input_bits must be different numbers"),
        ({"size": "5%", "quantizer": "Naive"}, "input_bits must be [], since Naive"),
        ({"size": "5%", "quantizer": "BNN"}, "BNN has to be trained; PTQ hasn't"),
        ({"size": "5%", "quantizer": "PQT"}, "no quantizer 'PQT'; did you mean"),
        ({"size": "5%", "widths": (0.5,)}, "widths need a pruner"),
        ({"size": "5%", "pruner": "CurveSolver", "widths": (0.0,)}, "widths must be in (0, 1]"),
        ({"size": "5%", "pruner": "CurvSolver"}, "MixedPrecision.pruner"),
        ({"size": "5%", "share": 0.0}, "share must be in (0, 1], got 0"),
        ({"size": "5%", "batches": 0}, "batches must be at least 1"),
        ({"size": "5%", "perturbation": 0.0}, "perturbation must be in (0, 2]"),
        ({"size": "5%", "objective": "speed"}, "objective must be 'loss' or 'score'"),
    ],
)
def test_bad_fields(fields, said):
    with pytest.raises(ConfigError) as error:
        MixedPrecision(**fields)
    assert said in str(error.value)


def test_what_it_cant_honour(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"macs": "50%"})
    with pytest.raises(ConfigError, match="without a pruner keeps all channels"):
        MixedPrecision(size=PERCENT).check(problem)
    both = MixedPrecision(size=PERCENT, pruner="L1Filter", widths=(0.5,))
    with pytest.raises(ConfigError, match="widths stand in place of a budget, got macs 50%"):
        both.check(problem)


def test_weights_alone(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    pruner = MixedPrecision(quantizer="Naive", input_bits=(), size="25%")
    winner = run_search(pruner.search(problem), executor)
    assert all(bits.input is None for _, bits in winner.quantize.choices)
    assert Candidate.from_key(json.loads(json.dumps(winner.key()))) == winner


JOB = {
    "name": "toy",
    "task": "raycompress.testing:ToyTask",
    "pruners": [{"type": "MixedPrecision", "size": PERCENT}],
    "quantize": {"type": "PTQ", "lower": "none"},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


@dataclass(frozen=True, kw_only=True)
class NoFour(NaiveQuantizer):
    """Inputs have 8 bits; four are refused in the last layer."""

    parts: ClassVar = ("weight", "input")

    def prepare(self, model, choices):
        if any(name == "fc" and bits.input == 4 for name, bits in choices.items()):
            raise ConfigError("no 4 bits of fc")


def _plan(tmp_path, **changed):
    keys = {**JOB, **changed, "output": str(tmp_path)}
    return prepare(parse_job({key: value for key, value in keys.items() if value is not None}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quantize": None}, "MixedPrecision finds bits, and the job doesn't say how"),
        (
            {
                "quantize": {
                    "type": "PTQ",
                    "lower": "none",
                    "config_list": [{"op_types": ["Conv2d"]}],
                }
            },
            "quantize.config_list must be left out: MixedPrecision finds the bits",
        ),
        (
            {"quantize": {"type": "Naive", "lower": "none"}},
            "quantize.type: NaiveQuantizer lacks bits that MixedPrecision may find: "
            "NaiveQuantizer quantizes no input, got 8 bits: conv1",
        ),
        (
            {"quantize": {"type": "BNN", "lower": "none", "training": {"epochs": 1.0}}},
            "quantize.type: BNN lacks bits that MixedPrecision may find: BNN has one bit",
        ),
        (
            {
                "pruners": [{"type": "MixedPrecision", "size": PERCENT, "input_bits": [8, 4]}],
                "quantize": {"type": f"{__name__}:NoFour", "lower": "none"},
            },
            "quantize.type: NoFour lacks bits that MixedPrecision may find: no 4 bits of fc",
        ),
        ({"budgets": [{"macs": "50%"}]}, "without a pruner keeps all channels"),
        ({"pruners": [{"type": "MixedPrecision", "size": "3%"}]}, "size 3% can't be reached"),
    ],
)
def test_jobs_that_couldnt_use_the_bits(tmp_path, changed, said):
    with pytest.raises(InputError) as error:
        _plan(tmp_path, **changed)
    assert said in str(error.value)


def test_a_job_trains_with_the_bits_that_were_found(tmp_path):
    quantize = {"type": "QAT", "lower": "none", "training": {"epochs": 1.0}, "batches": 3}
    plan = _plan(tmp_path, quantize=quantize)
    found = Quantization.of(PTQ(), {"conv1": Bits(weight=2, input=8), "fc": Bits(weight=4)})
    how = plan.quantize.with_bits(found)
    assert how.quantizer == QAT() and how.batches == 3
    assert dict(how.choices) == {
        "conv1": Bits(weight=2, input=8, norm="bn1"),
        "fc": Bits(weight=4),
    }
    assert plan.quantize.with_bits(None) == plan.quantize.how
    onnx = replace(plan.quantize, section=replace(plan.quantize.section, lower="onnx"))
    problem, _ = toy_problem(str(tmp_path / "w"))
    with pytest.raises(
        ConfigError, match=r"onnx computes in integers where .* and MixedPrecision finds"
    ):
        check_found_bits(onnx, MixedPrecision(size=PERCENT), problem)
    check_found_bits(onnx, CurveSolver(), problem)


def test_one_job_prunes_finds_bits_trains_and_stores_them(tmp_path):
    job = {
        **JOB,
        "pruners": [
            {"type": "MixedPrecision", "size": "16%", "pruner": "L1Filter", "widths": [0.6]}
        ],
        "quantize": {"type": "QAT", "lower": "none", "training": {"epochs": 1.0}},
        "latency": {"batch_sizes": [1], "repeats": 3},
        "output": str(tmp_path),
    }
    (trial,) = run(job).trials
    assert [row.name for row in trial.rows] == ["dense", "masked", "slim", "quantized"]
    stored = WeightStore(tmp_path / "weights").get(trial.quantized.weights)
    how = Quantization.from_key(stored.quantization)
    assert how.quantizer == QAT() and stored.kept
    assert {bits.norm for _, bits in how.choices} == {"bn1", "bn2", "bn3", ""}
    bits = {bits.weight for _, bits in how.choices}
    assert bits <= {8, 4, 2} and bits != {8}  # not what QAT alone would choose


def test_samples_are_trained_in_float_and_judged_with_their_bits(tmp_path):
    job = {
        **JOB,
        "model": {"pretrain": {"epochs": 1.0}},
        "pruners": [{"type": "MixedPrecision", "size": {"choice": ["20%", "26%"]}}],
        "tune": {"searcher": "grid", "train": {"epochs": 2.0}},
        "latency": {"batch_sizes": [1], "repeats": 1},
        "output": str(tmp_path),
    }
    result = run(job)
    records = read_ledger(tmp_path / "ledger")
    (trial,) = result.trials
    small, large = (
        json.loads(p.read_text()) for p in sorted(tmp_path.glob("trials/*/result.json"))
    )
    for found in (small, large):
        *searched, last = found["curve"]
        winner = Candidate.from_key(found["winner"])
        bits = {bits.weight for _, bits in winner.quantize.choices}
        assert bits <= {2, 4, 8} and bits != {8} and winner.training is None
        (trained,) = (
            r
            for r in records
            if r["weights"] == winner.weights and r["candidate"]["training"]["epochs"] == 2.0
        )
        assert "quantize" not in trained["candidate"]
        (judged,) = (
            r
            for r in records
            if r["kind"] == "evaluation"
            and r["split"] == "validation"
            and r["candidate"] == winner.key()
        )
        num, score = (sum(shard[i] for shard in judged["shards"]) for i in (0, 1))
        assert last["score"] == score / num == found["score"]
        assert last["loss"] < searched[-1]["loss"]
        assert last["dfe"] - searched[-1]["dfe"] > trained["dfe"] > 0
    best = max((small, large), key=lambda found: found["score"])
    assert trial.name == best["name"]
    assert [row.name for row in trial.rows] == ["dense", "masked", "quantized"]
    stored = WeightStore(tmp_path / "weights").get(trial.quantized.weights)
    kept = dict(Quantization.from_key(stored.quantization).choices)
    for layer, bits in Candidate.from_key(best["winner"]).quantize.choices:
        assert (kept[layer].weight, kept[layer].input) == (bits.weight, bits.input)
