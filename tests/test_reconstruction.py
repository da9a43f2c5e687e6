"""Least squares against torch's own solver, brute force, and models that need it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from raycompress import layer_rows
from raycompress.candidate import Candidate, Training
from raycompress.criteria import L1, Magnitude
from raycompress.layer_rows import rows_of, targets_of
from raycompress.masks import masked_copy
from raycompress.reconstruction import (
    Reconstruction,
    lost_inputs,
    reconstruct,
    solve,
)
from raycompress.structure import analyze, slim
from raycompress.testing import toy_problem


def _problem(rows=40, inputs=6, outputs=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).double()
    x[:, 1] += 0.7 * x[:, 0]  # correlated, or there is nothing to make up for
    w = torch.randn(inputs, outputs, generator=generator).double()
    mask = torch.rand(inputs, outputs, generator=generator) > 0.4
    return x, w, mask


def test_all_free_is_torchs_least_squares():
    x, w, _ = _problem()
    start = torch.zeros_like(w)
    found = solve(x.T @ x, x.T @ (x @ w - x @ start), None, 1e-12)
    assert torch.allclose(found, torch.linalg.lstsq(x, x @ w).solution, atol=1e-6)


def test_each_output_has_its_own_support():
    x, w, mask = _problem()
    start = w * mask
    found = start + solve(x.T @ x, x.T @ (x @ w - x @ start), mask, 1e-12)
    assert not found[~mask].any()
    for output in range(w.shape[1]):
        support = mask[:, output]
        best = torch.linalg.lstsq(x[:, support], (x @ w)[:, [output]]).solution
        assert torch.allclose(found[support, output], best[:, 0], atol=1e-7)
    assert (x @ found - x @ w).norm() < (x @ start - x @ w).norm()


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    _, w, mask = _problem()
    gram = torch.eye(6).double()
    assert torch.allclose(solve(gram, gram @ (w - w * mask), mask, 0.0), torch.zeros(6, 5).double())


def test_inputs_that_repeat_others_can_go_at_no_loss():
    x, w, _ = _problem(inputs=3)
    x = torch.cat([x, x @ torch.randn(3, 3).double()], dim=1)  # rank 3 of 6
    w = torch.randn(6, 5).double()
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[:3] = True
    start = w * mask
    found = start + solve(x.T @ x, x.T @ (x @ w - x @ start), mask, 1e-12)
    assert (x @ found - x @ w).norm() < 1e-4 * (x @ w).norm()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 5, 6)),
        (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (2, 3, 11)),
        (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 5)),
        (nn.Conv2d(3, 4, 2, padding="same"), (2, 3, 6, 5)),
        (nn.Conv3d(2, 3, 3, stride=2, padding=1), (2, 2, 5, 6, 7)),
        (nn.Conv2d(3, 4, 3), (3, 6, 5)),
    ],
)
def test_rows_times_weights_are_the_layers_outputs(layer, shape):
    layer = layer.double()
    x = torch.randn(shape).double()
    rows = rows_of(layer, x)
    expected = targets_of(layer, layer(x))
    assert torch.allclose(rows @ layer.weight.flatten(1).T + layer.bias, expected)


class Net(nn.Module):
    """Redundant on purpose: half of the hidden channels repeat the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Linear(6, 4)
        with torch.no_grad():
            self.a.weight[4:] = 2 * self.a.weight[:4]
            self.a.bias[4:] = 2 * self.a.bias[:4]

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def test_redundant_channels_are_made_up_for_exactly():
    torch.manual_seed(0)
    model = Net().double().eval()
    images = torch.randn(8, 3, 7, 7).double()
    structure = analyze(model, images)
    kept = {"a": torch.arange(4, 8)}
    small = slim(model, structure, kept)
    layers, outputs = lost_inputs(structure, kept)
    assert layers == {"b": None} and not outputs
    other = torch.randn(5, 3, 7, 7).double()
    assert (small(other) - model(other)).norm() > 0.03 * model(other).norm()
    (error,) = reconstruct(
        small, model, layers, outputs, lambda m, b: m(b), [images], damping=1e-12
    )
    assert error.after < 1e-8 < error.before
    assert (small(other) - model(other)).norm() < 1e-6 * model(other).norm()


def test_layers_that_lost_outputs_too_imitate_those_that_are_left():
    torch.manual_seed(0)
    model = Net().double().eval()
    images = torch.randn(8, 3, 7, 7).double()
    structure = analyze(model, images)
    kept = {"a": torch.arange(4, 8), "b": torch.tensor([1, 4, 5])}
    small = slim(model, structure, kept)
    layers, outputs = lost_inputs(structure, kept)
    assert outputs["b"].tolist() == [1, 4, 5] and set(layers) == {"b", "c"}
    errors = reconstruct(small, model, layers, outputs, lambda m, b: m(b), [images])
    assert [e.layer for e in errors] == ["b", "c"] and all(e.after <= e.before for e in errors)
    with torch.no_grad():
        hidden = torch.relu(model.b(torch.relu(model.a(images))))[:, [1, 4, 5]]
        mine = torch.relu(small.b(torch.relu(small.a(images))))
    assert (mine - hidden).norm() < 0.02 * hidden.norm()


def test_what_cant_be_solved_is_named():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
            self.idle = nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x))

    model = Grouped().eval()
    errors = reconstruct(
        model, Grouped().eval(), {"b": None, "idle": None}, {}, lambda m, b: m(b),
        [torch.randn(2, 3, 4, 4)],
    )  # fmt: skip
    assert {e.layer: e.skipped for e in errors} == {
        "idle": "not called by the model",
        "b": "a grouped convolution",
    }


@pytest.mark.parametrize("kind", ["channels", "weights"])
def test_pruned_models_lose_less(tmp_path, kind):
    problem, executor = toy_problem(str(tmp_path))
    dense = executor.evaluate([Candidate(problem.weights, training=Training(10.0))])[0].weights
    problem = replace(problem, weights=dense, model=problem.dense(dense))
    criterion = L1() if kind == "channels" else Magnitude()
    names = list(problem.groups() if kind == "channels" else problem.layers())
    scores = criterion.scores(problem.model, problem.structure, names, {})
    counts = {key: max(1, int(0.3 * s.numel())) for key, s in scores.items()}
    plain = problem.candidate(counts, problem.ranking(kind, scores))
    helped = replace(plain, reconstruct=Reconstruction(dense=dense))
    assert Candidate.from_key(helped.key()) == helped
    before, after = executor.evaluate([plain, helped])
    assert after.failure is None and after.loss < 0.8 * before.loss
    if kind == "weights":
        masks = executor.host.masks(helped)
        state = executor.host.build(helped).state_dict()
        assert all(not state[name][~mask].any() for name, mask in masks.items())
        assert any(
            not torch.equal(state[name], masked_copy(problem.model, masks).state_dict()[name])
            for name in masks
        )


def test_a_slim_parent_is_imitated_like_a_dense_one(tmp_path):
    """In dense shapes; a candidate that prunes nothing more has nothing to make up for."""
    problem, executor = toy_problem(str(tmp_path))
    trained = executor.evaluate([Candidate(problem.weights, training=Training(10.0))])[0].weights
    scores = L1().scores(problem.dense(trained), problem.structure, list(problem.groups()), {})
    ranking = problem.ranking("channels", scores)
    half = {"conv1": 5, "conv3": 9}
    asked = problem.candidate(half, ranking, weights=trained, training=Training(6.0))
    parent = executor.evaluate([asked])[0].weights
    same = problem.candidate(half, ranking, weights=parent)
    fewer = problem.candidate({"conv1": 3, "conv3": 5}, ranking, weights=parent)
    how = Reconstruction(dense=parent)
    base, again, plain, helped = executor.evaluate(
        [same, replace(same, reconstruct=how), fewer, replace(fewer, reconstruct=how)]
    )
    assert again.failure is None and again.loss == pytest.approx(base.loss, rel=1e-4)
    assert helped.loss < base.loss + 0.8 * (plain.loss - base.loss)


class InPlace(Net):
    """What comes after a layer overwrites its answer."""

    def forward(self, x):
        x = self.b(self.a(x).relu_())
        return self.c(x.relu_().mean((2, 3))).relu_()


@pytest.mark.parametrize("room", [1, layer_rows.MAX_ANSWERS])
@pytest.mark.parametrize("most", [50, 4096])
def test_what_the_dense_model_answered_before_is_not_asked_again(monkeypatch, room, most):
    """Nor does it matter how much of it is kept, or how many rows are looked at."""
    monkeypatch.setattr(layer_rows, "MAX_ANSWERS", room)
    monkeypatch.setattr(layer_rows, "MAX_ROWS", most)
    torch.manual_seed(0)
    model = InPlace().double().eval()
    batches = [torch.randn(4, 3, 7, 7).double() for _ in range(2)]
    structure = analyze(model, batches[0])
    kept = {"a": torch.arange(2, 7), "b": torch.tensor([1, 4, 5])}
    passes = []

    def forward(which, batch):
        passes.append(which is model)
        return which(batch)

    def run(known):
        small = slim(model, structure, kept)
        reconstruct(small, model, *lost_inputs(structure, kept), forward, batches, known=known)
        return small.state_dict()

    known = {}
    first = run(known)
    asked = sum(passes)
    assert asked == (4 if room == 1 else 2)  # each layer for itself, or both in one pass
    again, fresh = run(known), run(None)
    assert sum(passes) == (8 if room == 1 else 2) + asked
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], fresh[k]) for k in first)
    assert set(known) == ({"c"} if room == 1 else {"b", "c"})
    if room == 1:
        return
    with torch.no_grad():
        for layer, size in (("b", 8 * 49), ("c", 8)):
            answers = [rows for batch in known[layer] for rows in batch]
            assert sum(len(rows) for rows in answers) == min(size, 2 * most)
            if layer == "b" and most == 4096:
                expected = model.b(torch.relu(model.a(batches[0]))).movedim(1, -1).flatten(0, 2)
                assert torch.equal(answers[0], expected)


def test_the_same_rows_are_looked_at_of_inputs_and_of_outputs(monkeypatch):
    monkeypatch.setattr(layer_rows, "MAX_ROWS", 11)
    layer, x = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(2, 3, 6, 5).double()
    rows, targets = rows_of(layer, x), targets_of(layer, layer(x))
    assert len(rows) == 11 and len(rows.unique(dim=0)) == 11
    assert torch.allclose(rows @ layer.weight.flatten(1).T + layer.bias, targets)
