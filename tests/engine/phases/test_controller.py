"""What controllers decide: each case of the paper's algorithm, the staircase, sharing and its end."""

import pytest

from tenfold.engine.phases.controller import (
    Adaptive,
    Algorithm1,
    Guard,
    Learner,
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


def test_the_staircase_learns_what_phases_add_to_each_other_and_forgets_it() -> None:
    own = Staircase(TARGETS, SPLITS, STAIRS)
    assert isinstance(own, Learner)
    assert isinstance(adaptive(tpot=0.05), Learner)
    assert not isinstance(algorithm(), Learner)
    split, before = SPLITS[1], own.promise(SPLITS[1], seen())
    for _ in range(100):
        own.observe(split, 8, 1.5 * own.stairs.decode_seconds(split.decode, 8))
        own.prefilled(split, 4096, 1.5 * own.stairs.prefill_seconds(split.prefill, 4096))
    after = own.promise(split, seen())
    assert after.step > 1.2 * before.step
    assert after.work > 1.2 * before.work
    for _ in range(20_000):
        own.decide(seen(queued=0), split)
    assert own.promise(split, seen()).step == pytest.approx(before.step, rel=1e-3)


def test_a_phase_without_work_gives_the_whole_gpu_away() -> None:
    own = Staircase(TARGETS, SPLITS, STAIRS)
    assert own.decide(seen(queued=0), SPLITS[1]).split == Split(0, TOTAL)
    assert own.decide(seen(requests=0), SPLITS[1]).split == Split(TOTAL, 0)


def test_where_both_targets_are_out_of_reach_the_worse_miss_is_least() -> None:
    own = Staircase(Targets(0.05, 0.006), SPLITS, STAIRS)
    found = own.decide(seen(queued=8192, requests=64), SPLITS[0])
    misses = {split: own.promise(split, seen(queued=8192, requests=64)).miss for split in SPLITS}
    assert misses[found.split] == min(misses.values()) > 1
    assert own.decide(seen(queued=8300, requests=64), found.split).split == found.split


def test_what_one_phase_adds_to_the_other_is_remembered_on_average_and_fades() -> None:
    guard = Guard(0.2)
    assert guard.share == 0.2
    for _ in range(200):
        guard.observe(0.010, 0.013)
    assert guard.share == pytest.approx(0.3)
    guard.observe(0.010, 0.9)
    assert guard.share == pytest.approx(0.33)  # one that hung says little
    for _ in range(200):
        guard.observe(0.010, 0.008)
    assert guard.share == pytest.approx(-0.2)  # contexts are shorter than those that were measured
    for _ in range(20_000):
        guard.fade()
    assert guard.share == pytest.approx(0.2, abs=1e-4)


def test_a_split_is_judged_by_what_its_phases_added_to_each_other() -> None:
    own = adaptive(tpot=0.009, ttft=0.2, least=0.012)
    split = own.decide(seen(), WHOLE).split
    assert split in SPLITS
    before = own.inner.promise(split, seen())
    for _ in range(100):
        own.prefilled(split, 4096, 1.5 * own.inner.stairs.prefill_seconds(split.prefill, 4096))
        own.observe(split, 8, 1.5 * own.inner.stairs.decode_seconds(split.decode, 8))
    after = own.inner.promise(split, seen())
    assert after.work > 1.2 * before.work
    assert after.step > 1.2 * before.step
    assert own.guard.share == 0


def chunk_of(own: Adaptive, seen: Observed) -> int:
    return own.chunk(seen, own.fitting(seen))


def adaptive(tpot: float, ttft: float = 1.0, least: float = 0.006) -> Adaptive:
    """least: seconds of the smallest step with prompts."""
    fine = Stairs(
        {
            s: ((128, least * TOTAL / s), (512, 2 * least * TOTAL / s), (4096, 15 * least * TOTAL / s))
            for s in (32, 64, 96, 116, 132)
        },
        STAIRS.decode,
    )
    return Adaptive(Staircase(Targets(ttft, tpot), SPLITS, fine, Guard(), Guard()), 4096)


WHOLE = Split(TOTAL, TOTAL)


def test_prompts_ride_in_steps_that_are_in_time_and_nearly_as_fast_as_the_largest_of_those() -> None:
    own = adaptive(tpot=0.05)
    found = own.decide(seen(queued=4096), WHOLE)
    assert found.split == WHOLE
    largest = own.fitting(seen())[-1]
    assert own.seconds(largest, 8) <= 0.9 * 0.05 < own.seconds(largest + 128, 8)

    def rate(chunk: int) -> float:
        return chunk / own.seconds(chunk, 8)

    assert rate(found.chunk) >= 0.9 * rate(largest) > rate(found.chunk - 128)
    assert found.chunk < largest
    assert str(found.chunk) in found.why


def test_steps_grow_where_first_tokens_come_late_and_larger_ones_compute_more() -> None:
    own = adaptive(tpot=0.012)
    early, late = (chunk_of(own, seen(queued=queued)) for queued in (200, 30_000))
    assert own.seconds(early, 8) <= 0.9 * 0.012 < own.seconds(late, 8) <= 2 * 0.9 * 0.012
    largest = own.fitting(seen(), 2.0)[-1]
    assert late < largest
    assert late / own.seconds(late, 8) >= 0.9 * largest / own.seconds(largest, 8)
    relaxed = adaptive(tpot=0.05)
    assert relaxed.seconds(chunk_of(relaxed, seen(queued=30_000)), 8) <= 0.9 * 0.05  # steps in time hold enough tokens


def test_where_decodes_alone_are_late_prompts_wait_no_longer_for_that() -> None:
    own = adaptive(tpot=0.009)
    assert own.inner.stairs.decode_seconds(TOTAL, 64) > 0.9 * 0.009
    assert own.fitting(seen(requests=64))[-1] == 4096
    assert chunk_of(own, seen(requests=64)) > own.fitting(seen(requests=8))[-1]


def test_a_part_of_the_gpu_decodes_alone_where_no_step_with_prompts_is_in_time() -> None:
    own = adaptive(tpot=0.009, ttft=0.2, least=0.012)
    found = own.decide(seen(), WHOLE)
    assert found.split in SPLITS
    assert found.chunk == 0
    assert own.inner.stairs.decode_seconds(found.split.decode, 8) <= 0.009
    assert own.decide(seen(), found.split).split == found.split
    assert own.decide(seen(requests=0), found.split) == own.decide(seen(requests=0), WHOLE)
    assert adaptive(tpot=0.009, ttft=0.2).decide(seen(), WHOLE).split == WHOLE  # small steps are in time
    assert adaptive(tpot=0.005, ttft=0.2, least=0.012).decide(seen(), WHOLE).split == WHOLE  # and here no split is


def test_the_border_stays_where_steps_are_late_by_little() -> None:
    own = adaptive(tpot=0.0122, least=0.012)
    assert 1 < own.promise(128, seen()).step < 1.05
    assert own.decide(seen(), WHOLE).split == WHOLE
    assert own.decide(seen(), SPLITS[1]).split in SPLITS


def test_no_split_for_what_is_done_within_few_steps_of_decodes() -> None:
    own = adaptive(tpot=0.009, ttft=0.02, least=0.012)
    slow, fast = (seen(queued=1000), seen(queued=1))
    assert own.decide(slow, WHOLE).split in SPLITS
    for split in SPLITS:
        times = dict(own.inner.stairs.prefill)
        object.__setattr__(own.inner.stairs, "prefill", times | {split.prefill: ((1, 0.001), *times[split.prefill])})
    assert own.decide(fast, WHOLE).split == WHOLE


def test_a_phase_without_work_needs_no_split() -> None:
    own = adaptive(tpot=0.009)
    nobody_decodes = own.decide(seen(requests=0), SPLITS[1])
    assert (nobody_decodes.split, nobody_decodes.chunk) == (WHOLE, 4096)
    nobody_waits = own.decide(seen(queued=0), SPLITS[1])
    assert (nobody_waits.split, nobody_waits.chunk) == (WHOLE, 128)


def test_steps_that_took_longer_hold_fewer_tokens_for_a_while() -> None:
    own = adaptive(tpot=0.05)
    late = seen(queued=30_000)
    before = chunk_of(own, late)
    for _ in range(10):
        own.observe(WHOLE, 8, 1.4 * own.inner.stairs.mixed_seconds(before, 8), before)
    assert chunk_of(own, late) < before
    assert own.inner.guard.share == 0
    for _ in range(500):
        own.observe(WHOLE, 8, own.inner.stairs.mixed_seconds(before, 8), before)
    assert chunk_of(own, late) == before


@pytest.mark.parametrize("wrong", [{"ttft": 0.0}, {"tpot": -1.0}, {"tpot": float("inf")}, {"served": 1.0}])
def test_targets_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Targets(**({"ttft": 1.0, "tpot": 1.0} | wrong))


def test_percentiles() -> None:
    assert percentile([], 0.9) is None
    assert percentile([3.0, 1.0, 2.0], 0.9) == 3.0
    assert percentile(list(range(100)), 0.9) == 90


def test_prefills_in_a_lane_are_no_larger_than_pays() -> None:
    """Reading weights takes as long as computing 1,000 tokens: what comes meanwhile waits for no more than it must."""
    stairs = Stairs(dict.fromkeys((64, 132), ((1, 0.01), (1024, 0.011), (8192, 0.08))), {68: ((1, 0.005),)})
    for most, expected in ((0, 0), (8192, 1024), (128, 128)):
        own = Staircase(Targets(1.0, 0.1), [Split(64, 68)], stairs, most=most)
        for requests in (0, 4):
            decision = own.decide(seen(queued=9000, requests=requests), Split(64, 68))
            assert decision.prefill == expected
            assert decision.chunk == 0
