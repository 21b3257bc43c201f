"""Attention of chunks, emulated: tiles arrive late and in any order, products of warpgroups are finished when they are
waited for, and blocks take items from their queue at the same time.
"""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.gpu import nvrtc, prefill
from tests.ops.attention.cases import Case as Step
from tests.ops.gpu.emulated_cases import MARKS
from tests.ops.gpu.emulated_hopper import Boxes, HopperEmulator
from tests.ops.gpu.prefill_cases import check, chunks

pytestmark = MARKS
BFLOAT, HALF = torch.bfloat16, torch.float16
Case = tuple[str, int, int, torch.dtype, dict[str, Any]]
# Plan, head dimension, page, type, and rules: each is compiled.
CASES: list[Case] = [
    ("wgmma:lazy:2x64x2:turns", 64, 16, BFLOAT, {}),
    ("wgmma:online:2x96x2:overlap", 128, 48, HALF, {}),
    ("wgmma:lazy:3x128x2:apart", 64, 32, BFLOAT, {"window": 100, "softcap": 20.0}),
    ("wgmma:online:2x160x2:turns", 64, 16, BFLOAT, {"window": 1}),
]
MEASURED: list[Case] = [  # with a maximum that was measured before
    ("wgmma:unified:2x64x3:turns", 64, 64, BFLOAT, {}),
    ("wgmma:unified:3x64x2:apart", 64, 16, HALF, {"window": 70}),
]


def name(case: Case) -> str:
    return case[0]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of whose blocks two run at the same time; each launch has a seed of its own."""
    seeds = count(1)
    monkeypatch.setattr(nvrtc, "load", lambda *what: HopperEmulator(folder, next(seeds), together=2)(*what))
    monkeypatch.setattr(nvrtc, "tensor_map", Boxes)


def made(case: Case, lengths: list[int], counts: list[int], spread: float = 1.0) -> Step:
    plan, head_dim, page, dtype, rules = case
    assert prefill.fits(prefill.parse(plan), head_dim)
    sizes: dict[str, Any] = {"page_size": page, "dtype": dtype, "spread": spread}
    return chunks("cpu", lengths, counts, (2, 1), head_dim, **sizes, **rules)


@pytest.mark.parametrize("case", [*CASES, *MEASURED], ids=name)
def test_requests_of_all_lengths(case: Case) -> None:
    """Idle, of one token, at the borders of tiles, behind contexts that are there already."""
    plan = prefill.parse(case[0])
    tile, rows = plan.tile, plan.rows
    step = made(case, [1, 0, tile, tile + 1, rows + 17], [1, 0, tile, 3, rows + 1])
    for _ in range(2):
        assert check(step, plan, step.phi, sms=3) == 0 or case[3] == HALF


@pytest.mark.parametrize("phi", [1e4, -1e4, float("nan")])
@pytest.mark.parametrize("case", MEASURED, ids=name)
def test_a_wrong_unified_maximum_costs_time_only(case: Case, phi: float) -> None:
    """Of one head, then of both."""
    plan, step = prefill.parse(case[0]), made(case, [140, 40], [133, 7])
    wrong = torch.tensor([0.0, phi])
    assert check(step, plan, wrong, sms=2) == 140 or case[3] == HALF
    assert check(step, plan, torch.full_like(wrong, phi), sms=2) == 2 * 140


@pytest.mark.parametrize("case", [*CASES[:2], *MEASURED], ids=name)
def test_scores_that_grow_along_the_context(case: Case) -> None:
    step = made(case, [200], [200], spread=20.0)
    check(step, prefill.parse(case[0]), step.phi, sms=2)
