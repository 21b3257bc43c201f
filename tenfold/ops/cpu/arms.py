"""Which arm of the compiled linear operation runs: the table of choices applied to packed matrices.

Arms (csrc/linear.c) are bit-identical, so a choice never changes a result. `Matrix.arms` maps a batch size to the arm's
number; sizes it does not hold are left to the rule in C.
"""

import platform
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_int
from functools import cache
from pathlib import Path

from tenfold.ops.choose import LARGEST_BATCH, Choice, Key, Table, batch_bucket
from tenfold.ops.cpu import lib
from tenfold.ops.matrix import Matrix

ARMS = ("gemv", "flat", "tiled")  # order of TF_ARM_*
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 512)
"""Batch sizes that are measured and explained."""


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table() -> Table:
    """The table of this processor, the instruction set in use and this build of the kernels."""
    status = lib.status()
    version = status.path.stem.partition("-")[0] if status.path else ""
    return _table(f"cpu {processor()} {status.isa}", version)


@cache
def _table(device: str, version: str) -> Table:
    return Table(device, version)


@cache
def _rule() -> Callable[[int], int]:
    return lib.prototype("tf_linear_rule", c_int, c_int)


def rule(batch: int) -> str:
    """The arm that runs where nothing was measured."""
    return ARMS[_rule()(batch)]


def key(matrix: Matrix, batch: int) -> Key:
    return Key("linear", matrix.rows, matrix.cols, matrix.format, batch_bucket(batch), int(lib.load().tf_threads()))


def choice(matrix: Matrix, batch: int) -> Choice:
    return table().pick(key(matrix, batch), rule(batch))


def explain(matrices: Iterable[Matrix], batches: Sequence[int] = BATCHES) -> list[Choice]:
    """One row for each different shape and batch size: the arm, its time, the runner-up, measured or rule."""
    shapes = {key(matrix, 1): matrix for matrix in matrices}
    return [choice(matrix, batch) for matrix in shapes.values() for batch in batches]


def apply(matrix: Matrix) -> None:
    """Fill `matrix.arms` from the table: every batch size whose bucket was measured."""
    found = table()
    matrix.arms.clear()
    if not len(found):
        return
    batch = 1
    while batch <= LARGEST_BATCH:
        at = key(matrix, batch)
        if found.times(at):
            arm = ARMS.index(found.pick(at, rule(at.batch)).arm)
            matrix.arms.update(dict.fromkeys(range(batch, at.batch + 1), arm))
        batch = at.batch + 1
