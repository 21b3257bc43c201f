"""Attention of few new tokens a request over long paged contexts, split over the context ("split-KV").

A program takes one request, one KV head with all its query heads, and one split of the context. How many tokens a split
has follows on the device from the request's length, so one launch, and one captured graph, serves all lengths; splits
with nothing to do exit at once. A part whose unified maximum did not hold is computed again on the spot, by the program
that saw it; nothing waits for the host.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops.attention.merge import (
    MERGE_ELEMENTS,
    SLICED,
    VARYING,
    finish,
    merge_all,
    merge_kernel,
    merge_rows_at_once,
    share,
    span,
)
from tenfold.ops.attention.plan import DecodePlan, check_decode, padded, power_of_two
from tenfold.ops.attention.sweep import (
    AGAIN_STAGES,
    AGAIN_TILE,
    LAZY,
    LOG2E,
    PAPER,
    UNIFIED,
    failed,
    join_columns,
    sweep,
    sweep_row,
)
from tenfold.ops.attention.unified_max import guard
from tenfold.ops.kernels import SOFTMAX, AttentionSpec

TWO: tl.constexpr = tl.constexpr(0)
LAST: tl.constexpr = tl.constexpr(1)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICED)
def decode_kernel(
    q,
    keys,
    values,
    table,
    starts,
    lengths,
    phi,
    out,
    lse,
    sums,
    states,
    counters,
    recomputed,
    columns,
    kv_heads,
    scale,
    cap,
    window,
    least,
    most,
    low,
    high,
    D: tl.constexpr,
    DP: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MERGE: tl.constexpr,
    DOT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (splits, kv_heads, requests). See the module's head and `run`."""
    split, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    ROWS: tl.constexpr = QUERIES * GROUP
    heads = kv_heads * GROUP
    length = tl.load(lengths + request)
    start, count = span(starts, request)
    i = tl.arange(0, M)
    d = tl.arange(0, DP)
    token = start + i // GROUP
    head = kv_head * GROUP + i % GROUP
    is_row = (i < ROWS) & (i < count * GROUP)
    exists = is_row[:, None] & (d < D)[None, :]
    nothing = tl.zeros([M], tl.float32)
    if length <= 0:
        if split == 0:
            empty = tl.zeros([M, DP], tl.float32)
            finish(empty, nothing, nothing, nothing, out, lse, recomputed, token, head, is_row, heads, D, DP, LAZY)
        return
    first, last, active = share(length, count, split, splits, window, WINDOW, N, LEAST)
    if split >= active:
        return
    place = tl.where(is_row, length - count + i // GROUP, -1)
    base = keys.dtype.element_ty
    row_stride = heads * D
    queries = tl.load(
        q + token.to(tl.int64)[:, None] * row_stride + (head * D)[:, None] + d[None, :], mask=exists, other=0.0
    )
    queries = queries.to(base)
    top = nothing
    if SOFTMAX >= UNIFIED:
        top = tl.load(phi + head, mask=is_row, other=0.0) * LOG2E
    page_stride = kv_heads * PAGE * D
    skipped = kv_head.to(tl.int64) * PAGE * D
    context = keys + skipped, values + skipped, table + request.to(tl.int64) * columns, length, page_stride
    rules = scale, cap, window, low, high
    limits = least, most
    acc, m, den, again = part(
        *(queries, place, is_row, top, context, rules, limits, first, last, count),
        *(D, DP, M, N, PAGE, SOFTMAX, DOT, WINDOW, CAP, STAGES),
    )
    if active == 1:
        finish(acc, m, den, again, out, lse, recomputed, token, head, is_row, heads, D, DP, SOFTMAX)
        return
    pair = (request * kv_heads + kv_head).to(tl.int64)
    at = (pair * splits + split) * ROWS + i
    tl.store(sums + at[:, None] * D + d[None, :], acc, mask=exists)
    tl.store(states + at * 3, m, mask=is_row)
    tl.store(states + at * 3 + 1, den, mask=is_row)
    tl.store(states + at * 3 + 2, again, mask=is_row)
    if MERGE == LAST:
        tl.debug_barrier()  # all of the program's partial sums are written before it counts itself
        if tl.atomic_add(counters + pair, 1, sem="acq_rel") == active - 1:
            tl.store(counters + pair, 0)
            merge_all(
                *(sums + pair * splits * (ROWS * D), states + pair * splits * (ROWS * 3), active, 0),
                *(tl.minimum(ROWS, count * GROUP), out, lse, recomputed, start, kv_head, heads),
                *(D, DP, GROUP, ROWS, R, S, SOFTMAX),
            )


@triton.jit
def part(
    queries,
    place,
    is_row,
    top,
    context,
    rules,
    limits,
    first,
    last,
    count,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DOT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State of one split: acc [M, DP], m, den, recomputed [M]. A row that a unified maximum did not serve is computed
    again lazily.
    """
    acc, m, den, refused = walk(
        *(queries, place, top, context, rules, first, last, count),
        *(D, DP, M, N, PAGE, SOFTMAX, DOT, WINDOW, CAP, STAGES),
    )
    again = tl.zeros([M], tl.float32)
    if SOFTMAX == PAPER:
        den = tl.where(refused > 0, float("nan"), den)
    if SOFTMAX >= UNIFIED:
        acc, m, den, again = correct(
            *(acc, m, den, queries, place, is_row, context, rules, limits, first, last, count),
            *(D, DP, M, PAGE, DOT, WINDOW, CAP),
        )
    return acc, m, den, again


@triton.jit
def correct(
    acc,
    m,
    den,
    queries,
    place,
    is_row,
    context,
    rules,
    limits,
    first,
    last,
    count,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    PAGE: tl.constexpr,
    DOT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    """The state with the rows that failed computed again from first to last, and which these were [M]."""
    least, most = limits
    wrong = is_row & failed(acc, den, least, most)
    if tl.sum(wrong.to(tl.int32), 0) > 0:
        nothing = tl.zeros([M], tl.float32)
        acc_2, m_2, den_2, _ = walk(
            *(queries, place, nothing, context, rules, first, last, count),
            *(D, DP, M, AGAIN_TILE, PAGE, LAZY, DOT, WINDOW, CAP, AGAIN_STAGES),
        )
        acc = tl.where(wrong[:, None], acc_2, acc)
        m = tl.where(wrong, m_2, m)
        den = tl.where(wrong, den_2, den)
    return acc, m, den, wrong.to(tl.float32)


@triton.jit
def walk(
    queries,
    place,
    top,
    context,
    rules,
    first,
    last,
    count,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DOT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`sweep` or `sweep_row` from an empty state, reduced: acc [M, DP], m, den, refused [M]."""
    if DOT:
        m = tl.full([M], float("-inf"), tl.float32)
        wide_den, wide_bad = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.int32)
        acc, m, wide_den, wide_bad = sweep(
            *(queries, place, top, tl.zeros([M, DP], tl.float32), m, wide_den, wide_bad, context, rules, first, last),
            *(D, DP, N, PAGE, SOFTMAX, True, WINDOW, CAP, True, False, STAGES),
        )
        den = tl.sum(wide_den, 1)
        refused = tl.sum(wide_bad, 1)
    else:
        lowest = 0
        if WINDOW:
            lowest = context[3] - count - rules[2] + 1  # length, window
        one = tl.sum(queries.to(tl.float32), 0)  # the only row
        acc, m = tl.zeros([N, DP], tl.float32), tl.full([N], float("-inf"), tl.float32)
        acc, m, den, bad = sweep_row(
            *(one, tl.sum(top, 0), acc, m, tl.zeros([N], tl.float32), tl.zeros([N], tl.int32), context, rules),
            *(first, last, lowest, D, DP, N, PAGE, SOFTMAX, CAP, STAGES),
        )
        if SOFTMAX >= UNIFIED:
            m = tl.zeros([N], tl.float32)
        acc, m, den = join_columns(acc, m, den)
        refused = tl.sum(bad, 0, keep_dims=True)
    if SOFTMAX >= UNIFIED:
        m = top
    return acc, m, den, refused


class Workspace:
    """Partial results and arrival counters, at one place for graphs; grown by `reserve`, outside of capture.

    recomputed [1] int64 counts rows (a token's query head) that a unified maximum did not serve, of its own or with
    others; queue [2] int32 deals out chunks, see `gpu.prefill`. Launches that share a workspace must follow each other
    on one stream.
    """

    def __init__(self, device: torch.device | str, recomputed: Tensor | None = None) -> None:
        self.device = torch.device(device)
        own = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.recomputed = own if recomputed is None else recomputed
        self.queue = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._outgrown: list[Tensor] = []
        self.sums = self.states = torch.zeros(0, device=self.device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=self.device)

    def reserve(self, plan: DecodePlan, spec: AttentionSpec, requests: int) -> None:
        """Make room for a plan. Memory that was outgrown is kept, for captured graphs go on using it."""
        pairs = requests * spec.kv_heads
        rows = pairs * plan.queries * (spec.heads // spec.kv_heads)
        parts = rows * plan.splits if plan.splits > 1 else 0
        self.sums = self._grown(self.sums, parts * spec.head_dim)
        self.states = self._grown(self.states, parts * 3)
        self.counters = self._grown(self.counters, pairs if plan.merge != "two" else 0)

    def _grown(self, memory: Tensor, size: int) -> Tensor:
        """Zeros: counters are zero between launches."""
        if memory.numel() >= size:
            return memory
        self._outgrown.append(memory)
        return torch.zeros(size, dtype=memory.dtype, device=self.device)


def run(
    plan: DecodePlan,
    workspace: Workspace,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    spec: AttentionSpec,
    *,
    query_start: Tensor | None = None,
    phi: Tensor | None = None,
    around: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the last tokens of R requests: one each, or `query_start[r]:query_start[r+1]` of q, at most
    plan.queries each.

    q [T, heads * head_dim]; keys, values [pages, kv_heads, page_size, head_dim] contiguous; page_table [R, P],
    kv_lengths [R], query_start [R+1] int32. A request of length 0 is idle and gets zeros (log-sum-exp -inf). phi
    [heads] float32: unified maximum of the scores, natural units; None, and a plan of a unified arm runs "lazy".
    around: the paper's guard in natural units. lse [T, heads] float32 receives log-sum-exp -> out [T, heads *
    head_dim].
    """
    check_decode(spec, plan.queries)
    out = torch.empty_like(q) if out is None else out
    requests, group = len(kv_lengths), spec.heads // spec.kv_heads
    if requests == 0:
        return out
    softmax, merge = arms(plan, phi)
    if plan.splits > 1:
        workspace.reserve(plan, spec, requests)
    width = padded(spec.head_dim)
    dot = plan.dot or plan.queries * group > 1
    limits = guard(keys.dtype if dot else torch.float32, around)
    rows = merge_rows_at_once(plan.queries * group, width)
    sizes: dict[str, Any] = {
        "D": spec.head_dim,
        "DP": width,
        "GROUP": group,
        "QUERIES": plan.queries,
        "N": plan.tile,
        "LEAST": plan.least,
        "SOFTMAX": SOFTMAX.index(softmax),
        "WINDOW": spec.window > 0,
        "R": rows,
        "S": max(1, MERGE_ELEMENTS // (rows * width)),
    }
    decode_kernel[(plan.splits, spec.kv_heads, requests)](
        *(q, keys, values, page_table, query_start, kv_lengths, phi, out, lse),
        *(workspace.sums, workspace.states, workspace.counters, workspace.recomputed),
        *(page_table.shape[1], spec.kv_heads, *units(spec), spec.window),
        *(2.0**limits.least, 2.0**limits.most, limits.low, limits.high),
        M=max(16, power_of_two(plan.queries * group)) if dot else 1,
        PAGE=keys.shape[2],
        MERGE=merge,
        DOT=dot,
        CAP=spec.softcap > 0,
        STAGES=plan.stages,
        num_warps=plan.warps,
        **sizes,
    )
    if plan.splits > 1 and merge == TWO.value:
        merge_kernel[(-(-plan.queries * group // rows), spec.kv_heads, requests)](
            *(workspace.sums, workspace.states, query_start, kv_lengths, out, lse, workspace.recomputed),
            *(spec.kv_heads, spec.window, plan.splits),
            num_warps=4,
            **sizes,
        )
    return out


def units(spec: AttentionSpec) -> tuple[float, float]:
    """What brings q.k to log2 units, and the cap in log2 units."""
    log2e: float = LOG2E.value
    return spec.scale * log2e, spec.softcap * log2e


def arms(plan: DecodePlan, phi: Tensor | None) -> tuple[str, int]:
    """The softmax that runs, and the number of the merge."""
    unified = plan.softmax in ("unified", "paper")
    softmax = "lazy" if unified and phi is None else plan.softmax
    if plan.splits == 1:
        return softmax, TWO.value  # compiled without merging
    return softmax, TWO.value if plan.merge == "two" else LAST.value
