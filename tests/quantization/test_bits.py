import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycompress.quantization.lowering import bits as packing
from raycompress.quantization.lowering.bits import pack, packed_bytes, unpack


def test_bytes_by_hand():
    # Three bits each, low bits first: 5 = 101, 3 = 011, 7 = 111 -> 1111 0111 01 read backwards.
    assert pack(torch.tensor([5, 3, 7]), 3).tolist() == [0b11011101, 0b1]
    assert pack(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1]), 1).tolist() == [0b10001101, 1]
    assert pack(torch.tensor([0xA, 0x5]), 4).tolist() == [0x5A]


@given(
    st.integers(1, 8),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_round_trip_for_any_bits_and_shape(bits, shape, seed):
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_bytes(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, codes.numel()).view(shape).long(), codes)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_large_tensors_go_in_parts(bits, monkeypatch):
    codes = torch.randint(2**bits, (999,))
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 64)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 999).long(), codes)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"codes of 2 bits must be in \[0, 3\], got 0 to 4"):
        pack(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        pack(torch.tensor([0]), 9)
    with pytest.raises(ValueError, match="5 codes of 3 bits take 2 bytes of uint8, got"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
