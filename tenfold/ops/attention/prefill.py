"""Attention of chunks of new tokens over the paged cache, causal, prefix included.

A program takes a tile of queries of one KV head: neighbouring tokens, with all query heads that share the keys. Tiles
whose queries see most run first. Context that every query of the tile sees is read without masks, the rest with them.
Rows that a unified maximum did not serve are computed again by the same program.
"""

import triton
import triton.language as tl
from torch import Tensor, empty_like

from tenfold.ops.attention.decode import units
from tenfold.ops.attention.merge import SLICED, VARYING, finish, span
from tenfold.ops.attention.plan import PrefillPlan, check_spec, padded, power_of_two
from tenfold.ops.attention.sweep import (
    AGAIN_STAGES,
    AGAIN_TILE,
    LAZY,
    LOG2E,
    PAPER,
    UNIFIED,
    failed,
    sweep,
)
from tenfold.ops.attention.unified_max import guard
from tenfold.ops.kernels import SOFTMAX, AttentionSpec


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICED)
def prefill_kernel(
    q,
    keys,
    values,
    table,
    starts,
    lengths,
    phi,
    out,
    lse,
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
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BRANCH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (query tiles, kv_heads, requests). See the module's head and `run`."""
    T: tl.constexpr = M // GROUP
    tile, kv_head, request = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = span(starts, request)
    length = tl.load(lengths + request)
    begin_token = tile * T
    if begin_token >= count:
        return
    heads = kv_heads * GROUP
    i = tl.arange(0, M)
    d = tl.arange(0, DP)
    own = begin_token + i // GROUP
    is_row = (i < T * GROUP) & (own < count)
    token = start + own
    head = kv_head * GROUP + i % GROUP
    before = length - count
    place = tl.where(is_row, before + own, -1)
    at = (token.to(tl.int64) * heads + head) * D
    queries = tl.load(q + at[:, None] + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    queries = queries.to(keys.dtype.element_ty)
    top = tl.zeros([M], tl.float32)
    if SOFTMAX >= UNIFIED:
        top = tl.load(phi + head, mask=is_row, other=0.0) * LOG2E
    page_stride = kv_heads * PAGE * D
    skipped = kv_head.to(tl.int64) * PAGE * D
    context = keys + skipped, values + skipped, table + request.to(tl.int64) * columns, length, page_stride
    rules = scale, cap, window, low, high
    first = 0
    end = tl.minimum(before + begin_token + T, length)
    whole = (before + begin_token + 1) // N * N  # what even the tile's first query sees entirely
    if WINDOW:
        first = tl.maximum(before + begin_token - window + 1, 0) // N * N
        whole = first
    acc = tl.zeros([M, DP], tl.float32)
    m = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    bad = tl.zeros([M], tl.int32)
    if not WINDOW:
        acc, m, den, bad = sweep(
            *(queries, place, top, acc, m, den, bad, context, rules, first, whole),
            *(D, DP, N, PAGE, SOFTMAX, False, False, CAP, False, BRANCH, STAGES),
        )
    acc, m, den, bad = sweep(
        *(queries, place, top, acc, m, den, bad, context, rules, whole, end),
        *(D, DP, N, PAGE, SOFTMAX, True, WINDOW, CAP, False, BRANCH, STAGES),
    )
    none = tl.zeros([M], tl.float32)
    if SOFTMAX >= UNIFIED:
        if SOFTMAX == PAPER:
            den = tl.where(bad > 0, float("nan"), den)
        wrong = is_row & failed(acc, den, least, most)
        right = is_row & (wrong == 0)
        # What is right is written before, so that its sums need no registers while the rest is computed again.
        finish(acc, top, den, none, out, lse, recomputed, token, head, right, heads, D, DP, LAZY)
        if tl.sum(wrong.to(tl.int32), 0) > 0:
            acc, m = tl.zeros([M, DP], tl.float32), tl.full([M], float("-inf"), tl.float32)
            acc, m, den, _ = sweep(
                *(queries, place, top, acc, m, none, bad, context, rules, first, end),
                *(D, DP, AGAIN_TILE, PAGE, LAZY, True, WINDOW, CAP, False, False, AGAIN_STAGES),
            )
            again = wrong.to(tl.float32)
            finish(acc, m, den, again, out, lse, recomputed, token, head, wrong, heads, D, DP, SOFTMAX)
    else:
        finish(acc, m, den, none, out, lse, recomputed, token, head, is_row, heads, D, DP, SOFTMAX)


def run(
    plan: PrefillPlan,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    spec: AttentionSpec,
    max_query: int,
    *,
    recomputed: Tensor,
    phi: Tensor | None = None,
    around: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of R requests with up to max_query new tokens each, as `decode.run`; rows of q that no request owns are
    left as they are in out. recomputed [1] int64 counts rows that phi did not serve.
    """
    check_spec(spec)
    out = empty_like(q) if out is None else out
    group = spec.heads // spec.kv_heads
    requests, rows = len(kv_lengths), max(plan.rows, power_of_two(group))
    if requests == 0 or max_query == 0:
        return out
    softmax = "lazy" if phi is None and plan.softmax in ("unified", "paper") else plan.softmax
    limits = guard(keys.dtype, around)
    prefill_kernel[(-(-max_query // (rows // group)), spec.kv_heads, requests)](
        *(q, keys, values, page_table, query_start, kv_lengths, phi, out, lse, recomputed),
        *(page_table.shape[1], spec.kv_heads, *units(spec), spec.window),
        *(2.0**limits.least, 2.0**limits.most, limits.low, limits.high),
        D=spec.head_dim,
        DP=padded(spec.head_dim),
        GROUP=group,
        M=rows,
        N=plan.tile,
        PAGE=keys.shape[2],
        SOFTMAX=SOFTMAX.index(softmax),
        WINDOW=spec.window > 0,
        CAP=spec.softcap > 0,
        BRANCH=plan.branch,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )
    return out
