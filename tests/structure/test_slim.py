"""slim(x) == masked(x), on architectures with every parameter and buffer randomised."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import EXACT
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raycompress.structure import Structure, analyze, expand, slim, verify


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gains and variances away from zero, so that no wrong surgery can hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator) + 0.5
            tensor.copy_(values if "running_var" in name else values - 1)
    return model.double().eval()


def half(structure: Structure, seed: int = 0) -> dict[str, Tensor]:
    """Random, non-leading channels: half of each group, rounded up."""
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: torch.randperm(g.num_channels, generator=generator)[: (g.num_channels + 1) // 2]
        for g in structure.groups
    }


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    result = copy.deepcopy(model)
    for name, mask in masks.items():
        result.get_parameter(name).data.mul_(mask)
    return result


@pytest.fixture(params=EXACT, ids=lambda c: c.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomised(request.param())


@pytest.fixture
def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def test_slim_equals_masked_on_other_inputs_and_batch_size(
    model: nn.Module, example: Tensor
) -> None:
    structure = analyze(model, (example,))
    kept = half(structure)
    small = slim(model, structure, kept)
    other = torch.randn(5, 3, 8, 8).double()
    verdict = verify(masked(model, structure.masks(kept)), small, (other,), structure=structure)
    assert verdict.kind == "exact" and verdict.max_error < 1e-10, verdict
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < 0.65 * before
    assert not structure.unknown_ops and not structure.untouched


def test_cost_equals_counting_on_the_slim_model(model: nn.Module, example: Tensor) -> None:
    structure = analyze(model, (example,))
    kept = half(structure)
    for candidate, counts in (
        (model, None),
        (slim(model, structure, kept), {k: len(v) for k, v in kept.items()}),
    ):
        cost = structure.cost(counts)
        assert cost.params == sum(p.numel() for p in candidate.parameters())
        # The fused CPU kernel isn't in the counter's table.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            candidate(example)
        assert 2 * cost.macs * len(example) == flops.get_total_flops()
        fresh = analyze(candidate, (example,)).cost()
        assert cost == fresh
        table = structure.cost_table(counts)
        assert sum(r.params for r in table) == cost.params


def test_masks_and_kept_are_inverse(model: nn.Module, example: Tensor) -> None:
    structure = analyze(model, (example,))
    kept = half(structure)
    back = structure.kept(structure.masks(kept))
    assert {k: v.tolist() for k, v in back.items()} == {
        k: sorted(v.tolist()) for k, v in kept.items() if len(v) < structure.group(k).num_channels
    }


def test_expand_gives_a_dense_model_that_computes_the_same(
    model: nn.Module, example: Tensor
) -> None:
    structure = analyze(model, (example,))
    kept = half(structure)
    small = slim(model, structure, kept)
    dense = copy.deepcopy(model)
    dense.load_state_dict(expand(structure, model, small.state_dict(), kept))
    assert verify(dense, small, (example,)).max_error < 1e-10


def test_slim_model_trains(model: nn.Module, example: Tensor) -> None:
    structure = analyze(model, (example,))
    small = slim(model, structure, half(structure)).train()
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(example).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert type(small) is type(model)


def test_analysis_leaves_the_model_alone_and_is_picklable(
    model: nn.Module, example: Tensor
) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    structure = analyze(model, (example,))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = pickle.loads(pickle.dumps(structure))
    assert again.cost() == structure.cost()
    copy.deepcopy(model)


class Rotary(nn.Module):
    """Slices of heads, one of which is empty, and elements picked at the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 24)
        self.mix, self.head = nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q = self.q(x).unflatten(-1, (-1, 6))
        q = torch.cat([q[..., :6] * 2, q[..., 6:]], -1).flatten(2)
        out = self.mix(q * (1 + x[..., :1] + x[..., -1].unsqueeze(-1)))
        return self.head(out).mean(1)


def test_an_empty_slice_and_picked_ends_leave_the_rest_free(example: Tensor) -> None:
    model = randomised(Rotary())
    structure = analyze(model, (example,), form="module")
    kept = half(structure)
    small = slim(model, structure, kept)
    dense = masked(model, structure.masks(kept))
    assert verify(dense, small, (example,)).kind == "exact"
    # The first and the last of 12 channels are read by index.
    assert structure.group("embed").num_channels == 10
