"""Contexts shared out evenly, emulated: every tile is some block's, and blocks have about as much to do."""

import heapq
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.ops.gpu import even, nvrtc
from tenfold.ops.gpu.decode import ENOUGH
from tests.ops.gpu.emulated_cases import MARKS
from tests.ops.gpu.emulated_decode import DecodeEmulator

pytestmark = MARKS
TILE = 16
LEAST = 8  # tiles of a part
ROOM = 396  # blocks of four warps on the 132 multiprocessors of an H100
LENGTHS = st.one_of(st.integers(0, 600), st.integers(0, 70_000))


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvrtc, "load", DecodeEmulator(folder))


def parts(lengths: list[int], kv_heads: int = 8, room: int = ROOM, window: int = 0) -> list[tuple[int, int, int]]:
    """Request, first tile and number of tiles of each part, after what all of them must be was looked at."""
    kind = even.Kind(kv_heads, room, LEAST, 8192, window, ENOUGH)
    items = even.run(kind, torch.tensor(lengths, dtype=torch.int32)).tolist()
    assert len(items) == kind.capacity(len(lengths))
    used = [i for i, item in enumerate(items) if item[0] >= 0]
    assert used == list(range(len(used)))  # idle blocks come last
    seen: dict[int, list[int]] = {}
    for place, (request, first, end, part) in enumerate(items[: len(used)]):
        which, count = part & 0xFFFF, part >> 16
        assert 0 <= which < count <= even.SPLITS
        if which:  # parts of a context lie one after the other
            assert items[place - 1][0] == request
            assert items[place - 1][3] == part - 1
        seen.setdefault(request, []).extend(range(first, end))
        assert (which < count - 1) == (items[place + 1][0] == request if place + 1 < len(items) else False)
    for request, length in enumerate(lengths):
        start = max(0, length - window) // TILE if window else 0
        assert seen[request] == list(range(start, -(-length // TILE)))
    found = [(request, first, end - first) for request, first, end, _ in items[: len(used)]]
    largest = [max(n for r, _, n in found if r == request) for request, _, _ in found]
    assert largest == sorted(largest, reverse=True)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LENGTHS, min_size=1, max_size=80), st.sampled_from([1, 2, 8, 32]), st.sampled_from([0, 100, 4096]))
def test_every_tile_is_read_once(lengths: list[int], kv_heads: int, window: int) -> None:
    parts(lengths, kv_heads, window=window)


def took(found: list[tuple[int, int, int]], kv_heads: int, room: int) -> float:
    """Time of all parts, taken in order as blocks become free: 1 for a tile of each of `room` blocks. Fewer blocks are
    faster, for all of them share the memory's rate, up to where there are ENOUGH.
    """
    left = [tiles for _, _, tiles in reversed(found) for _ in range(kv_heads)]
    running: list[float] = []  # tiles of each by the time it ends, of a block that always ran
    now = tiles = 0.0
    while left or running:
        while left and len(running) < room:
            heapq.heappush(running, tiles + left.pop())
        speed = min(1 / ENOUGH, room / len(running))
        end = heapq.heappop(running)
        now, tiles = now + (end - tiles) / speed, end
    return now


@pytest.mark.parametrize(
    "lengths",
    [
        [300] * 31 + [8_400, 8_700],
        [200] * 7 + [16_000],
        [120, 130, 9_000],
        [32_000] + [500] * 63,
        list(range(100, 6_500, 100)),
        [4_000] * 3,
        [8_192] * 64,
        [1_000] * 200 + [60_000],
    ],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_no_multiprocessor_waits_long_for_the_others(lengths: list[int], kv_heads: int) -> None:
    """No more than a fifth of the time that all of them need, or a few tiles."""
    found = parts(lengths, kv_heads)
    needed = sum(n for _, _, n in found) * kv_heads / ROOM
    assert took(found, kv_heads, ROOM) <= max(1.2 * needed, needed + LEAST)


@pytest.mark.parametrize(
    ("lengths", "times"), [([300] * 31 + [8_400, 8_700], 1.8), ([200] * 7 + [16_000], 4.0)], ids=["33", "8"]
)
def test_a_number_of_parts_that_is_the_same_for_all_takes_longer(lengths: list[int], times: float) -> None:
    """Six, which fill the rounds of 33 requests, and of the longest alone few of the blocks there are."""
    same = []
    for request, length in enumerate(lengths):
        tiles = -(-length // TILE)
        each = max(LEAST, -(-tiles // 6))
        same += [(request, first, min(each, tiles - first)) for first in range(0, tiles, each)]
    assert took(same, 8, ROOM) > times * took(parts(lengths), 8, ROOM)


def test_short_contexts_are_left_whole() -> None:
    assert len(parts([100] * 40)) == 40
    assert len(parts([LEAST * TILE] * 3)) == 3


def test_parts_that_cost_more_than_they_hold_are_fewer() -> None:
    lengths = torch.full((24,), 8192, dtype=torch.int32)
    counts = []
    for beside in (0.0, 32.0):
        items = even.run(even.Kind(8, 264, 24, 2304, enough=ENOUGH, beside=beside), lengths)
        counts.append(int((items[:, 0] >= 0).sum()))
    assert counts == [96, 24]


def test_many_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="1025 requests cannot be shared out evenly; allowed: 1 to 1024"):
        even.run(even.Kind(8, ROOM, LEAST, 8192), torch.ones(1025, dtype=torch.int32))


def test_a_step_shares_out_once_and_a_repeated_forward_again() -> None:
    memo: dict[object, object] = {}
    lengths = torch.tensor([40, 3000], dtype=torch.int32)
    kind = even.Kind(8, ROOM, LEAST, 8192)
    first = even.share(kind, lengths, memo, 1)
    assert first.fresh
    for layer in (2, 3):
        again = even.share(kind, lengths, memo, layer)
        assert again.items is first.items
        assert not again.fresh
    windowed = even.share(replace(kind, window=100), lengths, memo, 4)
    assert windowed.fresh
    assert not torch.equal(windowed.items, first.items)
    lengths += 2000  # a captured step is run again, with other lengths
    later = even.share(kind, lengths, memo, 1)
    assert later.fresh
    assert not torch.equal(later.items, first.items)
