"""Products through a ring of the tensor copy engine, emulated: copies arrive late and in any order; how tiles are dealt
out, added up and stored.
"""

from pathlib import Path

import pytest
import torch

from tenfold.ops.gpu import nvrtc, ring
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle
from tests.ops.gpu.emulated_cases import MARKS, TYPES, normal
from tests.ops.gpu.emulated_hopper import Boxes, HopperEmulator
from tests.rounding import excess

pytestmark = MARKS
SMS = 3


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder))
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)


# Tokens of each width of the instruction; rows that fill tiles, eights or neither; tiles whole, in parts, dealt out
# evenly and of clusters.
@pytest.mark.parametrize(
    ("name", "tokens", "rows", "cols"),
    [
        *(("ring:4x1x64", 3, 136, 200), ("ring:2x1x64", 1, 70, 136), ("ring:3x1x64:even", 13, 200, 640)),
        *(("ring:3x1x64:s2", 33, 72, 512), ("ring:2x1x128", 20, 264, 256), ("ring:2x1x128:c2", 5, 200, 512)),
        *(("ring:3x1x128:s3", 9, 130, 640), ("ring:2x1x128:c4", 64, 136, 520), ("ring:2x1x256", 40, 300, 128)),
        *(("ring:3x1x256:c2", 17, 260, 256), ("ring:4x1x64:x2", 40, 136, 712), ("ring:4x1x64:s2:x1", 50, 72, 1000)),
        *(("ring:5x1x64:even:x2", 20, 200, 640), ("ring:4x1x64:x3", 18, 70, 136)),
    ],
)
def test_products(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, tokens: int, rows: int, cols: int) -> None:
    plan, dtype = ring.parse(name), torch.bfloat16
    assert ring.legal(plan, tokens, rows, cols)
    w, x = (normal(rows, cols) / cols**0.5).to(dtype), normal(tokens, cols, seed=1).to(dtype)
    residual, workspace = normal(tokens, rows, seed=2).to(dtype), ring.Workspace(torch.device("cpu"))
    results = []
    for seed in range(3):
        monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder, seed))
        results.append(ring.run(plan, workspace, SMS, x, w, float32=True))
        added = ring.run(plan, workspace, SMS, x, w, residual=residual)
        assert torch.equal(added, (results[0].to(dtype).float() + residual.float()).to(dtype))
    assert excess(results[0], x, w, dtype) <= 1
    assert all(torch.equal(results[0], other) for other in results)  # whatever arrived first
    assert not workspace.counters.any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("name", "tokens", "half", "act"),
    [
        *(("ring:3x1x64", 2, 100, "silu"), ("ring:2x1x128:c4", 13, 96, "gelu_tanh"), ("ring:3x1x64:s2", 3, 33, "silu")),
        *(("ring:2x1x256", 36, 136, "silu"), ("ring:2x1x128", 5, 75, None), ("ring:3x1x64:even", 9, 40, None)),
        ("ring:4x1x64:x2", 36, 72, "silu"),
    ],
)
def test_what_is_fused(name: str, tokens: int, half: int, act: str | None, dtype: str) -> None:
    plan, kind, cols = ring.parse(name), TYPES[dtype], 520
    rows = 2 * half if act else half
    assert ring.legal(plan, tokens, rows, cols)
    w, x, bias = (normal(rows, cols) / cols**0.5).to(kind), normal(tokens, cols, seed=1).to(kind), normal(rows, seed=2)
    residual, workspace = normal(tokens, half, seed=3).to(kind), ring.Workspace(torch.device("cpu"))
    got = ring.run(plan, workspace, SMS, x, w, bias, act=act, residual=residual)
    exact = Oracle(torch.device("cpu"), torch.float32)
    plain = Matrix("dense", rows, cols, (w.float(),))
    wanted = exact.linear(x.float(), plain, bias, act=act, residual=residual.float())
    assert got.shape == wanted.shape
    assert (got.float() - wanted).norm() <= (6e-3 if kind == torch.bfloat16 else 1e-3) * wanted.norm()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("name", "tokens", "half", "act"),
    [
        *(("ring-fp8:3x1x64", 3, 70, None), ("ring-fp8:2x1x128:c2", 9, 136, "silu")),
        *(("ring-fp8:2x1x64:even", 33, 72, "silu"), ("ring-fp8:2x1x256", 17, 264, None)),
        *(("ring-fp8:4x1x64:x2", 64, 72, "silu"), ("ring-fp8:5x1x64:s2:x2", 20, 70, None)),
    ],
)
def test_float8_by_float8(name: str, tokens: int, half: int, act: str | None, grouped: bool) -> None:
    plan, cols, kind = ring.parse(name), 512, torch.bfloat16
    rows = 2 * half if act else half
    assert ring.legal(plan, tokens, rows, cols)
    codes = [normal(n, cols, seed=seed).to(torch.float8_e4m3fn) for n, seed in ((rows, 0), (tokens, 1))]
    row_scales = normal(rows, cols // 128 if grouped else 1, seed=2).abs() / cols**0.5
    token_scales, residual = normal(tokens, seed=3).abs() + 0.1, normal(tokens, half, seed=4).to(kind)
    x, workspace = torch.empty(tokens, cols, dtype=kind), ring.Workspace(torch.device("cpu"))
    numbers = [codes[1].view(torch.uint8), codes[0].view(torch.uint8), row_scales, token_scales]
    got = ring.launch(plan, workspace, SMS, x, *numbers, None, act, residual)
    w = codes[0].float() * row_scales.repeat_interleave(cols // row_scales.shape[1], 1)
    exact = Oracle(torch.device("cpu"), torch.float32)
    plain = Matrix("dense", rows, cols, (w,))
    wanted = exact.linear(codes[1].float() * token_scales[:, None], plain, act=act, residual=residual.float())
    assert (got.float() - wanted).norm() <= 6e-3 * wanted.norm()
