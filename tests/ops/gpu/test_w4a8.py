"""Weights of 4 bits by many tokens in float8: orders of columns and plans here, sums on a GPU against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops import formats
from tenfold.ops.formats import store_nibbles
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tests.rounding import excess

w4a8 = pytest.importorskip("tenfold.ops.gpu.w4a8")
quantize = pytest.importorskip("tenfold.ops.gpu.quantize")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMS = 132
UNSIGNED = 2.0  # how much wider sums spread whose codes are 0 to 15 than those of -8 to 7


def column(place: int) -> int:
    """Of a number of x, as csrc/quantize.cu stores 128 of them."""
    j, h, t, i = place // 32, place // 16 % 2, place // 4 % 4, place % 4
    return 32 * t + 8 * j + 2 * h + (0, 4, 1, 5)[i]


def test_codes_of_a_lane_meet_their_columns() -> None:
    """A lane takes 16 bytes of a row: even nibbles of word j are its first register of product j, odd ones the next."""
    assert sorted(map(column, range(128))) == list(range(128))
    codes = torch.randint(0, 16, (1, 128), generator=torch.Generator().manual_seed(1))
    words = store_nibbles(codes)[0].view(torch.uint8).view(16, 4)
    for t, j, h in itertools.product(range(4), range(4), range(2)):
        register = words[4 * t + j] >> 4 * h & 15
        places = [32 * j + 16 * h + 4 * t + i for i in range(4)]
        assert register.tolist() == [int(codes[0, column(p)]) for p in places]


def test_plans() -> None:
    for tokens, rows, cols in ((65, 4608, 3584), (1024, 37888, 3584), (512, 3584, 18944), (100, 80, 96)):
        plan = w4a8.rule(tokens, rows, cols, SMS)
        assert plan is not None
        assert w4a8.parse(str(plan)) == plan
        assert w4a8.legal(plan, tokens, rows, cols)
        assert all(w4a8.legal(one, tokens, rows, cols) for one in w4a8.candidates(tokens, rows, cols))
    assert all(w4a8.rule(count, 4096, 4096, SMS) is None for count in (64, 4097))
    assert w4a8.rule(65, 4096, 4096, SMS).width == 64  # one round either way
    assert w4a8.rule(1024, 37888, 3584, SMS).width == 128
    assert not w4a8.legal(w4a8.parse("w4a8:192x8"), 1024, 4096, 4096)  # more stages than there is room for
    for name in ("w4a8:96x4", "w4a8:64", "ring:64x4"):
        with pytest.raises(ValueError, match="64, 128 or 192"):
            w4a8.parse(name)
    taken = {"int4a8": True, "int4": False, "int4g128a8": False, "int4za8": False, "fp8a8": False, "dense": False}
    assert {name: w4a8.takes(name) for name in taken} == taken


def matrix(rows: int, cols: int, scales: torch.dtype = torch.float16) -> Matrix:
    """Every code in every place of a word."""
    made = formats.format_of("int4a8").pack(torch.randn(rows, cols, device="cuda") / cols**0.5, scales)
    codes = store_nibbles(torch.arange(rows * cols, device="cuda").view(rows, cols) * 7 % 16)
    return Matrix("int4a8", rows, cols, made._replace(codes=codes).tensors())


def tokens(count: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(count)).to(dtype)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("cols", [96, 416, 3584, 18944])
    def test_the_order_of_columns_and_the_sums(self, cols: int, dtype: torch.dtype) -> None:
        x = tokens(5, cols, dtype)
        codes, numbers = quantize.for_nibbles(x)
        plain, scales = quantize.quantize(x)
        whole = F.pad(plain.float(), (0, -cols % 128))
        order = torch.tensor([column(p) for p in range(128)], device="cuda")
        assert torch.equal(codes.float(), whole.unflatten(1, (-1, 128))[:, :, order].flatten(1))
        assert torch.equal(numbers[:, 0], scales)
        wanted = plain.double().sum(1)
        assert (numbers[:, 1] - wanted).abs().max() <= 1e-5 * plain.double().abs().sum(1).max()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("width", w4a8.WIDTHS)
    @pytest.mark.parametrize(
        ("count", "rows", "cols"), [(1, 144, 96), (70, 80, 416), (200, 1056, 1024), (385, 3584, 3584), (1000, 304, 224)]
    )
    def test_sums(self, width: int, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
        x = tokens(count, cols, dtype)
        codes, scales = quantize.quantize(x)
        rounded = codes.double() * scales.double()[:, None]
        for kind in (torch.float16, torch.bfloat16, torch.float32):
            w = matrix(rows, cols, kind)
            got = w4a8.run(w4a8.deepest(width), SMS, x, w)
            assert excess(got, rounded, formats.unpack(w), dtype, float8=True) <= UNSIGNED
            assert torch.equal(got, w4a8.run(w4a8.deepest(width), SMS, x, w))

    @pytest.mark.parametrize("act", [None, "silu", "gelu_tanh"])
    @pytest.mark.parametrize("width", w4a8.WIDTHS)
    @pytest.mark.parametrize(("count", "rows", "cols"), [(300, 2112, 512), (70, 144, 384)])
    def test_what_is_fused(self, act: str | None, width: int, count: int, rows: int, cols: int) -> None:
        x, w = tokens(count, cols, torch.bfloat16), matrix(rows, cols)
        outputs = rows // 2 if act else rows
        bias, residual = torch.randn(rows, device="cuda"), tokens(count, outputs, torch.bfloat16)
        norm = Norm(torch.rand(cols, device="cuda") + 0.5, 1e-5)
        codes, scales = quantize.quantize(x, norm)
        wanted = (codes.double() * scales.double()[:, None]) @ formats.unpack(w).double().T + bias
        if act:
            gate, up = wanted.chunk(2, 1)
            wanted = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
        wanted = wanted + residual
        got = w4a8.run(w4a8.deepest(width), SMS, x, w, bias, norm, act, residual)
        assert (got - wanted).norm() <= 8e-3 * wanted.norm()
        assert (got - wanted).abs().max() <= 3e-2 * wanted.abs().max()
