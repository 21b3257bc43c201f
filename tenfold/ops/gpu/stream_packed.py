"""Linear operations of a few tokens on packed weights, at the speed of reading the codes: csrc/stream.cu.

Takes the formats of ops/formats.py whose groups are multiples of 128 columns, or whole rows, without a column order.
Codes become exact numbers in registers, a group's sum is scaled in float32: no weight is rounded, and activations keep
their 16 bits. Fuses what `stream` fuses.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tenfold.ops.formats import Format, format_of, is_format, packed_of
from tenfold.ops.gpu import hopper, nvrtc
from tenfold.ops.gpu.stream import StreamPlan, token_tiles
from tenfold.ops.gpu.stream import shared_bytes as dense_bytes
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

# What each kind of plan reads.
CODES = {"stream4": ("int4",), "stream8": ("int8", "fp8"), "stream3": ("int3",), "stream2": ("int2",)}
BITS = {"stream4": 4, "stream8": 8, "stream3": 3, "stream2": 2}
GROUPED = ("int2", "int3")  # codes that are read with groups only
CHUNK = 128  # columns
MOST_TOKENS = 16
WHOLE_ROW = 1 << 30  # GROUP where a row has one scale
SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Warps, chunks, blocks. 4 bits: H100, 2026-11-28.
SIZES = {
    "stream4": ((8, 4, 2), (16, 1, 2), (8, 4, 1), (8, 2, 2), (8, 2, 3), (4, 4, 3)),
    "stream8": ((8, 4, 1), (16, 1, 2), (8, 2, 2), (16, 1, 1), (4, 4, 2)),
    "stream3": ((8, 4, 2), (16, 1, 2), (8, 4, 1), (8, 2, 3), (16, 2, 1), (4, 4, 3)),
    "stream2": ((8, 4, 2), (16, 1, 2), (8, 4, 1), (8, 2, 3), (16, 2, 1), (4, 4, 3)),
}
MANY = (16, 2, 1)  # the same for more than FEW tokens (H100, 2026-11-28)
FEW = 2


def parse(name: str) -> StreamPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(rf"({'|'.join(CODES)}):(\d+)x(\d+)x(\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is no plan that streams codes; allowed: {':WxCxB, '.join(CODES)}:WxCxB.")
    kind, *sizes = found.groups()
    return StreamPlan(kind, *map(int, sizes))


def kind_of(format: str, kinds: Mapping[str, tuple[str, ...]] = CODES) -> str:
    """The kind of plan, of kinds and the codes they read, for matrices of this format; empty where none does."""
    if not is_format(format):
        return ""
    found = format_of(format)
    if found.order or found.group % CHUNK or (found.kind in GROUPED and not found.group):
        return ""
    return next((kind for kind, codes in kinds.items() if found.kind in codes), "")


def sums_bytes(bits: int, tokens: int, cols: int) -> int:
    """Shared memory of the sums of tokens' columns that codes of up to 4 bits need, at most."""
    return 0 if bits > 4 else cols // CHUNK * token_tiles(tokens) * 64


def shared_bytes(plan: StreamPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    return dense_bytes(plan, tokens, cols) + sums_bytes(BITS[plan.kind], tokens, cols)


def legal(plan: StreamPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    fits = hopper.fits(shared_bytes(plan, tokens, cols), plan.blocks)
    return 1 <= tokens <= MOST_TOKENS and cols % CHUNK == 0 and fits


def candidates(kind: str, tokens: int, rows: int, cols: int) -> Iterator[StreamPlan]:
    """Plans worth timing, the rule's first: one whose steps take all columns evenly, if there is."""
    first, second, *others = SIZES[kind]
    if cols % (first[0] * first[1] * CHUNK):
        first, second = second, first
    sizes = [MANY, first, second, *others] if tokens > FEW else [first, second, MANY, *others]
    plans = [StreamPlan(kind, *one) for one in dict.fromkeys(sizes)]
    for plan in plans:
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
    float32: bool = False,
) -> Tensor:
    """As `Kernels.linear` with a matrix whose format the plan's kind reads; the plan must be legal. float32: the
    result's type.
    """
    tokens, cols = x.shape
    gate = nvrtc.GATES[act]
    format, packed = format_of(w.format), packed_of(w)
    out = x.new_empty(tokens, w.rows // 2 if gate else w.rows, dtype=torch.float32 if float32 else x.dtype)
    macros = defines(plan, format, packed.scales.dtype, x, norm is not None, gate)
    kernel = nvrtc.load("stream.cu", "stream", (*macros, ("FLOAT32", int(float32))))
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
        *format_macros(format, scales),
        ("HALF", nvrtc.HALF[x.dtype]),
        ("NT", token_tiles(len(x))),
        ("WARPS", plan.warps),
        ("CHUNKS", plan.chunks),
        ("BLOCKS", plan.blocks),
        ("NORM", int(norm)),
        ("GATE", gate),
    )


def format_macros(format: Format, scales: torch.dtype) -> tuple[tuple[str, int], ...]:
    """What kernels are told of packed weights; scales: their type."""
    return (
        ("BITS", format.bits),
        ("E4M3", int(format.kind == "fp8")),
        ("GROUP", format.group or WHOLE_ROW),
        ("SCALES", SCALES[scales]),
        ("ZEROS", int(format.zero)),
    )
