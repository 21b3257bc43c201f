"""On a GPU: kernels of packed weights and those of their sources against float64: every code in every place, each plan,
and what is fused.

How far a result may lie away is `tests/rounding.py`; float8 tokens are compared as they were rounded.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops import formats
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tests.rounding import excess

quantize = pytest.importorskip("tenfold.ops.gpu.quantize")
ring = pytest.importorskip("tenfold.ops.gpu.ring")
stream_packed = pytest.importorskip("tenfold.ops.gpu.stream_packed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),  # a kernel compiles in a second or two
]

SMS = 132
TYPES = [torch.bfloat16, torch.float16]
STREAMED = ["int4", "int4g128z", "int8", "int8g128", "int8g128z", "fp8", "fp8g128", "fp8a8"]
FLOAT8 = ["fp8a8", "fp8g128a8"]


def matrix(format: str, rows: int, cols: int) -> Matrix:
    """Scales of random weights; for 8 bits every code in every place of a word."""
    dense = torch.randn(rows, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(rows)) / cols**0.5
    made = Matrix(format, rows, cols, formats.format_of(format).pack(dense).tensors())
    if not format.startswith("int4"):
        codes = (torch.arange(rows * cols, device="cuda") * 7 % 256).to(torch.uint8).view(rows, cols)
        if format.startswith("fp8"):
            codes[(codes & 127) == 127] = 5  # float8 has no number there
        made.data[0].view(torch.uint8).copy_(codes)
    return made


def tokens(count: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", STREAMED)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 4096), (13, 72, 1152)])
def test_streamed(format: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    w, x = matrix(format, rows, cols), tokens(count, cols, dtype)
    for plan in stream_packed.candidates(stream_packed.kind_of(format), count, rows, cols):
        assert excess(stream_packed.run(plan, SMS, x, w), x, formats.unpack(w), dtype) <= 1, plan


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", FLOAT8)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 1040), (9, 72, 400), (32, 512, 4096), (61, 1000, 1152)])
def test_float8_by_float8(format: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    w, x, maps = matrix(format, rows, cols), tokens(count, cols, dtype), ring.Maps()
    codes, scales = quantize.quantize(x)
    rounded = codes.double() * scales.double()[:, None]
    workspace = ring.Workspace(torch.device("cuda"))
    for plan in ring.candidates(count, rows, cols, SMS, ring.FLOAT8):
        got = ring.run_fp8(plan, maps, workspace, SMS, x, w)
        assert excess(got, rounded, formats.unpack(w), dtype, float8=True) <= 1, plan


@pytest.mark.parametrize(("format", "count"), [("int8g128z", 3), ("fp8", 16), ("int4", 8), ("fp8a8", 40)])
@pytest.mark.parametrize("fused", ["norm silu bias", "residual", "norm gelu_tanh residual"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_fused(format: str, count: int, fused: str, dtype: torch.dtype) -> None:
    rows, cols = 528, 1024
    w, x = matrix(format, rows, cols), tokens(count, cols, dtype)
    norm = Norm(torch.rand(cols, device="cuda") + 0.5, 1e-5) if "norm" in fused else None
    bias = torch.randn(rows, device="cuda") if "bias" in fused else None
    act = next((act for act in ("silu", "gelu_tanh") if act in fused), None)
    residual = tokens(count, rows // 2 if act else rows, dtype) if "residual" in fused else None
    read = x.double()
    if norm is not None:
        read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    if count > stream_packed.MOST_TOKENS:
        codes, scales = quantize.quantize(x, norm)
        assert ((codes.double() * scales.double()[:, None] - read).abs() <= read.abs().amax(1)[:, None] / 28).all()
        read = codes.double() * scales.double()[:, None]
        plan, workspace = ring.rule_fp8(count), ring.Workspace(torch.device("cuda"))
        got = ring.run_fp8(plan, ring.Maps(), workspace, SMS, x, w, bias, norm, act, residual)
    else:
        plan = next(stream_packed.candidates(stream_packed.kind_of(format), count, rows, cols))
        got = stream_packed.run(plan, SMS, x, w, bias, norm, act, residual)
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


@pytest.mark.parametrize(("format", "count"), [("fp8a8", 64), ("fp8g128a8", 17), ("int8g128", 8)])
def test_bits_repeat_in_a_graph_whose_products_follow_each_other(format: str, count: int) -> None:
    first, second, x, maps = (
        matrix(format, 1024, 1024),
        matrix(format, 1024, 1024),
        tokens(count, 1024, TYPES[0]),
        ring.Maps(),
    )

    workspace = ring.Workspace(torch.device("cuda"))

    def product(x: Tensor, w: Matrix) -> Tensor:
        if count > stream_packed.MOST_TOKENS:
            plan = replace(ring.rule_fp8(count), splits=0)
            return ring.run_fp8(plan, maps, workspace, SMS, x, w)  # type: ignore[no-any-return]
        plan = next(stream_packed.candidates(stream_packed.kind_of(format), count, 1024, 1024))
        return stream_packed.run(plan, SMS, x, w)  # type: ignore[no-any-return]

    wanted = product(product(product(x, first), second), first)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = product(product(product(x, first), second), first)
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)
