"""Measure the plans of experts on a GPU and write them into the table of choices, as `tune` does for linear operations.

Weights and scores are random, so experts are picked evenly; several sets of scores pick different experts, so that a
call finds its weights as cold as in a real step. What is timed is the whole operation: route, sort, gather, products,
sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tenfold.ops import tiles
from tenfold.ops.formats import format_of, raw_tensor
from tenfold.ops.gemm import grouped
from tenfold.ops.gpu import expert_arms, experts, experts_packed
from tenfold.ops.gpu.expert_arms import DENSE, TOKENS, ExpertArms, ExpertsWork, Plan
from tenfold.ops.gpu.timing import FARTHEST, Arm
from tenfold.ops.gpu.tune import Progress, Timer
from tenfold.ops.matrix import Bank, Experts, RawTensor, dense_bank
from tenfold.ops.route import Routing, route

SPREAD = 0.02  # standard deviation of random weights
MOST_SETS = 16  # of scores
FARTHEST_EIGHT_BITS = 0.1  # as FARTHEST, where activations may be rounded to 8 bits


def tune(
    works: Sequence[ExpertsWork],
    running: ExpertArms,
    timer: Timer,
    device: torch.device,
    tokens: Sequence[int] = TOKENS,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Time every plan of each different work at each number of tokens, and save the table. Returns how many were
    measured.
    """
    table, sms = running.table, running.sms
    todo, done = missing(works, running, tokens, force), 0
    for work, each in groupby(todo, lambda one: replace(one, tokens=1)):
        own = random_experts(work, device)
        for one in each:
            if progress:
                progress(done, len(todo), f"{expert_arms.key(one, sms).op} {work.stored}, {one.tokens} tokens")
            table.record(expert_arms.key(one, sms), measure(one, running, timer, own))
            table.save()
            done += 1
        del own
    return len(todo)


def missing(
    works: Sequence[ExpertsWork], running: ExpertArms, tokens: Sequence[int] = TOKENS, force: bool = False
) -> list[ExpertsWork]:
    """What `tune` measures: each different work at each number of tokens that the table has no times of."""
    every = [replace(work, tokens=n) for work in expert_arms.distinct(works) for n in tokens]
    return [one for one in every if force or not running.table.times(expert_arms.key(one, running.sms))]


def measure(work: ExpertsWork, running: ExpertArms, timer: Timer, own: Experts) -> dict[str, float]:
    """Microseconds of every plan's whole operation. Raises ValueError where none can run."""
    case = make(work, own, running, timer)
    arms = {str(plan): whole_arm(case, plan) for plan in expert_arms.candidates(work)}
    eight = any(kind.acts8 for kind in work.kinds)
    first = next(iter(arms.values()))
    times = timer.measure(arms, len(case.scores), first, FARTHEST_EIGHT_BITS if eight else FARTHEST)
    if not times:
        raise ValueError(
            f"None of {len(arms)} plans could run experts {work.count}/{work.top} {work.stored} for {work.tokens} "
            "tokens; the log says why. Other processes on this GPU may hold its memory."
        )
    return times


def random_experts(work: ExpertsWork, device: torch.device) -> Experts:
    """Random weights of the work's formats, of which neighbours differ where there are several."""
    names = dealt(work)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=work.dtype, device=device).normal_(0.0, SPREAD, generator=generator)

    sizes = (2 * work.inner, work.cols), (work.cols, work.inner)
    if work.dense:
        up, down = (dense_bank(normal(work.count, *size)) for size in sizes)
        return Experts(up, down, work.act)

    def bank(part: int, rows: int, cols: int) -> Bank:
        made = tiles.bank(
            [[raw(pair[part], normal(rows, cols))] for pair in names],
            *(part == 0, lambda parts: parts[0].data, device, work.dtype),
        )
        return Bank(tiles.Untiled(made), tiled=made)

    return Experts(bank(0, *sizes[0]), bank(1, *sizes[1]), work.act)


def raw(name: str, values: Tensor) -> RawTensor:
    rows, cols = values.shape
    if name == DENSE:
        return RawTensor("w", "BF16" if values.dtype == torch.bfloat16 else "F16", (rows, cols), values)
    format = format_of(name)
    return raw_tensor("w", format, rows, cols, format.pack(values))


def dealt(work: ExpertsWork) -> list[tuple[str, str]]:
    """Formats of gate_up and down of each expert, spread evenly."""
    left = {(up, down): [count, count] for up, down, count in work.formats}
    found: list[tuple[str, str]] = []
    for i in range(1, work.count + 1):
        behind = max(left, key=lambda pair: left[pair][1] * i / work.count - (left[pair][1] - left[pair][0]))
        left[behind][0] -= 1
        found.append(behind)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Experts, tokens and several sets of scores."""

    work: ExpertsWork
    own: Experts
    x: Tensor
    scores: list[Tensor]
    routing: Routing
    running: ExpertArms

    def routed(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and weights of each set."""
        return [route(scores, self.routing) for scores in self.scores]


def scores_of(work: ExpertsWork, skew: float = 0.0, seed: int = 0) -> Tensor:
    """A router's scores [tokens, experts], whose best are draws without replacement; skew: exponent of Zipf's law over
    experts, 0 for none.
    """
    draw = torch.Generator().manual_seed(seed)
    chance = torch.arange(1, work.count + 1, dtype=torch.float64) ** -skew
    chance = chance[torch.randperm(work.count, generator=draw)]
    noise = torch.rand(work.tokens, work.count, dtype=torch.float64, generator=draw)
    return (chance.log() - (-noise.log()).log()).float()  # Gumbel's trick


def make(work: ExpertsWork, own: Experts, running: ExpertArms, timer: Timer, skew: float = 0.0) -> Case:
    """As many sets of scores as it takes to read more weights than the L2 cache holds."""
    hit = scores_of(work, skew).topk(work.top).indices.unique().tolist()
    if own.tiled is not None:
        sizes, device = experts_packed.expert_bytes(*own.tiled), own.tiled[0].sources.device
        nbytes = sum(sizes[i] for i in hit)
    else:
        assert own.stacked is not None
        gate_up, down = own.stacked
        nbytes, device = len(hit) * (gate_up[0].nbytes + down[0].nbytes), gate_up.device
    sets = [scores_of(work, skew, seed).to(device) for seed in range(min(MOST_SETS, timer.copies(nbytes)))]
    x = torch.randn(work.tokens, work.cols, dtype=work.dtype, device=device)
    return Case(work, own, x, sets, Routing(work.count, work.top, normed=True), running)


def whole_arm(case: Case, plan: Plan) -> Arm:
    """As the engine runs experts: routed and sorted in one launch where tokens are few."""
    few, running = experts.routes(len(case.x), case.routing), case.running
    turns, width = running.turns(case.own), expert_arms.width(plan)

    def run(i: int) -> Tensor:
        if few:
            shares, by = experts.routed(case.scores[i], case.routing, width, turns)
        else:
            ids, shares = route(case.scores[i], case.routing)
            by = grouped.sort(ids, case.work.count, width, turns)
        return running.run(plan, case.x, by, shares, case.own)

    return run


def product_arm(case: Case, plan: Plan) -> Arm:
    """Both products alone, of picks sorted before."""
    routed, running = case.routed(), case.running
    turns, width = running.turns(case.own), expert_arms.width(plan)
    own: list[Any] = [grouped.sort(ids, case.work.count, width, turns) for ids, _ in routed]
    sources = [experts.gather(case.x, by, shares) for by, (_, shares) in zip(own, routed)]
    return lambda i: expert_arms.products(plan, running.sms, case.x, own[i], routed[i][1], case.own, sources[i])
