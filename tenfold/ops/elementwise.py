"""What stands between the matrix products of a forward, each in one Triton launch: norms, embedding rows, rotary
embedding with the write into pages, the gate, the residual.

Meaning, argument order and roundings are those of `Oracle`; everything is computed in float32. Any number of tokens.
Tiles are a few thousand elements, so that a warp moves 16 bytes a lane and a GPU is full from a few hundred tokens on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops.kernels import Heads, Norm

TILE = 2048  # elements of a program
MOST_TOKENS = 16  # of a program of `rope_write`
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, weight, residual, out, rows, eps, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, ADD: tl.constexpr
):
    """R rows of `residual + norm(x)`; grid (rows / R)."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.arange(0, DP)
    exists = (row < rows)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    value = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    gain = tl.load(weight + d, mask=d < D, other=0.0)
    value = value * scale[:, None] * gain[None, :]
    if ADD:
        rounded = value.to(out.dtype.element_ty).to(tl.float32)
        value = tl.load(residual + at, mask=exists, other=0.0).to(tl.float32) + rounded
    tl.store(out + at, value.to(out.dtype.element_ty), mask=exists)


@triton.jit
def embed_kernel(ids, table, out, scale, D: tl.constexpr, B: tl.constexpr):
    """B columns of one row; grid (tokens, D / B)."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * B + tl.arange(0, B)
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(table + row * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    tl.store(out + token * D + d, value.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def act_mul_kernel(y, out, width, columns, ACT: tl.constexpr, B: tl.constexpr):
    """B elements of one row [2 * width] -> [width]; grid (tokens * columns)."""
    row = (tl.program_id(0) // columns).to(tl.int64)
    i = (tl.program_id(0) % columns) * B + tl.arange(0, B)
    exists = i < width
    gate = tl.load(y + row * width * 2 + i, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(y + row * width * 2 + width + i, mask=exists, other=0.0).to(tl.float32)
    inner = gate
    if ACT == 1:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi): (1 + tanh(z)) / 2
    value = gate / (1.0 + tl.exp(tl.minimum(-inner, 88.0)))  # beyond, exp overflows
    value = value.to(out.dtype.element_ty).to(tl.float32) * up
    tl.store(out + row * width + i, value.to(out.dtype.element_ty), mask=exists)


@triton.jit
def add_kernel(x, y, out, count, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    left = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    right = tl.load(y + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, (left + right).to(out.dtype.element_ty), mask=i < count)


@triton.jit
def load_part(source, at, exists, begin, SIZE: tl.constexpr, P: tl.constexpr):
    """Features begin to begin + SIZE of heads that begin at `at` [N] -> [N, P] float32."""
    d = tl.arange(0, P)
    return tl.load(source + at[:, None] + begin + d[None, :], mask=exists[:, None] & (d < SIZE)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def store_part(target, at, exists, begin, value, SIZE: tl.constexpr, P: tl.constexpr):
    d = tl.arange(0, P)
    mask = exists[:, None] & (d < SIZE)[None, :]
    tl.store(target + at[:, None] + begin + d[None, :], value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def gain_part(value, scale, weight, begin, like, SIZE: tl.constexpr, P: tl.constexpr):
    """The norm of one part of a head, rounded as the norm's result is."""
    d = tl.arange(0, P)
    gain = tl.load(weight + begin + d, mask=d < SIZE, other=0.0)
    return (value * scale[:, None] * gain[None, :]).to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def turn(
    qkv,
    source,
    exists,
    table,
    position,
    target,
    place,
    owned,
    weight,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST: tl.constexpr,
    REST_P: tl.constexpr,
    NORM: tl.constexpr,
):
    """Norm and rotate heads that begin at `source` [N], and write those `owned` to `place` [N] of target."""
    if HALF > 0:
        first = load_part(qkv, source, exists, 0, HALF, HALF_P)
        second = load_part(qkv, source, exists, HALF, HALF, HALF_P)
    if REST > 0:
        rest = load_part(qkv, source, exists, 2 * HALF, REST, REST_P)
    if NORM:
        squares = tl.zeros_like(position).to(tl.float32)
        if HALF > 0:
            squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = 1.0 / tl.sqrt(squares / D + eps)
        if HALF > 0:
            first = gain_part(first, scale, weight, 0, qkv, HALF, HALF_P)
            second = gain_part(second, scale, weight, HALF, qkv, HALF, HALF_P)
        if REST > 0:
            rest = gain_part(rest, scale, weight, 2 * HALF, qkv, REST, REST_P)
    if HALF > 0:
        angle = position.to(tl.int64) * (2 * HALF)
        cos = load_part(table, angle, exists, 0, HALF, HALF_P)
        sin = load_part(table, angle, exists, HALF, HALF, HALF_P)
        store_part(target, place, owned, 0, (first * cos - second * sin).to(qkv.dtype.element_ty), HALF, HALF_P)
        store_part(target, place, owned, HALF, (second * cos + first * sin).to(qkv.dtype.element_ty), HALF, HALF_P)
    if REST > 0:
        store_part(target, place, owned, 2 * HALF, rest.to(qkv.dtype.element_ty), REST, REST_P)


@triton.jit(do_not_specialize=["tokens"])
def rope_write_kernel(
    qkv,
    table,
    positions,
    slots,
    keys,
    values,
    out,
    q_weight,
    k_weight,
    tokens,
    q_eps,
    k_eps,
    page_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST: tl.constexpr,
    REST_P: tl.constexpr,
    PAGE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    N: tl.constexpr,
):
    """One head of N tokens; grid (heads + 2 kv_heads, tokens / N)."""
    head = tl.program_id(0)
    token = tl.program_id(1) * N + tl.arange(0, N)
    exists = token < tokens
    row = token.to(tl.int64)
    source = row * ((HEADS + 2 * KV_HEADS) * D) + head * D
    if head < HEADS:
        position = tl.load(positions + token, mask=exists, other=0)
        place = row * (HEADS * D) + head * D
        turn(
            *(qkv, source, exists, table, position, out, place, exists, q_weight, q_eps),
            *(D, HALF, HALF_P, REST, REST_P, Q_NORM),
        )
    else:
        slot = tl.load(slots + token, mask=exists, other=-1).to(tl.int64)
        owned = slot >= 0
        kv_head = (head - HEADS) % KV_HEADS
        place = (slot // PAGE) * page_stride + kv_head * (PAGE * D) + (slot % PAGE) * D
        if head < HEADS + KV_HEADS:
            position = tl.load(positions + token, mask=exists, other=0)
            turn(
                *(qkv, source, exists, table, position, keys, place, owned, k_weight, k_eps),
                *(D, HALF, HALF_P, REST, REST_P, K_NORM),
            )
        else:
            store_part(values, place, owned, 0, load_part(qkv, source, owned, 0, D, DP), D, DP)


def refuse_strided(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all are contiguous: kernels count elements, not strides."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}; GPU kernels take contiguous "
                "tensors only: call .contiguous() first."
            )


def norm(x: Tensor, norm: Norm) -> Tensor:
    """`Kernels.norm`: x [..., D] contiguous. As all below, raises ValueError for what is not contiguous."""
    return _norm(x, None, norm)


def add_norm(x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """`Kernels.add_norm`: `x + norm(y)`, the norm rounded first."""
    return _norm(y, x, norm)


def _norm(x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
    refuse_strided(x, residual)
    out = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    if rows:
        padded = triton.next_power_of_2(size)
        together = max(1, min(TILE // padded, triton.next_power_of_2(rows)))
        norm_kernel[(triton.cdiv(rows, together),)](
            *(x, norm.weight, residual, out, rows, norm.eps),
            **{"D": size, "DP": padded, "R": together, "ADD": residual is not None},
            num_warps=warps(padded * together),
        )
    return out


def embed(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """`table[ids] * scale`: ids [T], table [rows, D] -> [T, D]. Ids must be rows of the table."""
    refuse_strided(ids, table)
    size = table.shape[1]
    out = table.new_empty(ids.shape[0], size)
    if out.numel():
        width = min(TILE, triton.next_power_of_2(size))
        embed_kernel[(ids.shape[0], triton.cdiv(size, width))](
            *(ids, table, out, float(scale)), D=size, B=width, num_warps=warps(width)
        )
    return out


def act_mul(y: Tensor, act: str) -> Tensor:
    """y [T, 2 I], gate then up -> `act(gate) * up` [T, I]; act(gate) is rounded first."""
    refuse_strided(y)
    width = y.shape[1] // 2
    out = y.new_empty(y.shape[0], width)
    if out.numel():
        size = min(TILE, triton.next_power_of_2(width))
        columns = triton.cdiv(width, size)
        act_mul_kernel[(y.shape[0] * columns,)](
            *(y, out, width, columns), ACT=ACTIVATIONS[act], B=size, num_warps=warps(size)
        )
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, both of one shape and type."""
    refuse_strided(x, y)
    out = torch.empty_like(x)
    if out.numel():
        add_kernel[(triton.cdiv(x.numel(), TILE),)](x, y, out, x.numel(), B=TILE, num_warps=warps(TILE))
    return out


def rope_write(qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`Kernels.rope_write`. A token whose slot is negative is not written. keys, values: contiguous within a page."""
    spec, q_norm, k_norm = heads.spec, heads.q_norm, heads.k_norm
    refuse_strided(qkv, heads.rope, positions, slots)
    tokens = qkv.shape[0]
    out = qkv.new_empty(tokens, spec.heads * spec.head_dim)
    if not tokens:
        return out
    half, rest = spec.rotary_dim // 2, spec.head_dim - spec.rotary_dim
    padded = triton.next_power_of_2(spec.head_dim)
    together = min(MOST_TOKENS, triton.next_power_of_2(tokens))
    rope_write_kernel[(spec.heads + 2 * spec.kv_heads, triton.cdiv(tokens, together))](
        *(qkv, heads.rope, positions, slots, keys, values, out),
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        tokens,
        0.0 if q_norm is None else q_norm.eps,
        0.0 if k_norm is None else k_norm.eps,
        keys.stride(0),
        HEADS=spec.heads,
        KV_HEADS=spec.kv_heads,
        D=spec.head_dim,
        DP=padded,
        HALF=half,
        HALF_P=triton.next_power_of_2(max(1, half)),
        REST=rest,
        REST_P=triton.next_power_of_2(max(1, rest)),
        PAGE=keys.shape[2],
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        N=together,
        num_warps=warps(padded * together),
    )
    return out


def warps(elements: int) -> int:
    """Warps of a program with so many elements: 16 a lane, at most 16 warps."""
    return max(1, min(16, elements // 512))
