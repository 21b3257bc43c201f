"""Measure the arms of attention on a GPU, and each softmax in the arm that runs, and write them into the table of
choices, as `tune` does for linear ones.

Keys and values are random and rotate through more sets than the L2 cache holds. Arms that do not fuse what stands
before attention (norms of heads, rotary embedding, the write into pages) are timed with the launch that does it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tenfold.ops.attention.tune import paged
from tenfold.ops.choose import Key
from tenfold.ops.gpu import attending, decode
from tenfold.ops.gpu.attending import Attending, Reading
from tenfold.ops.gpu.timing import Arm
from tenfold.ops.gpu.tune import Progress, Timer
from tenfold.ops.kernels import Contexts, Heads

NO_LAYER = -1  # what is no layer's address
KEPT = 8 << 30  # bytes of keys and values of the largest reading that is measured
PHI = -1.0  # a unified maximum that serves the scores of random queries and keys, also where sums are narrow (float16)


def tune(
    readings: Sequence[Reading],
    running: Attending,
    timer: Timer,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Time every legal arm of each reading, then every softmax, and save the table of `running`. Returns how many rows
    were measured.
    """
    table, sms = running.table, running.sms
    todo, measured = missing(readings, running, force), 0
    for done, (reading, key) in enumerate(todo):
        if progress:
            what = f"{reading.tokens} tokens" if reading.tokens else f"{reading.requests} x {reading.longest} tokens"
            progress(done, len(todo), f"{key.op}, {what}")
        alone = key == attending.key(reading, sms)
        if times := (measure if alone else measure_softmax)(reading, running, timer):
            table.record(key, times)
            table.save()
            measured += 1
    return measured


def missing(readings: Sequence[Reading], running: Attending, force: bool = False) -> list[tuple[Reading, Key]]:
    """What `tune` measures: each different reading, then its softmax, that the table has no times of, and where those
    go.
    """
    sms = running.sms
    every = [(reading, attending.key(reading, sms)) for reading in attending.alike(readings)]
    every += [(reading, attending.softmax_key(reading, sms)) for reading in readings]
    return [(reading, key) for reading, key in every if force or not running.table.times(key)]


def measure(
    reading: Reading,
    running: Attending,
    timer: Timer,
    names: Sequence[str] = (),
    softmax: str = "lazy",
    contexts: Sequence[int] = (),
) -> dict[str, float]:
    """Microseconds of arms, all that are legal unless some are named; what the rule's computes is the reference.
    contexts: tokens of each decode, where they are not `attending.measured_contexts`.

    Raises ValueError where none can run.
    """
    first = attending.rule(reading, running.sms)
    inputs = Inputs(reading, timer.copies(reading.nbytes), running.device, contexts)
    names = names or attending.candidates(reading, running.sms)
    arms = {name: inputs.bind(name, running, softmax) for name in names}
    return timed(arms, inputs.bind(first, running, softmax), inputs, timer)


def measure_softmax(reading: Reading, running: Attending, timer: Timer) -> dict[str, float]:
    """Microseconds of each softmax that is legal, in the arm that runs the reading; none where that is not ours. Raises
    ValueError where none can run.
    """
    arm = attending.choice(replace(reading, whole=False), running.table, running.sms).arm
    if not attending.takes_softmax(arm):
        return {}
    inputs = Inputs(reading, timer.copies(reading.nbytes), running.device)
    arms = {name: inputs.bind(arm, running, name) for name in attending.softmaxes(reading)}
    return timed(arms, arms["lazy"], inputs, timer)


def timed(arms: Mapping[str, Arm], reference: Arm, inputs: "Inputs", timer: Timer) -> dict[str, float]:
    times = timer.measure(arms, len(inputs.stores), reference)
    if not times:
        reading = inputs.reading
        raise ValueError(
            f"None of {len(arms)} arms could run {reading.op} for {reading.requests} x {reading.longest} tokens; the "
            "log says why. Other processes on this GPU may hold its memory."
        )
    return times


class Inputs:
    """Random queries, and `copies` sets of keys and values, for one reading."""

    def __init__(self, reading: Reading, copies: int, device: torch.device, contexts: Sequence[int] = ()) -> None:
        self.reading = reading
        spec, dtype, page = reading.spec, reading.dtype, reading.page_size
        count = reading.tokens or reading.requests
        self.stores = [
            paged(spec, reading.requests, reading.longest, page, dtype, device, seed) for seed in range(copies)
        ]
        self.qkv = torch.randn(count, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype=dtype, device=device)
        self.rope = torch.randn(reading.longest, max(2, spec.rotary_dim), device=device)
        lengths = list(contexts) or attending.measured_contexts(reading)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.positions = self.lengths - 1
        starts = range(reading.requests + 1)
        if reading.tokens:
            self.positions = torch.arange(count, dtype=torch.int32, device=device)
            starts = range(0, 2 * count, count)
        self.starts = torch.tensor(list(starts), dtype=torch.int32, device=device)
        self.max_query = reading.tokens or 1

    @property
    def heads(self) -> Heads:
        spec = self.reading.spec
        phi = torch.full((spec.heads,), PHI, device=self.rope.device) if self.reading.unified else None
        return Heads(spec, self.rope, phi=phi)

    def contexts(self, table: Tensor) -> Contexts:
        """Of the pages in a table."""
        rest = (table, self.starts, self.lengths, self.max_query, self.reading.longest)
        return Contexts(self.positions, self.slots(table), *rest)

    def slots(self, table: Tensor) -> Tensor:
        """Where the new tokens' keys and values go."""
        page, positions = self.reading.page_size, self.positions.long()
        rows = torch.zeros_like(positions) if self.reading.tokens else torch.arange(len(positions), device=table.device)
        return (table[rows, positions // page] * page + positions % page).int()

    def bind(self, name: str, running: Attending, softmax: str) -> Arm:
        arm, heads = attending.bound(name, softmax), self.heads
        contexts = [self.contexts(table) for _, _, table in self.stores]
        if isinstance(arm, decode.DecodePlan):  # what a step works out once for all layers is not timed
            for one in contexts:
                decode.share(arm, self.reading.spec, self.lengths, running.sms, one.memo, NO_LAYER)

        def call(i: int) -> Tensor:
            keys, values, _ = self.stores[i]
            return running.run(arm, self.qkv, heads, keys, values, contexts[i], self.reading.longest, softmax)

        return call
