"""Schemes, and the packed formats that hold what they round to."""

import pytest
import torch

from tenfold.quantize.gptq import gptq
from tenfold.quantize.schemes import format_of_scheme, grid_of, packed, parse, round_to_nearest


def random(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("name", ["w2g64z", "w2g128", "w3", "w3g32z", "w4g128z", "w4", "w8", "w8g128z", "w8g32za8"])
def test_what_is_rounded_is_what_a_format_holds(name: str) -> None:
    scheme, w = parse(name), random(24, 256)
    format, grid = format_of_scheme(scheme), grid_of(w, scheme)
    x = random(300, 256, seed=1)
    for rounded in (round_to_nearest(w, scheme), gptq(w, x.T @ x / 300, scheme)):
        held = packed(rounded, grid)
        assert torch.equal(format.unpack(held), rounded)
        assert held.scales.dtype == torch.float16
        assert sum(t.numel() * t.element_size() for t in held.tensors()) == format.nbytes(24, 256)
    assert format.nbytes(24, 256) * 8 == pytest.approx(24 * 256 * scheme.stored_bits(256))


def test_what_no_format_holds() -> None:
    with pytest.raises(ValueError, match="w5g32 cannot be stored; formats have 2, 3, 4, 8 bits"):
        format_of_scheme(parse("w5g32"))
    scheme, w = parse("w3g32"), random(4, 64)
    with pytest.raises(ValueError, match="64 columns are no multiple of 128"):
        packed(round_to_nearest(w, scheme), grid_of(w, scheme))


def test_names() -> None:
    assert str(parse("w4g128za8")) == "w4g128za8"
    with pytest.raises(ValueError, match="no scheme; allowed"):
        parse("int4")
