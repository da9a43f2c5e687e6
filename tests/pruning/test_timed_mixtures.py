"""Limits on latency: what layers save in integers, by hand, by brute force, and on onnxruntime."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from raycompress.candidate import Candidate
from raycompress.errors import BudgetError, ConfigError, EvaluationError
from raycompress.ledger import Ledger, read_ledger
from raycompress.local import LocalExecutor
from raycompress.on_runtime import FLOAT_OF
from raycompress.pruning import MixedPrecision
from raycompress.pruning.bit_costs import BitCosts
from raycompress.pruning.integer_times import IntegerTimes
from raycompress.pruning.pruner import Problem
from raycompress.pruning.timed_mixtures import CHUNK, TimedMixtures
from raycompress.quantization import PTQ, Quantization
from raycompress.quantization.quantizer import Bits
from raycompress.search import Race, Timings, answer, run_search
from raycompress.structure import analyze
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import TableError
from raycompress.testing import ToyTask, toy_problem
from raycompress.weights import Weights, WeightStore

NONE = TableError.of([], [])
LAYERS = ("conv1", "conv2", "conv3", "fc")
COST = {"conv1": (3.0, 1.0), "conv2": (6.0, 2.0), "conv3": (5.0, 4.0), "fc": (1.0, 1.5)}
"""Milliseconds in float and in integers, as the made-up runtime has them."""


def test_savings_lead_from_integers_to_float():
    times = IntegerTimes.of(10.0, 4.0, {"a": 3.0, "b": 1.0, "c": -0.4}, NONE)
    assert times.savings == pytest.approx({"a": 4.8, "b": 1.6, "c": -0.4})
    assert times.latency_ms(["a"]) == pytest.approx(8.8) and times.latency_ms([]) == 4.0
    assert times.latency_ms(["a", "b", "c"]) == pytest.approx(10.0)


def test_no_saving_was_seen():
    """What none of the layers saves alone is shared alike."""
    assert IntegerTimes.of(6.0, 4.0, {"a": -1.0, "b": 0.0}, NONE).savings == {"a": 0.5, "b": 1.5}
    slower = IntegerTimes.of(4.0, 6.0, {"a": 2.0, "b": 0.0}, NONE)
    assert slower.savings == {"a": 0.0, "b": -2.0} and slower.latency_ms(["a", "b"]) == 4.0
    mixed = IntegerTimes.of(4.0, 6.0, {"a": 2.0, "b": -3.0}, NONE)
    assert mixed.savings == {"a": 1.0, "b": -3.0} and mixed.latency_ms(["b"]) == 3.0


def test_savings_of_pruned_layers():
    times = IntegerTimes.of(10.0, 4.0, {"a": 4.0, "b": 2.0}, NONE)
    pruned = times.pruned(5.0, 3.0, {"a": 0.25, "b": 0.5})  # one each, of two
    assert pruned.savings == {"a": 1.0, "b": 1.0} and pruned.latency_ms(["a"]) == 4.0


class MadeUp(LocalExecutor):
    """Times by a formula; everything on its machine takes `drift` as long from one step to the
    next, and each border between integers and float `border` milliseconds."""

    drift, border, broken, cant = 1.0, 0.0, "", ""

    def latency(self, candidates, batch_sizes, repeats, max_seconds=None, runtime=""):
        assert runtime == "onnx" and batch_sizes == (4,)
        whole = [each for name, each in candidates.items() if not name.startswith(FLOAT_OF)]
        self.steps = [*getattr(self, "steps", []), whole]
        if self.broken:
            raise EvaluationError(self.broken)
        slow = self.drift ** (len(self.steps) - 1)
        rows = []
        for name, candidate in candidates.items():
            own, whole = self.true_ms(candidate)
            ms = slow * (whole if name.startswith(FLOAT_OF) else own)
            if self.cant in in_float(candidate):
                rows.append(LatencyRow.failed(name, 4, f"no mixture with {self.cant}"))
                continue
            # The median is another one: what is disturbed.
            rows.append(LatencyRow(name, 4, 9 * ms, ms, 99.0, 3, ms, 0, 0))
        return rows

    def true_ms(self, candidate):
        rounded = {name for name, _ in candidate.quantize.choices}
        counts = self.counts(candidate)
        layers = {row.name: row for row in self.structure.cost_table(counts)}
        dense = {row.name: row for row in self.structure.cost_table({})}
        own = whole = 0.5
        for name, ms in COST.items():
            share = layers[name].macs / dense[name].macs
            own += ms[name in rounded] * share
            whole += ms[False] * share
        order = [name in rounded for name in LAYERS]
        return own + self.border * sum(a != b for a, b in itertools.pairwise(order)), whole


def made_up(tmp_path, **changed):
    problem, _ = toy_problem(str(tmp_path / "weights"))
    executor = MadeUp(ToyTask(), problem.structure, problem.store)
    for key, value in changed.items():
        setattr(executor, key, value)
    return replace(problem, executor=executor), executor


def limited(limit, **changed):
    return MixedPrecision(weight_bits=(8, 32), latency_ms=limit, batch_size=4, share=1.0, **changed)


def drive(pruner, problem):
    """All that a search asks, with the answers, and its winner."""
    asked = []
    search = pruner.search(problem)
    step = next(search)
    try:
        while True:
            trials = answer(step, problem.executor)
            asked.append((step, trials))
            step = search.send(trials)
    except StopIteration as stop:
        assert asked.pop()[0] == [stop.value]  # once more, to have its figures
        return asked, stop.value


def in_float(candidate):
    rounded = {name for name, _ in candidate.quantize.choices}
    return tuple(name for name in LAYERS if name not in rounded)


def layers_of(problem, executor):
    dense = BitCosts.of(problem.model, problem.structure)

    def quantization(choices):
        return Quantization.of(PTQ(), {n: Bits(weight=w, input=i) for n, (w, i) in choices.items()})

    search = TimedMixtures(problem, dense, quantization, "onnx", 4).layers()
    step = next(search)
    try:
        while True:
            step = search.send(answer(step, executor))
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize("drift", [1.0, 1.7])
def test_layers_are_timed_one_at_a_time_whatever_the_machine_does_meanwhile(tmp_path, drift):
    problem, executor = made_up(tmp_path, drift=drift)
    times = layers_of(problem, executor)
    assert times.float_ms == pytest.approx(15.5) and times.integer_ms == pytest.approx(9.0)
    # The last layer is slower in integers.
    expected = {"conv1": 2.0, "conv2": 4.0, "conv3": 1.0, "fc": -0.5}
    assert times.savings == pytest.approx(expected, abs=1e-4)
    assert times.error.num == 4 and times.error.max < 1e-4
    first, *later = executor.steps
    assert len(first) == CHUNK + 1 and {step[0] for step in later} == {first[0]}
    assert [in_float(each) for each in first[:5]] == [(), *((name,) for name in LAYERS)]


def test_error_says_what_sums_dont_know(tmp_path):
    problem, executor = made_up(tmp_path, border=0.5)
    times = layers_of(problem, executor)
    assert times.error.max > 0.02


def test_the_winner_loses_least_of_what_is_fast_enough(tmp_path):
    problem, executor = made_up(tmp_path)
    figures = {}
    asked, winner = drive(limited("75%"), replace(problem, report=figures.update))
    assert figures["latency_float_ms"] == 15.5 and figures["latency_limit_ms"] == 0.75 * 15.5
    own = executor.true_ms(winner)[0]
    assert figures["latency_timed_ms"] == pytest.approx(own) == figures["latency_ms"]
    assert figures["latency_error"] < 1e-4
    kinds = [type(step).__name__ for step, _ in asked]
    assert kinds[:3] == ["Timings", "Timings", "Probes"] and kinds[-1] == "Race"
    assert set(kinds[3:-1]) == {"Timings"}
    limit = 0.75 * 15.5
    race, results = asked[-1]
    assert all(executor.true_ms(each)[0] <= limit for each in race.candidates)
    assert winner == min(results, key=lambda trial: trial.loss).candidate
    # By brute force over all mixtures and the probes: the program's own solution.
    (_, trials) = next((s, t) for s, t in asked if type(s).__name__ == "Probes")
    dense, *alone = trials
    lost = {t.candidate.quantize.choices[0][0]: max(t.loss - dense.loss, 0) for t in alone}
    times = layers_of(problem, executor)
    mixtures = [
        each
        for num in range(len(LAYERS))
        for each in itertools.combinations(LAYERS, num)
        if times.latency_ms(each) <= limit
    ]
    fewest = min(sum(lost[name] for name in LAYERS if name not in each) for each in mixtures)
    solution = in_float(race.candidates[0])
    assert sum(lost[n] for n in LAYERS if n not in solution) == pytest.approx(fewest, abs=1e-6)
    assert 0 < len(solution) < len(LAYERS)


def test_what_is_too_slow_as_timed_never_wins(tmp_path):
    """Sums say that it is fast enough, and it isn't: the limit is corrected, and all asked anew."""
    problem, executor = made_up(tmp_path, border=1.2)
    asked, winner = drive(limited("75%", neighbours=0), problem)
    assert executor.true_ms(winner)[0] <= 0.75 * 15.5
    race = asked[-1][0]
    assert isinstance(race, Race)
    assert all(executor.true_ms(each)[0] <= 0.75 * 15.5 for each in race.candidates)
    tried = {in_float(c) for step, _ in asked if isinstance(step, Timings) for c in step.candidates}
    assert len(tried) > len(race.candidates)


def test_a_correction_that_leads_too_far_is_taken_back_half_way(tmp_path):
    """The first solution is too slow; corrected by that, the limit is out of reach by sums."""
    problem, executor = made_up(tmp_path, border=1.0)
    asked, _ = drive(limited("62%", neighbours=0), problem)
    within = {in_float(each) for each in asked[-1][0].candidates}
    assert within - {()}
    assert all(executor.true_ms(c)[0] <= 0.62 * 15.5 for c in asked[-1][0].candidates)


def test_each_width_is_corrected_by_its_own_solution(tmp_path):
    problem, executor = made_up(tmp_path, border=0.3)
    pruner = limited("60%", pruner="L1Filter", widths=(1.0, 0.6), neighbours=0)
    asked, _ = drive(pruner, problem)
    pruned = [each for each in asked[-1][0].candidates if each.kept]
    # Not only all in integers: something of it is in float, within the limit.
    assert any(in_float(each) for each in pruned)
    assert all(executor.true_ms(each)[0] <= 0.6 * 15.5 for each in asked[-1][0].candidates)


def test_limits_that_cant_be_met(tmp_path):
    problem, _ = made_up(tmp_path)
    said = r"latency_ms 50% can't be reached: .* the fastest mixture .* 8.5 ms, 54.8% of 15.5 ms"
    with pytest.raises(BudgetError, match=said):
        drive(limited("50%"), problem)
    with pytest.raises(BudgetError, match="the limits are met in float: there is nothing to"):
        drive(limited("100%"), problem)
    with pytest.raises(BudgetError, match=r"latency_ms 8\.4 can't be reached"):
        drive(limited(8.4), problem)
    _, winner = drive(limited(8.6), problem)
    assert in_float(winner) == ("fc",)


def test_a_limit_beside_another_one(tmp_path):
    problem, executor = made_up(tmp_path)
    asked, winner = drive(limited("95%", size="45%"), problem)
    alone, _ = drive(limited("95%"), problem)
    costs = BitCosts.of(problem.model, problem.structure)
    bits = {name: (8, 8) for name, _ in winner.quantize.choices}
    whole = {name: bits.get(name, (32, None)) for name in LAYERS}
    assert costs.size(whole) <= 0.45 * costs.float_size
    assert executor.true_ms(winner)[0] <= 0.95 * 15.5
    assert asked[-1][0] != alone[-1][0]


def test_pruned_models_compete_within_the_limit(tmp_path):
    problem, executor = made_up(tmp_path)
    pruner = limited("45%", pruner="L1Filter", widths=(1.0, 0.6))
    asked, winner = drive(pruner, problem)
    # The dense model takes 58 % in integers: only the pruned one can.
    assert winner.kept and executor.true_ms(winner)[0] <= 0.45 * 15.5
    assert all(each.kept for each in asked[-1][0].candidates)


def test_what_a_runtime_cant_take(tmp_path):
    problem, _ = made_up(tmp_path, broken="no kernel of conv2")
    with pytest.raises(EvaluationError, match=r"timing on onnx failed: .*no kernel of conv2"):
        drive(limited("75%"), problem)


def test_mixtures_that_a_runtime_cant_take_are_none(tmp_path):
    """Wherever conv2 is in float: alone, in the mixtures that say how far off sums are, at last."""
    problem, executor = made_up(tmp_path, cant="conv2")
    asked, winner = drive(limited("75%"), problem)
    failed = [t for s, trials in asked if isinstance(s, Timings) for t in trials if t.failure]
    assert failed and all("conv2" in in_float(trial.candidate) for trial in failed)
    assert "conv2" not in in_float(winner) and executor.true_ms(winner)[0] <= 0.75 * 15.5
    assert not any("conv2" in in_float(each) for each in asked[-1][0].candidates)


def test_timings_are_shared_and_kept(tmp_path):
    problem, _ = toy_problem(str(tmp_path / "weights"))
    pruner = limited("75%")
    counted = []
    for _ in range(2):
        with Ledger(tmp_path / "ledger", "a") as ledger:
            executor = MadeUp(ToyTask(), problem.structure, problem.store, ledger=ledger)
            own = replace(problem, executor=executor)
            search = pruner.shared(own)
            step = next(search)
            try:
                while True:
                    step = search.send(answer(step, executor))
            except StopIteration:
                pass
            before = len(getattr(executor, "steps", []))
            asked, winner = drive(pruner, own)
            counted.append((before, len(getattr(executor, "steps", [])), winner))
            probes = [t for s, trials in asked if isinstance(s, Timings) for t in trials]
            assert all(trial.probe and not trial.shards for trial in probes)
    # Layers before the trials, proposals in them; in a second run nothing.
    assert 2 == counted[0][0] < counted[0][1] and counted[1][:2] == (0, 0)
    assert counted[0][2] == counted[1][2]
    rows = [r for r in read_ledger(tmp_path / "ledger") if r["kind"] == "timing"]
    assert all(r["latency_ms"] > 0 and r["runtime"] == "onnx" for r in rows)


def test_a_failed_timing_is_tried_again_by_another_run(tmp_path):
    problem, _ = toy_problem(str(tmp_path / "weights"))
    how = Quantization.of(PTQ(), {"conv1": Bits(weight=8, input=8)})
    asked = Timings((Candidate(problem.weights, quantize=how),), "onnx", 4)
    for broken in ("lost", ""):
        with Ledger(tmp_path / "ledger", "a") as ledger:
            executor = MadeUp(ToyTask(), problem.structure, problem.store, ledger=ledger)
            executor.broken = broken
            (trial,) = answer(asked, executor)
        assert (trial.failure is None) == (not broken) and not trial.replayed


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"latency_ms": "50%"}, "weight_bits must be [8, 32] and input_bits [8], got [8, 4, 2]"),
        ({"latency_ms": "50%", "weight_bits": (8, 32), "input_bits": ()}, "and input_bits [8]"),
        ({"latency_ms": "0%", "weight_bits": (8, 32)}, "MixedPrecision.latency_ms must be a per"),
        (
            {"latency_ms": "50%", "weight_bits": (8, 32), "runtime": "onxx"},
            "runtime must be one of onnx, inductor, got 'onxx'; did you mean 'onnx'?",
        ),
        ({"latency_ms": 1, "weight_bits": (8, 32), "batch_size": 0}, "batch_size must be at least"),
        ({"size": "50%", "weight_bits": (32,)}, "weight_bits must not be empty, or float alone"),
        ({"size": "50%", "weight_bits": (16,)}, "different numbers from 2 to 8, or 32 for float"),
    ],
)
def test_bad_fields(fields, said):
    with pytest.raises(ConfigError) as error:
        MixedPrecision(**fields)
    assert said in str(error.value)


def test_layers_may_stay_in_float_within_bytes(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    pruner = MixedPrecision(weight_bits=(2, 32), size="70%", share=1.0)
    winner = run_search(pruner.search(problem), executor)
    assert 0 < len(winner.quantize.choices) < 4
    assert all(bits.weight == 2 for _, bits in winner.quantize.choices)


def test_onnxruntime_times_what_it_is_asked(tmp_path):
    pytest.importorskip("onnxruntime")
    problem, executor = toy_problem(str(tmp_path))
    how = Quantization.of(PTQ(), {name: Bits(weight=8, input=8) for name in LAYERS})
    whole = Candidate(problem.weights, quantize=how)
    part = replace(whole, quantize=Quantization.of(PTQ(), {"conv2": Bits(weight=8, input=8)}))
    trials = answer(Timings((whole, part), "onnx", 4), executor)
    assert all(t.failure is None and t.latency_ms > 0 for t in trials)
    assert trials[0].float_ms > 0 and trials[1].float_ms is None
    assert trials[0].latency_ms != trials[1].latency_ms
    again = answer(Timings((whole, part), "onnx", 4), executor)
    assert all(trial.replayed for trial in again)
    (plain,) = answer(Timings((Candidate(problem.weights),), "onnx", 4), executor)
    assert "isn't quantized" in plain.failure


class Heads(ToyTask):
    """Linear layers behind each other, one channel in between; fixed: traced, it takes two."""

    def __init__(self, fixed=False):
        super().__init__()
        self.fixed = fixed

    def build_model(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.ReLU()),
            *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU()),
            *(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
        )
        if self.fixed:
            net.insert(6, Fixed())
        return net


class Fixed(nn.Module):
    def forward(self, x):
        return torch.stack([each * 2 for each in x])


def problem_of(task, folder):
    model = task.build_model().eval()
    store = WeightStore(folder)
    structure = analyze(model, task.example_inputs(), form="module")
    weights = store.put(Weights(model.state_dict(), {}))
    executor = LocalExecutor(task, structure, store)
    return Problem(
        model=model, structure=structure, weights=weights, executor=executor, store=store
    )


def test_mixtures_of_a_net_with_heads_run_on_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    problem = problem_of(Heads(), tmp_path)
    layers = list(BitCosts.of(problem.model, problem.structure).layers)
    assert len(layers) == 6
    asked = []
    for floats in ((), layers[2:3], layers[4:5], layers[1:4]):
        bits = {name: Bits(weight=8, input=8) for name in layers if name not in floats}
        asked.append(Candidate(problem.weights, quantize=Quantization.of(PTQ(), bits)))
    trials = answer(Timings(tuple(asked), "onnx", 4), problem.executor)
    assert [trial.failure for trial in trials] == [None] * len(asked)


def test_a_model_of_one_batch_size_is_a_failure_with_its_reason(tmp_path):
    pytest.importorskip("onnxruntime")
    problem = problem_of(Heads(fixed=True), tmp_path)
    how = Quantization.of(PTQ(), {"0": Bits(weight=8, input=8)})
    (trial,) = answer(
        Timings((Candidate(problem.weights, quantize=how),), "onnx", 1), problem.executor
    )
    assert trial.failure is not None and trial.latency_ms is None
