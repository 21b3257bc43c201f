"""Linear operations of a few tokens on 4-bit weights, at the speed of reading the codes: csrc/stream.cu with BITS 4.

Takes int4 formats of ops/formats.py whose groups are multiples of 128 columns, or whole rows, without a column order.
Codes become exact whole numbers in registers, a group's sum is scaled in float32: no weight is rounded. Fuses what
`stream` fuses.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold.ops.formats import Format, format_of, is_format, packed_of
from tenfold.ops.gpu import nvrtc
from tenfold.ops.gpu.stream import GATES, SHARED, SHARED_SM, StreamPlan, shared_bytes, token_tiles
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

KIND = "stream4"
CHUNK = 128  # columns
MOST_TOKENS = 16
WHOLE_ROW = 1 << 30  # GROUP where a row has one scale
SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def parse(name: str) -> StreamPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    kind, _, sizes = name.partition(":")
    numbers = sizes.split("x")
    if kind != KIND or len(numbers) != 3 or not all(n.isdigit() for n in numbers):
        raise ValueError(f"{name!r} is no plan for 4-bit weights; allowed: {KIND}:WxCxB.")
    return StreamPlan(KIND, *map(int, numbers))


def takes(format: str) -> bool:
    """Whether matrices of this format can be read."""
    if not is_format(format):
        return False
    kind = format_of(format)
    return kind.kind == "int4" and not kind.order and kind.group % CHUNK == 0


def legal(plan: StreamPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    shared = shared_bytes(plan, tokens, cols)
    fits = shared <= SHARED and (shared + 1024) * plan.blocks <= SHARED_SM
    return 1 <= tokens <= MOST_TOKENS and cols % CHUNK == 0 and fits


def candidates(tokens: int, rows: int, cols: int) -> Iterator[StreamPlan]:
    """Plans worth timing, the rule's first (H100, 2026-11-28): one whose steps take all columns evenly, if there is."""
    first = (8, 4, 2) if cols % (8 * 4 * CHUNK) == 0 else (16, 1, 2)
    others = ((16, 2, 1), (8, 4, 1), (8, 2, 2), (8, 4, 2), (8, 2, 3), (16, 1, 2), (4, 4, 3))
    for sizes in dict.fromkeys((first, *others)):
        plan = StreamPlan(KIND, *sizes)
        if legal(plan, tokens, rows, cols):
            yield plan


def run(
    plan: StreamPlan,
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
    gate = GATES[act]
    format, packed = format_of(w.format), packed_of(w)
    out = x.new_empty(tokens, w.rows // 2 if gate else w.rows)
    kernel = nvrtc.load("stream.cu", "stream", defines(plan, format, packed.scales.dtype, x, norm is not None, gate))
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    tiles = -(-(w.rows // 2) // 8) if gate else -(-w.rows // 16)
    kernel(
        (min(tiles, sms * plan.blocks), 1, 1),
        plan.warps * 32,
        shared_bytes(plan, tokens, cols),
        [x, packed.codes, packed.scales, packed.zeros, out, bias, residual, weight, eps, tokens, w.rows, cols],
        dependent=True,
    )
    return out


def defines(
    plan: StreamPlan, format: Format, scales: torch.dtype, x: Tensor, norm: bool, gate: int
) -> tuple[tuple[str, int], ...]:
    """Macros of the kernel."""
    return (
        ("BITS", 4),
        ("GROUP", format.group or WHOLE_ROW),
        ("SCALES", SCALES[scales]),
        ("ZEROS", int(format.zero)),
        ("HALF", nvrtc.HALF[x.dtype]),
        ("NT", token_tiles(len(x))),
        ("WARPS", plan.warps),
        ("CHUNKS", plan.chunks),
        ("BLOCKS", plan.blocks),
        ("NORM", int(norm)),
        ("GATE", gate),
    )
