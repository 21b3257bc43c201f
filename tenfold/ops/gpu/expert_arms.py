"""Which plan runs the experts of a layer on a GPU: the table of choices over those of experts.py (weights in 16 bits),
experts_packed.py (packed, in tiles) and grouped.py (Triton, for sizes the others do not take).

A `ExpertsWork` says what is to be computed. Where nothing was measured the modules' rules decide. All plans give the
same result but for roundings, and those with `acts8` round activations.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenfold.ops import tiles
from tenfold.ops.choose import Choice, Key, Table
from tenfold.ops.formats import format_of
from tenfold.ops.gemm import grouped
from tenfold.ops.gpu import experts, experts_packed, nvrtc
from tenfold.ops.matrix import Experts
from tenfold.ops.tiles import Kind

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of tokens that are measured; others run what the next larger one does, and more than the last the rule."""
DENSE = "dense"
Plan = experts.ExpertsPlan | experts_packed.PackedExpertsPlan | grouped.GroupedPlan


@dataclass(frozen=True, slots=True)
class ExpertsWork:
    """The routed experts of one layer for so many tokens. cols: features of a token; inner: inside an expert; formats:
    of gate_up and down, and how many experts have them, DENSE or packed.
    """

    count: int
    top: int
    cols: int
    inner: int
    formats: tuple[tuple[str, str, int], ...]
    act: str = "silu"
    tokens: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def picks(self) -> int:
        return self.tokens * self.top

    @property
    def dense(self) -> bool:
        return all(up == down == DENSE for up, down, _ in self.formats)

    @property
    def stored(self) -> str:
        """As the table names the formats: groups are left out, since a tile has them all alike."""
        if self.dense:
            return str(self.dtype).removeprefix("torch.")
        parts: Counter[str] = Counter()
        for up, down, count in self.formats:
            names = dict.fromkeys((label(up), label(down)))
            parts["/".join(names)] += count
        return parts.popitem()[0] if len(parts) == 1 else " + ".join(f"{n} {name}" for name, n in sorted(parts.items()))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All that occur, scales taken for 16 bits."""
        names = dict.fromkeys(name for up, down, _ in self.formats for name in (up, down))
        return tuple(kind(name) for name in names)


def label(name: str) -> str:
    """A format without its groups."""
    return DENSE if name == DENSE else replace(format_of(name), group=0, order=False).name


def kind(name: str) -> Kind:
    if name == DENSE:
        return tiles.DENSE
    return tiles.kind_named(format_of(name))


def name_of(found: Kind) -> str:
    """The format of a kind of tiles, without groups."""
    return found.codes + "z" * found.zeros + "a8" * found.acts8


def work_of(own: Experts, top: int, tokens: int, dtype: torch.dtype) -> ExpertsWork | None:
    """None for experts that no kernel of ours runs."""
    if own.tiled is not None:
        up, down = own.tiled
        mixed = Counter((name_of(up.kinds[a]), name_of(down.kinds[b])) for a, b in zip(up.of, down.of))
        formats = tuple((*pair, count) for pair, count in sorted(mixed.items()))
        return ExpertsWork(len(own), top, up.cols, down.cols, formats, own.act, tokens, dtype)
    if own.stacked is not None:
        gate_up, down_ = own.stacked
        formats = ((DENSE, DENSE, len(own)),)
        return ExpertsWork(len(own), top, gate_up.shape[2], down_.shape[2], formats, own.act, tokens, dtype)
    return None


def takes(work: ExpertsWork) -> bool:
    """Whether csrc/experts.cu or csrc/experts_packed.cu runs it."""
    return work.dtype in nvrtc.HALF and work.cols % 8 == 0 and work.inner % 8 == 0


def candidates(work: ExpertsWork) -> list[Plan]:
    """The plans that can do the work and are worth timing, the rule's first."""
    first = rule(work)
    every: list[Plan] = [first]
    if not work.dense:
        every += experts_packed.candidates(work.picks, work.count, work.kinds)
    else:
        own = experts.candidates(work.picks, work.count) if takes(work) else ()
        every += [plan for plan in own if legal(plan, work)]
        every.append(grouped.plan(work.picks, work.count))
    return list(dict.fromkeys(every))


def legal(plan: Plan, work: ExpertsWork) -> bool:
    if isinstance(plan, grouped.GroupedPlan):
        return work.dense
    if isinstance(plan, experts_packed.PackedExpertsPlan):
        return not work.dense and takes(work) and experts_packed.legal(plan, work.kinds)
    sizes = ((2 * work.inner, work.cols, True), (work.cols, work.inner, False))
    return work.dense and takes(work) and all(experts.legal(plan, *size) for size in sizes)


def rule(work: ExpertsWork) -> Plan:
    """The plan where nothing was measured."""
    if not work.dense:
        return experts_packed.plan(work.picks, work.count, work.kinds)
    plan = experts.plan(work.picks, work.count)
    return plan if legal(plan, work) else grouped.plan(work.picks, work.count)


def parse(name: str) -> Plan:
    """The plan `str(plan)` names. Raises ValueError."""
    parsers: dict[str, Any] = {"tiles": experts_packed.parse, "grouped": grouped.parse}
    found: Plan = parsers.get(name.partition(":")[0], experts.parse)(name)
    return found


def bucket(tokens: int) -> int:
    """The measured number of tokens that stands for `tokens`; 0: none does."""
    return next((n for n in TOKENS if tokens <= n), 0)


def key(work: ExpertsWork, sms: int) -> Key:
    """Where the table keeps what was measured."""
    op = f"experts {work.count}/{work.top} {work.act}"
    return Key(op, 2 * work.inner, work.cols, work.stored, bucket(work.tokens) or work.tokens, sms)


def choice(work: ExpertsWork, table: Table, sms: int) -> Choice:
    """What runs. A measured plan that cannot do the work gives way to the rule."""
    at, first = key(work, sms), str(rule(work))
    if not bucket(work.tokens):
        return Choice(at, first, "rule")
    found = table.pick(at, first)
    try:
        return found if legal(parse(found.arm), work) else Choice(at, first, "rule")
    except ValueError:
        return Choice(at, first, "rule")


def width(plan: Plan) -> int:
    """Picks of a tile."""
    return plan.height if isinstance(plan, grouped.GroupedPlan) else plan.width


class ExpertArms:
    """Runs experts by the table, with a memo of what was chosen."""

    def __init__(self, table: Table, sms: int) -> None:
        self.table = table
        self.sms = sms
        self.seen: dict[ExpertsWork, None] = {}
        self._plans: dict[tuple[int, int, int], Plan | None] = {}
        self._turns: dict[int, Tensor | None] = {}

    def explain(self) -> list[Choice]:
        """What runs all experts that were asked for, at every measured number of tokens."""
        every = [replace(work, tokens=tokens) for work in list(self.seen) for tokens in TOKENS]
        return [choice(work, self.table, self.sms) for work in every]

    def plan(self, x: Tensor, top: int, own: Experts) -> Plan | None:
        """For these tokens; None: no kernel of ours runs them."""
        tokens = bucket(len(x)) or 1 << len(x).bit_length()
        at = (place(own), top, tokens)
        if at not in self._plans:
            self._plans[at] = self._pick(work_of(own, top, tokens, x.dtype), own, x)
        return self._plans[at]

    def _pick(self, work: ExpertsWork | None, own: Experts, x: Tensor) -> Plan | None:
        if work is None or (own.tiled is not None and not experts_packed.takes(x, *own.tiled)):
            return None
        self.seen[replace(work, tokens=1)] = None
        chosen = parse(choice(work, self.table, self.sms).arm)
        if own.tiled is None:
            return chosen
        kinds = own.tiled[0].kinds + own.tiled[1].kinds  # with scales as they are
        fits = isinstance(chosen, experts_packed.PackedExpertsPlan) and experts_packed.legal(chosen, kinds)
        return chosen if fits else experts_packed.plan(work.picks, work.count, kinds)

    def turns(self, own: Experts) -> Tensor | None:
        """In what order experts come: `experts_packed.turns`."""
        if own.tiled is None:
            return None
        at = place(own)
        if at not in self._turns:
            self._turns[at] = experts_packed.turns(*own.tiled)
        return self._turns[at]

    def run(
        self, plan: Plan, x: Tensor, by: grouped.Sorted, shares: Tensor, own: Experts, residual: Tensor | None = None
    ) -> Tensor:
        """As `Kernels.experts` for picks sorted into tiles of the plan's width, shares [T, K] contiguous."""
        parts = products(plan, self.sms, x, by, shares, own)
        if parts.shape[1] % 8:  # which csrc/picks.cu does not take
            return grouped.summed(parts, residual, x.new_empty(len(x), parts.shape[1]))
        return experts.summed(parts, residual, shares.shape[1])


def place(own: Experts) -> int:
    """Where experts lie: what they are told apart by."""
    if own.tiled is not None:
        return own.tiled[0].sources.data_ptr()
    return 0 if own.stacked is None else own.stacked[0].data_ptr()


def products(
    plan: Plan, sms: int, x: Tensor, by: grouped.Sorted, shares: Tensor, own: Experts, gathered: Tensor | None = None
) -> Tensor:
    """What each pick gives, times its weight: [T * K, rows]. gathered: x by place, where that was made before."""
    if isinstance(plan, grouped.GroupedPlan):
        assert own.stacked is not None
        return grouped.products(plan, x, by, shares, *own.stacked, own.act)
    if isinstance(plan, experts_packed.PackedExpertsPlan):
        assert own.tiled is not None
        if gathered is None and experts_packed.gathers(plan, own.tiled[0]):
            gathered = experts.gather(x, by, shares)
        return experts_packed.products(plan, sms, x, gathered, by, shares, *own.tiled, own.act)
    assert own.stacked is not None
    gathered = experts.gather(x, by, shares) if gathered is None else gathered
    return experts.products(plan, sms, gathered, by, shares, *own.stacked, own.act)


def moved(work: ExpertsWork) -> tuple[float, float]:
    """Bytes that the work cannot but move: weights of the experts that have tokens, as many as even picks are expected
    to hit, and activations.
    """
    hit = work.count * (1 - (1 - work.top / work.count) ** work.tokens)
    sizes = (2 * work.inner, work.cols), (work.cols, work.inner)
    size = work.dtype.itemsize
    weights = 0.0
    for up, down, count in work.formats:
        each = (
            rows * cols * size if name == DENSE else format_of(name).nbytes(rows, cols)
            for name, (rows, cols) in zip((up, down), sizes)
        )
        weights += sum(each) * count / work.count
    return hit * weights, size * (2 * work.tokens * work.cols + 2 * work.picks * (work.cols + work.inner))


def distinct(works: Iterable[ExpertsWork]) -> list[ExpertsWork]:
    """Each different work once, for one token."""
    return list(dict.fromkeys(replace(work, tokens=1) for work in works))
