"""What runs in training only is cut with the rest."""

from __future__ import annotations

import torch
from pruned import prune
from torch import Tensor, nn

from raycompress.structure import analyze


class Auxiliary(nn.Module):
    """A head that reads inner channels in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.aux = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(self.stem(x)).relu()
        return (self.head(x), self.aux(x)) if self.training else (self.head(x),)


def images(batch: int) -> tuple[Tensor]:
    return (torch.rand(batch, 3, 6, 6).double(),)


def test_a_head_that_runs_in_training_only_is_cut_and_trains() -> None:
    result = prune(Auxiliary(), images, removed=0.4, macs=False)
    members = {(m.parameter, m.dim) for m in result.structure.group("stem").members}
    assert ("aux.0.weight", 1) in members
    assert result.structure.group("aux.0").num_channels == 6
    assert not result.structure.untouched
    result.slim.train()
    out, aux = result.slim(*images(2))
    (out.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in result.slim.parameters())


def test_the_second_pass_costs_nothing_and_moves_nothing() -> None:

    model = Auxiliary().double().train()
    before = model.norm.running_mean.clone()
    structure = analyze(model, images(2))
    assert torch.equal(model.norm.running_mean, before) and model.norm.num_batches_tracked == 0
    assert model.training and model.aux.training
    model.eval()
    bare = Auxiliary().double()
    bare.aux = nn.Identity()
    assert structure.cost().macs == analyze(bare, images(2)).cost().macs


class NeedsTargets(Auxiliary):
    """Asks for more in training than it is given."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.training and target is None:
            raise ValueError("targets are needed in training")
        return (self.head(self.norm(self.stem(x)).relu()),)


def test_a_branch_that_cannot_run_is_reported_as_untouched() -> None:

    structure = analyze(NeedsTargets(), (torch.rand(2, 3, 6, 6),))
    assert set(structure.untouched) == {
        "aux.0.weight",
        "aux.0.bias",
        "aux.2.weight",
        "aux.2.bias",
    }
