"""Linear operations of a few tokens at the speed of reading the weights: csrc/stream.cu.

All of x, up to 16 tokens, lies in shared memory; where weights are few, as of routers, more tokens are cut into pieces
of 16 that read them each. Weights are taken as Hugging Face stores them, [rows, cols] bfloat16 or float16, and read
once; the RMS norm before, and bias, gate and residual after are fused. Results repeat bit for bit.
With a norm in bfloat16, x * weight is rounded and the sum scaled by the inverse root mean square, where the oracle
rounds the product of all three; both round once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.gpu import hopper, nvrtc
from tenfold.ops.kernels import Norm

MOST_TOKENS = 16  # of a block
MOST_IN_PIECES, FEW_WEIGHTS = 64, 1 << 20  # tokens of all, where weights are no more


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """How a linear operation runs. kind: "stream", or one of `stream_packed`; warps of a block;
    chunks: pieces of 32 columns (128 of packed weights) under way; blocks of a multiprocessor.
    """

    kind: str
    warps: int
    chunks: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.warps}x{self.chunks}x{self.blocks}"


def parse(name: str) -> StreamPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"stream:(\d+)x(\d+)x(\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is no streaming plan; allowed: stream:WxCxB.")
    return StreamPlan("stream", *map(int, found.groups()))


def token_tiles(tokens: int) -> int:
    """Tiles of 8 tokens the kernel is compiled for: 1 or 2."""
    return -(-min(tokens, MOST_TOKENS) // 8)


def shared_bytes(plan: StreamPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    nt = token_tiles(tokens)
    return min(tokens, MOST_TOKENS) * (cols // 32 | 1) * 64 + (2 * 640 + 32) * plan.warps * nt + nt * 32


def legal(plan: StreamPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    if not 1 <= tokens <= (MOST_IN_PIECES if rows * cols <= FEW_WEIGHTS else MOST_TOKENS) or cols % 32:
        return False
    return hopper.fits(shared_bytes(plan, tokens, cols), plan.blocks)


def candidates(tokens: int, rows: int, cols: int) -> Iterator[StreamPlan]:
    """Plans worth timing, the rule's first (H100, 2026-11-28)."""
    for sizes in ((16, 4, 1), (8, 4, 2), (8, 4, 1), (16, 2, 1)):
        plan = StreamPlan("stream", *sizes)
        if legal(plan, tokens, rows, cols):
            yield plan


def run(
    plan: StreamPlan,
    sms: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    float32: bool = False,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols]; the plan must be legal. float32: the result's type."""
    tokens, cols = x.shape
    rows = w.shape[0]
    gate = nvrtc.GATES[act]
    out = x.new_empty(tokens, rows // 2 if gate else rows, dtype=torch.float32 if float32 else x.dtype)
    kernel = nvrtc.load(
        "stream.cu",
        "stream",
        (
            ("BITS", 16),
            ("HALF", nvrtc.HALF[x.dtype]),
            ("FLOAT32", int(float32)),
            ("NT", token_tiles(tokens)),
            ("WARPS", plan.warps),
            ("CHUNKS", plan.chunks),
            ("BLOCKS", plan.blocks),
            ("NORM", int(norm is not None)),
            ("GATE", gate),
        ),
    )
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    tiles = -(-(rows // 2) // 8) if gate else -(-rows // 16)
    kernel(
        (min(tiles, sms * plan.blocks), -(-tokens // MOST_TOKENS), 1),
        plan.warps * 32,
        shared_bytes(plan, tokens, cols),
        [x, w, None, None, out, bias, residual, weight, eps, tokens, rows, cols],
        dependent=True,
    )
    return out
