"""The allocator against every allocation there is, in small; budgets, ties, scopes; what cannot be is said."""

import itertools
import math
import random
from dataclasses import replace

import pytest

pytest.importorskip("scipy")

from tenfold.quantize.mxmoe.allocate import Allocator, Block, BudgetError, Plan, budgets, joined

BITS = {"w2": 2.25, "w4": 4.25, "w8": 8.0, "bf16": 16.0}


def random_blocks(seed: int, count: int, scopes: int = 1) -> list[Block]:
    draw = random.Random(seed)
    found = []
    for i in range(count):
        spread = draw.lognormvariate(0, 1)
        loss = {s: spread * 4.0 ** -(b / 2) * draw.uniform(0.5, 2) for s, b in BITS.items()}
        time = {s: draw.uniform(0.5, 1.5) * (1 + b / 4) for s, b in BITS.items()}
        weights, scope = draw.choice([100, 200]), f"layer {i % scopes}" if scopes > 1 else ""
        found.append(Block(f"b{i}", weights, of_bits(weights), loss, time, scope))
    return found


def of_bits(weights: int) -> dict[str, float]:
    """Bytes by scheme."""
    return {scheme: weights * bits / 8 for scheme, bits in BITS.items()}


def every(blocks: list[Block], budget: dict[str, float]) -> list[Plan]:
    found = []
    for schemes in itertools.product(BITS, repeat=len(blocks)):
        taken: dict[str, float] = {}
        for block, scheme in zip(blocks, schemes):
            taken[block.scope] = taken.get(block.scope, 0) + block.bytes[scheme]
        if all(taken[scope] <= budget[scope] * (1 + 1e-12) for scope in taken):
            loss = sum(b.loss[s] for b, s in zip(blocks, schemes))
            time = sum(b.time[s] for b, s in zip(blocks, schemes))
            found.append(Plan(dict(zip([b.name for b in blocks], schemes)), loss, time, taken))
    return found


@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_is_better(seed: int, r: float) -> None:
    blocks = random_blocks(seed, 6, scopes=1 + seed % 2)
    budget = budgets(blocks, 3.0 + 2 * (seed % 3))
    best = min(every(blocks, budget), key=lambda plan: plan.goal(r))
    found = Allocator(blocks).solve(budget, r)
    assert found.goal(r) == pytest.approx(best.goal(r), abs=1e-6)
    assert all(found.bytes[scope] <= budget[scope] * (1 + 1e-9) for scope in budget)
    again = Allocator(blocks).solve(budget, r)
    assert again == found


@pytest.mark.parametrize("seed", range(4))
def test_one_block_that_may_lose_most_hides_no_other(seed: int) -> None:
    """Its coarsest scheme, which nobody takes, costs millions of times what the best allocation does."""
    draw, blocks = random.Random(seed), random_blocks(seed, 6)
    for i, block in enumerate(blocks):
        size = 1e6 if i == 0 else draw.uniform(0.1, 10)
        loss = {s: size * 16.0**-b * draw.uniform(0.5, 1.5) for s, b in (("w2", 2), ("w4", 4), ("w8", 8), ("bf16", 16))}
        blocks[i] = replace(block, loss=loss)
    budget = budgets(blocks, 9.0)
    best = min(every(blocks, budget), key=lambda plan: plan.loss)
    assert Allocator(blocks).solve(budget).loss == pytest.approx(best.loss, rel=1e-6)


def hull(plans: list[Plan]) -> list[tuple[float, float]]:
    """(loss, time) of the lower left corners of the convex hull, from the least loss to the least time."""
    found: list[tuple[float, float]] = []
    for loss, time in sorted({(plan.loss, plan.time) for plan in plans}):
        if found and time >= found[-1][1]:
            continue
        while len(found) > 1:
            (a, b), (c, d) = found[-2:]
            if (c - a) * (time - b) - (d - b) * (loss - a) > 1e-12:
                break
            found.pop()
        found.append((loss, time))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_every_corner_of_the_hull(seed: int) -> None:
    blocks = random_blocks(seed, 6, scopes=1 + seed % 2)
    budget = budgets(blocks, 4.0 + 2 * (seed % 3))
    corners = hull(every(blocks, budget))
    solver = Allocator(blocks)
    chosen = solver.solve(budget, 0.7)
    front = solver.front(budget, chosen, most=100)
    assert [(plan.loss, plan.time) for plan in front] == [pytest.approx(corner, rel=1e-6) for corner in corners]
    assert len(corners) > 2
    assert chosen in front
    assert all(plan.bytes[scope] <= budget[scope] * (1 + 1e-9) for plan in front for scope in budget)
    for r in (1.0, 0.9, 0.4, 0.0):
        assert min(plan.goal(r) for plan in front) == pytest.approx(solver.solve(budget, r).goal(r), abs=1e-6)


def test_a_long_front_is_told_in_few_corners() -> None:
    blocks = random_blocks(1, 60)
    solver, budget = Allocator(blocks), budgets(blocks, 5.0)
    whole, chosen = solver.front(budget, most=1000), solver.solve(budget, 0.9)
    front = solver.front(budget, chosen, most=8)
    assert len(front) == 8 < len(whole)
    assert chosen in front
    assert (front[0].loss, front[-1].time) == (whole[0].loss, whole[-1].time)
    places = [min(range(len(whole)), key=lambda i: abs(whole[i].loss - plan.loss)) for plan in front]
    assert places == sorted(set(places))
    for plan, i in zip(front, places):
        assert (plan.loss, plan.time) == pytest.approx((whole[i].loss, whole[i].time), rel=1e-6)
    assert solver.front(budget, chosen, most=8) == front


def test_a_front_of_one_corner() -> None:
    blocks = random_blocks(7, 5)
    solver, budget = Allocator(blocks), budgets(blocks, BITS["w2"])
    assert [set(plan.schemes.values()) for plan in solver.front(budget, solver.solve(budget))] == [{"w2"}]


def test_accuracy_falls_and_speed_grows_with_r() -> None:
    blocks = random_blocks(1, 40)
    solver, budget = Allocator(blocks), budgets(blocks, 5.0)
    plans = [solver.solve(budget, r) for r in (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)]
    assert [p.loss for p in plans] == sorted(p.loss for p in plans)
    assert [p.time for p in plans] == sorted((p.time for p in plans), reverse=True)
    assert plans[0].loss < plans[-1].loss
    assert plans[0].time > plans[-1].time


def test_many_blocks_are_solved_with_few_programs() -> None:
    blocks = random_blocks(2, 256, scopes=4)
    solver = Allocator(blocks)
    found = solver.solve(budgets(blocks, 4.5), 0.75)
    assert len(found.schemes) == 256
    assert solver.solved < 60
    assert set(found.schemes.values()) > {"w2", "w4"}


def test_one_scheme_for_an_expert_is_never_better_than_one_for_each_block() -> None:
    blocks = random_blocks(3, 12)
    budget = budgets(blocks, 4.5)
    tied = joined(blocks, {f"b{i}": f"expert {i // 2}" for i in range(12)})
    assert len(tied) == 6
    assert sum(b.weights for b in tied) == sum(b.weights for b in blocks)
    for r in (0.75, 1.0):
        alone, together = (Allocator(own).solve(budget, r) for own in (blocks, tied))
        assert alone.goal(r) <= together.goal(r) + 1e-9


def test_a_budget_for_the_model_is_never_worse_than_one_for_each_layer() -> None:
    blocks = random_blocks(4, 24, scopes=4)
    whole = [Block(b.name, b.weights, b.bytes, b.loss, b.time) for b in blocks]
    layers = Allocator(blocks).solve(budgets(blocks, 3.5), 1.0)
    model = Allocator(whole).solve(budgets(whole, 3.5), 1.0)
    assert model.loss <= layers.loss + 1e-9


def test_each_block_takes_bytes_of_its_own() -> None:
    """As matrices of few columns do, whose scales are shared by few weights; those of one scheme take the sum."""
    losses = {"w4": 1.0, "w8": 0.1}
    short, long = (
        Block(name, 800, {"w4": b, "w8": b + 400}, losses, losses) for name, b in (("a", 500.0), ("b", 410.0))
    )
    assert Allocator([short, long]).least() == {"": 910}
    plan = Allocator([short, long]).solve({"": 1310.0})
    assert set(plan.schemes.values()) == {"w4", "w8"}
    assert plan.bytes == {"": 1310}
    (tied,) = joined([short, long], dict.fromkeys("ab", "both"))
    assert tied.bytes == {"w4": 910, "w8": 1710}


def test_what_cannot_be_is_said() -> None:
    blocks = random_blocks(5, 4)
    with pytest.raises(BudgetError, match=r"smallest schemes take \d+"):
        Allocator(blocks).solve(budgets(blocks, 2.0))
    for budget in (math.nan, math.inf):
        with pytest.raises(BudgetError, match=rf"The budget is {budget} bytes"):
            Allocator(blocks).solve({"": budget})
    with pytest.raises(ValueError, match=r"r is 1\.5; allowed: 0"):
        Allocator(blocks).solve(budgets(blocks, 4.0), 1.5)
    with pytest.raises(ValueError, match="has no scheme of w2"):
        Allocator([Block("a", 10, of_bits(10), {"w3": 1.0}, {"w3": 1.0})])
    with pytest.raises(ValueError, match="not positive numbers"):
        Allocator([Block("a", 10, of_bits(10), {"w4": math.nan}, {"w4": 1.0})])
    with pytest.raises(ValueError, match="one name"):
        Allocator([blocks[0], blocks[0]])
    with pytest.raises(ValueError, match="several scopes"):
        joined(random_blocks(6, 2, scopes=2), {"b0": "e", "b1": "e"})


def test_a_block_may_lack_a_scheme() -> None:
    only = Block("a", 10, of_bits(10), {"w4": 1.0, "w8": 0.1}, {"w4": 1.0, "w8": 2.0, "w2": 0.1})
    assert Allocator([only]).solve({"": 1e9}).schemes == {"a": "w8"}
    assert Allocator([only]).solve({"": 10 * 4.25 / 8}).schemes == {"a": "w4"}
    assert Allocator([only]).solve({"": 1e9}, r=0.0).schemes == {"a": "w4"}
