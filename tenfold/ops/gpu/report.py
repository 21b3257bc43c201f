"""What the table of choices says: what runs, how near it is to the floor, and of linear operations from how many tokens
on which kind of kernel wins (FlashDecoding++, 2.3).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tenfold.ops import formats
from tenfold.ops.choose import Choice, Key, Table
from tenfold.ops.gpu import arms, attending, expert_arms
from tenfold.ops.gpu.arms import OWN, Work
from tenfold.ops.gpu.attending import Reading
from tenfold.ops.gpu.expert_arms import ExpertsWork
from tenfold.ops.gpu.tune import copy_key, distinct

BAR = 40  # characters of the longest bar
TYPICAL = [(requests, longest) for requests in (1, 8, 64) for longest in (1024, 8192, 32768)]


@dataclass(frozen=True, slots=True)
class Timed:
    """What runs. floor: microseconds that moving its bytes takes at the rate of a copy, None where no copy was
    measured.
    """

    choice: Choice
    floor: float | None

    @property
    def share(self) -> float | None:
        """Floor over time: 1.0 is as fast as memory allows."""
        took = self.choice.microseconds
        return None if took is None or self.floor is None else self.floor / took


@dataclass(frozen=True, slots=True)
class Line(Timed):
    """One work at one number of tokens."""

    work: Work


@dataclass(frozen=True, slots=True)
class Read(Timed):
    """One attention. Chunks have no floor: arithmetic bounds them, not memory."""

    reading: Reading


@dataclass(frozen=True, slots=True)
class Routed(Timed):
    """Experts of one layer at one number of tokens."""

    work: ExpertsWork


@dataclass(frozen=True, slots=True)
class Shape:
    """One work at every batch size. m1: the first batch at which a flat kernel of ours beats the GEMV; m2: the first
    at which the library beats ours; None where that never happens, or was not measured.
    """

    lines: tuple[Line, ...]
    m1: int | None
    m2: int | None


def explain(
    works: Iterable[Work], table: Table, sms: int, batches: Sequence[int] = arms.BATCHES, gemm: str = "auto"
) -> list[Shape]:
    """One Shape for each different work. gemm: what a user fixed, of `kernels.GEMM`."""
    rate = bandwidth(table, sms)
    found = []
    for work in distinct(works):
        each = [replace(work, tokens=batch) for batch in batches]
        lines = tuple(
            Line(arms.choice(one, table, sms, gemm), None if rate is None else moved(one) / rate / 1e3, one)
            for one in each
        )
        found.append(Shape(lines, *inflections(each, table, sms)))
    return found


def attention(
    readings: Sequence[Reading], table: Table, sms: int, merge: str = "auto", softmax: str = "auto"
) -> list[Read]:
    """Every reading that was measured, that of chunks behind a context too where those run another arm, and its softmax
    where the arm is ours; of a kind of which none was, those of TYPICAL. merge, softmax: what a user fixed.
    """
    rate = bandwidth(table, sms)

    def read(reading: Reading, choice: Choice) -> Read:
        floor = None if rate is None or reading.tokens else attending.floor_bytes(reading) / rate / 1e3
        return Read(choice, floor, reading)

    found = []
    for reading in shown(attending.alike(readings), table, attending.key, sms):
        found.append(read(reading, attending.choice(reading, table, sms, merge)))
        if found[-1].choice.arm == attending.SDPA:
            behind = replace(reading, whole=False)
            found.append(read(behind, attending.choice(behind, table, sms, merge)))
    for reading in shown(readings, table, attending.softmax_key, sms):
        behind = replace(reading, whole=False)
        if attending.takes_softmax(attending.choice(behind, table, sms, merge).arm):
            found.append(read(reading, attending.softmax_choice(reading, table, sms, softmax)))
    return found


def shown(
    readings: Iterable[Reading], table: Table, place: Callable[[Reading, int], Key], sms: int
) -> Iterator[Reading]:
    """Those of which the table has times at `place`; of a kind of which it has none, those of TYPICAL."""
    kinds: dict[str, list[Reading]] = {}
    for reading in readings:
        kinds.setdefault(place(reading, sms).op, []).append(reading)
    for every in kinds.values():
        keys = [place(reading, sms) for reading in every]
        measured = [reading for reading, key in zip(every, keys) if table.times(key) or table.steps(key)]
        yield from measured or [r for r in every if r.tokens or (r.requests, r.longest) in TYPICAL]


def experts(works: Iterable[ExpertsWork], table: Table, sms: int) -> list[Routed]:
    """Every different layer of experts at every number of tokens. Floors are those of even picks, and hold where memory
    is the bound.
    """
    rate = bandwidth(table, sms)
    each = [replace(work, tokens=tokens) for work in expert_arms.distinct(works) for tokens in expert_arms.TOKENS]
    floors = [None if rate is None else sum(expert_arms.moved(work)) / rate / 1e3 for work in each]
    return [Routed(expert_arms.choice(work, table, sms), floor, work) for work, floor in zip(each, floors)]


def bandwidth(table: Table, sms: int, how: str = "copy") -> float | None:
    """GB/s of a copy, read + write, or with how "read" of reading alone; None where none was measured."""
    took = table.times(copy_key(sms)).get(how)
    return None if took is None else (2e-3 if how == "copy" else 1e-3) * copy_key(sms).cols / took


def moved(work: Work) -> int:
    """Bytes that the work cannot but move: the weight once, its inputs and its result."""
    outputs = work.rows // 2 if work.use.act else work.rows
    size = work.dtype.itemsize
    if work.format == "dense":
        weight = work.rows * work.cols * size
    else:
        weight = formats.format_of(work.format).nbytes(work.rows, work.cols)
    return weight + work.tokens * size * (work.cols + outputs * (2 if work.use.residual else 1))


def inflections(works: Sequence[Work], table: Table, sms: int) -> tuple[int | None, int | None]:
    """The paper's M1 and M2 of one work at rising numbers of tokens."""
    m1 = m2 = None
    for work in works:
        times = table.times(arms.key(work, sms))
        gemv, own, library = (best(times, kinds) for kinds in (("gemv",), OWN, ("cublas",)))
        if m1 is None and own is not None and (gemv is None or own < gemv):
            m1 = work.tokens
        if m2 is None and library is not None and (own is None or library < own):
            m2 = work.tokens
    return m1, m2


def best(times: Mapping[str, float], kinds: Sequence[str]) -> float | None:
    """The least time among arms of these families."""
    found = [took for name, took in times.items() if name.partition(":")[0] in kinds]
    return min(found, default=None)


def chart(shape: Shape) -> list[str]:
    """Bars of time against batch, with the floor as a mark in each bar."""
    first = shape.lines[0]
    work = first.work
    points = f"M1 {shape.m1 or '-'}, M2 {shape.m2 or '-'}"
    head = f"{work.use} {work.rows} x {work.cols} {work.stored}; {points}"
    measured = [line.choice.microseconds for line in shape.lines if line.choice.microseconds is not None]
    if not measured:
        return [head, "  not measured: `tenfold tune` does"]
    return [head, *(f"  {bar(line, max(measured))}" for line in shape.lines)]


def bar(line: Line, longest: float) -> str:
    """`batch |====:==   | time share arm`: the bar ends at the time, the mark stands at the floor."""
    took = line.choice.microseconds
    if took is None:
        return f"{line.work.tokens:>4} |{'':{BAR}}| not measured; {line.choice.arm} by rule"
    cells = list("=" * max(1, round(BAR * took / longest)))
    if line.floor is not None:
        cells[min(len(cells), max(1, round(BAR * line.floor / longest))) - 1] = ":"
    share = "" if line.share is None else f"{line.share:4.0%} of floor  "
    return f"{line.work.tokens:>4} |{''.join(cells):{BAR}}| {took:8.1f} us  {share}{line.choice.arm}"
