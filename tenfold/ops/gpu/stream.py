"""Linear operations of a few tokens at the speed of reading the weights: csrc/stream.cu and csrc/wide.cu.

`stream` holds all of x in shared memory (up to 16 tokens), `wide` a slice of its columns (up to 64). Both take weights
as Hugging Face stores them, [rows, cols] bfloat16 or float16, read each once, and fuse the RMS norm before, and bias,
gate and residual after. Results repeat bit for bit. With a norm, x * weight is rounded and the sum scaled by the
inverse root mean square, where the oracle rounds the product of all three; both round once (`stream` in float16 does
as the oracle, and `wide` refuses, for x * weight might overflow).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.gpu import nvrtc
from tenfold.ops.kernels import Norm

MOST_TOKENS = {"stream": 16, "wide": 64}
SHARED = 227 << 10  # bytes of shared memory a block may use on Hopper
SHARED_SM = 228 << 10  # of a multiprocessor; a block also costs 1 KiB
WORKSPACE = 64 << 20  # bytes for partial sums
MOST_TILES = 1 << 16
GATES = {None: 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """How one linear operation runs. kind: "stream", "wide", or "stream4" and "stream8" (see `stream_packed`);
    warps of a block; chunks: pieces of 32 columns (128 of packed weights) under way; blocks of a multiprocessor;
    height: 16-row pieces of a tile; slices of the columns (both 1 but with wide).
    """

    kind: str
    warps: int
    chunks: int
    blocks: int
    height: int = 1
    slices: int = 1

    def __str__(self) -> str:
        name = f"{self.kind}:{self.warps}x{self.chunks}x{self.blocks}"
        return f"{name}x{self.height}:s{self.slices}" if self.kind == "wide" else name


def parse(name: str) -> StreamPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"stream:(\d+)x(\d+)x(\d+)|wide:(\d+)x(\d+)x(\d+)x(\d+):s(\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is no streaming plan; allowed: stream:WxCxB or wide:WxCxBxH:sS.")
    return StreamPlan(name.partition(":")[0], *(int(n) for n in found.groups() if n))


def token_tiles(tokens: int) -> int:
    """Tiles of 8 tokens the kernel is compiled for: 1, 2, 4 or 8."""
    return 1 << max(0, (tokens - 1) // 8).bit_length()


def shared_bytes(plan: StreamPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    pieces = -(-(cols // 32) // plan.slices)
    x = tokens * (pieces | 1) * 64
    nt = token_tiles(tokens)
    return x + (0 if plan.kind == "wide" else 2 * plan.warps * nt * 512 + nt * 32)


def workspace_bytes(plan: StreamPlan, tokens: int, rows: int) -> int:
    """Global memory for partial sums; 0 where the columns are not sliced."""
    nt = token_tiles(tokens)
    if plan.kind == "stream":
        return 0
    tiles = -(-rows // (16 * plan.height))
    partial = tiles * plan.slices * plan.height * nt * 512 if plan.slices > 1 else 0
    return partial + plan.slices * nt * 32 + 256


def legal(plan: StreamPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes (`wide` with a norm only in bfloat16)."""
    if not 1 <= tokens <= MOST_TOKENS[plan.kind] or cols % 32 or cols // 32 < plan.slices:
        return False
    shared = shared_bytes(plan, tokens, cols)
    if shared > SHARED or (shared + 1024) * plan.blocks > SHARED_SM:
        return False
    return workspace_bytes(plan, tokens, rows) <= WORKSPACE and -(-rows // 16) <= MOST_TILES


def candidates(tokens: int, rows: int, cols: int) -> Iterator[StreamPlan]:
    """Plans worth timing."""
    nt = token_tiles(tokens)
    plans = [StreamPlan("stream", *sizes) for sizes in ((16, 4, 1), (8, 4, 2), (8, 4, 1), (16, 2, 1))]
    heights = (1,) if nt < 2 else (1, 2) if nt < 8 else (2, 1)
    for slices in (1, 2, 3, 4, 6, 8):
        for height in heights:
            plans += [StreamPlan("wide", 8, 4 if height == 1 else 2, 1, height, slices)]
            if nt <= 2 and height == 1:
                plans += [StreamPlan("wide", 16, 2, 1, 1, slices), StreamPlan("wide", 8, 4, 2, 1, slices)]
    for plan in plans:
        if legal(plan, tokens, rows, cols):
            yield plan


def rule(tokens: int, rows: int, cols: int, sms: int) -> StreamPlan | None:
    """The plan where nothing was measured (H100, 2026-11-28): all of x in shared memory for up to 8 tokens, else the
    fewest slices that keep every warp busy. None: no plan is legal or worth it.
    """
    plan = StreamPlan("stream", 16, 4, 1)
    if tokens <= 8 and legal(plan, tokens, rows, cols):
        return plan
    height = 2 if tokens > 16 else 1
    warps = 8 * sms
    for slices in (1, 2, 3, 4, 6, 8):
        plan = StreamPlan("wide", 8, 4 if height == 1 else 2, 1, height, slices)
        busy = -(-rows // (16 * height)) * slices >= 0.9 * warps
        if (busy or slices == 8) and legal(plan, tokens, rows, cols):
            return plan
    return None


class Workspace:
    """Memory for partial sums and arrival counters of one stream of launches, kept at one place for graphs."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.empty(WORKSPACE // 4, dtype=torch.float32, device=device)
        self.counters = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def run(
    plan: StreamPlan,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols]; the plan must be legal."""
    tokens, cols = x.shape
    rows = w.shape[0]
    gate = GATES[act]
    out = x.new_empty(tokens, rows // 2 if gate else rows)
    defines = [
        ("HALF", nvrtc.HALF[x.dtype]),
        ("NT", token_tiles(tokens)),
        ("WARPS", plan.warps),
        ("CHUNKS", plan.chunks),
        ("BLOCKS", plan.blocks),
        ("NORM", int(norm is not None)),
        ("GATE", gate),
    ]
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    shared = shared_bytes(plan, tokens, cols)
    tiles = -(-(rows // 2) // 8) if gate else -(-rows // 16)
    slots = sms * plan.blocks
    if plan.kind == "stream":
        kernel = nvrtc.load("stream.cu", "stream", (*defines, ("BITS", 16)))
        arguments = [x, w, None, None, out, bias, residual, weight, eps, tokens, rows, cols]
        blocks = min(tiles, slots)
    else:
        kernel = nvrtc.load("wide.cu", "wide", (*defines, ("ROWS", plan.height)))
        arguments = [x, w, out, bias, residual, weight, workspace.sums, workspace.counters]
        arguments += [eps, tokens, rows, cols, plan.slices]
        groups = min(slots // plan.slices, -(-tiles // (plan.height * plan.warps)))
        blocks = groups * plan.slices
    kernel((blocks, 1, 1), plan.warps * 32, shared, arguments, dependent=True)
    return out
