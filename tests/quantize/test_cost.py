"""What schemes cost in time: tiles of a launch by times that a stand-in timer gives, dealt out like the best order or
nearly so, and in words where nothing can be measured.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.models.table import model_config
from tenfold.ops.choose import Table
from tenfold.quantize.mxmoe import cost, run
from tenfold.quantize.mxmoe.allocate import Allocator, budgets
from tenfold.quantize.mxmoe.cost import Launches, Shape, filled, launches, makespan, shapes_of, whole
from tenfold.quantize.mxmoe.run import Wish, weighed
from tenfold.quantize.mxmoe.sensitivity import PARTS
from tenfold.quantize.mxmoe.subject import Rounded, blocks_of
from tenfold.quantize.schemes import parse
from tenfold.weights.open import open_checkpoint

pytest.importorskip("scipy")
arms = pytest.importorskip("tenfold.ops.gpu.expert_arms")
tuning = pytest.importorskip("tenfold.ops.gpu.tune_experts")
TINY = model_config(open_checkpoint("shape:tiny-moe").config)
assert TINY.experts is not None
CONFIG = replace(TINY, hidden_size=256, experts=replace(TINY.experts, size=128))
SCHEMES = [parse(name) for name in ("w2g128z", "w4g128z", "w8g128z")]


class Timer:
    """Every plan takes a microsecond longer than the one before."""

    def __init__(self) -> None:
        self.measured = 0

    def copies(self, nbytes: int) -> int:
        return 2

    def measure(self, arms: Mapping[str, Any], copies: int, *rest: Any) -> dict[str, float]:
        self.measured += 1
        return {name: 10.0 + i for i, name in enumerate(arms)}


def test_times_come_from_the_table_of_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer, path = Timer(), tmp_path / "t.json"
    monkeypatch.setattr(tuning, "whole_arm", lambda case, plan: lambda i: None)

    def times() -> dict[Any, Mapping[str, float]]:
        return cost.timed(CONFIG, SCHEMES, 8, arms.ExpertArms(Table("gpu", "1", path), 132), timer, torch.device("cpu"))

    found = times()
    assert timer.measured == 3
    assert times() == found
    assert timer.measured == 3
    assert list(found) == SCHEMES
    assert all(min(own.values()) == 10 and len(own) > 5 for own in found.values())


@pytest.mark.parametrize("seed", range(40))
def test_longest_first_is_near_the_best_order(seed: int) -> None:
    """Every way to deal few items out, tried: never better than the best, at most a third worse (Graham's bound)."""
    draw = random.Random(seed)
    machines = draw.choice((2, 3))
    items = [(float(draw.randint(1, 9)), draw.randint(0, 3)) for _ in range(3)]
    times = [time for time, n in items for _ in range(n)]
    best = 0.0 if not times else min(
        max(sum(t for t, own in zip(times, dealt) if own == m) for m in range(machines))
        for dealt in product(range(machines), repeat=len(times))
    )  # fmt: skip
    got = makespan(items, machines)
    assert best <= got <= best * (4 / 3 - 1 / (3 * machines))
    assert got >= sum(times) / machines


def test_tiles_that_picks_fill() -> None:
    """As many as drawing picks token by token gives, and never less than picks need."""
    chances, width, tokens = [0.0, 0.05, 0.4, 1.0], 4, 10
    draw = torch.Generator().manual_seed(0)
    counts = (torch.rand(20_000, tokens, 4, generator=draw) < torch.tensor(chances)).sum(1)
    drawn = ((counts + width - 1) // width).float().mean(0)
    found = filled(tokens, chances, width)
    assert found == pytest.approx(drawn.tolist(), abs=0.02)
    assert (found[0], found[-1]) == (0, 3)
    assert whole([0.4, 0.4, 0.4, 2.0, 0.3]) == [0, 1, 0, 2, 1]


def test_a_tile_takes_what_launches_of_one_scheme_took() -> None:
    """Whatever the shape, a launch as it was measured is as long as it was; plans that differ in stages are one shape,
    and the faster of them counts.
    """
    names = {"w4g128z": 40.0, "w8g128z": 90.0}
    plans = ("tiles:8x64x4x2x2", "tiles:16x128x3x1x1", "tiles:16x128x4x1x1")
    times = {parse(name): {plan: t * (i + 1) for i, plan in enumerate(plans)} for name, t in names.items()}
    found = shapes_of(CONFIG, 16, 7, times)
    assert [(s.width, s.height, s.at_once) for s in found] == [(8, 64, 14), (16, 128, 7)]
    assert CONFIG.experts is not None
    even = launches(CONFIG, 16, {3: [5] * CONFIG.experts.routing.experts})
    for shape, factor in zip(found, (1, 2)):
        for name, took in names.items():
            assert even.uniform(shape, name) == pytest.approx(factor * took)


def test_schemes_beside_those_for_8_bit_activations_run_as_alone() -> None:
    plans = {"tiles:32x128x4x1x1": 30.0, "tiles:32x128x4x1x1:a8": 20.0}
    times = {parse("fp8a8"): plans, parse("w4g128"): {"tiles:32x128x4x1x1": 24.0, "tiles:4x64x4x2x4:digits": 50.0}}
    plain, eights, digits = shapes_of(CONFIG, 16, 7, times)
    assert set(plain.steps) == set(eights.steps) == {"fp8a8", "w4g128"}
    assert eights.steps["w4g128"] == plain.steps["w4g128"]
    assert eights.steps["fp8a8"] == pytest.approx(plain.steps["fp8a8"] * 20 / 30)
    assert set(digits.steps) == {"w4g128"}


OWN = Launches({"gate_up": (256, 256), "down": (256, 128)}, 8, {0: [1.0, 0.25, 0.0]})


def test_blocks_add_up_to_launches() -> None:
    """Where tiles are as many as the GPU multiplies at once, and one scheme has all. Tiles of experts that have no
    picks take no time, and twice as many columns twice as much.
    """
    shape = Shape(8, 64, 8, {"w4": 3.0, "w8": 5.0})
    times = OWN.times(shape)
    assert times[(0, 0, "gate_up"), "w4"] == 1 * 4 * 2 * 3.0 / 8 == 2 * times[(0, 0, "down"), "w4"]
    assert times[(0, 2, "down"), "w8"] == 0
    assert times[(0, 1, "down"), "w8"] == pytest.approx((1 - 0.75**8) * 4 * 5.0 / 8)
    named = {f"0.{expert}.{part}": "w4" for expert in range(3) for part in PARTS}
    assert OWN.time(shape, named) == OWN.uniform(shape, "w4") == 2 * 3.0 + 3.0  # eight tiles, twice
    assert OWN.time(shape, named | {"0.0.down": "w8"}) == 2 * 3.0 + 5.0


BITS = {"w2g128z": 2.25, "w8g128z": 8.25}


def an_expert(**losses: float) -> Rounded:
    """One, with what each scheme costs either part of it."""
    keys = [(0, 0, part) for part in PARTS]
    costs, cols = {(key, s): x for key in keys for s, x in losses.items()}, dict.fromkeys(PARTS, 128)
    return Rounded({}, costs, dict.fromkeys(keys, 1000), {0: [5]}, cols=cols)


@pytest.mark.parametrize(("r", "wanted"), [(0.0, "w8g128z"), (1.0, "w2g128z"), (0.5, "w8g128z")])
def test_the_best_shape_decides(r: float, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits are the fastest here, in a shape that is slow for 2; without times the fewest bits are."""
    slow, quick = Shape(8, 64, 8, {"w2g128z": 2.0, "w8g128z": 9.0}), Shape(16, 64, 8, {"w2g128z": 8.0, "w8g128z": 1.0})
    monkeypatch.setattr(run, "shapes", lambda *given: ([slow, quick], "measured somewhere"))
    found = an_expert(w8g128z=1.0 + (r == 1), w2g128z=1.0)
    blocks, words = weighed(found, Wish(9.0, ",".join(BITS), r=r), {}, CONFIG, "cuda")
    assert set(Allocator(blocks).solve(budgets(blocks, 9.0), r).schemes.values()) == {wanted}
    assert words == ("" if r == 1 else "measured somewhere, in tiles of 16 picks by 64 rows")


def test_tiles_that_hold_too_few_schemes_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    both, one = Shape(8, 64, 8, {"w2g128z": 2.0, "w8g128z": 9.0}), Shape(16, 64, 8, {"w8g128z": 1.0})
    found = an_expert(w2g128z=1.0, w8g128z=1.0)
    for known, words in (
        ([both, one], "measured, in tiles of 8 picks by 64 rows"),
        ([one], "bytes read, since no tiles hold schemes of that few bits"),
    ):
        monkeypatch.setattr(run, "shapes", lambda *given, own=known: (own, "measured"))
        blocks, said = weighed(found, Wish(3.0, ",".join(BITS), r=0.5), {}, CONFIG, "cuda")
        assert said == words
        assert set(Allocator(blocks).solve(budgets(blocks, 3.0), 0.5).schemes.values()) == {"w2g128z"}


def test_without_a_gpu_bytes_stand_for_time() -> None:
    found, words = cost.shapes(CONFIG, SCHEMES, 8, "cpu")
    assert not found
    assert "no GPU here" in words
    found, words = cost.shapes(CONFIG, [*SCHEMES, parse("w4g32z")], 8, "cuda")
    assert not found
    assert "w4g32z cannot be timed: its groups of 32 columns" in words
    found, words = cost.shapes(CONFIG, [parse("w1g128z"), *SCHEMES], 8, "cuda")
    assert not found
    assert "w1g128z cannot be timed: tiles have no codes of int1" in words
    assert "no multiple of 64" in cost.obstacle(TINY, SCHEMES[0])
    blocks = blocks_of(an_expert(w2g128z=1.0, w8g128z=1.0), BITS, "model", False)
    assert [block.time for block in blocks] == [{name: 1000 * bits for name, bits in BITS.items()}] * 2
