"""A matrix-vector product on the CUDA cores in Triton for 1 to 4 tokens: the paper's ImplA (FlashDecoding++, 2.3).

A program owns a few rows of the weight; every lane multiplies and adds its columns in float32, and lanes are added up
at the end. Fusions and roundings are those of `flat`, and x * norm weight is not rounded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tenfold.ops.elementwise import refuse_strided
from tenfold.ops.gemm.flat import activate, bring, own_rows
from tenfold.ops.gpu.hopper import SHARED
from tenfold.ops.gpu.nvrtc import GATES
from tenfold.ops.kernels import Norm

MOST_TOKENS = 4
TILES = ((8, 512, 1), (4, 1024, 1), (16, 256, 1), (4, 512, 1), (8, 512, 3), (4, 1024, 3), (4, 512, 4))


@dataclass(frozen=True, slots=True)
class GemvPlan:
    """Rows of a program, columns it takes at once, and tiles of both under way: 1, in registers; more, in shared
    memory. early: begins before the kernel before it has ended.
    """

    rows: int
    cols: int
    stages: int = 1
    early: bool = False

    def __str__(self) -> str:
        return f"gemv:{self.rows}x{self.cols}" + f"x{self.stages}" * (self.stages > 1) + ":early" * self.early


def parse(name: str) -> GemvPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"gemv:(\d+)x(\d+)(?:x(\d+))?(:early)?", name)
    if not found:
        raise ValueError(
            f"{name!r} is no plan of a matrix-vector product; allowed: gemv:ROWSxCOLS, then xSTAGES, then :early."
        )
    rows, cols, stages, early = found.groups()
    return GemvPlan(int(rows), int(cols), int(stages or 1), early is not None)


def legal(plan: GemvPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    return 1 <= tokens <= MOST_TOKENS and cols % 16 == 0 and plan.stages * plan.rows * plan.cols * 2 <= SHARED


def candidates(tokens: int, rows: int, cols: int) -> Iterator[GemvPlan]:
    for sizes in TILES:
        plan = GemvPlan(*sizes)
        if legal(plan, tokens, rows, cols):
            yield plan


def run(
    plan: GemvPlan,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols]; the plan must be legal. Raises ValueError for what is not
    contiguous.
    """
    refuse_strided(x, w, residual)
    tokens, cols = x.shape
    gate = GATES[act]
    out = x.new_empty(tokens, w.shape[0] // 2 if gate else w.shape[0])
    early = plan.early and not triton.knobs.runtime.interpret
    gemv_kernel[(triton.cdiv(out.shape[1], plan.rows // 2 if gate else plan.rows),)](
        *(x, w, out, bias, residual, None if norm is None else norm.weight, 0.0 if norm is None else norm.eps),
        *(out.shape[1], cols),
        **{"T": tokens, "BN": plan.rows, "BK": plan.cols, "STAGES": plan.stages, "EVEN": cols % plan.cols == 0},
        **{"GATE": gate, "EARLY": early},
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
    return out


@triton.jit
def dot_token(weights, x, norm, at, gain, inside, acc, squares):
    """One token's columns [BK] times the weights [BN, BK], added to acc [BN, BK]; its squares to squares [BK]."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        squares += value * value
        value *= gain
    return acc + weights * value[None, :], squares


@triton.jit
def finish_token(
    acc, squares, out, bias, residual, norm, eps, tile, row, token, size, cols, BN: tl.constexpr, GATE: tl.constexpr
):
    y = tl.sum(acc, 1)
    if norm is not None:
        y = y * (1.0 / tl.sqrt(tl.sum(squares, 0) / cols + eps))
    if bias is not None:
        y += tl.load(bias + row)
    if GATE:
        H: tl.constexpr = BN // 2
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, H)), (1, 0)))
        y = activate(gate, GATE) * up
        feature = tile * H + tl.arange(0, H)
    else:
        feature = tile * BN + tl.arange(0, BN)
    at = token * size + feature
    if residual is not None:
        y += tl.load(residual + at, mask=feature < size, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=feature < size)


@triton.jit
def gemv_kernel(
    x,
    w,
    out,
    bias,
    residual,
    norm,
    eps,
    size,
    cols,
    T: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    GATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (size / rows of a program)."""
    tile = tl.program_id(0)
    row = own_rows(tile, size, BN, GATE)
    column = tl.arange(0, BK)
    begins = w + row.to(tl.int64) * cols
    source = begins[:, None] + column[None, :]
    if EARLY:  # nothing but weights is read before what ran before has ended, and nothing is written
        gdc_launch_dependents()
        bring(begins, 0, cols, BK, 2 if STAGES == 1 else STAGES)
        gdc_wait()
    acc0 = tl.zeros([BN, BK], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    squares0 = tl.zeros([BK], tl.float32)
    squares1, squares2, squares3 = squares0, squares0, squares0
    for k in tl.range(0, cols, BK, num_stages=STAGES):
        at = k + column
        inside = at < cols
        if EVEN:
            weights = tl.load(source + k, eviction_policy="evict_first").to(tl.float32)
        else:
            weights = tl.load(source + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        gain = squares0
        if norm is not None:
            gain = tl.load(norm + at, mask=inside, other=0.0)
        acc0, squares0 = dot_token(weights, x, norm, at, gain, inside, acc0, squares0)
        if T > 1:
            acc1, squares1 = dot_token(weights, x, norm, at + cols, gain, inside, acc1, squares1)
        if T > 2:
            acc2, squares2 = dot_token(weights, x, norm, at + 2 * cols, gain, inside, acc2, squares2)
        if T > 3:
            acc3, squares3 = dot_token(weights, x, norm, at + 3 * cols, gain, inside, acc3, squares3)
    finish_token(acc0, squares0, out, bias, residual, norm, eps, tile, row, 0, size, cols, BN, GATE)
    if T > 1:
        finish_token(acc1, squares1, out, bias, residual, norm, eps, tile, row, 1, size, cols, BN, GATE)
    if T > 2:
        finish_token(acc2, squares2, out, bias, residual, norm, eps, tile, row, 2, size, cols, BN, GATE)
    if T > 3:
        finish_token(acc3, squares3, out, bias, residual, norm, eps, tile, row, 3, size, cols, BN, GATE)
