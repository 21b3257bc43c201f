"""Linear operations of a few tokens whose weights come through a ring in shared memory by bulk copies of rows:
csrc/bulk.cu.

Takes dense weights, and the formats of ops/formats.py whose groups are 128 columns, or whole rows without zeros,
without a column order. All of x, up to 16 tokens, lies in shared memory. Fuses what `stream` fuses, and rounds alike.

Plans of `digits` take whole-number codes and up to 4 tokens. Tensor cores multiply the codes, where they lie, by
columns of x that are written as whole numbers in base 256 (csrc/digits.h): 32 columns of 3 bits take 12 masks, where
numbers of 16 bits take 27 masks and shifts. Columns count in steps of 2^-20 of the largest of their 128, finer than
16-bit numbers; with a norm, x * weight is not rounded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.formats import format_of, is_format, packed_of
from tenfold.ops.gpu import hopper, nvrtc
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
SIZES_DENSE = ((8, 8, 1, 1), (16, 4, 1, 1), (14, 4, 1, 1), (8, 4, 2, 1), (8, 4, 1, 2))
ENOUGH = 3  # stages with which a block leaves half of the shared memory to the next kernel's
# What runs unless something else was measured to be faster, up to so many tokens (H200, 2026-11-29).
RULE = {"digits4": 2, "digits3": 2, "bulk4": 8, "bulk3": 8}


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """How a linear operation runs. kind of KINDS; warps of a block that multiply; chunks: pieces of 128 columns (32 of
    dense weights) each has of a step; tall times 16 rows of a tile, 1 or 2; stages of the ring; blocks of a
    multiprocessor.
    """

    kind: str
    warps: int
    chunks: int
    tall: int
    stages: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.warps}x{self.chunks}x{self.tall}x{self.stages}x{self.blocks}"

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
    def threads(self) -> int:
        """Of a block: those that multiply, a warp that brings weights, and one that stores results."""
        return self.warps * 32 + 64


def parse(name: str) -> BulkPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(rf"({'|'.join(KINDS)}):(\d+)x(\d+)x([12])x(\d+)x(\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is no plan of bulk copies; allowed: {':WxCxTxSxB, '.join(KINDS)}:WxCxTxSxB.")
    kind, *sizes = found.groups()
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
    nt, chunks = plan.tiles(tokens), cols // CHUNK
    ring = plan.stages * (stage_bytes(plan) + 16) + 32
    if plan.digits:
        staged = chunks * tokens * 64 * (12 if plan.bits == 3 else 8) + chunks * nt * 64
        return ring + staged + (2 * 160 * plan.tall + 8) * plan.warps * nt + nt * 8
    staged = tokens * (cols // 32 | 1) * 64 + sums_bytes(plan.bits, tokens, cols)
    return ring + staged + (2 * 640 * plan.tall + 32) * plan.warps * nt + nt * 32


def legal(plan: BulkPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    if not 1 <= tokens <= (MOST_DIGITS if plan.digits else MOST_TOKENS) or plan.stages < LEAST_STAGES:
        return False
    if plan.digits and plan.warps < 3:
        return False
    if cols % (plan.chunks * plan.chunk_cols):
        return False
    if plan.kind != DENSE and (cols % (2 * CHUNK) or plan.warps * plan.chunks % 2):
        return False
    return hopper.fits(shared_bytes(plan, tokens, cols), plan.blocks)


def candidates(kind: str, tokens: int, rows: int, cols: int) -> Iterator[BulkPlan]:
    """Plans worth timing, those first whose steps take the columns most evenly."""

    def idle(size: tuple[int, ...]) -> int:
        """Columns that a row's last step has too many."""
        return -cols % (size[0] * size[1] * (32 if kind == DENSE else CHUNK))

    for size in sorted(SIZES_DENSE if kind == DENSE else SIZES, key=idle):
        plan = deepest(kind, size, tokens, rows, cols)
        if plan is not None:
            yield plan


def deepest(kind: str, size: tuple[int, int, int, int], tokens: int, rows: int, cols: int) -> BulkPlan | None:
    """The plan of a size with as many stages as fit in half of the shared memory, or where those are few in all of it.
    None: none is legal.
    """
    warps, chunks, tall, blocks = size
    for share, least in ((2, ENOUGH), (1, LEAST_STAGES)):
        for stages in range(MOST_STAGES, least - 1, -1):
            plan = BulkPlan(kind, warps, chunks, tall, stages, blocks)
            if hopper.fits(shared_bytes(plan, tokens, cols), blocks * share) and legal(plan, tokens, rows, cols):
                return plan
    return None


def rule(format: str, tokens: int) -> Iterator[str]:
    """Kinds of plans for matrices of this format where nothing was measured, the best first."""
    return (kind for kind, most in RULE.items() if tokens <= most and reads(kind, format))


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
            ("NORM", int(norm is not None)),
            ("GATE", gate),
        ),
    )
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    tiles = -(-w.rows // (16 * plan.tall))
    kernel(
        (min(tiles, sms * plan.blocks), 1, 1),
        plan.threads,
        shared_bytes(plan, tokens, cols),
        [x, *weights, out, bias, residual, weight, eps, tokens, w.rows, cols],
        dependent=True,
    )
    return out


def read(w: Matrix) -> tuple[list[Any], tuple[tuple[str, int], ...]]:
    """A matrix as arguments of the kernel (codes, scales, zeros) and macros."""
    if w.format == "dense":
        return [w.data[0], None, None], (("BITS", 16),)
    packed = packed_of(w)
    return [packed.codes, packed.scales, packed.zeros], format_macros(format_of(w.format), packed.scales.dtype)
