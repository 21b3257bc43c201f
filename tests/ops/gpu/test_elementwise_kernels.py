"""What stands around products, emulated: the best token, rotary embedding with the write to pages, picks of experts."""

from pathlib import Path

import pytest
import torch

from tenfold.ops.gemm.grouped import Sorted
from tenfold.ops.gpu import experts, nvrtc, rope
from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.oracle import Oracle
from tests.ops.gpu.emulated import Emulator
from tests.ops.gpu.emulated_cases import MARKS, normal

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned")]
BFLOAT, HALF = torch.bfloat16, torch.float16
STEP = {BFLOAT: 2**-7, HALF: 2**-10}


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvrtc, "load", Emulator(folder))


@pytest.mark.parametrize(("rows", "width", "blocks"), [(1, 1, 1), (3, 777, 1), (2, 1030, 3), (1, 5, 8)])
def test_the_best_token_is_the_first_of_equals(rows: int, width: int, blocks: int) -> None:
    """Twice in the same meeting place, which is clean in between; what is no number counts as the largest."""
    best, arrived = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    padded = torch.full((rows, width + 3), torch.inf)
    for turn, low in enumerate((-1.0, -torch.inf)):
        logits = padded[:, :width].copy_(normal(rows, width, seed=turn).round() + low)
        logits[-1, width // 2] = torch.nan if turn else logits[-1].max()
        tokens = torch.empty(rows, dtype=torch.int64)
        kernel = nvrtc.load("argmax.cu", "argmax", ())
        kernel((blocks, rows, 1), 256, 0, [padded, tokens, best, arrived, width, width + 3])
        assert torch.equal(tokens, logits.argmax(1))
    assert not best.any()
    assert not arrived.any()


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "rotary", "normed"),
    [
        (BFLOAT, 9, 2, 64, 64, True),
        (BFLOAT, 2, 1, 64, 0, False),
        (HALF, 3, 1, 128, 64, True),
        (BFLOAT, 2, 2, 256, 256, False),
    ],
)
def test_rotary_and_pages(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    normed: bool,
) -> None:
    """Tokens without a slot are not written; slots that nobody owns stay as they were."""
    monkeypatch.setattr(rope, "legal", lambda *what: True)
    gains = [Norm(normal(head_dim, seed=seed).abs() + 0.5, 1e-5) for seed in (5, 6)] if normed else []
    layer = Heads(AttentionSpec(heads, kv_heads, head_dim, 1.0, rotary_dim=rotary), normal(40, max(1, rotary)), *gains)
    qkv = normal(5, (heads + 2 * kv_heads) * head_dim, seed=1).to(dtype)
    positions, slots = torch.tensor([39, 0, 7, 8, 20]).int(), torch.tensor([30, 0, 7, 8, 21]).int()
    wanted = torch.full((2, 4, kv_heads, 8, head_dim), torch.nan, dtype=dtype)
    queries = Oracle("cpu").rope_write(qkv, layer, positions, slots, *wanted)
    wanted[:, 7 // 8, :, 7 % 8] = torch.nan
    pages = torch.full_like(wanted, torch.nan)
    slots[2] = -1
    got = rope.write(qkv, layer, positions, slots, *pages)
    close = {"rtol": STEP[dtype], "atol": 4 * STEP[dtype]}
    torch.testing.assert_close(got, queries, **close)
    torch.testing.assert_close(pages[0], wanted[0], equal_nan=True, **close)
    torch.testing.assert_close(pages[1], wanted[1], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("cols", [8, 72, 2056])
def test_picks_gathered_and_added_up(cols: int) -> None:
    order = torch.tensor([7, 2, 0, 5, 8, 1, 3, 4, 6], dtype=torch.int32)
    x, parts, residual = (normal(rows, cols, seed=rows).to(HALF) for rows in (3, 9, 5))
    by = Sorted(order, torch.empty(0), torch.empty(0))
    assert torch.equal(experts.gather(x, by, torch.empty(3, 3)), x[(order // 3).long()])
    for last in (None, residual[:3]):
        exact = parts.double().view(3, 3, cols).sum(1) + (0 if last is None else last.double())
        torch.testing.assert_close(experts.summed(parts, last, 3).double(), exact, rtol=2**-11, atol=1e-6)
