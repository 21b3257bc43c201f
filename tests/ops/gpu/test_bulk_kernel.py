"""Products by bulk copies, emulated: copies and sums of other blocks arrive late and in any order."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenfold.ops import formats
from tenfold.ops.gpu import bulk, nvrtc
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle
from tests.ops.gpu.emulated_bulk import BulkEmulator
from tests.ops.gpu.emulated_cases import MARKS, TYPES, normal
from tests.rounding import excess

pytestmark = MARKS


def matrix(format: str, rows: int, cols: int, dtype: torch.dtype) -> Matrix:
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) / cols**0.5
    if format == "dense":
        return Matrix(format, rows, cols, (dense.to(dtype),))
    return Matrix(format, rows, cols, formats.format_of(format).pack(dense, torch.float16).tensors())


def values(w: Matrix) -> Tensor:
    return w.data[0] if w.format == "dense" else formats.unpack(w)


# Clusters that run at the same time: few, so that turns go round, or as many as there are tiles.
@pytest.mark.parametrize(
    ("name", "format", "tokens", "rows", "cols", "clusters"),
    [
        ("digits3:4x1x1x2x1", "int3g128z", 3, 100, 1536, 2),
        ("digits3:4x1x1x2x1:c2", "int3g128z", 3, 150, 1536, 1),
        ("digits3:4x1x2x3x1:c4", "int3g128", 1, 331, 1280, 1),
        ("digits4:3x2x1x2x1:c4", "int4g128z", 2, 100, 1792, 2),
        ("digits8:4x1x1x2x1:c2", "int8", 4, 40, 768, 9),
        ("digits2:3x2x1x2x1:c4", "int2g128z", 1, 200, 1024, 1),
        # more columns than threads make digits of at once
        ("digits4:2x1x1x2x1", "int4g128", 2, 40, 4096, 1),
        ("digits3:2x1x1x2x1", "int3g128z", 1, 40, 3072, 1),
        ("digits8:2x1x1x2x1", "int8", 3, 40, 3072, 1),
        ("digits2:2x1x1x2x1", "int2g128", 4, 40, 2048, 1),
        ("bulk3:4x1x1x3x1:c2", "int3g128z", 9, 100, 1280, 2),
        ("bulk4:2x2x1x2x1:c4", "int4", 3, 100, 1280, 1),
        ("bulk2:2x1x2x2x1:c2", "int2g128", 1, 100, 768, 1),
        ("bulk8:2x1x1x2x1:c4", "fp8g128", 13, 70, 1024, 1),
        ("bulk:3x2x1x2x1:c2", "dense", 16, 71, 704, 1),
        ("bulk:2x1x2x3x1:c4", "dense", 5, 200, 480, 1),
    ],
)
def test_products(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    format: str,
    tokens: int,
    rows: int,
    cols: int,
    clusters: int,
) -> None:
    plan, dtype = bulk.parse(name), torch.bfloat16
    assert bulk.legal(plan, tokens, rows, cols)
    assert bulk.reads(plan.kind, format)
    w, x = matrix(format, rows, cols, dtype), normal(tokens, cols).to(dtype)
    results = []
    for seed in range(3):
        monkeypatch.setattr(nvrtc, "load", BulkEmulator(folder, clusters, seed))
        results.append(bulk.run(plan, clusters * plan.cluster, x, w, float32=True))
    assert excess(results[0], x, values(w), dtype) <= 1
    assert all(torch.equal(results[0], other) for other in results)  # whatever arrived first


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("name", "format", "tokens", "act"),
    [
        ("digits3:4x1x1x2x1:c2", "int3g128z", 3, "silu"),
        ("digits8:3x2x1x2x1:c4", "int8", 1, None),
        ("digits4:2x1x1x2x1", "int4g128z", 4, None),
        ("digits2:2x1x1x2x1", "int2g128z", 1, "silu"),
        ("digits3:2x1x1x2x1", "int3g128z", 1, None),
        ("bulk4:2x1x1x3x1:c4", "int4g128z", 10, "gelu_tanh"),
        ("bulk:2x2x2x2x1:c2", "dense", 2, "silu"),
    ],
)
def test_what_is_fused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str, tokens: int, act: str | None, dtype: str
) -> None:
    plan, kind, rows, cols = bulk.parse(name), TYPES[dtype], 180, 1280
    monkeypatch.setattr(nvrtc, "load", BulkEmulator(folder, 2))
    w, x = matrix(format, rows, cols, kind), (300 * normal(tokens, cols)).to(kind)
    norm, bias = Norm(normal(cols, seed=1).abs() + 0.5, 1e-5), normal(rows, seed=2)
    residual = normal(tokens, rows // 2 if act else rows, seed=3).to(kind)
    got = bulk.run(plan, 2 * plan.cluster, x, w, bias, norm, act, residual)
    plain = Matrix("dense", rows, cols, (values(w).float(),))
    exact = Oracle(torch.device("cpu"), torch.float32)
    wanted = exact.linear(x.float(), plain, bias, norm=norm, act=act, residual=residual.float())
    assert (got.float() - wanted).norm() <= (6e-3 if kind == torch.bfloat16 else 1e-3) * wanted.norm()
