import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raycompress.errors import StructureError
from raycompress.masks import hold, load_masks, masked_copy, num_kept, prune_order, save_masks


@pytest.mark.parametrize(
    ("num", "sparsity", "round_to", "kept"),
    [(10, 0.3, 1, 7), (10, 0.5, 8, 8), (7, 0.5, 1, 4), (4, 0.99, 1, 1), (10, 0.0, 1, 10)],
)
def test_num_kept_by_hand(num, sparsity, round_to, kept):
    assert num_kept(num, sparsity, round_to=round_to) == kept


@given(st.integers(1, 500), st.floats(0, 0.999), st.integers(1, 16))
def test_num_kept_is_within_bounds(num, sparsity, round_to):
    kept = num_kept(num, sparsity, round_to=round_to)
    assert 1 <= kept <= num
    assert kept == num or kept % round_to == 0
    assert kept >= num - int(num * sparsity + 1e-9)


def test_ties_break_by_index():
    assert prune_order(torch.ones(5)).tolist() == [0, 1, 2, 3, 4]
    assert prune_order(torch.tensor([2.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="NaN"):
        prune_order(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_held_weights_stay_zero_through_fifty_steps(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    masks = {"0.weight": torch.rand(8, 6) > 0.5, "2.weight": torch.rand(3, 8) > 0.5}
    parameters = model.parameters()
    optimizer = (
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
        if kind == "sgd"
        else torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01)
    )
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(5):
        step()  # momentum that would revive what is masked
    keys = list(model.state_dict())
    with hold(model, masks):
        for _ in range(50):
            before = model[0].weight.detach().clone()
            step()
            for name, mask in masks.items():
                assert torch.all(model.get_parameter(name)[~mask] == 0)
        assert not torch.equal(before, model[0].weight)
        assert list(copy.deepcopy(model).state_dict()) == keys
    step()
    assert torch.any(model[0].weight[~masks["0.weight"]] != 0)  # let go


def test_save_and_load(tmp_path):
    masks = {"a.weight": torch.rand(3, 4) > 0.5}
    save_masks(masks, tmp_path / "m.safetensors")
    assert torch.equal(load_masks(tmp_path / "m.safetensors")["a.weight"], masks["a.weight"])
    (tmp_path / "bad").write_bytes(b"not masks")
    with pytest.raises(StructureError, match="can't be read"):
        load_masks(tmp_path / "bad")


def test_wrong_masks_are_named():
    model = nn.Linear(3, 2)
    with pytest.raises(StructureError, match="'wait' names no parameter"):
        masked_copy(model, {"wait": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(StructureError, match=r"shape \(2, 3\)"):
        masked_copy(model, {"weight": torch.ones(3, 2, dtype=torch.bool)})
