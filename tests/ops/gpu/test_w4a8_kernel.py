"""Weights of 4 bits by many tokens in float8, emulated: boxes arrive late and in any order, and products of warpgroups
read their operands as late as they may.
"""

from pathlib import Path

import pytest
import torch

from tenfold.ops import formats
from tenfold.ops.formats import store_nibbles
from tenfold.ops.gpu import nvrtc, w4a8
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle
from tests.ops.gpu.emulated_cases import MARKS, normal
from tests.ops.gpu.emulated_hopper import Boxes, HopperEmulator
from tests.ops.gpu.test_quantize_kernel import expected
from tests.rounding import excess

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned")]
SMS = 3  # so that a block has several tiles
BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "scales", "tokens", "outputs", "cols", "act", "dtype"),
    [
        ("w4a8:64x3", HALF, 1, 144, 480, None, BFLOAT),
        ("w4a8:128x2", BFLOAT, 131, 208, 288, None, HALF),
        ("w4a8:192x2", FLOAT, 193, 80, 96, None, BFLOAT),
        ("w4a8:64x2", FLOAT, 70, 136, 288, "silu", BFLOAT),
    ],
)
def test_sums_and_what_is_fused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    scales: torch.dtype,
    tokens: int,
    outputs: int,
    cols: int,
    act: str | None,
    dtype: torch.dtype,
) -> None:
    plan, rows = w4a8.parse(name), 2 * outputs if act else outputs
    assert w4a8.legal(plan, tokens, rows, cols)
    made = formats.format_of("int4a8").pack(normal(rows, cols) / cols**0.5, scales)
    codes = store_nibbles(torch.arange(rows * cols).view(rows, cols) * 7 % 16)  # every one in every place of a word
    w = Matrix("int4a8", rows, cols, made._replace(codes=codes).tensors())
    x, bias, residual = normal(tokens, cols, seed=1).to(dtype), normal(rows, seed=2), normal(tokens, outputs, seed=3)
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)
    results = []
    for seed in range(3):
        monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder, seed))
        results.append(w4a8.run(plan, SMS, x, w, bias, act=act, residual=residual.to(dtype)))
    rounded, sizes = expected(x, None)
    inputs, plain = rounded.float() * sizes[:, None], Matrix("dense", rows, cols, (formats.unpack(w).float(),))
    exact = Oracle(torch.device("cpu"), FLOAT)
    wanted = exact.linear(inputs, plain, bias, act=act, residual=residual.to(dtype).float())
    assert (results[0].float() - wanted).norm() <= (8e-3 if dtype == BFLOAT else 1e-3) * wanted.norm()
    assert all(torch.equal(results[0], other) for other in results)  # whatever arrived first
    if not act:
        assert excess(w4a8.run(plan, SMS, x, w), inputs, plain.data[0], dtype, float8=True) <= 1
