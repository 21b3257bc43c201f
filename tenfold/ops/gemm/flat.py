"""The flat GEMM of FlashDecoding++ (2.2) in Triton: few tokens, weights on the wide side of the matrix instruction.

    acc[BN, BM] += W[BN, BK] @ x[BM, BK]^T      BM >= tokens, so no weight is read twice

A program owns BN rows of the weight and walks over its share of the columns with `stages` tiles under way: 1 is no
buffering, 2 is the paper's double buffering. Where rows alone do not fill the GPU the columns are split (the paper does
not), and the program that comes last adds up the parts in the order of the columns, so results repeat bit for bit; or
a second launch does. A plan may begin early: it asks the L2 cache for its first tiles while the kernel before it ends.

Norm, bias, gate and residual are fused and computed in float32. The norm's weight is multiplied into x, rounded, and
its root mean square divides the sum; the result is rounded once, where the oracle rounds after each of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tenfold.ops.elementwise import refuse_strided
from tenfold.ops.gpu.hopper import RESERVED, SHARED, SHARED_SM
from tenfold.ops.gpu.nvrtc import GATES
from tenfold.ops.gpu.sums import MOST_TILES, WORKSPACE, Workspace
from tenfold.ops.kernels import Norm

MOST_TOKENS = 64
TILES = ((64, 128, 4), (64, 64, 6), (128, 64, 4), (32, 128, 4), (128, 128, 3))
SPLITS = (1, 2, 3, 4, 6, 8)
ABLATION = (1, 2, 3, 4, 6)  # stages
LEAST_UNDER_WAY = 18 << 10


@dataclass(frozen=True, slots=True)
class FlatPlan:
    """Rows and columns of a weight tile, tiles under way, shares of the columns. apart: a second launch adds the shares
    up; early: begins before the kernel before it has ended.
    """

    rows: int
    cols: int
    stages: int
    splits: int = 1
    apart: bool = False
    early: bool = False

    def __str__(self) -> str:
        name = f"flat:{self.rows}x{self.cols}x{self.stages}:s{self.splits}"
        return name + ":apart" * self.apart + ":early" * self.early


def parse(name: str) -> FlatPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"flat:(\d+)x(\d+)x(\d+):s(\d+)(:apart)?(:early)?", name)
    if not found:
        raise ValueError(
            f"{name!r} is no plan of a flat product; allowed: flat:ROWSxCOLSxSTAGES:sSPLITS, then :apart, then :early."
        )
    height, depth, stages, splits, apart, early = found.groups()
    return FlatPlan(int(height), int(depth), int(stages), int(splits), apart is not None, early is not None)


def width(tokens: int) -> int:
    """Tokens of a tile: 16, 32 or 64."""
    return max(16, triton.next_power_of_2(tokens))


def shared_bytes(plan: FlatPlan, tokens: int) -> int:
    """Shared memory of the tiles of a program, about."""
    return plan.stages * (plan.rows + width(tokens)) * plan.cols * 2


def legal(plan: FlatPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes; rows: of the weight."""
    if not 1 <= tokens <= MOST_TOKENS or cols % 16 or plan.splits > triton.cdiv(cols, plan.cols):
        return False
    tiles = triton.cdiv(rows, plan.rows)
    if shared_bytes(plan, tokens) > SHARED or tiles > MOST_TILES:
        return False
    return plan.splits == 1 or tiles * plan.splits * (plan.rows + 1) * width(tokens) * 4 <= WORKSPACE


def candidates(tokens: int, rows: int, cols: int, sms: int) -> Iterator[FlatPlan]:
    """Plans worth timing: those that fill between half of the GPU and four times the GPU."""
    for height, depth, stages in TILES:
        tiles = triton.cdiv(rows, height)
        for splits in SPLITS:
            plan = FlatPlan(height, depth, stages, splits)
            fills = sms <= 2 * tiles * splits and (splits == 1 or tiles * splits <= 4 * sms)
            if (fills or splits == 1) and legal(plan, tokens, rows, cols):
                yield plan


def plan(tokens: int, rows: int, cols: int, sms: int) -> FlatPlan | None:
    """The plan where nothing was measured: among those with one and a half programs or more for each multiprocessor and
    18 KiB of weights under way there (3.35 TB/s times 0.7 us, divided by 132), the one whose busiest multiprocessor
    moves the fewest bytes. None: no plan is legal.
    """
    every = list(candidates(tokens, rows, cols, sms))
    filling = [one for one in every if triton.cdiv(rows, one.rows) * one.splits >= 1.5 * sms]
    flying = [one for one in filling or every if under_way(one, tokens) >= LEAST_UNDER_WAY]
    return min(flying or every, key=lambda one: busiest(one, tokens, rows, cols, sms), default=None)


def under_way(plan: FlatPlan, tokens: int) -> int:
    """Bytes of weights that loads of one multiprocessor wait for."""
    programs = max(1, SHARED_SM // (shared_bytes(plan, tokens) + RESERVED))
    return programs * max(1, plan.stages - 1) * plan.rows * plan.cols * 2


def busiest(plan: FlatPlan, tokens: int, rows: int, cols: int, sms: int) -> int:
    """Bytes that the multiprocessor with the most programs moves, or could in the time it waits for a program's first.
    x comes from the L2 cache, at about twice the rate; whoever adds up the shares reads all of a tile's.
    """
    share = triton.cdiv(triton.cdiv(cols, plan.cols), plan.splits) * plan.cols
    part = plan.rows * width(tokens) * 4 if plan.splits > 1 else 0
    programs = triton.cdiv(triton.cdiv(rows, plan.rows) * plan.splits, sms)
    return programs * (2 * plan.rows * share + width(tokens) * share + part + LEAST_UNDER_WAY) + plan.splits * part


def ablation(plan: FlatPlan, tokens: int, rows: int, cols: int) -> Iterator[FlatPlan]:
    """The same tiles with no buffering, double buffering and more; then with sums in a launch of their own, and begun
    early.
    """
    others = [replace(plan, stages=stages) for stages in ABLATION]
    others += [replace(plan, apart=True)] if plan.splits > 1 else []
    for other in (*others, replace(plan, early=True)):
        if legal(other, tokens, rows, cols):
            yield other


def run(
    plan: FlatPlan,
    workspace: Workspace,
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
    rows = w.shape[0]
    gate = GATES[act]
    out = x.new_empty(tokens, rows // 2 if gate else rows)
    tile = plan.rows // 2 if gate else plan.rows
    tiles = triton.cdiv(out.shape[1], tile)
    ends = (out, bias, residual, None if norm is None else norm.weight, workspace.sums)
    sizes = (0.0 if norm is None else norm.eps, tokens, out.shape[1], cols, plan.splits)
    early = plan.early and not triton.knobs.runtime.interpret
    shape: dict[str, Any] = {"BN": plan.rows, "BM": width(tokens), "GATE": gate, "EARLY": early}
    options = {"num_warps": 4 if plan.rows <= 64 else 8, **({"launch_pdl": True} if early else {})}
    flat_kernel[(tiles, plan.splits)](
        *(x, w, *ends, workspace.counters, *sizes),
        **{"BK": plan.cols, "STAGES": plan.stages, "MERGE": merge(plan), "EVEN": cols % plan.cols == 0, **shape},
        num_stages=plan.stages,
        **options,
    )
    if merge(plan) == APART:
        merge_kernel[(tiles,)](*ends, *sizes, **shape, **options)
    return out


LAST, APART = 1, 2  # who adds up the shares of the columns: the program that comes last, or a second launch


def merge(plan: FlatPlan) -> int:
    if plan.splits == 1:
        return 0
    return APART if plan.apart else LAST


@triton.jit
def own_rows(tile, size, BN: tl.constexpr, GATE: tl.constexpr):
    """Rows of the weight [BN] that make `tile` of a result of `size` features; with a gate, rows of up after rows of
    gate. Rows past the end repeat the last.
    """
    i = tl.arange(0, BN)
    if GATE:
        HALF: tl.constexpr = BN // 2
        feature = tl.minimum(tile * HALF + i % HALF, size - 1)
        return tl.where(i < HALF, feature, size + feature)
    return tl.minimum(tile * BN + i, size - 1)


@triton.jit
def activate(gate, GATE: tl.constexpr):
    inner = gate
    if GATE == 2:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(tl.minimum(-inner, 88.0)))


@triton.jit
def finish(
    acc, squares, out, bias, residual, norm, eps, tile, row, tokens, size, cols,
    BN: tl.constexpr, BM: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Norm, bias, gate and residual of acc [BN, BM], and the result written."""
    token = tl.arange(0, BM)
    if norm is not None:
        acc = acc * (1.0 / tl.sqrt(squares / cols + eps))[None, :]
    if bias is not None:
        acc += tl.load(bias + row)[:, None]
    if GATE:
        H: tl.constexpr = BN // 2
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, H, BM)), (1, 2, 0)))
        acc = activate(gate, GATE) * up
        feature = tile * H + tl.arange(0, H)
    else:
        feature = tile * BN + tl.arange(0, BN)
    at = token.to(tl.int64)[None, :] * size + feature[:, None]
    exists = (feature < size)[:, None] & (token < tokens)[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=exists)


@triton.jit
def bring(weights, first, last, BK: tl.constexpr, STAGES: tl.constexpr):
    """Ask the L2 cache for the first STAGES tiles of rows that begin at `weights` [BN], 128 bytes an element."""
    LINE: tl.constexpr = 64 if BK >= 64 else BK
    line = tl.arange(0, BK // LINE) * LINE
    for i in tl.static_range(STAGES):
        column = tl.minimum(first + i * BK + line, last - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [weights[:, None] + column[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def add_up(sums, tile, splits, BN: tl.constexpr, BM: tl.constexpr):
    """The shares of a tile, in the order of the columns: acc [BN, BM] and squares [BM]."""
    PART: tl.constexpr = (BN + 1) * BM
    parts = sums + tile.to(tl.int64) * splits * PART
    token = tl.arange(0, BM)
    inner = tl.arange(0, BN)[:, None] * BM + token[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for i in range(splits):
        acc += tl.load(parts + i * PART + inner, cache_modifier=".cg")
        squares += tl.load(parts + i * PART + BN * BM + token, cache_modifier=".cg")
    return acc, squares


@triton.jit(do_not_specialize=["tokens", "splits"])
def merge_kernel(
    out, bias, residual, norm, sums, eps, tokens, size, cols, splits,
    BN: tl.constexpr, BM: tl.constexpr, GATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (size / rows of a tile)."""
    tile = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = own_rows(tile, size, BN, GATE)
    acc, squares = add_up(sums, tile, splits, BN, BM)
    finish(acc, squares, out, bias, residual, norm, eps, tile, row, tokens, size, cols, BN, BM, GATE)


@triton.jit(do_not_specialize=["tokens", "splits"])
def flat_kernel(
    x,
    w,
    out,
    bias,
    residual,
    norm,
    sums,
    counters,
    eps,
    tokens,
    size,
    cols,
    splits,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    MERGE: tl.constexpr,
    EVEN: tl.constexpr,
    GATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (size / rows of a tile, splits). size: features of the result. See the module's head."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row = own_rows(tile, size, BN, GATE)
    token = tl.arange(0, BM)
    column = tl.arange(0, BK)
    begins = w + row.to(tl.int64) * cols
    weights = begins[:, None] + column[None, :]
    states = x + token[:, None] * cols + column[None, :]
    there = (token < tokens)[:, None]
    share = tl.cdiv(tl.cdiv(cols, BK), splits) * BK
    first = split * share
    last = tl.minimum(first + share, cols)
    if EARLY:  # nothing but weights is read before what ran before has ended, and nothing is written
        gdc_launch_dependents()
        bring(begins, first, last, BK, STAGES)
        gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for k in tl.range(first, last, BK, num_stages=STAGES):
        if EVEN:
            a = tl.load(weights + k)
            b = tl.load(states + k, mask=there, other=0.0)
        else:
            inside = (k + column < cols)[None, :]
            a = tl.load(weights + k, mask=inside, other=0.0)
            b = tl.load(states + k, mask=there & inside, other=0.0)
        if norm is not None:
            full = b.to(tl.float32)
            squares += tl.sum(full * full, 1)
            if EVEN:
                gain = tl.load(norm + k + column)
            else:
                gain = tl.load(norm + k + column, mask=k + column < cols, other=0.0)
            b = (full * gain[None, :]).to(b.dtype)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if MERGE == 0:
        finish(acc, squares, out, bias, residual, norm, eps, tile, row, tokens, size, cols, BN, BM, GATE)
    else:
        PART: tl.constexpr = (BN + 1) * BM
        inner = tl.arange(0, BN)[:, None] * BM + token[None, :]
        own = sums + (tile.to(tl.int64) * splits + split) * PART
        tl.store(own + inner, acc)
        tl.store(own + BN * BM + token, squares)
        if MERGE == 1:
            tl.debug_barrier()  # every thread's part is written before one thread says so
            if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:
                tl.debug_barrier()
                acc, squares = add_up(sums, tile, splits, BN, BM)
                finish(acc, squares, out, bias, residual, norm, eps, tile, row, tokens, size, cols, BN, BM, GATE)
                tl.store(counters + tile, 0)
