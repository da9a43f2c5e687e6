import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raycompress.quantization.bnn import binarize
from raycompress.quantization.lowering.binary import pack_signs, sign_thresholds, xnor_matmul


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_xnor_and_popcount_equal_the_matmul_of_signs(num, examples, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = binarize(torch.randn(examples, num, generator=generator))
    w = binarize(torch.randn(outputs, num, generator=generator))
    assert torch.equal(xnor_matmul(pack_signs(x), pack_signs(w), num).float(), x @ w.T)
    assert torch.equal(xnor_matmul(pack_signs(x), pack_signs(-w), num).float(), -(x @ w.T))


def test_norm_and_sign_are_a_comparison_turned_round_where_gamma_is_negative():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(40).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(40))
        norm.weight[:2] = 0
        norm.bias.copy_(torch.randn(40))
        norm.bias[:2] = torch.tensor([0.0, -0.1])
        norm.running_mean.copy_(torch.randn(40) * 5)
        norm.running_var.copy_(torch.rand(40) * 9 + 0.1)
    x = torch.randint(-30, 31, (500, 40)).double()  # what xnor_matmul returns
    thresholds, turned = sign_thresholds(norm)
    above = torch.where(turned, x <= thresholds, x >= thresholds)
    assert turned.any() and not turned.all()
    assert torch.equal(torch.where(above, 1.0, -1.0).double(), binarize(norm(x)))


def test_a_norm_without_statistics_has_no_threshold():
    with pytest.raises(ValueError, match="without running statistics"):
        sign_thresholds(nn.BatchNorm1d(3, track_running_stats=False))
