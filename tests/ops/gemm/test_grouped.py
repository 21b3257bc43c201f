"""Experts' products in Triton against float64, interpreted on a CPU: whoever has how many tokens."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tenfold.ops.matrix import Experts, dense_bank
from tenfold.ops.oracle import Oracle

grouped = pytest.importorskip("tenfold.ops.gemm.grouped")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of three roundings of sums of size one
EXPERTS = 6
SMALL = grouped.GroupedPlan(16, 32, 32, 2, 4)

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def picks(kind: str) -> Tensor:
    draw = torch.Generator().manual_seed(len(kind))
    if kind == "spread":
        return torch.stack([torch.randperm(EXPERTS, generator=draw)[:3] for _ in range(23)])
    if kind == "all on one":
        return torch.full((37, 1), 4)
    if kind == "two of six":
        return torch.tensor([[1, 5]] * 19)
    return {"one token": torch.tensor([[5, 0]]), "nobody": torch.empty(0, 2, dtype=torch.int64)}[kind]


CASES = list(itertools.product(["spread", "all on one", "two of six", "one token", "nobody"], [False, True]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize(("kind", "added"), CASES)
@pytest.mark.parametrize(("cols", "inner", "act"), [(64, 32, "silu"), (48, 20, "gelu_tanh")])
def test_sums_of_experts(kind: str, added: bool, cols: int, inner: int, act: str, dtype: torch.dtype) -> None:
    ids = picks(kind).to(DEVICE)
    tokens = len(ids)
    x = random(tokens, cols, seed=1).to(dtype)
    residual = random(tokens, cols, seed=2).to(dtype) if added else None
    weights = random(*ids.shape, seed=3).abs()
    gate_up = (random(EXPERTS, 2 * inner, cols, seed=4) * cols**-0.5).to(dtype)
    down = (random(EXPERTS, cols, inner, seed=5) * inner**-0.5).to(dtype)
    found = grouped.run(SMALL, x, ids, weights, gate_up, down, act, residual)
    assert found.shape == (tokens, cols)
    assert found.dtype == dtype
    exact = Oracle(DEVICE, torch.float64)
    own = Experts(dense_bank(gate_up.double()), dense_bank(down.double()), act)
    want = exact.experts(x.double(), ids, weights, own, None if residual is None else residual.double())
    assert tokens == 0 or (found - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    again = grouped.run(SMALL, x, ids, weights, gate_up, down, act, residual)
    assert torch.equal(found, again)


def test_experts_come_in_the_order_that_is_asked_for() -> None:
    ids, turns = picks("spread").to(DEVICE), torch.tensor([4, 0, 5, 2, 1, 3], dtype=torch.int32, device=DEVICE)
    plain, by = grouped.sort(ids, EXPERTS, 4), grouped.sort(ids, EXPERTS, 4, turns)
    tiles = by.tiles[: int(by.count)].tolist()
    assert list(dict.fromkeys(tile[0] for tile in tiles)) == turns.tolist()
    flat = ids.flatten().tolist()
    for expert, first, end, _ in tiles:
        assert {flat[pick] for pick in by.order[first:end].tolist()} == {expert}
    assert sorted(by.order.tolist()) == sorted(plain.order.tolist())
    assert int(by.count) == int(plain.count)


@pytest.mark.parametrize("height", [1, 4, 16])
def test_tiles_cover_each_pick_once_and_no_other(height: int) -> None:
    for kind in ("spread", "all on one", "two of six", "one token"):
        ids = picks(kind).to(DEVICE)
        by = grouped.sort(ids, EXPERTS, height)
        flat = ids.flatten().tolist()
        assert int(by.count) == sum(tile[0] >= 0 for tile in by.tiles.tolist())
        covered = []
        seen_end = False
        for expert, first, end, _ in by.tiles.tolist():
            seen_end |= expert < 0
            assert (expert < 0) == seen_end  # those that are none come last
            if expert >= 0:
                own = by.order[first:end].tolist()
                assert 1 <= len(own) <= height
                assert all(flat[pick] == expert for pick in own)
                covered += own
        assert sorted(covered) == list(range(len(flat)))
        assert covered == by.order.tolist()


@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.sampled_from([16, 64, 128, 192, 256]), st.randoms())
def test_tiles_of_an_expert_are_few_and_about_even(counts: list[int], height: int, random: Any) -> None:
    flat = [expert for expert, count in enumerate(counts) for _ in range(count)]
    random.shuffle(flat)
    turns = torch.tensor(random.sample(range(len(counts)), len(counts)), dtype=torch.int32)
    by = grouped.sort(torch.tensor(flat, dtype=torch.int64).to(DEVICE)[:, None], len(counts), height, turns.to(DEVICE))
    unit, place, tiles = min(64, height), 0, iter(by.tiles.tolist())
    for expert in turns.tolist():
        own = list(itertools.islice(tiles, -(-counts[expert] // height)))
        sizes = [end - first for _, first, end, _ in own]
        assert [tile[0] for tile in own] == [expert] * len(own)
        assert [tile[1] for tile in own] == [place + sum(sizes[:i]) for i in range(len(own))]
        assert sum(sizes) == counts[expert]
        widths = [-(-size // unit) for size in sizes]  # in units
        assert all(1 <= width <= height // unit for width in widths)
        assert sum(widths) == -(-counts[expert] // unit)
        assert not widths or max(widths) - min(widths) <= 1
        place += counts[expert]
    assert all(tile[0] == -1 for tile in tiles)
    assert int(by.count) == sum(-(-count // height) for count in counts)


def test_plans_follow_the_picks_of_an_expert() -> None:
    heights = [grouped.plan(picks, 128).height for picks in (8, 512, 2048, 8192, 65536)]
    assert heights == sorted(heights)
    assert heights[0] == 16
    assert heights[-1] == 128
    assert all(grouped.most_tiles(p, e, h) >= -(-p // h) for p in (1, 5, 100) for e in (1, 8, 200) for h in (1, 16))
