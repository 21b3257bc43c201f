"""Attention over one vector of a token that is key and value of all heads (latent attention, absorbed), for new tokens
of any number and long paged contexts.

    out[t, h] = softmax over j <= place of t of (scale * q[t, h] . kept[j]) @ kept        q, out [T, heads * D]

A program takes up to M rows, a row being a head of a token, of one request and one split of its context; a tile of the
context is read once for all of them, as keys and as values. D is a power of two and a smaller one, as DeepSeek's 512 +
64, whose sums are kept apart. Splits leave partial sums that a second launch adds up, in their order, so results repeat
bit for bit; how many tokens a split has follows on the device, so one captured graph serves all lengths.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops.attention.merge import share, span
from tenfold.ops.attention.sweep import LOG2E
from tenfold.ops.kernels import AttentionSpec

LEAST_TILES = 4  # of a split
MOST_SPLITS = 32
MOST_SUMS = 1 << 26  # numbers of partial sums


@dataclass(frozen=True, slots=True)
class LatentPlan:
    """rows of a program, tokens of a tile, splits of a context at most, warps, tiles under way."""

    rows: int
    tile: int
    splits: int
    warps: int
    stages: int


def parts(width: int) -> tuple[int, int]:
    """The powers of two that a vector's features fall into, the second 0 where there is none."""
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def takes(spec: AttentionSpec) -> bool:
    """Whether the kernel serves this attention."""
    first, second = parts(spec.head_dim)
    plain = spec.kv_heads == 1 and not spec.window and not spec.softcap and not spec.rotary_dim
    return plain and first >= 16 and (not second or (second >= 16 and second & (second - 1) == 0))


def plan(spec: AttentionSpec, requests: int, max_query: int, max_kv: int, sms: int) -> LatentPlan:
    """Enough splits that every multiprocessor has work."""
    count = max_query * spec.heads
    rows = 16 if count <= 16 else 32 if count <= 32 else 64
    blocks = requests * -(-count // rows)
    tile = 64 if rows <= 32 else 32
    splits = max(1, min(MOST_SPLITS, 2 * sms // blocks, max_kv // (LEAST_TILES * tile)))
    splits = min(splits, max(1, MOST_SUMS // (requests * count * spec.head_dim)))
    return LatentPlan(rows, tile, splits, 4 if rows <= 16 else 8, 2)


def run(
    chosen: LatentPlan,
    q: Tensor,
    kept: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    spec: AttentionSpec,
    max_query: int,
) -> Tensor:
    """As `Kernels.attend` where keys and values are `kept` [pages, 1, page, D], contiguous."""
    requests, (first, second) = len(kv_lengths), parts(spec.head_dim)
    out = torch.empty_like(q)
    rows = len(q) * spec.heads
    single = chosen.splits == 1
    sums = out if single else q.new_empty(chosen.splits, rows, spec.head_dim, dtype=torch.float32)
    states = None if single else q.new_empty(chosen.splits, rows, 2, dtype=torch.float32)
    starts = None if max_query == 1 and requests == len(q) else query_start
    latent_kernel[(chosen.splits, -(-max_query * spec.heads // chosen.rows), requests)](
        *(q, kept, page_table, starts, kv_lengths, sums, states, rows, page_table.stride(0), spec.heads),
        spec.scale * LOG2E,
        FIRST=first,
        SECOND=second,
        M=chosen.rows,
        N=chosen.tile,
        PAGE=kept.shape[2],
        LEAST=LEAST_TILES,
        STAGES=chosen.stages,
        num_warps=chosen.warps,
    )
    if not single:
        merge_kernel[(rows,)](sums, states, out, rows, chosen.splits, WIDTH=first + second, PADDED=2 * first)
    return out


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["table", "starts", "lengths"])
def latent_kernel(
    q, kept, table, starts, lengths, sums, states, rows, columns, heads, scale,
    FIRST: tl.constexpr, SECOND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    LEAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (splits, blocks of rows, requests). scale: for powers of two."""
    split, request = tl.program_id(0), tl.program_id(2)
    WIDTH: tl.constexpr = FIRST + SECOND
    length = tl.load(lengths + request)
    start, count = span(starts, request)
    own = tl.program_id(1) * M + tl.arange(0, M)  # rows of the request: its tokens' heads, one after the other
    lives = own < count * heads
    row = start.to(tl.int64) * heads + own
    if tl.program_id(1) * M < count * heads:
        begin, end, active = share(length, count, split, tl.num_programs(0), 0, False, N, LEAST)
        place = length - count + own // heads
        f, g, n = tl.arange(0, FIRST), tl.arange(0, SECOND if SECOND else 16), tl.arange(0, N)
        kind = kept.dtype.element_ty
        q_first = tl.load(q + row[:, None] * WIDTH + f[None, :], mask=lives[:, None], other=0.0).to(kind)
        acc = tl.zeros([M, FIRST], tl.float32)
        if SECOND:
            q_second = tl.load(q + row[:, None] * WIDTH + FIRST + g[None, :], mask=lives[:, None], other=0.0).to(kind)
            rest = tl.zeros([M, SECOND], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        if split < active:
            last = tl.minimum(end, length - count + (tl.program_id(1) * M + M - 1) // heads + 1)
            for tile in tl.range(begin, last, N, num_stages=STAGES):
                token = tile + n
                there = token < end
                page = tl.load(table + request.to(tl.int64) * columns + token // PAGE, mask=there, other=0)
                at = (page.to(tl.int64) * PAGE + token % PAGE) * WIDTH
                k_first = tl.load(kept + at[:, None] + f[None, :], mask=there[:, None], other=0.0)
                scores = tl.dot(q_first, tl.trans(k_first))
                if SECOND:
                    k_second = tl.load(kept + at[:, None] + FIRST + g[None, :], mask=there[:, None], other=0.0)
                    scores = tl.dot(q_second, tl.trans(k_second), scores)
                seen = there[None, :] & (token[None, :] <= place[:, None])
                scores = tl.where(seen, scores * scale, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                safe = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp2(scores - safe[:, None])
                shrink = tl.exp2(top - safe)
                total = total * shrink + tl.sum(weights, 1)
                acc = tl.dot(weights.to(kind), k_first, acc * shrink[:, None])
                if SECOND:
                    rest = tl.dot(weights.to(kind), k_second, rest * shrink[:, None])
                top = higher
        if states is None:
            some = tl.where(total == 0.0, 1.0, total)[:, None]
            acc /= some
            if SECOND:
                rest /= some
        else:
            at_state = states + (split.to(tl.int64) * rows + row) * 2
            tl.store(at_state, top, mask=lives)
            tl.store(at_state + 1, total, mask=lives)
        if states is None or split < active:
            result = sums + ((split.to(tl.int64) * rows if states is not None else 0) + row[:, None]) * WIDTH
            tl.store(result + f[None, :], acc.to(sums.dtype.element_ty), mask=lives[:, None])
            if SECOND:
                tl.store(result + FIRST + g[None, :], rest.to(sums.dtype.element_ty), mask=lives[:, None])


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(sums, states, out, rows, splits, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Grid (rows): the splits' sums of one row, which have their own maxima, in the order of the splits."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < WIDTH
    top = float("-inf")
    for split in range(splits):
        top = tl.maximum(top, tl.load(states + (split * rows + row) * 2))
    acc = tl.zeros([PADDED], tl.float32)
    total = 0.0
    for split in range(splits):
        at = split * rows + row
        most, part = tl.load(states + at * 2), tl.load(states + at * 2 + 1)
        if part > 0.0:
            shrink = tl.exp2(most - top)
            total += part * shrink
            acc += tl.load(sums + at * WIDTH + d, mask=inside, other=0.0) * shrink
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * WIDTH + d, result.to(out.dtype.element_ty), mask=inside)
