import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycompress.errors import ConfigError, TaskError
from raycompress.quantization.fake_quant import (
    FakeQuantize,
    Grid,
    integer_range,
    make_grid,
    observe_ranges,
)

numbers = st.floats(-1e4, 1e4, allow_nan=False, width=32)


def _grid(low: float, high: float, bits: int, symmetric: bool = False) -> Grid:
    return make_grid(
        torch.tensor(low, dtype=torch.float64),
        torch.tensor(high, dtype=torch.float64),
        bits,
        symmetric,
    )


def test_affine_grids_by_hand():
    grid = _grid(-1.0, 2.0, 2)  # S = 3 / 3, Z = 0 + 1 / 1
    assert (float(grid.scale), int(grid.zero_point)) == (1.0, 1)
    grid = _grid(-0.3, 1.2, 4)  # S = 1.5 / 15, Z = 0.3 / 0.1
    assert float(grid.scale) == pytest.approx(0.1) and int(grid.zero_point) == 3
    x = torch.tensor([-9.0, -0.3, -0.26, 0.0, 0.04, 0.06, 1.2, 9.0], dtype=torch.float64)
    assert grid.integers(x).tolist() == [0, 0, 0, 3, 3, 4, 15, 15]
    expected = [-0.3, -0.3, -0.3, 0, 0, 0.1, 1.2, 1.2]
    assert grid.fake(x).tolist() == pytest.approx(expected)
    assert grid.real(grid.integers(x), torch.float64).tolist() == pytest.approx(expected)


def test_a_range_away_from_zero_is_widened():
    assert float(_grid(1.0, 5.1, 8).scale) == pytest.approx(0.02)
    assert int(_grid(1.0, 5.1, 8).zero_point) == 0
    assert float(_grid(-5.1, -1.0, 8).scale) == pytest.approx(0.02)
    assert int(_grid(-5.1, -1.0, 8).zero_point) == 255


def test_symmetric_int8_leaves_out_its_lowest_number():
    assert integer_range(8, symmetric=True) == (-127, 127)
    grid = _grid(-1.27, 0.5, 8, symmetric=True)
    assert float(grid.scale) == pytest.approx(0.01) and int(grid.zero_point) == 0
    x = torch.tensor([-5.0, -1.27, 0.004, 0.006, 5.0], dtype=torch.float64)
    assert grid.integers(x).tolist() == [-127, -127, 0, 1, 127]


def test_channels_have_grids_of_their_own():
    grid = make_grid(torch.tensor([-1.27, -12.7]), torch.tensor([0.0, 1.0]), 8, True, dim=0)
    x = torch.tensor([[-1.27, 0.5], [-12.7, 0.5]])
    assert grid.integers(x).tolist() == [[-127, 50], [-127, 5]]
    assert torch.allclose(grid.fake(x), x)


@settings(deadline=None)
@given(numbers, numbers, st.integers(2, 8), st.booleans(), st.lists(numbers, max_size=20))
def test_properties_of_any_range(one, other, bits, symmetric, values):
    low, high = min(one, other), max(one, other)
    grid = _grid(low, high, bits, symmetric)
    x = torch.tensor([0.0, low, high, *values], dtype=torch.float64)
    y = grid.fake(x)
    scale = float(grid.scale)
    assert y[0] == 0  # exactly
    assert torch.equal(grid.fake(y), y)
    assert len(set(y.tolist())) <= 2**bits
    bottom = (grid.low - int(grid.zero_point)) * scale
    top = (grid.high - int(grid.zero_point)) * scale
    inside = (x >= bottom) & (x <= top)
    error = (y - x).abs()
    assert (error[inside] <= scale / 2 * (1 + 1e-9)).all()
    assert (y >= bottom).all() and (y <= top).all()
    # Nudging moves the ends by half a step at most, so all of the range is within a step.
    assert error[:3].max() <= scale * (1 + 1e-9)


@settings(deadline=None)
@given(numbers, numbers, st.integers(2, 8), st.lists(numbers, min_size=1, max_size=20))
def test_the_gradient_is_one_within_the_range_and_zero_outside(one, other, bits, values):
    grid = _grid(min(one, other), max(one, other), bits)
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(1, 2, len(values), dtype=torch.float64)
    grid.fake(x).backward(upstream)
    bottom = (grid.low - int(grid.zero_point)) * float(grid.scale)
    top = (grid.high - int(grid.zero_point)) * float(grid.scale)
    inside = (x >= bottom) & (x <= top)
    assert torch.equal(x.grad, torch.where(inside, upstream, 0.0))


def test_nothing_but_zeros():
    quantizer = FakeQuantize("x", 8, symmetric=False)
    assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]
    assert float(quantizer.scale) == 1


def test_ranges_are_followed_during_the_delay_and_nothing_is_rounded():
    quantizer = FakeQuantize("x", 8, symmetric=False, decay=0.75, start_step=2)
    first, second = torch.tensor([-1.0, 3.0]), torch.tensor([0.5, 7.0])
    assert quantizer(first) is first and quantizer(second) is second
    # The observed 0.5, not the 0 that the grid is widened to.
    assert float(quantizer.low) == 0.75 * -1 + 0.25 * 0.5
    assert float(quantizer.high) == 0.75 * 3 + 0.25 * 7
    assert int(quantizer.steps) == 2
    x = torch.tensor([0.01234])
    assert quantizer.eval()(x) != x  # the delay is over
    assert not quantizer.train()(x).equal(x)


def test_eval_reads_and_training_writes():
    quantizer = FakeQuantize("x", 8, symmetric=False)
    quantizer(torch.tensor([-1.0, 1.0]))
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.eval()(torch.tensor([-100.0, 100.0]))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    quantizer.train()(torch.tensor([-100.0, 100.0]))
    assert float(quantizer.high) == 100


def test_the_scale_alone_decides_what_comes_out():
    quantizer = FakeQuantize("x", 8, symmetric=True)
    quantizer(torch.tensor([-1.27, 1.27]))
    quantizer.eval().scale.mul_(2)
    assert quantizer(torch.tensor([0.05])).item() == pytest.approx(0.04)


def test_without_data_there_is_no_range():
    quantizer = FakeQuantize("the input of 'conv1'", 8, symmetric=False).eval()
    with pytest.raises(TaskError, match="the input of 'conv1' has no range: it saw neither"):
        quantizer(torch.ones(2))
    with pytest.raises(TaskError, match="aren't finite"):
        quantizer.train()(torch.tensor([1.0, float("nan")]))


def test_a_state_dict_carries_range_and_delay():
    quantizer = FakeQuantize("x", 8, symmetric=False, start_step=1)
    quantizer(torch.tensor([-1.0, 1.0]))
    other = FakeQuantize("x", 8, symmetric=False, start_step=1).eval()
    other.load_state_dict(quantizer.state_dict())
    x = torch.tensor([0.01234])
    assert other(x) == quantizer.eval()(x) != x


def test_calibration_takes_minima_and_maxima_of_the_model_in_float():
    first, second = (FakeQuantize(name, 2, symmetric=False).eval() for name in "ab")
    model = torch.nn.Sequential(first, second).eval()
    batches = [torch.tensor([-1.0, 0.3]), torch.tensor([0.1, 2.0])]
    observe_ranges(model, lambda m, batch: m(batch), batches)
    for quantizer in (first, second):  # the second saw what the first was given, not its grid
        assert (float(quantizer.low), float(quantizer.high)) == (-1, 2)
        assert not quantizer._forward_hooks and int(quantizer.steps) == 0


@pytest.mark.parametrize("bits", [1, 9, 8.0, True])
def test_bits_out_of_range(bits):
    with pytest.raises(ConfigError, match="bits of x must be an integer between 2 and 8, got"):
        FakeQuantize("x", bits, symmetric=False)
