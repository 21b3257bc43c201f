"""Which scheme each block of weights gets: accuracy and speed weighed together under a budget of bytes, solved exactly.

    min L^r * T^(1-r)      L, T: the sums of loss and time over blocks; the bytes of a scope no more than its budget

The logarithm of the goal is concave in (L, T), so over all allocations it is least at a corner of their convex hull,
and a corner is what a weighted sum `a L + b T` is least at. Corners are found by solving such sums, each a linear
program in whole numbers (SciPy's HiGHS), between two corners at a time, and a pair is left alone when not even the best
of both of its ends could beat what is known. So the result is exact for any r, up to the solver's tolerance, without
the piecewise linear logarithms of the published code. The corners themselves, between which no r chooses anything else,
are the front.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite, log, prod

import numpy as np

GAP = 1e-9  # of the solver, relative
LEAST = 1000.0  # of the sums that the solver is given, as it stops within 1e-6 of the best, however large that is
FAINTEST = 1e-9  # least sum that counts so, relative to the largest number in it
TIE = 1e-7  # of the best sum at most, that another may cost by which equals are told apart
ALIKE = 1e-9  # relative difference of two sums that count as equal
ROUNDED = 1e-12  # likewise of two sums of bytes
CORNERS = 20  # of a front at most: with 12,000 blocks each takes the solver seconds


class BudgetError(ValueError):
    """A budget that no allocation keeps to: says what the least is."""


@dataclass(frozen=True, slots=True)
class Block:
    """Weights that have one scheme. bytes, scales and zeros included, loss and time by scheme; scope: those of one
    scope share a budget.
    """

    name: str
    weights: int
    bytes: Mapping[str, float]
    loss: Mapping[str, float]
    time: Mapping[str, float]
    scope: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A scheme for each block. loss, time: the sums; bytes by scope."""

    schemes: Mapping[str, str]
    loss: float
    time: float
    bytes: Mapping[str, float]

    def goal(self, r: float) -> float:
        """log of L^r T^(1-r)."""
        return _goal(self.loss, self.time, r)


@dataclass(slots=True)
class Allocator:
    """Of blocks that may lack some schemes, not all. Raises ValueError for blocks that make no sense."""

    blocks: Sequence[Block]
    solved: int = 0  # linear programs so far
    _choices: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for i, block in enumerate(self.blocks):
            own = [s for s in block.bytes if s in block.loss and s in block.time]
            if not own:
                raise ValueError(f"Block {block.name} has no scheme of {', '.join(block.bytes)}; measure it with one.")
            sums = block.bytes, block.loss, block.time
            if block.weights < 1 or any(not (0 <= v[s] < inf) for v in sums for s in own):
                raise ValueError(
                    f"Block {block.name} has weights, bytes, losses or times that are not positive numbers."
                )
            self._choices += [(i, scheme) for scheme in own]
        if len({b.name for b in self.blocks}) != len(self.blocks):
            raise ValueError("Two blocks have one name; each needs its own.")

    def least(self) -> dict[str, float]:
        """Bytes of each scope with the smallest scheme everywhere."""
        smallest = [inf] * len(self.blocks)
        for i, scheme in self._choices:
            smallest[i] = min(smallest[i], self.blocks[i].bytes[scheme])
        found: dict[str, float] = {}
        for block, size in zip(self.blocks, smallest):
            found[block.scope] = found.get(block.scope, 0.0) + size
        return found

    def solve(self, budget: Mapping[str, float], r: float = 1.0) -> Plan:
        """The best allocation within the bytes of each scope; r: weight of accuracy, 0 to 1. Raises BudgetError,
        ValueError.
        """
        if not 0 <= r <= 1:
            raise ValueError(f"r is {r}; allowed: 0 (speed alone) to 1 (accuracy alone).")
        self._check(budget)
        if r in (0, 1):
            return self._weighted(budget, *((1.0, 0.0) if r else (0.0, 1.0)))
        ends = self._ends(budget)
        best = min(ends, key=lambda plan: plan.goal(r))
        pairs = [ends]
        while pairs:
            first, last = pairs.pop()  # less loss, less time
            if first.loss >= last.loss or first.time <= last.time or _goal(first.loss, last.time, r) >= best.goal(r):
                continue
            middle = self._between(budget, first, last)
            if middle is not None:
                best = min(best, middle, key=lambda plan: plan.goal(r))
                pairs += [(first, middle), (middle, last)]
        return best

    def front(self, budget: Mapping[str, float], chosen: Plan | None = None, most: int = CORNERS) -> list[Plan]:
        """Corners of the hull of (loss, time) within the bytes of each scope, from the least loss to the least time:
        all of them where they are no more than `most`, else both ends and, of the rest, those in the widest gaps.
        chosen: what `solve` found under the same budget, which is always among them. Raises BudgetError.
        """
        self._check(budget)
        corners: list[Plan] = []
        first, last = self._ends(budget)
        for plan in (first, last) if chosen is None else (chosen, first, last):
            if not any(_alike(plan, other) for other in corners):
                corners.append(plan)
        corners.sort(key=lambda plan: (plan.loss, -plan.time))
        gaps = list(pairwise(corners))
        while gaps and len(corners) < most:
            first, last = widest = max(gaps, key=lambda gap: _gap(*gap))
            gaps.remove(widest)
            middle = self._between(budget, first, last)
            if middle is not None:
                corners.insert(corners.index(last), middle)
                gaps += [(first, middle), (middle, last)]
        return corners

    def _check(self, budget: Mapping[str, float]) -> None:
        for scope, least in self.least().items():
            own = budget.get(scope, 0.0)
            if not (isfinite(own) and own >= least * (1 - ROUNDED)):
                raise BudgetError(
                    f"The budget {'of ' + scope + ' ' if scope else ''}is {own:.0f} bytes and the smallest schemes "
                    f"take {least:.0f}; allow that much, or add a scheme of fewer bits."
                )

    def _ends(self, budget: Mapping[str, float]) -> tuple[Plan, Plan]:
        """Those of the least loss, and of the least time."""
        return self._weighted(budget, 1.0, 0.0), self._weighted(budget, 0.0, 1.0)

    def _between(self, budget: Mapping[str, float], first: Plan, last: Plan) -> Plan | None:
        """A corner beyond the line from one to another; None where nothing lies there."""
        a, b = first.time - last.time, last.loss - first.loss
        middle = self._weighted(budget, a, b)
        along = a * first.loss + b * first.time
        return None if a * middle.loss + b * middle.time >= along * (1 - ALIKE) else middle

    def _weighted(self, budget: Mapping[str, float], a: float, b: float) -> Plan:
        """The allocation with the least `a * loss + b * time`; of equals, the one with the other sum least."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        losses = np.array([self.blocks[i].loss[s] for i, s in self._choices])
        times = np.array([self.blocks[i].time[s] for i, s in self._choices])
        cost = a * losses + b * times
        tie = losses if not a else times if not b else None
        columns = np.arange(len(self._choices))
        owner = np.array([i for i, _ in self._choices])
        lowest = np.full(len(self.blocks), inf)
        np.minimum.at(lowest, owner, cost)
        cost = cost * LEAST / (max(lowest.sum(), FAINTEST * cost.max()) or 1.0)
        if tie is not None and tie.max() > 0:
            cost += LEAST * TIE * tie / tie.sum()
        once = coo_array((np.ones(len(columns)), (owner, columns)), shape=(len(self.blocks), len(columns)))
        scopes = list(dict.fromkeys(block.scope for block in self.blocks))
        place = np.array([scopes.index(self.blocks[i].scope) for i, _ in self._choices])
        sizes = np.array([self.blocks[i].bytes[s] for i, s in self._choices])
        limits = np.array([budget[scope] for scope in scopes])
        within = coo_array((sizes / limits[place], (place, columns)), shape=(len(scopes), len(columns)))
        found = milp(
            cost,
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(within, -np.inf, 1)],
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP},
        )
        self.solved += 1
        if found.x is None:
            raise BudgetError(f"No allocation was found: {found.message}")
        return self._plan([choice for choice, x in zip(self._choices, found.x) if x > 0.5])

    def _plan(self, chosen: Sequence[tuple[int, str]]) -> Plan:
        taken: dict[str, float] = {}
        for i, scheme in chosen:
            scope = self.blocks[i].scope
            taken[scope] = taken.get(scope, 0.0) + self.blocks[i].bytes[scheme]
        return Plan(
            {self.blocks[i].name: scheme for i, scheme in chosen},
            sum(self.blocks[i].loss[s] for i, s in chosen),
            sum(self.blocks[i].time[s] for i, s in chosen),
            taken,
        )


def _goal(loss: float, time: float, r: float) -> float:
    parts = [(r, loss), (1 - r, time)]
    return sum(share * (log(value) if value > 0 else -inf) for share, value in parts if share)


def _alike(one: Plan, other: Plan) -> bool:
    pairs = (one.loss, other.loss), (one.time, other.time)
    return all(abs(a - b) <= ALIKE * max(a, b) for a, b in pairs)


def _gap(first: Plan, last: Plan) -> float:
    """How far apart two corners are, in the logarithms that the goal counts."""
    ratios = (last.loss, first.loss), (first.time, last.time)
    return prod(log(more / less) if less > 0 else inf for more, less in ratios)


def joined(blocks: Sequence[Block], by: Mapping[str, str]) -> list[Block]:
    """Blocks that are to have one scheme as one: by[name] is what it is called. Schemes that one of them lacks are
    lost.
    """
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        groups.setdefault(by.get(block.name, block.name), []).append(block)
    found = []
    for name, own in groups.items():
        common = [s for s in own[0].bytes if all(s in b.bytes and s in b.loss and s in b.time for b in own)]
        scopes = {b.scope for b in own}
        if len(scopes) > 1:
            raise ValueError(f"Blocks of {name} lie in several scopes ({', '.join(sorted(scopes))}); join within one.")
        found.append(
            Block(
                name,
                sum(b.weights for b in own),
                {s: sum(b.bytes[s] for b in own) for s in common},
                {s: sum(b.loss[s] for b in own) for s in common},
                {s: sum(b.time[s] for b in own) for s in common},
                own[0].scope,
            )
        )
    return found


def budgets(blocks: Sequence[Block], bits: float) -> dict[str, float]:
    """Bytes of each scope at so many bits a weight."""
    found: dict[str, float] = {}
    for block in blocks:
        found[block.scope] = found.get(block.scope, 0.0) + block.weights * bits / 8
    return found
