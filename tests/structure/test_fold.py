"""Folding against its meaning: the dense model with zeroed weights and everything else left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure import Folding, analyze, fold_constants, slim, verify


def built(model: nn.Module) -> nn.Module:
    """In float64, with every parameter and buffer random and norms that really shift."""
    g = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=g) - (0 if "var" in name else 0.5))
            if "running_var" in name:
                tensor.add_(0.5)
    return model.double().eval()


def weights_masked(model: nn.Module, gone: dict[str, list[int]]) -> nn.Module:
    """What NNI's masks of weights alone mean: rows of weights are zero, biases and norms stay."""
    masked = copy.deepcopy(model)
    for layer, rows in gone.items():
        masked.get_submodule(layer).weight.data[rows] = 0
    return masked


def folded(
    model: nn.Module, gone: dict[str, list[int]], x: Tensor, **options: bool
) -> tuple[nn.Module, Folding]:
    """Masks the weights, completes the masks, folds."""
    structure = analyze(model, x)
    masks = {}
    for layer, rows in gone.items():
        mask = torch.ones_like(model.get_submodule(layer).weight)
        mask[rows] = 0
        masks[layer] = {"weight": mask}
    done = structure.complete(masks)
    assert done.kept
    masked = weights_masked(model, gone)
    before = copy.deepcopy(masked.state_dict())
    folding = fold_constants(masked, structure, done.kept, x, **options)
    assert all(torch.equal(v, before[k]) for k, v in masked.state_dict().items())
    return masked, folding


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


def other(x: Tensor) -> Tensor:
    """Other examples, and another batch size."""
    return torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(9)).double()


class ResidualNet(nn.Module):
    """Both producers of the sum lose the same channels; what stays of them is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.inner, self.branch = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.head = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn(self.stem(x)))
        x = F.relu(x + self.branch(F.silu(self.inner(x))))
        return self.head(x).mean((2, 3))


class Squeezed(nn.Module):
    """The gate is one number for each example and channel: times a constant it isn't constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 6, 1), nn.Linear(3, 6)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(self.stem(x) * gate)


EXACT = {
    "norm, activation, 1x1": (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
        ),
        {"0": [1, 4]},
        (2, 3, 6, 6),
    ),
    "no padding": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 5, 3, stride=2), nn.Flatten()),
        {"0": [0, 5]},
        (2, 3, 9, 9),
    ),
    "padding that repeats": (
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")
        ),
        {"0": [2]},
        (2, 3, 6, 6),
    ),
    "linear": (
        nn.Sequential(
            nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3, bias=False)
        ),
        {"0": [1, 2], "2": [0, 4]},
        (4, 7),
    ),
    "residual": (ResidualNet(), {"stem": [1, 2], "branch": [1, 2], "inner": [3]}, (2, 3, 7, 7)),
    "depthwise": (
        nn.Sequential(
            nn.Conv2d(3, 6, 1),
            nn.ReLU6(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.BatchNorm2d(6),
            nn.Hardswish(),
            nn.Conv2d(6, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        ),
        {"0": [0, 3], "2": [0, 3]},
        (2, 3, 6, 6),
    ),
    "flattened": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)),
        {"0": [2, 3, 5]},
        (2, 3, 6, 6),
    ),
    "conv1d, pooled": (
        nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(6, 4, 2)),
        {"0": [2, 3, 5]},
        (2, 3, 11),
    ),
    "1x1 transposed": (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.GELU(), nn.ConvTranspose2d(6, 4, 1)),
        {"0": [1]},
        (2, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_folded_model_computes_what_the_masked_weights_compute(name: str) -> None:
    model, gone, shape = EXACT[name]
    model = built(model)
    x = image(*shape)
    masked, folding = folded(model, gone, x)
    assert folding.exact and not folding.reasons
    assert all(r.exact and r.error < 1e-11 for r in folding.layers)
    assert verify(masked, folding.model, (other(x),)).max_error < 1e-10
    # Without folding the constants are lost, so the test would see it.
    assert any(r.folded and r.constant > 0.01 for r in folding.layers)
    structure = analyze(model, x)
    kept = {
        g.name: [c for c in range(g.num_channels) if c not in gone.get(g.name, ())]
        for g in structure.groups
    }
    assert verify(masked, slim(masked, structure, kept), (other(x),)).max_error > 1e-4


def test_graph_form_takes_constants_into_biases_that_are_there() -> None:
    model = built(copy.deepcopy(EXACT["linear"][0]))
    x = image(4, 7)
    structure = analyze(model, x, form="graph")
    masked = weights_masked(model, {"0": [1]})
    folding = fold_constants(masked, structure, {"0": [0, 2, 3, 4, 5]}, x)
    assert folding.exact and folding.layers[0].folded
    assert verify(masked, folding.model, (other(x),)).max_error < 1e-10
    masked = weights_masked(model, {"2": [1]})
    folding = fold_constants(masked, structure, {"2": [0, 2, 3, 4]}, x)
    assert folding.reasons == ("4: it has no bias, and graph form takes none",)


def test_a_bias_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    model[0].bias.data = torch.tensor([3.0, -1.0]).double()
    model[2].weight.data = torch.tensor([[5.0, 7.0], [11.0, 13.0]]).double()
    _, folding = folded(model, {"0": [0]}, torch.randn(4, 2).double())
    assert folding.model[2].bias.tolist() == [15.0, 33.0]  # relu(3) times the lost column
    assert folding.model[2].weight.tolist() == [[7.0], [13.0]]
    (row,) = folding.layers
    assert (row.layer, row.inputs, row.constant, row.added_bias) == ("2", 1, 33.0, True)


PADDED = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 5, 3, padding=1))


def test_zero_padding_is_reported_and_left_alone() -> None:
    model = built(copy.deepcopy(PADDED))
    x = image(2, 3, 8, 8)
    masked, folding = folded(model, {"0": [0, 1]}, x)
    (row,) = folding.layers
    assert not folding.exact and not row.exact and not row.folded and row.constant == 0
    assert folding.reasons == ("2: zero padding: at the borders it reads less of the constant",)
    assert torch.equal(folding.model[2].bias, masked[2].bias)
    got = verify(masked, folding.model, (x,)).max_error
    assert got == pytest.approx(row.error, rel=1e-6)  # the reader is the last layer


def test_the_mean_is_folded_on_request_and_its_error_stated() -> None:
    model = built(copy.deepcopy(PADDED))
    x = image(2, 3, 8, 8)
    _, left = folded(model, {"0": [0, 1]}, x)
    masked, folding = folded(model, {"0": [0, 1]}, x, approximate=True)
    (row,) = folding.layers
    assert row.folded and not row.exact and row.error < left.layers[0].error
    assert verify(masked, folding.model, (x,)).max_error == pytest.approx(row.error, rel=1e-6)
    mean = masked(x) - folding.model(x)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-12
    assert "zero padding" in folding.reasons[0]


def test_a_padded_depthwise_layer_passes_on_no_constant() -> None:
    model = built(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)
        )
    )
    structure = analyze(model, image(2, 3, 6, 6))
    masked = weights_masked(model, {"0": [1]})  # the depthwise weight itself isn't masked
    folding = fold_constants(masked, structure, {"0": [0, 2, 3, 4, 5]}, image(2, 3, 6, 6))
    assert folding.reasons == ("2: what it loses isn't constant over examples and positions",)


def test_gated_constants_vary() -> None:
    model = built(Squeezed())
    structure = analyze(model, image(2, 3, 6, 6))
    kept = {structure.groups[0].name: [0, 1, 2, 5]}
    masked = weights_masked(model, {"stem": [3, 4]})
    for x in (image(2, 3, 6, 6), torch.zeros(2, 3, 6, 6).double()):  # zeros alone prove nothing
        folding = fold_constants(masked, structure, kept, x)
        assert not folding.exact and not any(r.folded for r in folding.layers)
        assert "isn't constant" in folding.reasons[0]


def test_channels_that_emit_nothing_need_no_fold() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 6, bias=False)
            self.recurrent = nn.LSTM(6, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(self.embed(x))[0])

    model = built(Tagger())
    x = image(2, 5, 3)
    masked, folding = folded(model, {"embed": [2]}, x)
    assert folding.exact and not any(r.folded for r in folding.layers)
    assert [r.layer for r in folding.layers] == ["recurrent"]
    assert verify(masked, folding.model, (other(x),)).max_error < 1e-10
    biased = built(Tagger())
    biased.embed.bias = nn.Parameter(torch.rand(6).double())
    masked, folding = folded(biased, {"embed": [2]}, x)
    assert folding.reasons == ("recurrent: LSTM has no weight with a bias of its own behind it",)


def test_layers_whose_bias_does_not_add_to_the_output_are_found_out() -> None:
    class Scaled(nn.Module):
        """Looks like a linear layer; its bias is scaled with the rest."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (nn.Parameter(torch.rand(s)) for s in ((4, 6), (4,)))

        def forward(self, x: Tensor) -> Tensor:
            return 3 * F.linear(x, self.weight, self.bias)

    model = built(nn.Sequential(nn.Linear(3, 6), Scaled()))
    _, folding = folded(model, {"0": [1]}, image(4, 3))
    assert not folding.exact and not folding.layers[0].folded


def test_norms_across_channels_stand_against_exactness() -> None:
    model = built(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    _, folding = folded(model, {"0": [1]}, image(4, 3))
    assert not folding.exact and "LayerNorm" in folding.reasons[0]


def test_a_shared_reader_must_take_one_constant() -> None:
    class Twice(nn.Module):
        """The second call reads a constant of another size than the first."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.read = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.read(x) + self.read(2 * x)

    _, folding = folded(built(Twice()), {"a": [0]}, image(4, 3))
    (row,) = folding.layers
    assert not row.exact and not row.folded


def test_float32_is_exact_to_rounding() -> None:
    model, gone, shape = EXACT["residual"]
    model = built(copy.deepcopy(model)).float()
    x = image(*shape).float()
    masked, folding = folded(model, gone, x)
    assert folding.exact
    assert verify(masked, folding.model, (other(x).float(),)).max_error < 1e-5


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = built(copy.deepcopy(PADDED))
    structure = analyze(model, image(2, 3, 8, 8))
    with pytest.raises(StructureError, match=r"\(2, 4, 8, 8\)\): it stops in '0' \(Conv2d\)"):
        fold_constants(model, structure, {"0": [0]}, image(2, 4, 8, 8))
    with pytest.raises(StructureError, match="no channel group 'nothing'"):
        fold_constants(model, structure, {"nothing": [0]}, image(2, 3, 8, 8))
