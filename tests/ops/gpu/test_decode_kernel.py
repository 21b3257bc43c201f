"""Attention of decode steps, emulated: blocks run in any order; tiles that come through shared memory and sums that
other blocks merge arrive at once or late.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tenfold.ops.attention import unified_max
from tenfold.ops.gpu import nvrtc
from tests.ops.gpu.decode_cases import ADVERSARIAL, EVEN_SPLITS, check
from tests.ops.gpu.emulated_cases import MARKS
from tests.ops.gpu.emulated_decode import DecodeEmulator

pytestmark = MARKS
TILE = 16
KNOWN = 32  # tiles of a warp whose pages its lanes know
BFLOAT, HALF = torch.bfloat16, torch.float16
Case = tuple[int, int, int, int, int, torch.dtype, str]
# Tiles that a warp has under way, warps, heads, KV heads, head dimension, type, softmax: each is compiled.
CASES: list[Case] = [
    (1, 2, 4, 1, 128, BFLOAT, "lazy"),
    (1, 4, 16, 2, 64, HALF, "online"),
    (2, 2, 1, 1, 64, BFLOAT, "lazy"),
    (2, 2, 6, 2, 128, HALF, "online"),
    (3, 2, 4, 1, 128, BFLOAT, "lazy"),
    (3, 4, 6, 2, 64, HALF, "online"),
    (6, 2, 8, 1, 64, BFLOAT, "online"),
    (6, 2, 2, 2, 128, HALF, "lazy"),
]
MEASURED: list[Case] = [  # with a maximum that was measured before
    (1, 2, 4, 1, 64, HALF, "paper"),
    (2, 2, 3, 1, 128, BFLOAT, "unified"),
    (3, 2, 4, 1, 128, BFLOAT, "unified"),
    (3, 4, 6, 2, 64, HALF, "paper"),
    (6, 2, 8, 1, 64, HALF, "unified"),
    (6, 2, 2, 2, 128, BFLOAT, "paper"),
]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvrtc, "load", DecodeEmulator(folder))


def name(case: Case) -> str:
    depth, warps, heads, kv_heads, head_dim, dtype, softmax = case
    return f"{depth}x{warps}-{heads // kv_heads}x{head_dim}-{dtype}-{softmax}".replace("torch.", "")


def checks(case: Case, splits: int) -> Callable[..., int]:
    depth, warps, heads, kv_heads, head_dim, dtype, softmax = case
    plan = {"depth": depth, "shape": (warps, 1), "splits": splits, "softmax": softmax}
    return partial(check, torch.device("cpu"), heads, kv_heads, head_dim, dtype=dtype, **plan)


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_lengths(case: Case, splits: int) -> None:
    """At the borders of a tile, of a block's tiles, of all that are under way, and of the pages a warp knows."""
    depth, warps, *_ = case
    block = warps * TILE
    borders = {count * block + more for count in (1, depth, 2 * depth) for more in (-1, 0, 1)}
    run = checks(case, splits)
    run([1, 2, 15, 16, 17, 0, *sorted(borders)])
    if depth > 2 and splits < 3:
        run([KNOWN * block, KNOWN * block + 1, (2 * KNOWN + 2) * block + 1])


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("case", [*CASES[:4], *MEASURED[:2]], ids=name)
def test_splits_that_meet_in_a_cluster(case: Case, splits: int) -> None:
    """Some have nothing to read, some wait for the others long."""
    run = partial(checks(case, splits), cluster=True, phi=2.0 if case in MEASURED else None)
    block = case[1] * TILE
    run([1, 0, 17, splits * block, splits * block + 1, 5 * block - 1])
    run([700, 33, 0, 32], page=32, window=100, norms=True)
    if case in MEASURED:
        assert checks(case, splits)([300, 0, 17], cluster=True, phi=1e4) == 2 * 2 * case[2]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_rules(case: Case, splits: int) -> None:
    run = checks(case, splits)
    run([700, 33, 0, 32], page=32)
    run([700, 64, 65], page=64, norms=True)
    run([40, 700, 100, 101], window=100)
    run([700, 17], window=600, page=64)
    run([300, 70], softcap=20.0)
    run([300, 70], rotary=case[4] // 2)


@pytest.mark.parametrize("phi", ADVERSARIAL)
@pytest.mark.parametrize("case", MEASURED, ids=name)
def test_a_wrong_unified_maximum_costs_time_only(case: Case, phi: float) -> None:
    wrong = not abs(phi) < 100
    for splits, lengths in ((1, [100, 17]), (3, [400, 0, 17])):
        again = checks(case, splits)(lengths, phi=phi)
        assert again == 2 * 2 * case[2] or not wrong  # two runs of two requests


@pytest.mark.parametrize("case", MEASURED, ids=name)
def test_long_contexts_that_are_computed_again(case: Case) -> None:
    """By one block, of splits whose warps had less than the pages they know."""
    length = (KNOWN + 1) * case[1] * TILE + 1
    assert checks(case, 3)([length], phi=1e4) == 2 * case[2]


def test_a_score_outside_the_guard_counts_in_whatever_split_it_is() -> None:
    """Highest scores lie around the guard's end, and denominators well inside their bounds."""
    by_softmax = {case[-1]: case for case in MEASURED if case[-2] == BFLOAT}
    lengths, around = [200, 190, 180, 170, 160], math.log(2) * unified_max.guard(BFLOAT).high
    most = 2 * len(lengths) * by_softmax["paper"][2]
    counts = set()
    for highest in (3.5, 4.0, 4.5):
        one, three = (checks(by_softmax["paper"], splits)(lengths, phi=highest - around) for splits in (1, 3))
        assert one == three
        counts.add(one)
    assert counts - {0, most}
    assert not checks(by_softmax["unified"], 3)(lengths, phi=4.0 - around)


@pytest.mark.parametrize("sms", [1, 6, 40])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_contexts_that_are_shared_out_evenly(case: Case, sms: int) -> None:
    """A long one among short and idle ones, in as many parts as there are multiprocessors for."""
    block = case[1] * TILE
    run = partial(checks(case, EVEN_SPLITS), sms=sms)
    run([17, 0, 40 * block + 1, 1, 100, 0, 5 * block])
    run([0, 1, 0])
    run([3 * block] * 5)
    run([700, 33, 0, 32], page=32, window=100, norms=True)


@pytest.mark.parametrize("phi", ADVERSARIAL)
@pytest.mark.parametrize("case", MEASURED, ids=name)
def test_a_wrong_unified_maximum_of_parts_costs_time_only(case: Case, phi: float) -> None:
    again = checks(case, EVEN_SPLITS)([600, 0, 17], phi=phi)
    assert again == 2 * 2 * case[2] or abs(phi) < 100
