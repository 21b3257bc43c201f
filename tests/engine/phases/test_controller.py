"""What controllers decide: each case of the paper's algorithm, the staircase, sharing and its end."""

import pytest

from tenfold.engine.phases.controller import (
    Adaptive,
    Algorithm1,
    Guard,
    Observed,
    Split,
    Staircase,
    Targets,
    percentile,
)
from tenfold.engine.phases.latency import Paper, Stairs

TOTAL = 132
SPLITS = [Split(p, TOTAL - p) for p in (32, 64, 96, 116)]
TARGETS = Targets(ttft=0.5, tpot=0.02)
STAIRS = Stairs(
    {s: ((8192, 0.2 * TOTAL / s),) for s in (32, 64, 96, 116, 132)},
    {s: ((1, 0.005 + 0.1 / s), (64, 0.008 + 0.25 / s)) for s in (16, 36, 68, 100, 132)},
)


def seen(ttft: float | None = 0.1, tpot: float | None = 0.01, **values: float) -> Observed:
    own = {"queued": 4096, "waited": 0.0, "requests": 8, "rate": 1000.0} | values
    return Observed(ttft, tpot, int(own["queued"]), own["waited"], int(own["requests"]), own["rate"])


def algorithm() -> Algorithm1:
    return Algorithm1(TARGETS, SPLITS, Paper.seeded(TOTAL, 0.2, 0.008), 0.2 / 8192)


@pytest.mark.parametrize(
    ("ttft", "tpot", "direction"),
    [
        (0.1, 0.01, 0),
        (0.9, 0.01, 1),
        (0.1, 0.05, -1),
        (0.9, 0.05, 0),
        (None, None, 0),
        (None, 0.05, -1),
        (0.9, None, 1),
    ],
)
def test_algorithm_1_moves_the_border_towards_the_phase_that_fails_alone(
    ttft: float | None, tpot: float | None, direction: int
) -> None:
    now = SPLITS[1]
    found = algorithm().decide(seen(ttft, tpot), now)
    assert (found.split.prefill > now.prefill) - (found.split.prefill < now.prefill) == direction
    assert found.why


def test_algorithm_1_ends_where_a_target_is_out_of_reach() -> None:
    own = Algorithm1(Targets(0.5, 1e-6), SPLITS, Paper.seeded(TOTAL, 0.2, 0.008), 0.2 / 8192)
    assert own.decide(seen(0.1, 0.01), SPLITS[3]).split == SPLITS[0]
    assert own.decide(seen(0.1, 0.01), SPLITS[3]).split == SPLITS[3]  # waits for what that brings
    own.every = own._waits = 0
    assert own.decide(seen(0.1, 0.01), SPLITS[0]).split == SPLITS[0]


def test_the_staircase_gives_decodes_no_more_than_they_need() -> None:
    own = Staircase(TARGETS, SPLITS, STAIRS)
    assert own.decide(seen(), SPLITS[0]).split == Split(116, 16)
    assert own.decide(seen(requests=64), SPLITS[3]).split == Split(96, 36)
    own.guard.share = 0.5
    assert own.decide(seen(requests=64), SPLITS[3]).split == Split(64, 68)


def test_a_phase_without_work_gives_the_whole_gpu_away() -> None:
    own = Staircase(TARGETS, SPLITS, STAIRS)
    assert own.decide(seen(queued=0), SPLITS[1]).split == Split(0, TOTAL)
    assert own.decide(seen(requests=0), SPLITS[1]).split == Split(TOTAL, 0)


def test_where_both_targets_are_out_of_reach_the_worse_miss_is_least() -> None:
    own = Staircase(Targets(0.05, 0.006), SPLITS, STAIRS)
    found = own.decide(seen(queued=8192, requests=64), SPLITS[0])
    misses = {split: own.miss(split, seen(queued=8192, requests=64)) for split in SPLITS}
    assert misses[found.split] == min(misses.values()) > 1
    assert own.decide(seen(queued=8300, requests=64), found.split).split == found.split


def test_what_prefill_adds_to_a_decode_step_is_remembered_at_its_worst_and_fades() -> None:
    guard = Guard()
    guard.observe(0.010, 0.013)
    assert guard.share == pytest.approx(0.3)
    guard.observe(0.010, 0.010)
    assert 0.29 < guard.share < 0.3
    guard.observe(0.010, 0.100)
    assert guard.share == 0.6


def test_sharing_goes_on_while_it_serves_and_is_tried_again_later() -> None:
    own = Adaptive(Staircase(TARGETS, SPLITS, STAIRS))
    whole = Split(TOTAL, TOTAL)
    assert own.decide(seen(), SPLITS[0]).split == whole
    own.observe(whole, 8, 0.015)
    assert own.decide(seen(), whole).split == whole
    own.observe(whole, 8, 0.030)
    apart = own.decide(seen(), whole).split
    assert apart == Split(116, 16)
    turns = 0
    while own.decide(seen(), apart).split != whole:
        turns += 1
    assert 100 < turns < 2000
    assert own.decide(seen(queued=0), whole).split == Split(0, TOTAL)


def test_sharing_is_kept_where_every_split_is_worse() -> None:
    own = Adaptive(Staircase(Targets(0.001, 0.02), SPLITS, STAIRS))
    own.observe(own.shared, 8, 0.03)
    assert own.decide(seen(), own.shared).split == own.shared


@pytest.mark.parametrize("wrong", [{"ttft": 0.0}, {"tpot": -1.0}, {"served": 1.0}])
def test_targets_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Targets(**({"ttft": 1.0, "tpot": 1.0} | wrong))


def test_percentiles() -> None:
    assert percentile([], 0.9) is None
    assert percentile([3.0, 1.0, 2.0], 0.9) == 3.0
    assert percentile(list(range(100)), 0.9) == 90
