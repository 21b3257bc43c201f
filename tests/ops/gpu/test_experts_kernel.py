"""Products of experts, emulated: boxes arrive late and in any order, in both blocks of a pair, and products of
warpgroups read their operands as late as they may.
"""

from pathlib import Path

import pytest
import torch

from tests.ops.gpu.emulated_cases import MARKS, normal
from tests.ops.gpu.emulated_hopper import Boxes, HopperEmulator
from tests.ops.gpu.expert_cases import check, sorted_picks

experts = pytest.importorskip("tenfold.ops.gpu.experts")
nvrtc = experts.nvrtc

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned")]
SMS = 3  # so that a block has several items
BFLOAT, HALF = torch.bfloat16, torch.float16


# Experts without picks, with one, with more than a tile holds; one pick; all of one expert. Sizes that fill no box.
@pytest.mark.parametrize("sizes", [(65, 0, 1, 129), (1,), (0, 0, 21)])
@pytest.mark.parametrize(
    ("name", "outputs", "cols", "act", "dtype"),
    [
        ("experts:8x64x2x3x2", 72, 200, "silu", BFLOAT),
        ("experts:128x128x1x3x1:pairs", 168, 136, "gelu_tanh", HALF),
        ("experts:64x192x1x2x1:pairs", 200, 264, None, BFLOAT),
    ],
)
def test_products(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    outputs: int,
    cols: int,
    act: str | None,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
) -> None:
    plan, rows, picks = experts.parse(name), 2 * outputs if act else outputs, sum(sizes)
    assert experts.legal(plan, rows, cols, bool(act))
    w = (normal(len(sizes), rows, cols) / cols**0.5).to(dtype)
    x, shares = normal(picks, cols, seed=1).to(dtype), normal(picks, 1, seed=2).abs()
    by = sorted_picks(sizes, plan.width)
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)
    results = []
    for seed in range(3):
        monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder, seed))
        results.append(torch.full((picks + 1, outputs), torch.nan, dtype=dtype))
        experts.product(plan, SMS, x, w, results[-1], by, shares, act)
        assert results[-1][picks:].isnan().all()
    check(results[0][:picks], x, w, by, shares, act)
    assert all(torch.equal(results[0][:picks], other[:picks]) for other in results)  # whatever arrived first
