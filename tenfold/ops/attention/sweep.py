"""Device functions: a tile of queries walks over a paged context and collects softmax sums.

Scores are in log2 units. A row's state is (acc, m, den): acc = sum 2^(s - m) v and den = sum 2^(s - m), where m is the
row's maximum so far ("online"), at most 8 below it ("lazy") or phi ("unified", "paper").
"""

import triton
import triton.language as tl

ONLINE: tl.constexpr = tl.constexpr(0)
LAZY: tl.constexpr = tl.constexpr(1)
UNIFIED: tl.constexpr = tl.constexpr(2)
PAPER: tl.constexpr = tl.constexpr(3)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
SLACK: tl.constexpr = tl.constexpr(8.0)  # log2 units that a maximum may be stale by
# Computing again is rare; in small tiles it takes no registers from the usual way. Every tile is a multiple of it.
AGAIN_TILE: tl.constexpr = tl.constexpr(16)
AGAIN_STAGES: tl.constexpr = tl.constexpr(3)
HUGE: tl.constexpr = tl.constexpr(3.0e38)


@triton.jit
def cap_scores(s, cap):
    """cap * tanh(s / cap) for scores s and cap in one unit."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / cap))))


@triton.jit
def rows_of(table, place, valid, page_stride, PAGE: tl.constexpr, D: tl.constexpr):
    """Where in the store the rows of these places [N] begin, in elements, for KV head 0."""
    page = tl.load(table + place // PAGE, mask=valid, other=0)
    return page.to(tl.int64) * page_stride + (place % PAGE) * D


@triton.jit
def load_rows(store, rows, valid, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """[N, DP] of rows; what is invalid or past D is 0."""
    d = tl.arange(0, DP)
    if MASKED:
        return tl.load(store + rows[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if D == DP:
        return tl.load(store + rows[:, None] + d[None, :])
    return tl.load(store + rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit
def sweep(
    q,
    q_place,
    phi,
    acc,
    m,
    den,
    bad,
    context,
    rules,
    first,
    last,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SPREAD: tl.constexpr,
    BRANCH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the context from first (a multiple of N) to last to the state of queries q [M, DP] at q_place [M] (-1: no
    query). context: keys and values of the KV head, page table and length of the request, elements of a page. rules:
    scale, cap, window, low, high. SPREAD: den and bad are kept for each column [M, N] and reduced by the caller.
    bad counts what the paper's guard refused. BRANCH: the lazy arm skips rescaling where no row needs it.
    """
    keys, values, table, length, page_stride = context
    scale, cap, window, low, high = rules
    columns = tl.arange(0, N)
    for start in tl.range(first, last, N, num_stages=STAGES):
        place = start + columns
        valid = place < length
        rows = rows_of(table, place, valid, page_stride, PAGE, D)
        k = load_rows(keys, rows, valid, D, DP, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        unit = scale  # what brings s to log2 units; left to the exponential's argument, where it costs nothing
        if CAP:
            s = cap_scores(s * scale, cap)
            unit = 1.0
        if MASKED:
            seen = place[None, :] <= q_place[:, None]
            if WINDOW:
                seen = seen & (place[None, :] > q_place[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        v = load_rows(values, rows, valid, D, DP, MASKED)
        if SOFTMAX >= UNIFIED:
            t = s * unit - phi[:, None]
            if SOFTMAX == PAPER:
                refused = (t <= low) | (t >= high)
                if MASKED:
                    refused = refused & seen
                if SPREAD:
                    bad += refused.to(tl.int32)
                else:
                    bad += tl.sum(refused.to(tl.int32), 1)
            p = tl.exp2(t)
            weights = p.to(v.dtype)
            if v.dtype == tl.float16:
                p = weights.to(tl.float32)  # what vanishes must vanish from both sums
        else:
            top = tl.max(s, 1) * unit
            if SOFTMAX == ONLINE:
                m_new = tl.maximum(m, top)
            else:
                m_new = tl.where(top > m + SLACK, top, m)
            m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
            if SOFTMAX == LAZY and BRANCH:
                if tl.sum((m_new > m).to(tl.int32), 0) > 0:
                    alpha = tl.exp2(m - m_used)
                    acc = acc * alpha[:, None]
                    den = den * (alpha[:, None] if SPREAD else alpha)
            else:
                alpha = tl.exp2(m - m_used)
                acc = acc * alpha[:, None]
                den = den * (alpha[:, None] if SPREAD else alpha)
            m = m_new
            p = tl.exp2(s * unit - m_used[:, None])
            weights = p.to(v.dtype)
        if SPREAD:
            den += p
        else:
            den += tl.sum(p, 1)
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    return acc, m, den, bad


@triton.jit
def sweep_row(
    q,
    phi,
    acc,
    m,
    den,
    bad,
    context,
    rules,
    first,
    last,
    lowest,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`sweep` for one query [DP] float32 on the CUDA cores. Each of N columns keeps a state of its own, acc [N, DP], m,
    den, bad [N], so nothing is reduced before the end. lowest: the first place that the query sees.
    """
    keys, values, table, length, page_stride = context
    scale, cap, _, low, high = rules
    columns = tl.arange(0, N)
    for start in tl.range(first, last, N, num_stages=STAGES):
        place = start + columns
        valid = (place < length) & (place >= lowest)
        rows = rows_of(table, place, valid, page_stride, PAGE, D)
        k = load_rows(keys, rows, valid, D, DP, True)
        v = load_rows(values, rows, valid, D, DP, True)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
        if CAP:
            s = cap_scores(s, cap)
        s = tl.where(valid, s, float("-inf"))
        if SOFTMAX >= UNIFIED:
            t = s - phi
            if SOFTMAX == PAPER:
                bad += (valid & ((t <= low) | (t >= high))).to(tl.int32)
            p = tl.exp2(t)
        else:
            if SOFTMAX == ONLINE:
                m_new = tl.maximum(m, s)
            else:
                m_new = tl.where(s > m + SLACK, s, m)
            m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m - m_used)
            acc = acc * alpha[:, None]
            den = den * alpha
            m = m_new
            p = tl.exp2(s - m_used)
        den += p
        acc += p[:, None] * v.to(tl.float32)
    return acc, m, den, bad


@triton.jit
def join_columns(acc, m, den):
    """The state of `sweep_row` as one row: acc [1, DP], m [1], den [1]."""
    top = tl.max(m, 0)
    top_used = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(m - top_used)
    return (
        tl.sum(acc * weights[:, None], 0)[None, :],
        tl.max(m, 0, keep_dims=True),
        tl.sum(den * weights, 0, keep_dims=True),
    )


@triton.jit
def failed(acc, den, least, most):
    """Rows [M] whose sums a unified maximum did not serve: out of range, infinite or NaN."""
    holes = tl.sum(tl.where(tl.abs(acc) < HUGE, 0, 1), 1)
    return ((den > least) & (den < most) & (holes == 0)) == 0
