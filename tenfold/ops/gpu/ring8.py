"""Linear operations of up to 64 tokens in float8 by float8: csrc/quantize.cu, then csrc/ring8.cu.

Takes `a8` formats of ops/formats.py with a scale a row or for 128 columns. Tokens, normed where a norm is fused, are
rounded to e4m3 with a scale each; bias, gate and residual are fused behind the product. Results repeat bit for bit.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.formats import format_of, packed_of
from tenfold.ops.gpu import nvrtc
from tenfold.ops.gpu.quantize import MOST_COLS, quantize
from tenfold.ops.gpu.ring import Maps, width
from tenfold.ops.gpu.stream import GATES, SHARED
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

KIND = "ring8"
MOST_TOKENS = 64
BOX = 128  # columns of a copy
STAGE = 2 * 64 * BOX  # bytes
PITCH = 68
SLICES = (1, 2, 4, 8)
LEAST_STAGES, MOST_STAGES = 3, 12
NEIGHBOURS = 16  # multiprocessors that clusters of up to 8 blocks fill whole (GPCs of an H100 have 16 or 18)


@dataclass(frozen=True, slots=True)
class Ring8Plan:
    """stages of the ring, each 256 bytes of 64 rows, and slices of the columns: blocks of a cluster. kind: "ring8", or
    "sliced" (see `sliced`).
    """

    stages: int
    slices: int
    kind: str = KIND

    def __str__(self) -> str:
        return f"{self.kind}:{self.stages}x{self.slices}"


def parse(name: str) -> Ring8Plan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(KIND + r":(\d+)x([1248])", name)
    if not found:
        raise ValueError(
            f"{name!r} is no plan of float8 by float8; allowed: {KIND}:STAGESxSLICES, 1, 2, 4 or 8 slices."
        )
    return Ring8Plan(int(found[1]), int(found[2]))


def pieces(size: int, each: int) -> int:
    return -(-size // each)


def steps(plan: Ring8Plan, cols: int) -> int:
    """Stages that hold a tile's columns of one block."""
    return pieces(pieces(pieces(cols, BOX), plan.slices), 2)


def shared_bytes(plan: Ring8Plan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    n = width(tokens)
    return 1024 + plan.stages * (STAGE + 16) + steps(plan, cols) * 2 * n * BOX + n * PITCH * 4 + 24


def clusters(plan: Ring8Plan, sms: int) -> int:
    """Clusters that run at once: a whole number of them on neighbouring multiprocessors."""
    return sms if plan.slices == 1 else max(1, sms // NEIGHBOURS * NEIGHBOURS // plan.slices)


def legal(plan: Ring8Plan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    fits = plan.stages >= 2 and plan.slices in SLICES and shared_bytes(plan, tokens, cols) <= SHARED
    return 1 <= tokens <= MOST_TOKENS and cols % 16 == 0 and 0 < cols <= MOST_COLS and rows > 0 and fits


def candidates(tokens: int, rows: int, cols: int, sms: int, kind: str = KIND) -> Iterator[Ring8Plan]:
    """Plans worth timing, the rule's first: the least that one block must read, then a ring that is not too short."""
    found = []
    for slices in SLICES:
        room = SHARED - shared_bytes(Ring8Plan(0, slices), tokens, cols)
        most = min(MOST_STAGES, room // (STAGE + 16))
        found += [Ring8Plan(n, slices, kind) for n in (most, most - 2) if n >= LEAST_STAGES]

    def rank(plan: Ring8Plan) -> tuple[int, bool, int, int]:
        turns = pieces(pieces(rows, 64), clusters(plan, sms))
        return turns * steps(plan, cols), plan.stages < 6, plan.slices, -plan.stages

    for plan in sorted(found, key=rank):
        if legal(plan, tokens, rows, cols):
            yield plan


def run(
    plan: Ring8Plan,
    maps: Maps,
    sms: int,
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with a matrix whose format `takes` accepts; the plan must be legal."""
    tokens, cols = x.shape
    gate, grouped, packed = GATES[act], format_of(w.format).group > 0, packed_of(w)
    height, outputs = (32, w.rows // 2) if gate else (64, w.rows)
    codes, token_scales = quantize(x, norm)
    out = x.new_empty(tokens, outputs)
    kernel = nvrtc.load("ring8.cu", "ring8", defines(plan, x.dtype, tokens, gate, grouped))
    w_map, x_map = maps.of(packed.codes, height), nvrtc.TensorMap(codes, width(tokens))
    arguments: list[nvrtc.Argument] = [w_map, x_map, packed.scales, token_scales, out, bias, residual]
    blocks = min(pieces(outputs, height), clusters(plan, sms)) * plan.slices
    kernel(
        (blocks, 1, 1),
        160,
        shared_bytes(plan, tokens, cols),
        [*arguments, tokens, w.rows, cols],
        dependent=True,
        cluster=plan.slices,
    )
    return out


def defines(plan: Ring8Plan, dtype: torch.dtype, tokens: int, gate: int, grouped: bool) -> tuple[tuple[str, int], ...]:
    """Macros of csrc/ring8.cu."""
    return (
        ("BITS", 8 if plan.kind == KIND else 16),
        ("HALF", nvrtc.HALF[dtype]),
        ("GATE", gate),
        ("N", width(tokens)),
        ("STAGES", plan.stages),
        ("SLICES", plan.slices),
        ("GROUPED", int(grouped)),
    )
