"""Measure the arms of the compiled linear operation on the matrices of a model, and write the table of choices.

Weights are rotated: a call finds its matrix no warmer than in a real step, where the other layers ran in between.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from ctypes import Structure, addressof, c_float, c_int32, c_void_p, cast, sizeof

import torch

from tenfold.ops.choose import Choice, Key
from tenfold.ops.cpu import arms, lib, pack
from tenfold.ops.matrix import Matrix

Progress = Callable[[int, int, str], None]
ROTATION = 96 << 20  # bytes of weights to cycle through: beyond the last-level cache of most processors
SAMPLES = 5
SAMPLE_SECONDS = 0.004  # of one sample, at least
MOST_CALLS = 400  # of one sample


class _Arguments(Structure):
    """tf_linear_args."""

    _fields_ = (
        *((name, c_void_p) for name in ("w", "x", "norm_weight", "bias", "residual", "out")),
        ("rows", c_int32),
        ("eps", c_float),
        ("act", c_int32),
        ("arm", c_int32),
    )


class _Call(Structure):
    """tf_call."""

    _fields_ = (("op", c_void_p), ("args", c_void_p))


class Series:
    """The linear operation on each matrix in turn, as calls the library runs without Python in between."""

    def __init__(self, matrices: Sequence[Matrix], batch: int, arm: str, *, norm: bool = False, act: int = 0) -> None:
        """Matrices of one shape; batch: rows of x; norm: with an RMS norm before; act: as tf_linear_args."""
        rows, cols = matrices[0].rows, matrices[0].cols
        self.calls = len(matrices)
        self._tensors = (torch.randn(batch, cols), torch.ones(cols), torch.empty(batch, rows))
        x, weight, out = (t.data_ptr() for t in self._tensors)
        number = arms.ARMS.index(arm)
        self._arguments = (_Arguments * self.calls)(
            *(
                _Arguments(m.handle, x, weight if norm else None, None, None, out, batch, 1e-5, act, number)
                for m in matrices
            )
        )
        first, op = addressof(self._arguments), cast(lib.load().tf_linear_call, c_void_p)
        self._calls = (_Call * self.calls)(*(_Call(op, first + i * sizeof(_Arguments)) for i in range(self.calls)))
        self._run = lib.load().tf_run

    def time(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of one call, over one pass through all matrices."""
        start = clock()
        self._run(self._calls, self.calls)
        return (clock() - start) / self.calls


def rotation(matrices: Sequence[Matrix], size: int = ROTATION) -> list[Matrix]:
    """The matrices, and copies of them until they take `size` bytes."""
    result = list(matrices)
    held = sum(m.nbytes for m in result)
    while held < size:
        result.append(pack.copy(matrices[len(result) % len(matrices)]))
        held += result[-1].nbytes
    return result


def tune_linear(
    matrices: Iterable[Matrix],
    batches: Sequence[int] = arms.BATCHES,
    progress: Progress | None = None,
) -> list[Choice]:
    """Time every arm for each different shape and batch size, save the table and apply it to the matrices.

    progress(done, total, what) is called before each measurement. Returns one row for each shape and batch size.
    """
    every = list(matrices)
    shapes: dict[Key, list[Matrix]] = {}
    for matrix in every:
        shapes.setdefault(arms.key(matrix, 1), []).append(matrix)
    table, total, done = arms.table(), len(shapes) * len(batches), 0
    for group in shapes.values():
        rotated = rotation(group)
        for batch in batches:
            at = arms.key(rotated[0], batch)
            if progress:
                progress(done, total, f"{at.rows} x {at.cols} {at.format}, batch {batch}")
            table.record(at, measure(rotated, batch))
            done += 1
    table.save()
    for matrix in every:
        arms.apply(matrix)
    return arms.explain(every, batches)


def measure(matrices: Sequence[Matrix], batch: int) -> dict[str, float]:
    """Microseconds of each arm: the median of samples taken in turn, after one that warms up and sets their length."""
    first = Series(matrices[:1], batch, arms.ARMS[-1])
    first.time()
    calls = min(len(matrices), MOST_CALLS, max(1, round(SAMPLE_SECONDS / first.time())))
    series = {arm: Series(matrices[:calls], batch, arm) for arm in arms.ARMS}
    samples: dict[str, list[float]] = {arm: [] for arm in series}
    for _ in range(SAMPLES):
        for arm, one in series.items():
            samples[arm].append(one.time() * 1e6)
    return {arm: round(statistics.median(taken), 2) for arm, taken in samples.items()}
