"""Packed weights on a GPU: every format, kind of plan and type against float64 of the unpacked weight.

How far a result may lie away is `tests/rounding.py`. Float8 tokens are compared as they were rounded.
"""

import pytest
import torch
from torch import Tensor

from tenfold.ops.blocks import quantize
from tenfold.ops.formats import format_of, packed_of, stack, unpack
from tenfold.ops.matrix import Matrix, RawTensor
from tests.rounding import excess

lowbit = pytest.importorskip("tenfold.ops.gemm.lowbit")
LowbitPlan = lowbit.LowbitPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMATS = [
    *("int1g64z", "int1g128z", "int2", "int2g64z", "int3g32", "int3g128z"),
    *("int4", "int4g32", "int4g64z", "int4g128", "int4g128z", "int4g128zo"),
    *("int8", "int8g128", "int8g128z", "fp8", "fp8g128", "fp8a8", "fp8g128a8"),
]
SHAPES = [(100, 352), (1536, 4096)]
TOKENS = [1, 7, 33, 300]


def weight(name: str, rows: int, cols: int) -> Matrix:
    generator = torch.Generator("cuda").manual_seed(rows)
    dense = torch.randn(rows, cols, device="cuda", generator=generator) / cols**0.5
    raw = quantize(RawTensor("w", "F32", (rows, cols), dense), name.replace("o", ""))
    if format_of(name).order:
        order = torch.randperm(cols, device="cuda", generator=generator).to(torch.int32)
        raw = RawTensor("w", name, raw.shape, raw.data, (*raw.extras, order))
    return stack([raw], "cuda")


def tokens(count: int, cols: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(count)
    return torch.randn(count, cols, device="cuda", generator=generator).to(dtype)


def plans(name: str, rows: int, cols: int) -> list[LowbitPlan]:
    """Every kind, and the corners of tile sizes; few, as each takes a second to compile."""
    found = [LowbitPlan("dense"), LowbitPlan("library"), LowbitPlan("fused", 64, 128, 16, 4, 4, 4)]
    found += [LowbitPlan("fused", 128, 64, 128, 1, 8, 3), LowbitPlan("fp8", 64, 64, 64, 2, 4, 4)]
    return [plan for plan in found if lowbit.legal(plan, rows, cols, format_of(name))]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.bfloat16) for n in (*FORMATS, "int4a8")]
    + [(n, torch.float16) for n in ("int4g128z", "int8g128", "fp8a8")],
)
def test_every_format(name: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    cols += -cols % format_of(name).codes.align
    w, workspace = weight(name, rows, cols), lowbit.Workspace(torch.device("cuda"))
    exact, format = unpack(w), format_of(name)
    for count in TOKENS:
        x = tokens(count, cols, dtype)
        for plan in plans(name, rows, cols):
            got = lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace)
            again = lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace)
            assert torch.equal(got, again), plan
            read, float8 = x.double(), plan.kind in ("fp8", "library")
            if float8:
                codes, scales = lowbit.quantize_tokens(x)
                read = codes.double() * scales[:, None].double()
            rounds = plan.kind == "dense" or lowbit.scaling(plan, format) == lowbit.WEIGHTS
            assert excess(got, read, exact, dtype, weights=rounds, float8=float8) <= 1, (count, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["int1g128z", "int1g32z", "int2g64z", "int3g128z", "int4g128z", "int8g64z"])
def test_zeros_may_be_fractions(name: str, dtype: torch.dtype) -> None:
    """Unpacked they are the oracle's to the bit. Those of one bit round no weight; others' zeros are rounded with the
    codes, by up to a unit of 16 bits, and a group's all alike.
    """
    w, format = weight(name, 256, 2048), format_of(name)
    w.data[2].add_(tokens(*w.data[2].shape, torch.float16) / 4)
    packed, exact = packed_of(w), unpack(w)
    assert torch.equal(lowbit.unpack_on_device(packed, format, 256, 2048, dtype), format.unpack(packed, dtype))
    if not name.startswith("int1"):
        return
    for count in (1, 33):
        x = tokens(count, 2048, dtype)
        for plan in (LowbitPlan("fused", 64, 128, 16, 4, 4, 4), LowbitPlan("fused", 128, 32, 128, 1, 8, 3)):
            rounds = lowbit.scaling(plan, format) == lowbit.WEIGHTS
            assert excess(lowbit.lowbit_linear(x, w, plan=plan), x.double(), exact, dtype, weights=rounds) <= 1, plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["int1g64z", "int4g32", "int8", "fp8"])
def test_every_code_becomes_its_number(name: str, dtype: torch.dtype) -> None:
    w = weight(name, 16, 256)
    if format_of(name).bits < 8:
        codes = torch.arange(16 * 256, device="cuda").view(16, 256) + torch.arange(16, device="cuda")[:, None]
        w.data[0].copy_(format_of(name).codes.store(codes % (1 << format_of(name).bits)))
    else:
        codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(16, 1)
        codes[codes & 127 == 127] = 0  # float8 has no number there
        w.data[0].view(torch.uint8).copy_(codes)
    w.data[1].fill_(1.0)
    eye = torch.eye(256, dtype=dtype, device="cuda")
    for plan in (LowbitPlan("fused", 64, 64, 64), LowbitPlan("fused", 64, 128, 128, 2), LowbitPlan("dense")):
        assert torch.equal(lowbit.lowbit_linear(eye, w, plan=plan), unpack(w).T.to(dtype)), plan


def test_float8_tokens_round_to_nearest() -> None:
    x = tokens(9, 5000, torch.bfloat16)
    codes, scales = lowbit.quantize_tokens(x)
    scaled = x.float() / scales[:, None]
    assert torch.equal(scales, x.float().abs().amax(dim=1) / 448)
    assert ((codes.float() - scaled).abs() <= (scaled.abs() / 16).clamp_(min=2**-10) * 1.001).all()


@pytest.mark.parametrize("name", ["int4g128", "int4g128z", "fp8a8"])
@pytest.mark.parametrize("kind", ["fused", "rule"])
def test_a_captured_graph_repeats_it(name: str, kind: str) -> None:
    w, workspace = weight(name, 1024, 2048), lowbit.Workspace(torch.device("cuda"))
    plan = LowbitPlan("fused", 64, 128, 16, 4) if kind == "fused" else lowbit.plan(1024, 2048, 4, format_of(name), 132)
    x = tokens(4, 2048, torch.bfloat16)
    wanted = lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", ["int4g128", "int4g128z", "int8g128", "fp8a8"])
def test_weights_are_rounded_on_the_gpu_as_on_the_cpu(name: str) -> None:
    """The same scales, and the same codes but where the last bit of a product decides: hardly ever, and by one."""
    dense = torch.randn(300, 4096, generator=torch.Generator().manual_seed(1))
    cpu, gpu = (packed_of(quantize(RawTensor("w", "F32", (300, 4096), d), name)) for d in (dense, dense.cuda()))
    assert torch.equal(gpu.scales.cpu(), cpu.scales)
    assert cpu.zeros is None or torch.equal(gpu.zeros.cpu(), cpu.zeros)
    load = format_of(name).codes.load
    ours, theirs = (load(codes).view(torch.int8).int() for codes in (cpu.codes, gpu.codes.cpu()))
    assert (ours != theirs).float().mean() < 1e-4
    assert ((ours - theirs).abs() <= 1).all()
