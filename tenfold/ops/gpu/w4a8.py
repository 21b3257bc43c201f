"""Linear operations of many tokens in float8 with weights of 4 bits, a scale a row, on Hopper: csrc/w4a8.cu.

Tokens are rounded to e4m3 with a scale each before, with the norm. Bias, gate and residual are fused. Weights stay 4
bits until they are in registers, so that prompts need no float8 copy of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.formats import format_of, is_format, packed_of
from tenfold.ops.gpu import hopper, nvrtc, quantize, stream_packed
from tenfold.ops.gpu.experts import store_bytes
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

WIDTHS = (64, 128, 192)
ROWS = 128
THREADS = 2 * ROWS + 128
STEP = 128  # columns of a stage
STEADY = 48  # tokens whose product takes about as long as what a tile costs beside products
LEAST = 65  # tokens from which on the rule takes it
MOST = 4096  # tokens up to which; for more a float8 copy of the weights is the smaller part of the product (H200)
MOST_STAGES = 8


@dataclass(frozen=True, slots=True)
class W4A8Plan:
    """width: tokens of a tile; stages of the ring."""

    width: int
    stages: int

    def __str__(self) -> str:
        return f"w4a8:{self.width}x{self.stages}"


def parse(name: str) -> W4A8Plan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"w4a8:(64|128|192)x(\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is no plan of w4a8; allowed: w4a8:WxS with a width of 64, 128 or 192.")
    return W4A8Plan(int(found[1]), int(found[2]))


def takes(format: str) -> bool:
    """Whether matrices of this format can be read."""
    if not is_format(format):
        return False
    found = format_of(format)
    return found.strict and not (found.group or found.order)


def shared_bytes(plan: W4A8Plan) -> int:
    """Dynamic shared memory of a block."""
    stage = plan.width * STEP + ROWS * STEP // 2
    return 1024 + plan.stages * (stage + 16) + ROWS // 64 * store_bytes(plan.width)


def legal(plan: W4A8Plan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    sizes = tokens > 0 and rows % 16 == 0 and cols % 32 == 0 and cols <= quantize.MOST_COLS
    return sizes and plan.stages >= 2 and hopper.fits(shared_bytes(plan), 1)


def deepest(width: int) -> W4A8Plan:
    """The plan with as many stages as fit."""
    plans = (W4A8Plan(width, stages) for stages in range(MOST_STAGES, 1, -1))
    return next(plan for plan in plans if hopper.fits(shared_bytes(plan), 1))


def candidates(tokens: int, rows: int, cols: int) -> Iterator[W4A8Plan]:
    """Plans worth timing."""
    for width in WIDTHS:
        plan = deepest(width)
        if legal(plan, tokens, rows, cols) and (width == WIDTHS[0] or width <= 2 * tokens):
            yield plan


def rule(tokens: int, rows: int, cols: int, sms: int) -> W4A8Plan | None:
    """The plan where nothing was measured: the fewest rounds of tiles. None: too few tokens, or so many that the
    library is faster.
    """
    if not LEAST <= tokens <= MOST:
        return None

    def cost(width: int) -> int:
        items = -(-rows // ROWS) * -(-tokens // width)
        return -(-items // sms) * (width + STEADY)

    return deepest(min(WIDTHS, key=cost))


def run(
    plan: W4A8Plan,
    sms: int,
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with a matrix whose format `takes` accepts; the plan must be legal."""
    gate, packed = nvrtc.GATES[act], packed_of(w)
    outputs = w.rows // 2 if gate else w.rows
    codes, scales = quantize.for_nibbles(x, norm)
    out = x.new_empty(len(x), outputs)
    macros = (
        *stream_packed.format_macros(format_of(w.format), packed.scales.dtype),
        ("HALF", nvrtc.HALF[x.dtype]),
        ("GATE", gate),
        ("N", plan.width),
        ("ROWS", ROWS),
        ("STAGES", plan.stages),
    )
    kernel = nvrtc.load("w4a8.cu", "w4a8", macros)
    x_map = nvrtc.tensor_map(codes, plan.width)
    w_map = nvrtc.tensor_map(packed.codes.view(torch.uint8), 32 if gate else 64, STEP // 2)
    arguments: list[nvrtc.Argument] = [x_map, w_map, scales, packed.scales, bias, residual, out]
    items = -(-w.rows // ROWS) * -(-len(x) // plan.width)
    arguments += [len(x), outputs, w.cols]
    kernel((min(items, sms), 1, 1), THREADS, shared_bytes(plan), arguments, dependent=True)
    return out
