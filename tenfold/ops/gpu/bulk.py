"""Linear operations of a few tokens whose weights come through a ring in shared memory by bulk copies of rows:
csrc/bulk.cu.

Takes dense weights, and the formats of ops/formats.py whose groups are 128 columns, or whole rows without zeros,
without a column order. All of x, up to 16 tokens, lies in shared memory. Fuses what `stream` fuses, and rounds alike.

Plans of `digits` take whole-number codes and up to 4 tokens. Tensor cores multiply the codes, where they lie, by
columns of x that are written as whole numbers in base 256 (csrc/digits.h): 32 columns of 3 bits take 12 masks, where
numbers of 16 bits take 27 masks and shifts. Columns count in steps of 2^-20 of the largest of their 128, finer than
16-bit numbers; with a norm, x * weight is not rounded.

Every block stages all of x. Where that takes long, or a multiprocessor has few tiles, blocks of a cluster divide the
columns (csrc/shares.h): each stages its share only, and tiles are divided more finely.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.formats import format_of, is_format, packed_of
from tenfold.ops.gpu import experts, hopper, nvrtc
from tenfold.ops.gpu.stream import MOST_TOKENS, token_tiles
from tenfold.ops.gpu.stream_packed import CHUNK, GROUPED, format_macros, sums_bytes
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

DENSE = "bulk"
# What each kind of plan reads, and bits of a weight.
CODES = {"bulk8": ("int8", "fp8"), "bulk4": ("int4",), "bulk3": ("int3",), "bulk2": ("int2",)}
CODES |= {"digits8": ("int8",), "digits4": ("int4",), "digits3": ("int3",), "digits2": ("int2",)}
KINDS = (DENSE, *CODES)
BITS = {DENSE: 16, **{kind: int(kind[-1]) for kind in CODES}}
MOST_DIGITS = 4  # tokens of a plan of digits
TOGETHER = {3: 48, 2: 32}  # bytes of a row that four lanes load at once, 64 for other bits
LEAST_STAGES, MOST_STAGES = 2, 12
# Warps that multiply, chunks of each, 16 rows of a tile, blocks of a multiprocessor (H200, 2026-11-29).
SIZES = ((14, 2, 1, 1), (16, 2, 1, 1), (14, 2, 2, 1), (7, 4, 1, 1), (7, 4, 2, 1), (8, 4, 1, 1), (14, 2, 1, 2))
SIZES_8 = ((16, 1, 1, 1), (8, 2, 1, 1), (14, 1, 1, 1))  # besides, for 8 bits: a step of the others is half of the ring
SIZES_DENSE = ((8, 8, 1, 1), (16, 4, 1, 1), (14, 4, 1, 1), (8, 4, 2, 1), (8, 4, 1, 2))
CLUSTERS = (1, 2, 4)  # blocks that divide the columns
# The same where they do, and how many of them are worth timing.
SIZES_SHARES = (
    *((19, 2, 1, 1), (10, 4, 1, 1)),
    *((14, 2, 1, 1), (16, 2, 1, 1), (14, 1, 2, 1), (16, 1, 2, 1), (7, 2, 2, 1), (8, 2, 2, 1), (14, 1, 1, 1)),
    *((16, 1, 1, 1), (13, 2, 1, 1), (11, 2, 1, 1), (10, 2, 1, 1), (7, 2, 1, 2), (8, 2, 1, 2), (8, 1, 2, 1)),
    (8, 1, 1, 2),
)
SIZES_SHARES_DENSE = (*SIZES_DENSE, (7, 8, 1, 1), (7, 4, 2, 1), (10, 4, 1, 1), (11, 4, 1, 1))
MOST_SHARES = {2: 4, 4: 3}
MOST_SHARES_DENSE = {2: 3, 4: 2}
FEW_ROWS = {2: 16384, 4: 8192}  # up to so many a multiprocessor has few tiles
MANY_COLS = {2: 8192, 4: 12288}  # from so many on each block had better stage a share
MANY_DIGITS = {2: 2048, 4: 8192}  # the same where they become digits
ENOUGH = 3  # stages with which a block leaves half of the shared memory to the next kernel's
LONG = 8192  # columns from which on two blocks divide those that become digits (H200, 2026-11-29)
# What runs unless something else was measured to be faster, up to so many tokens (H200, 2026-11-29).
RULE = {"digits8": 2, "digits4": 2, "digits3": 2, "bulk4": 8, "bulk3": 8}
# Dense weights: as steps of Llama-3-8B and Llama-3.2-1B are fastest (H200, 2026-11-29). Beside these kernels the plain
# ones find little L1 cache, so a model's layers had better all be wide, or none.
WIDE = 3072  # rows and columns, from which on
MOST_DENSE = 2  # tokens, up to which
FEW, MOST_DENSE_FEW = 4096, 4  # rows so few that blocks had better divide the columns, and tokens up to which they do


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """How a linear operation runs. kind of KINDS; warps of a block that multiply; chunks: pieces of 128 columns (32 of
    dense weights) each has of a step; tall times 16 rows of a tile, 1 or 2; stages of the ring; blocks of a
    multiprocessor; cluster: blocks that divide the columns.
    """

    kind: str
    warps: int
    chunks: int
    tall: int
    stages: int
    blocks: int
    cluster: int = 1

    def __str__(self) -> str:
        name = f"{self.kind}:{self.warps}x{self.chunks}x{self.tall}x{self.stages}x{self.blocks}"
        return name + f":c{self.cluster}" * (self.cluster > 1)

    @property
    def chunk_cols(self) -> int:
        return 32 if self.kind == DENSE else CHUNK

    @property
    def bits(self) -> int:
        return BITS[self.kind]

    @property
    def digits(self) -> bool:
        return self.kind.startswith("digits")

    def tiles(self, tokens: int) -> int:
        """Of tokens, that the kernel is compiled for: of 8, or 2 with digits."""
        return -(-tokens // 2) if self.digits else token_tiles(tokens)

    @property
    def unit(self) -> int:
        """Columns are a multiple of, and so is each block's share: of chunks, and for packed weights of a pair."""
        cols = self.chunks * self.chunk_cols
        return cols if self.kind == DENSE else math.lcm(cols, 2 * CHUNK)

    def share(self, rank: int, cols: int) -> range:
        """The columns of a block of a cluster."""
        units = cols // self.unit
        return range(rank * units // self.cluster * self.unit, (rank + 1) * units // self.cluster * self.unit)

    def widest(self, cols: int) -> int:
        """Columns of the largest share."""
        return -(-cols // self.unit // self.cluster) * self.unit

    @property
    def threads(self) -> int:
        """Of a block: those that multiply, a warp that brings weights, and one that stores results."""
        return self.warps * 32 + 64


def parse(name: str) -> BulkPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(rf"({'|'.join(KINDS)}):(\d+)x(\d+)x([12])x(\d+)x(\d+)(?::c([24]))?", name)
    if not found:
        allowed = f"{':WxCxTxSxB, '.join(KINDS)}:WxCxTxSxB, each with :c2 or :c4 behind it or nothing"
        raise ValueError(f"{name!r} is no plan of bulk copies; allowed: {allowed}.")
    kind, *sizes = found.groups(default="1")
    return BulkPlan(kind, *map(int, sizes))


def reads(kind: str, format: str) -> bool:
    """Whether plans of this kind read matrices of this format, "dense" among them."""
    if kind == DENSE or not is_format(format):
        return kind == DENSE and format == "dense"
    found = format_of(format)
    if found.order or (found.group != CHUNK if found.group else found.zero or found.kind in GROUPED):
        return False
    return found.kind in CODES[kind]


def stage_bytes(plan: BulkPlan) -> int:
    """Of a tile's rows in a step, and of their groups' scales and zeros as float32."""
    cols = plan.warps * plan.chunks * plan.chunk_cols
    together = TOGETHER.get(plan.bits, 64)
    pitch = -(-(cols * plan.bits // 8 - together) // 128) * 128 + together
    return 16 * plan.tall * (pitch + (0 if plan.kind == DENSE else 2 * cols // CHUNK * 4))


def shared_bytes(plan: BulkPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block, at most."""
    cols = plan.widest(cols)
    nt, chunks = plan.tiles(tokens), cols // CHUNK
    ring = plan.stages * (stage_bytes(plan) + 16) + 32 + sent_bytes(plan, tokens)
    if plan.digits:
        staged = chunks * tokens * 64 * (12 if plan.bits == 3 else 8) + chunks * nt * 64
        return ring + staged + (2 * 160 * plan.tall + 8) * plan.warps * nt + nt * 8
    staged = tokens * (cols // 32 | 1) * 64 + sums_bytes(plan.bits, tokens, cols)
    return ring + staged + (2 * 640 * plan.tall + 32) * plan.warps * nt + nt * 32


def sent_bytes(plan: BulkPlan, tokens: int) -> int:
    """Of other blocks' sums, in two turns, and of the barriers where they arrive."""
    if plan.cluster == 1:
        return 0
    numbers = (16 * plan.tall + 1) * plan.tiles(tokens) * (2 if plan.digits else 8)
    return 2 * 8 + 2 * plan.cluster * numbers * 4


def legal(plan: BulkPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    if not 1 <= tokens <= (MOST_DIGITS if plan.digits else MOST_TOKENS) or plan.stages < LEAST_STAGES:
        return False
    if cols % plan.unit or (plan.kind != DENSE and plan.warps * plan.chunks % 2):
        return False
    if plan.cluster not in CLUSTERS or cols // plan.unit < plan.cluster:
        return False
    return hopper.fits(shared_bytes(plan, tokens, cols), plan.blocks)


def candidates(kind: str, tokens: int, rows: int, cols: int) -> Iterator[BulkPlan]:
    """Plans worth timing, those first whose steps take the columns most evenly, and of clusters those alone."""
    dense = kind == DENSE
    own = {16: SIZES_DENSE, 8: (*SIZES, *SIZES_8)}.get(BITS[kind], SIZES)
    yield from plans(kind, own, tokens, rows, cols)
    many = MANY_DIGITS if kind.startswith("digits") else MANY_COLS
    for cluster, most in (MOST_SHARES_DENSE if dense else MOST_SHARES).items():
        if rows <= FEW_ROWS[cluster] or cols >= many[cluster]:
            sizes = SIZES_SHARES_DENSE if dense else SIZES_SHARES
            yield from islice(plans(kind, sizes, tokens, rows, cols, cluster), most)


def plans(
    kind: str, sizes: Iterable[tuple[int, int, int, int]], tokens: int, rows: int, cols: int, cluster: int = 1
) -> Iterator[BulkPlan]:
    """Of these sizes, those first whose steps take a block's columns most evenly."""
    found = [deepest(kind, size, tokens, rows, cols, cluster) for size in sizes]
    yield from sorted((plan for plan in found if plan is not None), key=lambda plan: idle(plan, cols))


def idle(plan: BulkPlan, cols: int) -> int:
    """Columns that the last step of a row of the largest share has too many."""
    return -plan.widest(cols) % (plan.warps * plan.chunks * plan.chunk_cols)


def deepest(
    kind: str, size: tuple[int, int, int, int], tokens: int, rows: int, cols: int, cluster: int = 1
) -> BulkPlan | None:
    """The plan of a size with as many stages as fit in half of the shared memory, or where those are few in all of it.
    None: none is legal.
    """
    warps, chunks, tall, blocks = size
    for share, least in ((2, ENOUGH), (1, LEAST_STAGES)):
        for stages in range(MOST_STAGES, least - 1, -1):
            plan = BulkPlan(kind, warps, chunks, tall, stages, blocks, cluster)
            if hopper.fits(shared_bytes(plan, tokens, cols), blocks * share) and legal(plan, tokens, rows, cols):
                return plan
    return None


def rule(format: str, tokens: int, rows: int, cols: int) -> Iterator[BulkPlan]:
    """Plans for matrices of this format where nothing was measured, the best first."""
    if format == "dense":
        yield from rule_dense(tokens, rows, cols)
        return
    for kind, most in RULE.items():
        if tokens <= most and reads(kind, format):
            cluster = 2 if kind.startswith("digits") and cols >= LONG else 1
            yield from islice(plans(kind, SIZES_SHARES if cluster > 1 else SIZES, tokens, rows, cols, cluster), 1)


def rule_dense(tokens: int, rows: int, cols: int) -> Iterator[BulkPlan]:
    """The same for dense matrices."""
    few = rows <= FEW
    if min(rows, cols) < WIDE or tokens > (MOST_DENSE_FEW if few else MOST_DENSE):
        return
    cluster = (4 if tokens > MOST_DENSE and cols > rows else 2) if few else 1
    yield from islice(plans(DENSE, SIZES_SHARES_DENSE if few else SIZES_DENSE, tokens, rows, cols, cluster), 1)


def run(
    plan: BulkPlan,
    sms: int,
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    float32: bool = False,
) -> Tensor:
    """As `Kernels.linear` with a matrix whose format the plan's kind reads; the plan must be legal. float32: the
    result's type.
    """
    tokens, cols = x.shape
    gate = nvrtc.GATES[act]
    out = x.new_empty(tokens, w.rows // 2 if gate else w.rows, dtype=torch.float32 if float32 else x.dtype)
    weights, macros = read(w)
    kernel = nvrtc.load(
        "bulk.cu",
        "bulk",
        (
            *macros,
            ("HALF", nvrtc.HALF[x.dtype]),
            ("FLOAT32", int(float32)),
            ("DIGITS", int(plan.digits)),
            ("NT", plan.tiles(tokens)),
            ("TALL", plan.tall),
            ("WARPS", plan.warps),
            ("CHUNKS", plan.chunks),
            ("STAGES", plan.stages),
            ("BLOCKS", plan.blocks),
            ("CLUSTER", plan.cluster),
            ("NORM", int(norm is not None)),
            ("GATE", gate),
        ),
    )
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    items = -(-w.rows // (16 * plan.tall)) * plan.cluster
    sizes = (sms, plan.blocks, plan.cluster, plan.threads, shared_bytes(plan, tokens, cols))
    experts.launch(kernel, items, *sizes, [x, *weights, out, bias, residual, weight, eps, tokens, w.rows, cols])
    return out


def read(w: Matrix) -> tuple[list[Any], tuple[tuple[str, int], ...]]:
    """A matrix as arguments of the kernel (codes, scales, zeros) and macros."""
    if w.format == "dense":
        return [w.data[0], None, None], (("BITS", 16),)
    packed = packed_of(w)
    return [packed.codes, packed.scales, packed.zeros], format_macros(format_of(w.format), packed.scales.dtype)
