"""Products whose weights go straight into registers, emulated: formats, what is fused, tiles that follow each other."""

from pathlib import Path

import pytest
import torch

from tenfold.ops import formats
from tenfold.ops.gpu import nvrtc, stream, stream_packed
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle
from tests.ops.gpu.emulated_bulk import BulkEmulator
from tests.ops.gpu.emulated_cases import MARKS, TYPES, normal

pytestmark = MARKS
SMS = 3  # so that a block has several tiles


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvrtc, "load", BulkEmulator(folder, 1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("name", "format", "tokens", "outputs", "cols", "act", "normed"),
    [
        ("stream:2x2x1", "dense", 1, 100, 320, None, True),
        ("stream:4x1x1", "dense", 13, 72, 544, "silu", True),
        ("stream:2x4x1", "dense", 9, 33, 256, None, False),
        ("stream:8x1x1", "dense", 2, 100, 512, None, False),  # more threads than a tile has outputs
        ("stream:2x2x1", "dense", 17, 56, 256, None, True),  # in two pieces
        ("stream:4x1x1", "dense", 50, 40, 128, "silu", False),
        ("stream4:2x2x1", "int4g128z", 3, 72, 640, "gelu_tanh", True),
        ("stream4:4x1x1", "int4", 16, 130, 512, None, False),
        ("stream8:2x1x1", "int8g128z", 2, 100, 384, None, True),
        ("stream8:2x2x1", "fp8", 5, 72, 512, "silu", False),
        ("stream3:2x2x1", "int3g128z", 4, 72, 640, None, True),
        ("stream2:2x1x1", "int2g128", 1, 56, 512, "silu", True),
    ],
)
def test_products(
    name: str, format: str, tokens: int, outputs: int, cols: int, act: str | None, normed: bool, dtype: str
) -> None:
    kind, rows = TYPES[dtype], 2 * outputs if act else outputs
    dense = normal(rows, cols) / cols**0.5
    x, bias, residual = normal(tokens, cols, seed=1).to(kind), normal(rows, seed=2), normal(tokens, outputs, seed=3)
    norm = Norm(normal(cols, seed=4).abs() + 0.5, 1e-5) if normed else None
    fused = (bias, norm, act, residual.to(kind))
    if format == "dense":
        weights = dense.to(kind)
        got, values = stream.run(stream.parse(name), SMS, x, weights, *fused), weights.float()
    else:
        packed = formats.format_of(format).pack(dense, torch.float16).tensors()
        w = Matrix(format, rows, cols, packed)
        got, values = stream_packed.run(stream_packed.parse(name), SMS, x, w, *fused), formats.unpack(w).float()
    exact = Oracle(torch.device("cpu"), torch.float32)
    plain = Matrix("dense", rows, cols, (values,))
    wanted = exact.linear(x.float(), plain, bias, norm=norm, act=act, residual=residual.to(kind).float())
    assert (got.float() - wanted).norm() <= (6e-3 if kind == torch.bfloat16 else 1e-3) * wanted.norm()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "cols"), [(3, 2048), (2, 2056), (1, 40), (2, 6000)])
def test_norms_in_front(folder: Path, tokens: int, cols: int, dtype: str) -> None:
    kind = TYPES[dtype]
    x, norm = (3 * normal(tokens, cols)).to(kind), Norm(normal(cols, seed=1), 1e-5)
    out, vectors = torch.full_like(x, torch.nan), -(-cols // (8 * 256))
    macros = (("HALF", nvrtc.HALF[kind]), ("VECTORS", vectors), ("WARPS", 8), ("CLUSTER", 1), ("BITS", 16), ("GATE", 0))
    kernel = BulkEmulator(folder, 1)("norm.cu", "rms_norm", macros)
    kernel((tokens, 1, 1), 256, 0, [x, norm.weight, out, float(norm.eps), cols])
    wanted = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
    assert torch.allclose(out.float(), wanted, rtol=1e-2 if kind == torch.bfloat16 else 2e-3, atol=1e-3)
