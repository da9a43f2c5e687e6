import torch

from raycompress.quantization.bnn import binarize


def test_signs_of_zeros_are_one_and_nan_stays():
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    assert binarize(x).tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    assert binarize(torch.tensor([float("nan")])).isnan().all()


def test_the_gradient_is_zero_exactly_where_x_is_beyond_one():
    x = torch.tensor([-1.5, -1.0, -0.3, 0.0, 1.0, 1.0001], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    binarize(x).backward(upstream)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]
