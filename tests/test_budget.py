"""Latency budgets, over pricings that are formulas."""

import random
from itertools import product

import pytest

from raycompress.budget import Allocator, Budget
from raycompress.errors import BudgetError, ConfigError
from raycompress.structure import Cost, analyze
from raycompress.testing import ToyTask


class Priced:
    """A pricing by a function of the counts of the toy model's two groups."""

    def __init__(self, structure, formula):
        self.full = {group.name: group.num_channels for group in structure.groups}
        self.formula = formula
        self.calls = 0

    def latency_ms(self, kept=None):
        self.calls += 1
        return self.formula(*{**self.full, **(kept or {})}.values())


@pytest.fixture(scope="module")
def structure():
    task = ToyTask()
    found = analyze(task.build_model().eval(), task.example_inputs())
    assert [group.num_channels for group in found.groups] == [8, 16]
    return found


def linear(a, b):
    return 1.0 + 0.5 * a + 0.25 * b  # 9 ms for 8 and 16 channels


def steps(a, b):
    """Slower below multiples of four: 3 channels take longer than 4."""
    return linear(4 * ((a + 3) // 4), 4 * ((b + 3) // 4)) + 0.3 * (a % 4 > 0) + 0.3 * (b % 4 > 0)


def allocator(structure, budget, formula, **options):
    names = tuple(group.name for group in structure.groups)
    pricing = Priced(structure, formula)
    return Allocator(structure, names, Budget.of(budget), latency=pricing, **options)


def test_percentages_and_milliseconds():
    budget = Budget.of({"latency_ms": "60%"})
    assert budget.names_latency and budget.label == "latency_ms60"
    cost = Cost(1, 1, 1)
    assert budget.excess(cost, cost, (5.4, 9.0)) == pytest.approx(1.0)
    assert budget.excess(cost, cost, (2.7, 9.0)) == pytest.approx(0.5)
    assert Budget.of({"latency_ms": 2.5}).excess(cost, cost, (5.0, 9.0)) == pytest.approx(2.0)
    both = Budget.of({"latency_ms": "60%", "macs": "50%"})
    assert both.excess(Cost(0, 80, 0), Cost(0, 100, 0), (5.4, 9.0)) == pytest.approx(1.6)
    assert both.kept(Cost(0, 80, 0), Cost(0, 100, 0), (4.5, 9.0)) == "latency_ms 50%, macs 80%"
    assert not Budget.of({"macs": "50%"}).names_latency
    with pytest.raises(ValueError, match="can't be judged without"):
        both.excess(cost, cost)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"macs": 0.5}, r"budget.macs .*: got 0.5; write '50%' for that fraction"),
        ("50%", r"budget must be a mapping such as {'macs': '50%'}, got '50%'"),
    ],
)
def test_what_a_fraction_and_a_budget_look_like(values, message):
    with pytest.raises(ConfigError, match=message):
        Budget.of(values)


def test_uniform_fit_by_hand(structure):
    # 60 % of 9 ms is 5.4: 1 + 8 f / 2 + 16 f / 4 = 1 + 8 f, so f = 0.55, 4 and 8 channels: 5 ms.
    # The rest of 0.4 ms is one more of the second group (0.25), and then nothing fits.
    fit = allocator(structure, {"latency_ms": "60%"}, linear).fit
    first, second = (group.name for group in structure.groups)
    assert fit({first: 1.0, second: 1.0}) == {first: 4, second: 9}
    absolute = allocator(structure, {"latency_ms": 5.4}, linear).fit
    assert absolute({first: 1.0, second: 1.0}) == {first: 4, second: 9}


# Under steps one channel of each takes 4.6 ms, two and four 4.3 ms, which is within 50 %.
@pytest.mark.parametrize(
    ("formula", "percent"),
    [(linear, 30), (linear, 45), (linear, 85), (steps, 50), (steps, 60), (steps, 85), (steps, 100)],
)
def test_never_above_the_budget_and_nothing_more_fits(structure, formula, percent):
    budget = {"latency_ms": f"{percent}%"}
    one = allocator(structure, budget, formula)
    names = [group.name for group in structure.groups]
    limit = percent / 100 * formula(8, 16)
    rng = random.Random(percent)
    for _ in range(20):
        counts = one.fit({name: rng.uniform(0.05, 1.0) for name in names})
        used = formula(*(counts[name] for name in names))
        assert used <= limit + 1e-9
        for position, full in enumerate((8, 16)):
            more = [counts[name] + (position == i) for i, name in enumerate(names)]
            if more[position] <= full:
                assert formula(*more) > limit


def test_uniform_fit_under_steps_is_nearly_the_best(structure):
    """At 60 %, no uniform allocation within the budget has more channels by over a quarter."""
    fit = allocator(structure, {"latency_ms": "60%"}, steps).fit
    names = [group.name for group in structure.groups]
    counts = fit(dict.fromkeys(names, 1.0))
    limit = 0.6 * steps(8, 16)
    inside = [a / 8 + b / 16 for a, b in product(range(1, 9), range(1, 17)) if steps(a, b) <= limit]
    assert counts[names[0]] / 8 + counts[names[1]] / 16 >= 0.75 * max(inside)


def test_all_limits_hold_together(structure):
    budget = Budget.of({"latency_ms": "60%", "macs": "30%", "params": "40%"})
    one = allocator(structure, {"latency_ms": "60%", "macs": "30%", "params": "40%"}, linear)
    counts = one.fit({group.name: 1.0 for group in structure.groups})
    cost, dense = structure.cost(counts), structure.cost()
    assert cost.macs <= 0.3 * dense.macs and cost.params <= 0.4 * dense.params
    assert linear(*counts.values()) <= 0.6 * 9
    assert one.excess(counts) == budget.excess(cost, dense, (linear(*counts.values()), 9.0))


def test_unreachable_says_what_is_reachable(structure):
    # One channel of each: 1.75 of 9 ms.
    with pytest.raises(BudgetError, match=r"latency_ms 10% can't be reached.*latency_ms 19.4%;"):
        allocator(structure, {"latency_ms": "10%"}, linear)
    with pytest.raises(BudgetError, match=r"latency_ms 1.2 can't.*latency_ms 19.4% \(1.75\);"):
        allocator(structure, {"latency_ms": 1.2}, linear)
    with pytest.raises(BudgetError, match=r"latency_ms 44.4%;"):  # 4 and 4 channels, at least
        allocator(structure, {"latency_ms": "30%"}, linear, round_to=4)


def test_without_a_table(structure):
    with pytest.raises(ConfigError, match="latency_ms 60% needs a latency table"):
        Allocator(structure, (), Budget.of({"latency_ms": "60%"}))


def test_other_budgets_ask_no_pricing(structure):
    pricing = Priced(structure, linear)
    names = tuple(group.name for group in structure.groups)
    Allocator(structure, names, Budget.of({"macs": "50%"}), latency=pricing).fit(
        dict.fromkeys(names, 1.0)
    )
    assert pricing.calls == 0


@pytest.mark.parametrize("percent", [10, 40, 80, 100])
@pytest.mark.parametrize("most", [{"conv1": 5, "conv3": 9}, {"conv3": 1}, {"conv1": 8}])
def test_caps_hold_and_nothing_more_fits(structure, percent, most):
    """What a slim parent hasn't got can't be given out; brute force over all other counts."""
    budget = Budget.of({"macs": f"{percent}%"})
    fitter = Allocator(structure, ("conv1", "conv3"), budget, most=most)
    caps = {"conv1": 8, "conv3": 16, **most}
    rng = random.Random(percent)
    for _ in range(5):
        counts = fitter.fit({name: rng.uniform(0.05, 1) for name in caps})
        assert fitter.meets(counts) and all(1 <= counts[name] <= caps[name] for name in caps)
        for a, b in product(range(counts["conv1"], caps["conv1"] + 1), range(1, 17)):
            larger = {"conv1": a, "conv3": b}
            if counts["conv3"] <= b <= caps["conv3"] and larger != counts:
                assert not fitter.meets(larger)
    assert list(fitter.sizes("conv3")) == list(range(1, caps["conv3"]))
