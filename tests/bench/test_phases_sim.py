"""Controllers in a simulation: convergence, no oscillation, bursts, idle phases, loads beyond reach."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tenfold.bench.phases_sim import Ask, Costs, Gpu, Result, chunked, poisson
from tenfold.engine.phases.controller import Adaptive, Algorithm1, Controller, Observed, Split, Staircase, Targets
from tenfold.engine.phases.latency import Paper, Stairs

TOTAL = 132
# Shapes of published tables (relative, H800): decode hardly gains above 48 SMs, prefill comes in stairs.
DECODE = {8: 3.0, 16: 1.76, 24: 1.43, 32: 1.24, 40: 1.16, 48: 1.13, 64: 1.06, 88: 1.03, 132: 1.0}
PREFILL = {32: 3.72, 48: 2.77, 64: 1.94, 88: 1.53, 120: 1.53, 128: 1.01, 132: 1.0}
STAIRS = Stairs(
    {s: ((1, 0.006 * r), (8192, 0.2 * r)) for s, r in PREFILL.items()},
    {s: ((1, 0.006 * r), (64, 0.0085 * r), (256, 0.016 * r)) for s, r in DECODE.items()},
)
SPLITS = [Split(p, TOTAL - p) for p in (32, 48, 64, 88, 120)]
TARGETS = Targets(ttft=1.0, tpot=0.02)
MIDDLE = SPLITS[2]


def controllers() -> dict[str, Controller]:
    return {
        "algorithm 1": Algorithm1(TARGETS, SPLITS, Paper.seeded(TOTAL, 0.05, 0.008), 0.2 / 8192, every=400),
        "staircase": Staircase(TARGETS, SPLITS, STAIRS),
        "adaptive": Adaptive(Staircase(TARGETS, SPLITS, STAIRS), 4096),
    }


def gpu(controller: Controller, **costs: float) -> Gpu:
    return Gpu(STAIRS, TOTAL, Costs(**costs), controller, start=MIDDLE)


@pytest.mark.parametrize("name", ["algorithm 1", "staircase", "adaptive"])
def test_every_request_gets_every_token(name: str) -> None:
    asks = poisson(4, 20, [100, 2000], [5, 60], seed=1)
    result = gpu(controllers()[name]).run(asks)
    assert sorted(s.made for s in result.served) == sorted(a.answer for a in asks)
    assert all(s.ask.arrival < s.first <= s.last for s in result.served)


def test_a_request_alone_takes_what_the_table_says() -> None:
    (served,) = gpu(Staircase(TARGETS, SPLITS, STAIRS)).run([Ask(0.0, 8192, 11)]).served
    assert served.ttft == pytest.approx(0.2, abs=0.06)  # until the first decision the start's split
    assert served.tpot == pytest.approx(0.006, rel=0.1)


def test_algorithm_1_converges_and_stays() -> None:
    asks = poisson(3, 60, [4000], [100], seed=2)
    result = gpu(controllers()["algorithm 1"]).run(asks)
    late = [at for at, _ in result.splits if at > 30]
    assert len(late) <= 4
    assert result.attained(TARGETS) > 0.5


@pytest.mark.parametrize("name", ["staircase", "adaptive"])
def test_borders_do_not_swing_while_both_phases_have_work(name: str) -> None:
    """Giving all to one phase while the other is idle is no swing."""
    asks = [Ask(i * 0.3, 8000, 400) for i in range(40)]
    result = gpu(controllers()[name]).run(asks)
    moves = [split for _, split in result.splits if split.prefill and split.decode]
    swings = sum(a != b for a, b in pairwise(moves))
    assert swings <= 10


def test_the_gpu_is_divided_only_where_steps_with_both_fail_the_targets() -> None:
    asks = poisson(2, 30, [8000], [100], seed=3)
    for tpot, apart in ((0.04, False), (0.0085, True)):
        controller = Adaptive(Staircase(Targets(1.0, tpot), SPLITS, STAIRS), 4096)
        result = gpu(controller).run(asks)
        used = {split for _, split in result.splits if split.prefill and split.decode}
        assert any(s.prefill + s.decode == TOTAL for s in used) == apart


def test_a_burst_is_worked_off_and_the_gpu_goes_back_to_decodes() -> None:
    calm = [Ask(i * 1.0, 200, 300) for i in range(10)]
    burst = [Ask(5.0, 8192, 20) for _ in range(12)]
    result = gpu(controllers()["adaptive"]).run(sorted(calm + burst, key=lambda a: a.arrival))
    assert len(result.served) == 22
    assert result.splits[-1][1] == Split(TOTAL, TOTAL)
    assert result.gap(0.99) < 0.05


def test_beyond_reach_nothing_starves() -> None:
    asks = poisson(30, 10, [8192], [50], seed=4)
    result = gpu(controllers()["adaptive"]).run(asks)
    assert len(result.served) == len(asks)
    assert result.attained(TARGETS) < 0.5
    assert result.gap(1.0 - 1e-9) < 2.0  # tokens keep coming


def test_chunks_bound_gaps_and_large_ones_do_not() -> None:
    asks = poisson(2, 30, [8192], [100], seed=5)
    small, large = (chunked(STAIRS, TOTAL, asks, size) for size in (512, 1 << 20))
    assert len(small.served) == len(large.served) == len(asks)
    assert small.gap(0.99) < 0.03 < 0.15 < large.gap(0.99)
    assert small.latency > 0


def test_two_lanes_keep_tokens_coming_where_large_chunks_do_not() -> None:
    asks = poisson(2, 30, [8192], [200], seed=6)
    lanes = gpu(controllers()["adaptive"]).run(asks)
    mixed = chunked(STAIRS, TOTAL, asks, 4096)
    assert lanes.gap(0.99) * 2 < mixed.gap(0.99)
    assert lanes.latency < 1.1 * mixed.latency


# Llama-3-8B's shape on an H200 (bench/results/phases, 2026-11-29): milliseconds of 128 to 2,048 tokens of prompts, and
# of 1, 8, 64 and 256 answers at contexts of 1,024.
TOKENS = (128, 256, 512, 1024, 2048)
H200_PREFILL = {
    64: (6.06, 10.1, 18.3, 35.7, 71.7),
    80: (5.71, 8.53, 15.7, 30.6, 60.0),
    96: (5.65, 8.14, 13.8, 26.1, 50.6),
    112: (5.42, 7.01, 12.5, 23.5, 46.6),
    132: (5.37, 7.08, 11.0, 21.1, 42.1),
}
H200_DECODE = {
    20: (8.92, 12.2, 28.0, 92.1),
    36: (5.36, 8.98, 17.2, 47.6),
    52: (5.06, 8.57, 14.2, 33.6),
    68: (4.51, 5.29, 10.6, 26.0),
    TOTAL: (3.88, 4.58, 7.73, 15.3),
}
H200 = Stairs(
    {s: tuple(zip(TOKENS, (t / 1e3 for t in times))) for s, times in H200_PREFILL.items()},
    {s: tuple(zip((1, 8, 64, 256), (t / 1e3 for t in times))) for s, times in H200_DECODE.items()},
)


def on_an_h200(targets: Targets, overtake: float = 0.0) -> Gpu:
    controller = h200_controller("adaptive", targets)
    return Gpu(H200, TOTAL, Costs(), controller, start=Split(TOTAL, TOTAL), overtake=overtake)


RECORDED = Path(__file__).parents[2] / "bench" / "results" / "phases" / "phases.json"


def test_the_table_of_an_h200_is_the_recorded_one() -> None:
    """A result tells of each number of multiprocessors the largest prefill and decode that were measured."""
    prefill, decode = json.loads(RECORDED.read_text())["stairs"].split("; ")
    for said, measured in ((prefill, H200.prefill), (decode, H200.decode)):
        found = {int(sms): float(ms) for sms, ms in re.findall(r"(\d+): ([\d.]+)", said.partition(": ")[2])}
        assert found == pytest.approx({sms: 1e3 * points[-1][1] for sms, points in measured.items()}, rel=0.03)


NAMES = ("algorithm 1", "staircase", "adaptive")
H200_SPLITS = [Split(s, TOTAL - s) for s in H200_PREFILL if s < TOTAL]


def h200_controller(name: str, targets: Targets) -> Controller:
    if name == "algorithm 1":
        whole = H200.prefill_seconds(TOTAL, 1024), H200.decode_seconds(TOTAL, 1)
        return Algorithm1(targets, H200_SPLITS, Paper.seeded(TOTAL, *whole), whole[0] / 1024, every=160)
    staircase = Staircase(targets, H200_SPLITS, H200)
    return staircase if name == "staircase" else Adaptive(staircase, 4096)


def h200_run(name: str, targets: Targets, asks: list[Ask]) -> Result:
    start = Split(TOTAL, TOTAL) if name == "adaptive" else H200_SPLITS[len(H200_SPLITS) // 2]
    return Gpu(H200, TOTAL, Costs(), h200_controller(name, targets), start=start).run(asks)


def swings(result: Result) -> int:
    """Moves from one split to another while both phases have work: all for one of them, when the other has none, is
    no split.
    """
    return sum(all(0 < s.prefill < TOTAL for s in pair) for pair in pairwise(split for _, split in result.splits))


@pytest.mark.parametrize("name", NAMES)
def test_where_both_targets_are_out_of_reach_all_are_served_and_the_border_settles(name: str) -> None:
    unmet = Targets(0.001, 0.001)
    asks = poisson(12, 20, [100, 300, 2000], [50, 150], seed=11)
    result = h200_run(name, unmet, asks)
    assert len(result.served) == len(asks)
    assert result.attained(unmet) == 0
    assert swings(result) <= {"algorithm 1": 0, "staircase": len(asks) // 5, "adaptive": 0}[name]


@pytest.mark.parametrize("name", NAMES)
def test_where_both_targets_fail_controllers_say_what_they_are(name: str) -> None:
    """Algorithm 1 leaves the border; a staircase takes the split whose worse miss is least."""
    own = h200_controller(name, Targets(0.01, 0.001))
    now = H200_SPLITS[1]
    seen = Observed(ttft=2.0, tpot=0.05, queued=8192, waited=1.0, requests=64, rate=20_000.0)
    found = own.decide(seen, now)
    if isinstance(own, Algorithm1):
        assert (found.split, found.why) == (now, "both targets fail, nothing changes")
    elif isinstance(own, Staircase):
        misses = {split: own.promise(split, seen).miss for split in H200_SPLITS}
        assert misses[found.split] <= 1.05 * min(misses.values())
    else:
        assert found.split == Split(TOTAL, TOTAL)
        assert found.chunk > 128  # tokens come too late as they are: prompts wait no longer for that


@pytest.mark.parametrize("name", NAMES)
def test_phases_without_work_are_left_alone(name: str) -> None:
    """Alone in a phase, idle in between: answers run at full speed where the controller gives the GPU away, and the
    border does not move while there is nothing.
    """
    asks = [Ask(10.0 * i, 1024, 60) for i in range(3)]
    result = h200_run(name, Targets(1.0, 0.05), asks)
    assert [s.made for s in result.served] == [60, 60, 60]
    assert result.attained(Targets(1.0, 0.05)) == 1
    moves = [at for at, _ in result.splits]
    assert not [at for at in moves if at % 10 > 2]  # nothing is left to do then
    if name == "algorithm 1":
        assert not moves
    else:
        first, alone = H200.prefill_seconds(TOTAL, 1024), H200.decode_seconds(TOTAL, 1)
        for served in result.served[1:]:
            assert served.ttft == pytest.approx(first, rel=0.5)
            assert served.tpot == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_burst_ends_and_the_border_comes_to_rest(name: str) -> None:
    targets = Targets(1.0, 0.05)
    asks = [*poisson(5, 20, [100, 300], [100, 200], seed=12), *(Ask(5.0, 2048, 50) for _ in range(10))]
    asks = sorted(asks, key=lambda ask: ask.arrival)
    result = h200_run(name, targets, asks)
    assert len(result.served) == len(asks)
    late = [s for s in result.served if s.ask.arrival > 10]
    assert sum(s.ttft <= targets.ttft and s.tpot <= targets.tpot for s in late) >= 0.9 * len(late)


@pytest.mark.parametrize("rate", [20, 30, 40])
def test_where_chunks_serve_well_the_adaptive_border_serves_as_well(rate: int) -> None:
    """Rates around saturation; short prompts, as in conversations."""
    targets = Targets(0.053, 0.028)
    asks = poisson(rate, 20, [20, 60, 100, 300], [100, 300, 500], seed=rate)
    ours, theirs = on_an_h200(targets).run(asks), chunked(H200, TOTAL, asks, 8192)
    assert ours.attained(targets) >= theirs.attained(targets) - 0.02
    assert ours.latency < 1.05 * theirs.latency


def test_long_prompts_among_short_ones_leave_short_gaps() -> None:
    targets = Targets(0.053, 0.02)
    asks = poisson(10, 30, [100] * 9 + [8192], [100, 300, 500], seed=9)
    ours = on_an_h200(targets).run(asks)
    for chunk, ratio in ((2048, 2.0), (1024, 1.1)):
        theirs = chunked(H200, TOTAL, asks, chunk)
        first = [sorted(s.ttft for s in result.served)[int(0.9 * len(asks))] for result in (ours, theirs)]
        assert ours.gap(0.99) * ratio < theirs.gap(0.99)
        assert first[0] < 1.2 * first[1]


@pytest.mark.parametrize("rate", [20, 25, 30])
def test_a_few_long_prompts_cost_others_little_where_shorter_ones_overtake(rate: int) -> None:
    """One of twenty has 8,192 tokens; targets are 7.5 times the mean of what such requests take alone."""
    targets = Targets(0.13, 0.028)
    asks = poisson(rate, 20, [20, 60, 100, 200, 300] * 19 + [8192] * 5, [100, 200, 300], seed=rate)
    as_they_come, overtaking = (chunked(H200, TOTAL, asks, 1024, overtake=k) for k in (0.0, 4.0))
    ours = on_an_h200(targets, 4.0).run(asks)
    assert as_they_come.attained(targets) < 0.85
    assert overtaking.attained(targets) > 0.9
    assert ours.attained(targets) > overtaking.attained(targets) - 0.02
    longest, before = (max(s.ttft for s in r.served if s.ask.prompt == 8192) for r in (overtaking, as_they_come))
    assert longest < 1.5 * before
