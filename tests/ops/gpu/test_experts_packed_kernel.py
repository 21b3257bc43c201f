"""Products of experts of packed formats, mixed in one launch, emulated: copies arrive late and in any order, in both
blocks of a pair, and products of warpgroups read their operands as late as they may.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenfold.ops import tiles
from tests.ops.gpu.emulated_cases import MARKS, normal
from tests.ops.gpu.emulated_hopper import Boxes, HopperEmulator
from tests.ops.gpu.expert_cases import check, experts_of, sorted_picks
from tests.ops.gpu.test_gpu_experts_packed import raw
from tests.ops.gpu.test_quantize_kernel import expected, in_tiles

packed = pytest.importorskip("tenfold.ops.gpu.experts_packed")
nvrtc = packed.nvrtc

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned")]
SMS = 3  # so that a block has several items
BFLOAT, HALF = torch.bfloat16, torch.float16
SCALES = (torch.float16, torch.bfloat16, torch.float32)
FIRST = ("int2g128", "int4g128z", "int8", "fp8g128", "int8g128z", "int4g128a8", "int2g128z", "dense")
SECOND = ("int3g128z", "int4a8", "int3g128", "fp8a8", "int8g128", "int4", "int2g128z", "dense")
ROUNDED = ("fp8a8", "int3g128z", "dense", "int4g128a8")
WHOLE = ("int4g128", "int2g128z", "int8g128z", "int3g128")


# Experts of every format with one pick or with more than a tile holds, one without any; all picks of one expert. Sizes
# that fill no tile.
@pytest.mark.parametrize("on_one", [False, True])
@pytest.mark.parametrize(
    ("name", "formats", "sizes", "outputs", "cols", "act", "dtype"),
    [
        ("tiles:16x64x3x2x4", FIRST, (1, 1, 3, 17, 1, 1, 1, 2, 0), 72, 704, "silu", BFLOAT),
        ("tiles:8x128x2x1x2", SECOND, (1, 9, 1, 1, 1, 1, 1, 1, 0), 136, 384, None, HALF),
        ("tiles:128x128x2x1x1:a8:pairs", ROUNDED, (1, 65, 2, 129, 0), 168, 256, "gelu_tanh", BFLOAT),
        ("tiles:192x64x3x1x1:a8", ("fp8a8", "int4a8"), (193, 1, 0), 72, 288, None, HALF),
        ("tiles:2x64x3x2x4:digits", WHOLE[:3], (3, 1, 1, 0), 40, 704, "silu", HALF),
        ("tiles:4x128x2x2x2:digits", WHOLE, (1, 2, 5, 1, 0), 136, 384, None, HALF),
    ],
)
def test_products(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    formats: tuple[str, ...],
    sizes: tuple[int, ...],
    outputs: int,
    cols: int,
    act: str | None,
    dtype: torch.dtype,
    on_one: bool,
) -> None:
    plan, rows, picks = packed.parse(name), 2 * outputs if act else outputs, sum(sizes)
    w = bank(formats, normal(len(sizes), rows, cols) / cols**0.5, bool(act), dtype)
    assert packed.legal(plan, w.kinds)
    assert len(w.kinds) == len(formats)
    by = sorted_picks((0, picks) if on_one else sizes, plan.width, None if on_one else packed.turns(w, w))
    x, shares = normal(picks, cols, seed=1).to(dtype), normal(picks, 1, seed=2).abs()
    codes, scales = expected(x, None)
    rounded = torch.tensor([packed.rounds(plan, w.kinds[at], cols) for at in w.of])[experts_of(by)]
    inputs = torch.where(rounded[:, None], codes.float() * scales[:, None], x.float())
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)
    results = []
    for seed in range(3):
        monkeypatch.setattr(nvrtc, "load", HopperEmulator(folder, seed))
        results.append(torch.full((picks + 1, outputs), torch.nan, dtype=dtype))
        eights = packed.spread(x, w.kinds) if plan.digits else (in_tiles(codes).view(torch.uint8), scales)
        packed.product(plan, SMS, x, eights, w, results[-1], by, shares, act)
        assert results[-1][picks:].isnan().all()
    check(results[0][:picks], inputs, values(w), by, shares, act)
    assert all(torch.equal(results[0][:picks], other[:picks]) for other in results)  # whatever arrived first


def bank(formats: tuple[str, ...], w: Tensor, pairs: bool, dtype: torch.dtype) -> tiles.Tiled:
    parts = [[raw(formats[i % len(formats)], each, SCALES[i % len(formats) % 3])] for i, each in enumerate(w)]
    return tiles.bank(parts, pairs, lambda own: own[0].data, torch.device("cpu"), dtype)


def values(w: tiles.Tiled) -> Tensor:
    """Of all experts [experts, rows, cols], exactly as tiles mean them."""
    types = [w.dtype if w.kinds[at].name == "dense" else torch.float32 for at in w.of]
    each = zip(w.of, w.data, types)
    return torch.stack([tiles.untile(w.kinds[at], own, w.rows, w.cols, of, w.pairs).float() for at, own, of in each])
