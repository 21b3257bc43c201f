"""Products of packed weights through a ring, emulated: copies arrive late and in any order, and products of warpgroups
read their operands as late as they may.
"""

from pathlib import Path

import pytest
import torch

from tenfold.ops import formats
from tenfold.ops.gpu import nvrtc, ring_packed
from tenfold.ops.gpu.sums import Workspace
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle
from tests.ops.gpu.emulated_cases import MARKS, normal
from tests.ops.gpu.emulated_hopper import Boxes, HopperEmulator
from tests.rounding import excess

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned")]
SMS = 3
BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


# Tokens of each width of the instruction; tiles whole, in parts and dealt out evenly; scales of rows and of groups.
@pytest.mark.parametrize(
    ("name", "format", "scales", "tokens", "outputs", "cols", "act", "dtype"),
    [
        ("ring4:3x1x64", "int4", HALF, 1, 71, 480, None, BFLOAT),
        ("ring4:3x1x64:s2", "int4g128z", HALF, 13, 135, 800, None, HALF),
        ("ring4:2x2x64:even", "int4g256", BFLOAT, 20, 200, 1312, None, BFLOAT),
        ("ring4:2x1x192", "int4g128z", FLOAT, 33, 99, 512, "silu", BFLOAT),
        ("ring8:3x1x64:s3", "int8g128z", HALF, 3, 33, 400, "gelu_tanh", HALF),
        ("ring8:2x1x64", "fp8", FLOAT, 40, 70, 272, None, BFLOAT),
        ("ring8:4x1x128:even", "fp8g128", HALF, 9, 300, 384, None, HALF),
        ("ring8:2x1x256", "int8", HALF, 17, 270, 144, None, BFLOAT),
    ],
)
def test_products(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    format: str,
    scales: torch.dtype,
    tokens: int,
    outputs: int,
    cols: int,
    act: str | None,
    dtype: torch.dtype,
) -> None:
    plan, rows = ring_packed.parse(name), 2 * outputs if act else outputs
    assert ring_packed.legal(plan, tokens, rows, cols)
    assert ring_packed.kind_of(format) == plan.kind
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)
    w = Matrix(format, rows, cols, formats.format_of(format).pack(normal(rows, cols) / cols**0.5, scales).tensors())
    x, workspace = normal(tokens, cols, seed=1).to(dtype), Workspace(torch.device("cpu"))
    bias, residual = normal(rows, seed=2), normal(tokens, outputs, seed=3).to(dtype)
    plain, exact = Matrix("dense", rows, cols, (formats.unpack(w).float(),)), Oracle(torch.device("cpu"), FLOAT)
    wanted = exact.linear(x.float(), plain, bias, act=act, residual=residual.float())
    results = []
    for seed in range(3):
        monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder, seed))
        results.append(ring_packed.run(plan, workspace, SMS, x, w, bias, act=act, residual=residual))
        if not act:
            assert excess(ring_packed.run(plan, workspace, SMS, x, w), x, plain.data[0], dtype) <= 1
    assert (results[0].float() - wanted).norm() <= (6e-3 if dtype == BFLOAT else 1e-3) * wanted.norm()
    assert all(torch.equal(results[0], other) for other in results)  # whatever arrived first
    assert not workspace.counters.any()


def test_logits_in_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)
    monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder))
    w = Matrix("int8", 77, 160, formats.format_of("int8").pack(normal(77, 160), HALF).tensors())
    x = normal(5, 160, seed=1).to(HALF)
    got = ring_packed.run(ring_packed.parse("ring8:3x1x64"), Workspace(x.device), SMS, x, w, float32=True)
    assert got.dtype == FLOAT
    wanted = x.double() @ formats.unpack(w).double().T
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
