"""The bound of `tests/rounding.py` holds for the arithmetic of the kernels, emulated, and for no faulty kernel."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tenfold.ops.formats import Packed, format_of
from tests.rounding import excess

TYPES = [torch.bfloat16, torch.float16]
FORMATS = ["int4", "int4g128z", "int8g128", "fp8"]
ROWS, COLS, TOKENS = 96, 1024, 64


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Packed]:
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(ROWS, COLS, generator=generator) / COLS**0.5 + 0.02
    return torch.randn(TOKENS, COLS, generator=generator).to(dtype), format_of(name).pack(dense)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_right_products_stay_inside(name: str, dtype: torch.dtype) -> None:
    x, packed = drawn(name, dtype)
    w = format_of(name).unpack(packed).double()
    exact = (x.double() @ w.T).float().to(dtype)
    rounded = (x.double() @ w.to(dtype).double().T).float().to(dtype)
    assert 0.4 < excess(exact, x, w, dtype) <= 1
    assert excess(rounded, x, w, dtype, weights=True) <= 0.8
    assert excess(rounded, x, w, dtype) > 1  # who promises not to round weights is held to it


def shifted_scale(packed: Packed) -> Packed:
    scales = packed.scales.clone()
    scales[7, 0] *= 1.0625
    return packed._replace(scales=scales)


def neighbours_scale(packed: Packed) -> Packed:
    return packed._replace(scales=packed.scales.roll(1, 0))


def swapped_codes(packed: Packed) -> Packed:
    """Two neighbouring columns of one row change places: in int4, two nibbles of a byte."""
    kind = "int4" if packed.codes.dtype == torch.int32 else "int8"
    codes = format_of(kind).codes.load(packed.codes.view(torch.int8) if kind == "int8" else packed.codes).clone()
    apart = (codes[3, 0::2].int() - codes[3, 1::2].int()).abs().argmax() * 2
    codes[3, [apart, apart + 1]] = codes[3, [apart + 1, apart]]
    return packed._replace(codes=format_of(kind).codes.store(codes).view(packed.codes.dtype))


def no_zeros(packed: Packed) -> Packed:
    assert packed.zeros is not None
    return packed._replace(zeros=torch.full_like(packed.zeros, 8))


FAULTS: list[Callable[[Packed], Packed]] = [shifted_scale, neighbours_scale, swapped_codes]


@pytest.mark.parametrize("weights", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "fault"),
    [(n, f) for n in FORMATS for f in FAULTS] + [("int4g128z", no_zeros)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_faulty_products_do_not(
    name: str, fault: Callable[[Packed], Packed], dtype: torch.dtype, weights: bool
) -> None:
    x, packed = drawn(name, dtype)
    format = format_of(name)
    wrong = (x.double() @ format.unpack(fault(packed)).double().T).float().to(dtype)
    assert excess(wrong, x, format.unpack(packed), dtype, weights=weights) > 1.5


def test_sums_of_float8_stay_inside_where_they_are_kept_short() -> None:
    x, packed = drawn("fp8", torch.bfloat16)
    w, codes = format_of("fp8").unpack(packed).double()[:32], (x.double() * 40).to(torch.float8_e4m3fn).double()
    short, long = (added(codes, w, columns).to(torch.bfloat16) for columns in (128, COLS))
    assert excess(short, codes, w, torch.bfloat16, float8=True) <= 1
    assert excess(added(codes, w, 128).float().to(torch.float16), codes, w, torch.float16, float8=True) <= 0.6
    assert excess(short, codes, w, torch.bfloat16) > 1
    assert excess(long, codes, w, torch.bfloat16, float8=True) > excess(short, codes, w, torch.bfloat16, float8=True)


def added(x: Tensor, w: Tensor, columns: int) -> Tensor:
    """x @ w.T as a tensor core adds float8: addends cut 13 bits below the largest; `columns` meet in float32."""
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for start in range(0, x.shape[1], columns):
        part = torch.zeros_like(total)
        for first in range(start, start + columns, 32):
            addends = torch.cat((x[:, None, first : first + 32] * w[None, :, first : first + 32], part[..., None]), 2)
            unit = torch.exp2(addends.abs().amax(2, keepdim=True).clamp_(min=1e-30).log2().floor() - 13)
            part = ((addends / unit).trunc() * unit).sum(2)
        total = (total + part).float().double()
    return total
