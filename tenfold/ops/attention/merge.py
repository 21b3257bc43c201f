"""Where splits of a context meet: partial states in memory become rows of the result, in the order of the splits."""

import triton
import triton.language as tl

from tenfold.ops.attention.plan import power_of_two
from tenfold.ops.attention.sweep import LN2, UNIFIED

MERGE_ELEMENTS = 4096  # of partial sums that a program merges at once
# Numbers and slices that differ from step to step must not make the compiler run again.
VARYING = ["columns"]
SLICED = ["table", "starts", "lengths", "lse"]


@triton.jit
def share(length, count, split, splits, window, WINDOW: tl.constexpr, N: tl.constexpr, LEAST: tl.constexpr):
    """What a split works on: its first token, where it ends, and how many splits have work."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - count - window + 1, 0) // N * N
    tiles = tl.cdiv(length - begin, N)
    each = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    first = begin + split * each * N
    return first, tl.minimum(first + each * N, length), tl.cdiv(tiles, each)


@triton.jit
def span(starts, request):
    """First token and number of tokens of a request; starts None: one each."""
    start = request
    count = 1
    if starts is not None:
        start = tl.load(starts + request)
        count = tl.load(starts + request + 1) - start
    return start, count


@triton.jit
def finish(
    acc,
    m,
    den,
    again,
    out,
    lse,
    recomputed,
    token,
    head,
    is_row,
    heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Write rows [M] of the result and their log-sum-exp, and count those that were computed again."""
    d = tl.arange(0, DP)
    at = token.to(tl.int64) * heads + head
    some = tl.where(den == 0.0, 1.0, den)
    result = (acc / some[:, None]).to(out.dtype.element_ty)
    tl.store(out + (at * D)[:, None] + d[None, :], result, mask=is_row[:, None] & (d < D)[None, :])
    if lse is not None:
        tl.store(lse + at, tl.where(den == 0.0, float("-inf"), (m + tl.log2(some)) * LN2), mask=is_row)
    if SOFTMAX >= UNIFIED:
        count = tl.sum((is_row & (again > 0)).to(tl.int32), 0)
        if count > 0:
            tl.atomic_add(recomputed, count.to(tl.int64))


@triton.jit
def merge_rows(
    sums,
    states,
    active,
    row,
    rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """Merge the first `active` partial states of rows [R], of which those below `rows` exist, in the order of splits.

    sums [*, ROWS, D], states [*, ROWS, 3] float32 (m, den, recomputed), from the first split on
    -> acc [R, DP], m, den, recomputed [R].
    """
    order = tl.arange(0, S)
    d = tl.arange(0, DP)
    top = tl.full([R], float("-inf"), tl.float32)
    for begin in range(0, active, S):
        at = (begin + order)[:, None] * ROWS + row[None, :]
        there = (begin + order < active)[:, None] & (row < rows)[None, :]
        m = tl.load(states + at * 3, mask=there, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, tl.max(m, 0))
    top_used = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([R, DP], tl.float32)
    den = tl.zeros([R], tl.float32)
    again = tl.zeros([R], tl.float32)
    for begin in range(0, active, S):
        at = (begin + order)[:, None] * ROWS + row[None, :]
        there = (begin + order < active)[:, None] & (row < rows)[None, :]
        element = (at * D)[:, :, None] + d[None, None, :]
        part = tl.load(sums + element, mask=there[:, :, None] & (d < D)[None, None, :], other=0.0, cache_modifier=".cg")
        m = tl.load(states + at * 3, mask=there, other=float("-inf"), cache_modifier=".cg")
        part_l = tl.load(states + at * 3 + 1, mask=there, other=0.0, cache_modifier=".cg")
        part_again = tl.load(states + at * 3 + 2, mask=there, other=0.0, cache_modifier=".cg")
        weights = tl.exp2(m - top_used[None, :])
        acc += tl.sum(part * weights[:, :, None], 0)
        den += tl.sum(part_l * weights, 0)
        again = tl.maximum(again, tl.max(part_again, 0))
    return acc, top, den, again


@triton.jit
def merge_all(
    sums,
    states,
    active,
    begin,
    end,
    out,
    lse,
    recomputed,
    start,
    kv_head,
    heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Merge rows begin to end of one request and KV head, R at a time, and write them."""
    for first in range(begin, end, R):
        row = first + tl.arange(0, R)
        acc, m, den, again = merge_rows(sums, states, active, row, end, ROWS, D, DP, R, S)
        token, head = start + row // GROUP, kv_head * GROUP + row % GROUP
        finish(acc, m, den, again, out, lse, recomputed, token, head, row < end, heads, D, DP, SOFTMAX)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=SLICED[1:])
def merge_kernel(
    sums,
    states,
    starts,
    lengths,
    out,
    lse,
    recomputed,
    kv_heads,
    window,
    splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    N: tl.constexpr,
    LEAST: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WINDOW: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """Grid (row tiles, kv_heads, requests): the second launch of merge "two"."""
    tile, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request)
    start, count = span(starts, request)
    if length <= 0:
        return
    _, _, active = share(length, count, 0, splits, window, WINDOW, N, LEAST)
    if active == 1:
        return
    pair = (request * kv_heads + kv_head).to(tl.int64)
    ROWS: tl.constexpr = QUERIES * GROUP
    merge_all(
        *(sums + pair * splits * (ROWS * D), states + pair * splits * (ROWS * 3), active, tile * R),
        *(tl.minimum(tile * R + R, count * GROUP), out, lse, recomputed, start, kv_head, kv_heads * GROUP),
        *(D, DP, GROUP, ROWS, R, S, SOFTMAX),
    )


def merge_rows_at_once(rows: int, width: int) -> int:
    """Rows that a program merges side by side: 512 elements, so that 8 splits or more are read at once."""
    return min(power_of_two(rows), max(1, 512 // width))
