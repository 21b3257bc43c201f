"""Codes and bytes are exact inverses, for every code, width and shape."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.ops.kv.packing import LEVELS, UNITS, pack, packed_bytes, unpack

BITS = st.sampled_from(sorted(LEVELS))


@settings(deadline=None, max_examples=40)
@given(bits=BITS, channels=st.integers(1, 150), tokens=st.integers(0, 4), seed=st.integers(0, 1 << 30))
def test_unpacking_undoes_packing(bits: float, channels: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(LEVELS[bits], (tokens, 2, channels), generator=generator, dtype=torch.uint8)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8
    assert data.shape == (tokens, 2, packed_bytes(channels, bits))
    assert torch.equal(unpack(data, bits, channels), codes)


@pytest.mark.parametrize("bits", [1.5, 2, 4])
def test_every_unit_of_codes_has_a_byte_of_its_own(bits: float) -> None:
    count, _ = UNITS[bits]
    units = torch.tensor(list(itertools.product(range(LEVELS[bits]), repeat=count)), dtype=torch.uint8)
    data = pack(units, bits)
    assert data.unique().numel() == len(units)
    assert torch.equal(unpack(data, bits, count), units)


def test_the_layout_is_the_documented_one() -> None:
    def packed(codes: list[int], bits: float) -> list[int]:
        return pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()

    assert packed([1, 2, 3, 0, 2], 2) == [1 + 4 * 2 + 16 * 3, 2]
    assert packed([5, 9, 15], 4) == [5 + 16 * 9, 15]
    assert packed([2, 1, 0, 2, 1, 2], 1.5) == [2 + 3 + 27 * 2 + 81, 2]
    assert packed([2] * 5, 1.5) == [242]
    number = sum(code << 3 * i for i, code in enumerate(range(8)))
    assert packed(list(range(8)), 3) == list(number.to_bytes(3, "little"))


@settings(deadline=None, max_examples=40)
@given(bits=BITS, heads=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_a_head_is_packed_by_itself(bits: float, heads: int, seed: int) -> None:
    """64 channels are no multiple of 5: a head must not share its last byte with the next one."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(LEVELS[bits], (1, heads, 64), generator=generator, dtype=torch.uint8)
    data = pack(codes, bits)
    for head in range(heads):
        assert torch.equal(pack(codes[:, head], bits), data[:, head])


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        pack(torch.tensor([3], dtype=torch.uint8), 1.5)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.tensor([1]), 2)
    with pytest.raises(ValueError, match=r"allowed: 1\.5, 2, 3, 4"):
        pack(torch.tensor([1], dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match=r"bits is 1"):
        unpack(torch.zeros(2, dtype=torch.uint8), 1, 4)
    with pytest.raises(ValueError, match=r"take 13"):
        unpack(torch.zeros(12, dtype=torch.uint8), 1.5, 64)
