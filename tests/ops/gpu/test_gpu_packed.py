"""On a GPU: kernels of packed weights and those of their sources against float64: every code in every place, each plan,
and what is fused.

How far a result may lie away is `tests/rounding.py`; float8 tokens are compared as they were rounded.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops import formats
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.quantize.schemes import parse, round_activations
from tests.ops.gpu.replays import assert_replays
from tests.rounding import excess

quantize = pytest.importorskip("tenfold.ops.gpu.quantize")
ring = pytest.importorskip("tenfold.ops.gpu.ring")
ring_packed = pytest.importorskip("tenfold.ops.gpu.ring_packed")
stream_packed = pytest.importorskip("tenfold.ops.gpu.stream_packed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),  # a kernel compiles in a second or two
]

SMS = 132
TYPES = [torch.bfloat16, torch.float16]
RINGED = ["int4", "int4z", "int4g128z", "int4g256", "int8", "int8g128", "int8g128z", "fp8", "fp8g128", "fp8a8"]
STREAMED = [*RINGED, "int2g128", "int2g128z", "int3g128", "int3g256z"]
FLOAT8 = ["fp8a8", "fp8g128a8"]


def matrix(format: str, rows: int, cols: int) -> Matrix:
    """Scales of random weights; for 8 bits every code in every place of a word."""
    dense = torch.randn(rows, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(rows)) / cols**0.5
    made = Matrix(format, rows, cols, formats.format_of(format).pack(dense).tensors())
    if made.data[0].dtype != torch.int32:
        codes = (torch.arange(rows * cols, device="cuda") * 7 % 256).to(torch.uint8).view(rows, cols)
        if format.startswith("fp8"):
            codes[(codes & 127) == 127] = 5  # float8 has no number there
        made.data[0].view(torch.uint8).copy_(codes)
    return made


def tokens(count: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(count)).to(dtype)


def product(name: str, workspace: Any, x: Tensor, w: Matrix, *fused: Any) -> Tensor:
    """The plan of this name. fused: bias, norm, act, residual."""
    if name.startswith("stream"):
        result = stream_packed.run(stream_packed.parse(name), SMS, x, w, *fused)
    elif name.startswith(ring.FLOAT8):
        result = ring.run_fp8(ring.parse(name), workspace, SMS, x, w, *fused)
    else:
        result = ring_packed.run(ring_packed.parse(name), workspace, SMS, x, w, *fused)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", STREAMED)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 4096), (13, 72, 1152)])
def test_streamed(format: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    w, x = matrix(format, rows, cols), tokens(count, cols, dtype)
    for plan in stream_packed.candidates(stream_packed.kind_of(format), count, rows, cols):
        assert excess(stream_packed.run(plan, SMS, x, w), x, formats.unpack(w), dtype) <= 1, plan


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", RINGED)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 4096), (9, 72, 1120), (32, 200, 160), (61, 1000, 1440)])
def test_codes_through_a_ring(format: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    w, x = matrix(format, rows, cols), tokens(count, cols, dtype)
    kind, workspace = ring_packed.kind_of(format), ring.Workspace(torch.device("cuda"))
    for plan in ring_packed.candidates(kind, count, rows, cols, SMS):
        got = ring_packed.run(plan, workspace, SMS, x, w)
        assert excess(got, x, formats.unpack(w), dtype) <= 1, plan
    assert not workspace.counters.any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("format", "plan"),
    [
        *(("int4g128z", "ring4:4x1x128"), ("int8g128z", "ring8:4x1x128"), ("int4g128z", "stream4:8x4x1")),
        *(("int8g128z", "stream8:8x4x1"), ("int2g128z", "stream2:8x4x1"), ("int3g128z", "stream3:8x4x1")),
    ],
)
def test_zeros_may_be_fractions(format: str, plan: str, dtype: torch.dtype) -> None:
    """As `tenfold quantize` writes them; what is less than a 16-bit number can hold is rounded once."""
    w, x = matrix(format, 136, 1152), tokens(9, 1152, dtype)
    zeros = w.data[2]
    zeros += torch.rand(zeros.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(zeros.dtype)
    got = product(plan, ring.Workspace(torch.device("cuda")), x, w)
    assert excess(got, x, formats.unpack(w), dtype, weights=True) <= 1


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["int4g128z", "int8g128", "int8z"])
def test_scales_of_each_type_through_a_ring(format: str, scales: torch.dtype) -> None:
    rows, cols, count = 136, 1152, 20
    w, x = matrix(format, rows, cols), tokens(count, cols, TYPES[0])
    codes, *numbers = w.data
    w = Matrix(format, rows, cols, (codes, *(one.to(scales) for one in numbers)))
    plan = ring_packed.PackedPlan(4, 1, 128, 0, ring_packed.kind_of(format))
    got = ring_packed.run(plan, ring.Workspace(torch.device("cuda")), SMS, x, w, float32=True)
    assert got.dtype == torch.float32
    assert excess(got, x, formats.unpack(w), TYPES[0]) <= 1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", FLOAT8)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 1040), (9, 72, 400), (32, 512, 4096), (61, 1000, 1152)])
def test_float8_by_float8(format: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    w, x = matrix(format, rows, cols), tokens(count, cols, dtype)
    codes, scales = quantize.quantize(x)
    rounded = codes.double() * scales.double()[:, None]
    workspace = ring.Workspace(torch.device("cuda"))
    for plan in ring.candidates(count, rows, cols, SMS, ring.FLOAT8):
        got = ring.run_fp8(plan, workspace, SMS, x, w)
        assert excess(got, rounded, formats.unpack(w), dtype, float8=True) <= 1, plan


@pytest.mark.parametrize(
    ("format", "count", "plan"),
    [
        *(("int8g128z", 3, "stream8:8x4x1"), ("fp8", 16, "stream8:8x4x1"), ("int4", 8, "stream4:8x4x1")),
        *(("int4g128z", 40, "ring4:4x1x192:even"), ("fp8", 24, "ring8:5x1x256"), ("int8g128", 12, "ring8:4x2x64:s2")),
        ("fp8a8", 40, "ring-fp8:5x1x64"),
    ],
)
@pytest.mark.parametrize("fused", ["norm silu bias", "residual", "norm gelu_tanh residual"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_fused(format: str, count: int, plan: str, fused: str, dtype: torch.dtype) -> None:
    rows, cols = 528, 1024
    w, x = matrix(format, rows, cols), tokens(count, cols, dtype)
    norm = Norm(torch.rand(cols, device="cuda") + 0.5, 1e-5) if "norm" in fused else None
    bias = torch.randn(rows, device="cuda") if "bias" in fused else None
    act = next((act for act in ("silu", "gelu_tanh") if act in fused), None)
    residual = tokens(count, rows // 2 if act else rows, dtype) if "residual" in fused else None
    read = x.double()
    if norm is not None:
        read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    if plan.startswith("ring-fp8"):
        codes, scales = quantize.quantize(x, norm)
        assert ((codes.double() * scales.double()[:, None] - read).abs() <= read.abs().amax(1)[:, None] / 27.99).all()
        read = codes.double() * scales.double()[:, None]
    got = product(plan, ring.Workspace(torch.device("cuda")), x, w, bias, norm, act, residual)
    wanted = read @ formats.unpack(w).double().T
    wanted = wanted if bias is None else wanted + bias.double()
    if act is not None:
        gate, up = wanted.chunk(2, -1)
        wanted = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
    wanted = wanted if residual is None else wanted + residual.double()
    assert (got.double() - wanted).norm() <= (6e-3 if dtype == torch.bfloat16 else 1e-3) * wanted.norm()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cols", [400, 4096, 14336])
def test_tokens_are_rounded_to_the_nearest_float8(cols: int, dtype: torch.dtype) -> None:
    x = tokens(5, cols, dtype)
    x[2] = 0
    codes, scales = quantize.quantize(x)
    assert torch.allclose(scales, x.float().abs().amax(1) / 448, rtol=1e-6)
    scaled = (x.double() / scales.double().clamp(min=1e-30)[:, None]).nan_to_num()
    assert ((codes.double() - scaled).abs() <= (scaled.abs() / 16).clamp_(min=2**-10) * 1.001).all()
    told = round_activations(x.cpu().float(), parse("fp8a8"))  # by which `tenfold quantize` measures
    assert torch.allclose((codes.float() * scales[:, None]).cpu(), told, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("format", "count", "plan"),
    [
        *(("fp8a8", 64, "ring-fp8:5x1x64:even"), ("fp8g128a8", 17, "ring-fp8:5x1x64:even")),
        *(("int8g128", 8, "stream8:8x4x1"), ("int4g128", 64, "ring4:4x1x192:even"), ("int8", 16, "ring8:4x2x64:s2")),
    ],
)
def test_bits_repeat_in_a_graph_whose_products_follow_each_other(format: str, count: int, plan: str) -> None:
    first, second = matrix(format, 1024, 1024), matrix(format, 1024, 1024)
    x, workspace = tokens(count, 1024, TYPES[0]), ring.Workspace(torch.device("cuda"))

    def three() -> Tensor:
        got = x
        for w in (first, second, first):
            got = product(plan, workspace, got, w)
        return got

    assert_replays(three)
