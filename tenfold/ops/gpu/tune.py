"""Measure the arms of linear operations on a GPU and write the table of choices.

Weights are random: a time depends on the shape and the format alone. The table is saved after every key, and what it
holds is not measured again, so a run that was stopped goes on where it was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import torch

from tenfold.ops import formats
from tenfold.ops.choose import Key, Table
from tenfold.ops.gpu import arms
from tenfold.ops.gpu.arms import Arms, Fused, Work
from tenfold.ops.gpu.timing import COPY, FARTHEST, Arm
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

Progress = Callable[[int, int, str], None]
SPREAD = 0.02  # standard deviation of random weights
FARTHEST_EIGHT_BITS = 0.08  # as FARTHEST, where activations are rounded to e4m3, of 3 bits


class Timer(Protocol):
    """`timing.GpuTimer`, or what stands in for it."""

    def copies(self, nbytes: int) -> int: ...

    def measure(
        self, arms: Mapping[str, Arm], copies: int, reference: Arm | None = None, farthest: float = FARTHEST
    ) -> dict[str, float]: ...

    def memory_microseconds(self) -> dict[str, float]: ...


def copy_key(sms: int) -> Key:
    """Where a table keeps the times of a copy of COPY bytes, the measure of every floor, and of reading them."""
    return Key("copy", 1, COPY, "int64", 1, sms)


def tune(
    works: Iterable[Work],
    running: Arms,
    timer: Timer,
    batches: Sequence[int] = arms.BATCHES,
    families: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Time every legal arm of each different work at each batch size, and save the table of `running`.

    works: of any number of tokens. families: first words of the arms to time, all where empty; the rule's arm and the
    library's are timed in any case. force: measure again what is there. progress(done, total, what) is called before
    each measurement. Returns how many keys were measured.
    """
    table, sms = running.table, running.sms
    if force or not table.times(copy_key(sms)):
        table.record(copy_key(sms), timer.memory_microseconds())
        table.save()
    todo, done = missing(works, running, batches, force), 0
    for work, each in groupby(todo, lambda one: replace(one, tokens=1)):
        matrices = weights(work, timer, running.context.device)
        for one in each:
            if progress:
                progress(done, len(todo), f"{one.use} {one.rows} x {one.cols} {one.stored}, batch {one.tokens}")
            table.record(arms.key(one, sms), measure(one, matrices, running, timer, wanted(one, sms, families)))
            table.save()
            done += 1
        del matrices
    return len(todo)


def missing(
    works: Iterable[Work], running: Arms, batches: Sequence[int] = arms.BATCHES, force: bool = False
) -> list[Work]:
    """What `tune` measures: each different work at each batch size that the table has no times of."""
    every = [replace(work, tokens=batch) for work in distinct(works) for batch in batches]
    return [one for one in every if force or not running.table.times(arms.key(one, running.sms))]


def distinct(works: Iterable[Work]) -> list[Work]:
    """Each different work once, for one token."""
    return list(dict.fromkeys(replace(work, tokens=1) for work in works))


def wanted(work: Work, sms: int, families: Sequence[str]) -> list[str]:
    """The arms to time."""
    first, every = arms.rule(work, sms), arms.candidates(work, sms)
    if not families:
        return every
    return [name for name in every if name in (first, "cublas") or name.partition(":")[0] in families]


def measure(
    work: Work, matrices: Sequence[Matrix], running: Arms, timer: Timer, names: Sequence[str]
) -> dict[str, float]:
    """Microseconds of the named arms on one work. Raises ValueError where none can run."""
    x, fused = inputs(work, matrices[0].data[0].device)
    oracle = Oracle(x.device, work.dtype)

    def reference(i: int) -> torch.Tensor:
        return oracle.linear(x, matrices[i], fused.bias, norm=fused.norm, act=fused.act, residual=fused.residual)

    calls = {name: bound(name, running, x, matrices, fused) for name in names}
    farthest = FARTHEST_EIGHT_BITS if work.format.endswith("a8") else FARTHEST
    times = timer.measure(calls, len(matrices), reference, farthest)
    if not times:
        raise ValueError(
            f"None of {len(calls)} arms could run {work.use} {work.rows} x {work.cols} {work.stored} for {work.tokens} "
            "tokens; the log says why. Other processes on this GPU may hold its memory."
        )
    return times


def bound(name: str, running: Arms, x: torch.Tensor, matrices: Sequence[Matrix], fused: Fused) -> Arm:
    run, context = running.bind(name), running.context
    return lambda i: run(context, x, matrices[i], fused)


def inputs(work: Work, device: torch.device) -> tuple[torch.Tensor, Fused]:
    """Random x [tokens, cols] and what is fused."""

    def normal(*shape: int, **kind: Any) -> torch.Tensor:
        return torch.empty(shape, device=device, **kind).normal_()

    use = work.use
    outputs = work.rows // 2 if use.act else work.rows
    norm = Norm(normal(work.cols, dtype=torch.float32) * 0.1 + 1, 1e-5) if use.norm else None
    residual = normal(work.tokens, outputs, dtype=work.dtype) if use.residual else None
    return normal(work.tokens, work.cols, dtype=work.dtype), Fused(None, norm, use.act, residual, use.float32)


def weights(work: Work, timer: Timer, device: torch.device) -> list[Matrix]:
    """Random matrices, as many as the timer wants for rotation."""
    dense = torch.empty(work.rows, work.cols, dtype=work.dtype, device=device).normal_(0.0, SPREAD)
    if work.format == "dense":
        first = Matrix("dense", work.rows, work.cols, (dense,))
    else:
        format = formats.format_of(work.format)
        plain = replace(format, order=False).pack(dense)
        order = torch.randperm(work.cols, device=device).int() if format.order else None
        first = Matrix(work.format, work.rows, work.cols, plain._replace(order=order).tensors())
    copies = timer.copies(first.nbytes)
    return [
        first,
        *(Matrix(work.format, work.rows, work.cols, tuple(t.clone() for t in first.data)) for _ in range(copies - 1)),
    ]


def open_arms(device: torch.device, dtype: torch.dtype, table: Table | None = None) -> Arms:
    """The arms of a CUDA device, by its own table or another."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    own = arms.table(torch.cuda.get_device_name(device)) if table is None else table
    return Arms(device, dtype, sms, own)
