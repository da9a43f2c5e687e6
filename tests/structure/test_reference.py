"""The reference is checked against formulas over the kept channels, and finds wrong surgery.

Every architecture computes `c(norm(a(x)))`: what must come out when some channels of `a` are gone
is `norm` written out by hand, on the kept channels alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.masks import masked_copy
from raycompress.structure import Structure, Verdict, analyze, slim, verify
from raycompress.structure.reference import run_on_kept

WIDTH = 8


class Affine(nn.Module):
    """A normalisation over the last dim of (batch, channels), then weight and bias."""

    def __init__(self, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.normalise = normalise
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x) * self.weight + self.bias


def by_powers(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def by_std(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (std + 1e-5)


def by_sums(x: Tensor) -> Tensor:
    """Counts channels by the shape, which a slim model's has fewer of."""
    centred = x - (x.sum(-1) / x.shape[-1]).unsqueeze(-1)
    size = centred.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return centred / size + (centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()


def by_root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def response(x: Tensor) -> Tensor:
    """The global response normalisation of ConvNeXt V2, without space."""
    size = x.abs()
    return x + x * size / (size.mean(-1, keepdim=True) + 1e-6)


def attended(x: Tensor) -> Tensor:
    """Linear attention's features: f(0) = 1, so removed channels would count in the product."""
    features = F.elu(x) + 1
    return x * (features.unsqueeze(1) @ features.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class Case:
    """A norm and what it computes from the kept channels x, its weight w and its bias b."""

    name: str
    norm: Callable[[], nn.Module]
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]


def mean(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True) / x.shape[1]


def variance(x: Tensor, less: int = 0) -> Tensor:
    return (x - mean(x)).square().sum(1, keepdim=True) / (x.shape[1] - less)


def standard(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - mean(x)) / (variance(x) + 1e-5).sqrt() * w + b


def exponential(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(1, keepdim=True)


CASES = [
    Case("LayerNorm", lambda: nn.LayerNorm(WIDTH), standard),
    Case("GroupNorm", lambda: nn.GroupNorm(1, WIDTH), standard),
    Case("by_powers", lambda: Affine(by_powers), standard),
    Case(
        "RMSNorm",
        lambda: nn.RMSNorm(WIDTH, eps=1e-6),
        lambda x, w, b: x / (mean(x * x) + 1e-6).sqrt() * w,
    ),
    Case(
        "by_root_mean_square",
        lambda: Affine(by_root_mean_square),
        lambda x, w, b: x / (mean(x * x) + 1e-6).sqrt() * w + b,
    ),
    Case(
        "by_std",
        lambda: Affine(by_std),
        lambda x, w, b: (x - mean(x)) / (variance(x, 1).sqrt() + 1e-5) * w + b,
    ),
    Case(
        "response",
        lambda: Affine(response),
        lambda x, w, b: (x + x * x.abs() / (mean(x.abs()) + 1e-6)) * w + b,
    ),
    Case(
        "softmax",
        lambda: Affine(lambda x: x.softmax(-1)),
        lambda x, w, b: exponential(x) * w + b,
    ),
    Case(
        "log_softmax",
        lambda: Affine(lambda x: F.log_softmax(x, -1)),
        lambda x, w, b: exponential(x).log() * w + b,
    ),
    Case(
        "logsumexp",
        lambda: Affine(lambda x: x - x.logsumexp(-1, keepdim=True)),
        lambda x, w, b: exponential(x).log() * w + b,
    ),
    Case(
        "largest",
        lambda: Affine(lambda x: x - (-x * x).max(-1, keepdim=True)[0] - x.abs().amin(-1, True)),
        lambda x, w, b: (x + (x * x).sort(1)[0][:, :1] - x.abs().sort(1)[0][:, :1]) * w + b,
    ),
    Case(
        "sum",
        lambda: Affine(lambda x: x * x.cos().sum(-1, keepdim=True)),
        lambda x, w, b: x * sum(x[:, i : i + 1].cos() for i in range(x.shape[1])) * w + b,
    ),
    Case(
        "normalize",
        lambda: Affine(lambda x: x.cos() / x.cos().norm(dim=-1, keepdim=True)),
        lambda x, w, b: x.cos() / x.cos().square().sum(1, keepdim=True).sqrt() * w + b,
    ),
    Case(
        "attended",
        lambda: Affine(attended),
        lambda x, w, b: (
            x * torch.where(x > 0, x + 1, x.exp()).square().sum(1, keepdim=True) * w + b
        ),
    ),
]


class Between(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(5, WIDTH), norm, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.a(x)))


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised over their inputs, as in NFNets and BiT."""

    def __init__(self, i: int, o: int, how: str) -> None:
        super().__init__(i, o, 3, padding=1)
        self.how = how
        self.gain = nn.Parameter(torch.ones(o, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "batch norm":
            flat = self.weight.reshape(1, self.out_channels, -1)
            gain = self.gain.view(-1)
            w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
            weight = w.reshape_as(self.weight)
        else:
            v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
            weight = (self.weight - m) * torch.rsqrt(v + 1e-6) * self.gain
        return F.conv2d(x, weight, self.bias, padding=1)


class Convolutional(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 6, 3, padding=1),
            Standardised(6, WIDTH, how),
            Standardised(WIDTH, 4, how),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(F.gelu(self.a(x))))).mean((2, 3))


class Block(nn.Module):
    """A small transformer with a norm before each part, an attention over heads and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed = nn.Linear(6, 12)
        self.position = nn.Parameter(torch.rand(1, 5, 12))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(8, 12)
        self.norm2, self.up, self.down = nn.RMSNorm(12), nn.Linear(12, 20), nn.Linear(10, 12)
        self.norm3, self.head = nn.GroupNorm(1, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        b, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.num_heads, 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        up, gate = self.up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(up * gate.sigmoid())
        return self.head(self.norm3(x.transpose(1, 2)).mean(2))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{c.name: (lambda c=c: Between(c.norm()), (4, 5)) for c in CASES},  # type: ignore[misc]
    "by_sums": (lambda: Between(Affine(by_sums)), (4, 5)),
    "batch norm": (lambda: Convolutional("batch norm"), (2, 3, 5, 5)),
    "var_mean": (lambda: Convolutional("var_mean"), (2, 3, 5, 5)),
    "Block": (Block, (3, 5, 6)),
}
# Wrong, and yet the same function: scaling a weight that is standardised.
BLIND_TO_SCALE = {
    ("batch norm", "b.weight"),
    ("batch norm", "c.weight"),
    ("var_mean", "b.weight"),
    ("var_mean", "c.weight"),
}
each = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.cache
def analysed(name: str) -> tuple[nn.Module, Tensor, Structure]:
    """Model, inputs and structure; every parameter is random and far from zero."""
    make, shape = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) * 2 - 1)
            p.add_(0.3 * p.sign())
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return model, x, analyze(model, x)


@dataclass
class Pruned:
    """A dense model's structure, its masked and its slim version."""

    structure: Structure
    kept: dict[str, list[int]]
    masked: nn.Module
    small: nn.Module
    x: Tensor

    @classmethod
    def of(cls, name: str, seed: int = 0) -> Pruned:
        model, x, structure = analysed(name)
        generator = torch.Generator().manual_seed(seed)
        kept = {
            g.name: sorted(
                torch.randperm(g.num_channels, generator=generator)[
                    : max(2, g.num_channels // 2)
                ].tolist()
            )
            for g in structure.groups
        }
        masked = masked_copy(model, structure.masks(kept))
        return cls(structure, kept, masked, slim(model, structure, kept), x)

    def verdict(self, slim: nn.Module | None = None) -> Verdict:
        small = self.small if slim is None else slim
        return verify(self.masked, small, self.x, structure=self.structure, kept=self.kept)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_reference_is_the_formula_over_kept_channels(case: Case) -> None:
    model, x, structure = analysed(case.name)
    assert isinstance(model, Between)
    kept = [1, 2, 4, 7]
    masked = masked_copy(model, structure.masks({"a": kept}))
    reference = run_on_kept(masked, structure, {"a": kept}, (x,), {})
    with torch.no_grad():
        a, c = model.a, model.c
        channels = x @ a.weight[kept].T + a.bias[kept]
        weight = model.norm.weight[kept]
        bias = model.norm.bias[kept] if hasattr(model.norm, "bias") else torch.zeros(4)
        expected = case.formula(channels, weight, bias) @ c.weight[:, kept].T + c.bias
        assert not torch.allclose(masked(x), expected, rtol=1e-3)
    torch.testing.assert_close(reference.output, expected, rtol=1e-12, atol=1e-12)
    assert reference.operations


def test_numbers_worked_out_by_hand() -> None:
    """Channels (1, 2, 3, 4) of which 0 and 2 are kept: mean 2, variance 1; and softmax."""
    model = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4, eps=0), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 2, 3, 4]))
        model[2].weight.copy_(torch.tensor([[1.0, 5, 0, 5], [0, 5, 1, 5]]))
        model[2].bias.zero_()
    x = torch.zeros(1, 1, dtype=torch.float64)
    structure = analyze(model, x)
    masked = masked_copy(model, structure.masks({"0": [0, 2]}))
    assert run_on_kept(masked, structure, {"0": [0, 2]}, (x,), {}).output.tolist() == [[-1, 1]]


@each
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_slim_equals_the_reference(name: str, seed: int) -> None:
    verdict = Pruned.of(name, seed).verdict()
    assert verdict.kind == "inexact", verdict
    assert verdict.max_error > 1e-6
    assert verdict.reference_error is not None and verdict.reference_error < 1e-11


@each
def test_two_kept_indices_swapped_in_one_parameter_are_found(name: str) -> None:
    pruned = Pruned.of(name)
    for parameter, dim in pruned.structure.keep_vectors(pruned.kept):
        small = copy.deepcopy(pruned.small)
        value = small.get_parameter(parameter).data
        order = torch.arange(value.shape[dim])
        order[:2] = torch.tensor([1, 0])
        value.copy_(value.index_select(dim, order))
        assert pruned.verdict(small).kind == "wrong", (parameter, dim)


@each
def test_a_slice_of_other_channels_is_found(name: str) -> None:
    pruned = Pruned.of(name)
    dense, _, _ = analysed(name)
    for (parameter, dim), keep in pruned.structure.keep_vectors(pruned.kept).items():
        small = copy.deepcopy(pruned.small)
        value = small.get_parameter(parameter).data
        # The channels next to the kept ones, cut along this dim alone.
        wrong = dense.get_parameter(parameter).data
        for d, size in enumerate(value.shape):
            mine = pruned.structure.keep_vectors(pruned.kept).get((parameter, d))
            index = torch.arange(size) if mine is None else torch.from_numpy(mine.nonzero()[0])
            if d == dim:
                index = torch.from_numpy((~keep).nonzero()[0])[:size]
            wrong = wrong.index_select(d, index)
        assert wrong.shape == value.shape  # half of everything is kept
        value.copy_(wrong)
        assert pruned.verdict(small).kind == "wrong", (parameter, dim)


@each
def test_a_wrong_scale_is_found(name: str) -> None:
    pruned = Pruned.of(name)
    for parameter, _ in pruned.small.named_parameters():
        if (name, parameter) in BLIND_TO_SCALE:
            continue
        small = copy.deepcopy(pruned.small)
        small.get_parameter(parameter).data.mul_(1.001)
        assert pruned.verdict(small).kind == "wrong", parameter
    small = copy.deepcopy(pruned.small)
    next(small.parameters()).data.view(-1)[0] = float("nan")
    verdict = pruned.verdict(small)
    assert verdict.kind == "wrong" and verdict.max_error == float("inf")


@each
def test_groups_that_are_reduced_over_say_so(name: str) -> None:
    pruned = Pruned.of(name)
    if name == "attended":  # a product of activations; only the run shows that f(0) counts
        assert all(g.exact for g in pruned.structure.groups)
    else:
        assert any(not g.exact and g.reason for g in pruned.structure.groups)


def test_a_model_that_is_not_masked_is_no_reference() -> None:
    model, x, structure = analysed("LayerNorm")
    kept = {"a": [0, 3, 5]}
    with pytest.raises(StructureError, match=r"isn't zero where `kept` says so: 'a\.weight'"):
        run_on_kept(model, structure, kept, (x,), {})
    verdict = verify(model, slim(model, structure, kept), x, structure=structure, kept=kept)
    assert verdict.kind == "wrong" and verdict.reference_error is None


def test_other_indices_than_slim_got_are_found() -> None:
    pruned = Pruned.of("LayerNorm")
    other = sorted({*range(WIDTH)} - {*pruned.kept["a"]})
    verdict = verify(
        pruned.masked, pruned.small, pruned.x, structure=pruned.structure, kept={"a": other}
    )
    assert verdict.kind == "wrong"


def test_whole_groups_of_a_group_norm_go_without_a_trace() -> None:
    model = Between(nn.GroupNorm(4, WIDTH)).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    structure = analyze(model, x)
    kept = {structure.groups[0].name: [1, 3]}
    masked = masked_copy(model, structure.masks(kept))
    reference = run_on_kept(masked, structure, kept, (x,), {})
    assert reference.operations == ()
    torch.testing.assert_close(reference.output, masked(x), rtol=0, atol=0)
    small = slim(model, structure, kept)
    assert verify(masked, small, x, structure=structure, kept=kept).kind == "exact"


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        channels = self.a(x)
        return channels.argmax(1), channels.min(1)[1], channels.median(1, True)[1]


def test_positions_are_those_of_the_dense_model() -> None:
    """Channel 5 stays channel 5: a slim model would call it 3, so no channel may go."""
    model = Positions().double()
    structure = analyze(model, torch.randn(4, 5, dtype=torch.float64))
    assert not structure.groups
    assert structure.frozen[0].reason.startswith("slim is wrong: differs by")


class Counting(nn.Module):
    """Divides a sum by a number that stands in its code."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by
        self.a, self.c = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x - x.cos().sum(1, keepdim=True).div_(self.by))


def test_a_divisor_is_the_dense_number_or_the_kept_one_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = Counting(WIDTH).double(), torch.randn(4, 5, dtype=torch.float64)
    structure = analyze(model, x)
    kept = {"a": [0, 2, 7]}
    masked = masked_copy(model, structure.masks(kept))
    with torch.no_grad():
        a, c = model.a, model.c
        channels = x @ a.weight[kept["a"]].T + a.bias[kept["a"]]
        for by_kept, by in ((False, 8), (True, 3)):
            reference = run_on_kept(masked, structure, kept, (x,), {}, by_kept=by_kept)
            values = channels - channels.cos().sum(1, keepdim=True) / by
            expected = values @ c.weight[:, kept["a"]].T + c.bias
            assert reference.divides
            torch.testing.assert_close(reference.output, expected, rtol=1e-12, atol=1e-12)
    kinds = {}
    for by in (8, 3, 4, 8.001, 7):
        small = slim(model, structure, kept)
        small.by = by
        kinds[by] = verify(masked, small, x, structure=structure, kept=kept).kind
    assert kinds == {8: "inexact", 3: "inexact", 4: "wrong", 8.001: "wrong", 7: "wrong"}
