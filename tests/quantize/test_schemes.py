"""Schemes, and the packed formats that hold what they round to."""

import pytest
import torch

from tenfold.ops.formats import FP8_MAX
from tenfold.quantize.gptq import gptq
from tenfold.quantize.schemes import WIDE, format_of_scheme, grid_of, packed, parse, round_to_nearest


def random(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize(
    "name",
    [
        *("w1g64z", "w1g128z", "w2g64z", "w2g128", "w3", "w3g32z", "w4g128z", "w4", "w4a8", "w4g128a8"),
        *("w8", "w8g128z", "w8g32za8", "fp8", "fp8a8", "fp8g128a8"),
    ],
)
def test_what_is_rounded_is_what_a_format_holds(name: str) -> None:
    scheme, w = parse(name), random(24, 256)
    format, grid = format_of_scheme(scheme), grid_of(w, scheme)
    x = random(300, 256, seed=1)
    for rounded in (round_to_nearest(w, scheme), gptq(w, x.T @ x / 300, scheme)):
        held = packed(rounded, grid)
        assert torch.equal(format.unpack(held), rounded)
        assert held.scales.dtype == (torch.float32 if scheme.float8 else torch.float16)
        assert sum(t.numel() * t.element_size() for t in held.tensors()) == format.nbytes(24, 256)
    assert format.nbytes(24, 256) * 8 == pytest.approx(24 * 256 * scheme.stored_bits(256))


def test_what_no_format_holds() -> None:
    with pytest.raises(ValueError, match="w5g32 cannot be stored; formats have 1, 2, 3, 4, 8 bits"):
        format_of_scheme(parse("w5g32"))
    for name, lacks in (("w1g128", "zeros"), ("w1z", "groups"), ("w1", "zeros")):
        with pytest.raises(ValueError, match=f"lacks {lacks}, and two levels need"):
            format_of_scheme(parse(name))
    scheme, w = parse("w3g32"), random(4, 64)
    with pytest.raises(ValueError, match="64 columns are no multiple of 128"):
        packed(round_to_nearest(w, scheme), grid_of(w, scheme))


@pytest.mark.parametrize("shift", [0.0, 0.1, -30.0, 3000.0])
def test_two_levels_anywhere_are_held(shift: float) -> None:
    """Zeros are fractions, and far from zero a group's spread is what 16 bits can say beside it."""
    scheme, w = parse("w1g128z"), random(8, 256, seed=3) + shift
    w[0] = shift
    grid = grid_of(w, scheme)
    assert torch.equal(grid.zeros, grid.zeros.half().float())
    assert grid.zeros.isfinite().all()
    held = packed(round_to_nearest(w, scheme), grid)
    got = format_of_scheme(scheme).unpack(held)
    assert torch.equal(got, round_to_nearest(w, scheme))
    assert (got.mean(1) - w.mean(1)).abs().max() <= 0.1 + 2e-3 * abs(shift)


def test_float8_is_the_nearest_but_for_the_range() -> None:
    """Three bits behind the leading one: half a step is a sixteenth of a number. A row of zeros stays one."""
    w, scheme = random(8, 256), parse("fp8a8")
    w[3] = 0
    w[4] *= 1e-30
    rounded = round_to_nearest(w, scheme, WIDE)
    steps = torch.maximum(w.abs() / 16, w.abs().amax(1, keepdim=True) / FP8_MAX * 2**-10)
    assert ((rounded - w).abs() <= 1.001 * steps).all()
    assert (rounded - w).square().sum() <= (round_to_nearest(w, scheme, (0.9,)) - w).square().sum()
    assert (round_to_nearest(w, scheme) - w).square().sum() <= (rounded - w).square().sum()


def test_names() -> None:
    for name in ("w4g128za8", "fp8", "fp8g128a8"):
        assert str(parse(name)) == name
    names = "w4a8", "w4g128a8", "fp8a8", "fp8", "w4", "w8a8", "w3a8", "w4za8"
    assert {name for name in names if parse(name).eights} == {"w4a8", "w4g128a8", "fp8a8"}
    with pytest.raises(ValueError, match="fp8 has no zeros"):
        format_of_scheme(parse("fp8z"))
    with pytest.raises(ValueError, match="no scheme; allowed"):
        parse("int4")
