"""Attention over pages, and the rotary write into them, against float64 torch; and the promise that a row's bits
depend on its own query, keys and position only."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.ops.cpu import lib
from tenfold.ops.kernels import AttentionSpec, Heads, Norm

SPEC = AttentionSpec(heads=6, kv_heads=2, head_dim=32, scale=32**-0.5)


@dataclass
class Pages:
    """A cache whose unused places hold NaN, with the pages of each request in shuffled order."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    dense_keys: list  # [n, kv_heads, head_dim] of each request, as stored
    dense_values: list


def make_pages(lengths, spec, page_size=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    per_request = [max(1, -(-n // page_size)) for n in lengths]
    total = sum(per_request) + 1
    shape = (total, spec.kv_heads, page_size, spec.head_dim)
    keys, values = torch.full(shape, math.nan, dtype=dtype), torch.full(shape, math.nan, dtype=dtype)
    order = torch.randperm(total, generator=g).tolist()
    table = torch.zeros(len(lengths), max(per_request, default=1), dtype=torch.int32)
    dense_keys, dense_values = [], []
    for r, n in enumerate(lengths):
        mine = [order.pop() for _ in range(per_request[r])]
        table[r, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        k = torch.randn(n, spec.kv_heads, spec.head_dim, generator=g).to(dtype)
        v = torch.randn(n, spec.kv_heads, spec.head_dim, generator=g).to(dtype)
        for i in range(n):
            keys[mine[i // page_size], :, i % page_size] = k[i]
            values[mine[i // page_size], :, i % page_size] = v[i]
        dense_keys.append(k)
        dense_values.append(v)
    return Pages(keys, values, table, dense_keys, dense_values)


def reference(q, k, v, spec):
    """q [n, heads, D] at the end of k, v [N, kv_heads, D] -> output and log-sum-exp, float64."""
    n, total = len(q), len(k)
    group = spec.heads // spec.kv_heads
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    at, key = torch.arange(total - n, total)[:, None], torch.arange(total)[None]
    seen = key <= at
    if spec.window:
        seen &= key > at - spec.window
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def attend(native, q, pages, spec, queries, lengths, lse=None):
    start = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    kv = torch.tensor(lengths, dtype=torch.int32)
    longest = (max(queries, default=0), max(lengths, default=0))
    return native.attend(q, pages.keys, pages.values, pages.table, start, kv, spec, *longest, lse=lse)


def check(native, spec, queries, lengths, page_size=16, dtype=torch.float32):
    pages = make_pages(lengths, spec, page_size, dtype)
    q = torch.randn(sum(queries), spec.heads * spec.head_dim, generator=torch.Generator().manual_seed(1))
    lse = torch.full((len(q), spec.heads), math.nan)
    out = attend(native, q, pages, spec, queries, lengths, lse)
    row = 0
    for r, n in enumerate(queries):
        mine = q[row : row + n].view(n, spec.heads, spec.head_dim)
        want, want_lse = reference(mine, pages.dense_keys[r], pages.dense_values[r], spec)
        got = out[row : row + n].view(n, spec.heads, spec.head_dim).double()
        torch.testing.assert_close(got, want, rtol=2e-5, atol=3e-6)  # sums of up to 300 float32 products
        torch.testing.assert_close(lse[row : row + n].double(), want_lse, rtol=2e-6, atol=3e-6)
        row += n


@pytest.mark.parametrize(
    ("queries", "lengths"),
    [
        ([1], [1]),
        ([1], [64]),
        ([1], [65]),
        ([1], [300]),
        ([1, 1, 1], [5, 200, 64]),
        ([7], [7]),
        ([130], [130]),
        ([33], [150]),
        ([1, 20, 0, 3], [90, 20, 10, 67]),
    ],
)
def test_batches(isa, native, queries, lengths):
    check(native, SPEC, queries, lengths)


@pytest.mark.parametrize("head_dim", [1, 7, 8, 16, 20, 40, 64, 72, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_head_dims(isa, native, head_dim, dtype):
    spec = replace(SPEC, head_dim=head_dim, scale=head_dim**-0.5)
    check(native, spec, [1, 20], [70, 90], dtype=dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (2, 1), (3, 1), (8, 2), (5, 1), (14, 2), (60, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups(isa, native, heads, kv_heads, dtype):
    check(native, replace(SPEC, heads=heads, kv_heads=kv_heads), [1, 13], [100, 70], dtype=dtype)


@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 1000])
def test_window(isa, native, window):
    check(native, replace(SPEC, window=window), [1, 90, 3], [200, 150, 64])


@pytest.mark.parametrize("cap", [0.5, 5.0, 50.0])
def test_softcap(isa, native, cap):
    check(native, replace(SPEC, softcap=cap, scale=1.0), [1, 40], [200, 70])


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 64, 100])
def test_page_sizes(isa, native, page_size):
    check(native, SPEC, [1, 30], [131, 66], page_size)


def test_nothing_to_do(isa, native):
    pages = make_pages([4], SPEC)
    out = attend(native, torch.empty(0, 192), pages, SPEC, [0], [4])
    assert out.shape == (0, 192)
    empty = replace(pages, table=pages.table[:0])
    assert attend(native, torch.empty(0, 192), empty, SPEC, [], []).shape == (0, 192)


def test_large_scores_do_not_overflow(isa, native):
    check(native, replace(SPEC, scale=40.0), [3], [100])


LENGTH = 230


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "head_dim"), [(0, 32), (70, 32), (0, 40)])
def test_bits_do_not_depend_on_chunks_threads_or_neighbours(isa, native, dtype, window, head_dim):
    """One prompt: all at once, token by token, in odd chunks, beside others, on one to five threads."""
    spec = replace(SPEC, window=window, head_dim=head_dim)
    pages = make_pages([LENGTH, 300, 17], spec, dtype=dtype)
    q = torch.randn(LENGTH, spec.heads * spec.head_dim, generator=torch.Generator().manual_seed(2))
    alone = replace(pages, table=pages.table[:1])
    lib.set_threads(1)
    want = attend(native, q, alone, spec, [LENGTH], [LENGTH])
    for threads in (1, 2, 5):
        lib.set_threads(threads)
        for chunks in ([LENGTH], [100, 1, 64, 65], [1] * LENGTH if threads == 2 else [LENGTH - 1, 1]):
            done = 0
            for n in chunks:
                got = attend(native, q[done : done + n], alone, spec, [n], [done + n])
                assert torch.equal(got, want[done : done + n])
                done += n
        others = torch.randn(41, q.shape[1])
        got = attend(native, torch.cat((q[200:], others)), pages, spec, [30, 40, 1], [LENGTH, 300, 17])
        assert torch.equal(got[:30], want[200:])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_batch_has_the_bits_of_each_alone(data):
    from tenfold.ops.cpu.native import Native

    if not lib.available():
        pytest.skip(lib.status().reason)
    native = Native(data.draw(st.integers(1, 4)))
    lib.set_isa(data.draw(st.sampled_from(lib.isas())))
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=5))
    queries = [data.draw(st.integers(1, min(n, 80))) for n in lengths]
    spec = replace(
        SPEC, window=data.draw(st.sampled_from([0, 30, 129])), kv_heads=data.draw(st.sampled_from([1, 2, 6]))
    )
    pages = make_pages(lengths, spec, data.draw(st.sampled_from([5, 16])), seed=len(lengths))
    q = torch.randn(sum(queries), spec.heads * spec.head_dim)
    together = attend(native, q, pages, spec, queries, lengths)
    row = 0
    for r, n in enumerate(queries):
        alone = replace(pages, table=pages.table[r : r + 1])
        assert torch.equal(
            together[row : row + n], attend(native, q[row : row + n], alone, spec, [n], lengths[r : r + 1])
        )
        row += n
    lib.set_isa()
    lib.set_threads()


def rotate(x, cosines, sines):
    half = cosines.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines, rest), -1)


def rms(x, norm):
    return x if norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()


@pytest.mark.parametrize("tokens", [0, 1, 3, 70])
@pytest.mark.parametrize(("head_dim", "rotary"), [(32, 32), (32, 16), (20, 12), (7, 0), (256, 256)])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rope_write(isa, native, tokens, head_dim, rotary, norms, dtype):
    spec = replace(SPEC, head_dim=head_dim, rotary_dim=rotary)
    page_size, pages = 16, 8
    angles = torch.rand(200, rotary // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    qkv = torch.randn(tokens, (spec.heads + 2 * spec.kv_heads) * head_dim)
    positions = torch.randint(0, 200, (tokens,), dtype=torch.int32)
    slots = torch.randperm(pages * page_size)[:tokens].int()
    keys, values = (torch.full((pages, spec.kv_heads, page_size, head_dim), -7.0, dtype=dtype) for _ in range(2))
    q_norm, k_norm = (Norm(torch.rand(head_dim) + 0.5, 1e-6) if norms else None for _ in range(2))
    got = native.rope_write(qkv, Heads(spec, table, q_norm, k_norm), positions, slots, keys, values)

    heads = qkv.double().view(tokens, spec.heads + 2 * spec.kv_heads, head_dim)
    q, k, v = heads.split([spec.heads, spec.kv_heads, spec.kv_heads], 1)
    cosines, sines = table[positions.long()].double()[:, None].chunk(2, -1)
    want_q, want_k = rotate(rms(q, q_norm), cosines, sines), rotate(rms(k, k_norm), cosines, sines)
    torch.testing.assert_close(got.double(), want_q.reshape(got.shape), rtol=2e-6, atol=2e-6)
    flat_k, flat_v = (x.transpose(1, 2).reshape(pages * page_size, spec.kv_heads, head_dim) for x in (keys, values))
    # One unit in the last place of the stored type: the float32 result may round to the other neighbour.
    step = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(flat_k[slots.long()].double(), want_k, rtol=step, atol=2e-6)
    assert torch.equal(flat_v[slots.long()], v.to(torch.float32).to(dtype))
    untouched = torch.ones(pages * page_size, dtype=torch.bool)
    untouched[slots.long()] = False
    assert (flat_k[untouched] == -7).all()
    assert (flat_v[untouched] == -7).all()


def test_a_negative_slot_is_not_written(native):
    keys, values = torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 16, 32)
    qkv = torch.randn(2, 320)
    positions, slots = torch.zeros(2, dtype=torch.int32), torch.tensor([-1, 3], dtype=torch.int32)
    native.rope_write(qkv, Heads(SPEC, torch.zeros(1, 0)), positions, slots, keys, values)
    assert set(values.abs().sum((0, 1, 3)).nonzero().flatten().tolist()) == {3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrowing_rounds_like_torch(isa, native, dtype):
    """Every kind of float32: subnormal, halfway, overflowing, infinite, NaN."""
    special = [
        0.0,
        -0.0,
        1e-8,
        6e-8,
        3e-8,
        65504.0,
        65519.9,
        65520.0,
        1e30,
        math.inf,
        -math.inf,
        math.nan,
        1 + 2**-11,
        1 + 3 * 2**-11,
    ]
    bits = torch.randint(-(2**31), 2**31 - 1, (4096 - len(special),)).to(torch.int32).view(torch.float32)
    v = torch.cat((torch.tensor(special), bits)).view(64, 64)
    spec = AttentionSpec(heads=1, kv_heads=1, head_dim=64, scale=1.0)
    keys, values = (torch.zeros(4, 1, 16, 64, dtype=dtype) for _ in range(2))
    qkv = torch.cat((torch.zeros(64, 128), v), 1)
    index = torch.arange(64, dtype=torch.int32)
    native.rope_write(qkv, Heads(spec, torch.zeros(64, 0)), index, index, keys, values)
    torch.testing.assert_close(values.view(64, 64), v.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_wrong_inputs_are_refused(native):
    pages = make_pages([4], SPEC)
    q = torch.randn(1, 192)
    for bad, what in [(q.double(), "float32"), (torch.randn(192, 1).T[:, ::1].expand(1, 192)[:, :100], "heads of q")]:
        with pytest.raises(ValueError, match=what):
            attend(native, bad.contiguous(), pages, SPEC, [1], [4])
    with pytest.raises(ValueError, match="contiguous"):
        attend(native, torch.randn(192, 2).T, pages, SPEC, [2], [4])
    with pytest.raises(ValueError, match="values"):
        attend(native, q, replace(pages, values=pages.values.half()), SPEC, [1], [4])
    with pytest.raises(ValueError, match="keys"):
        attend(native, q, pages, replace(SPEC, head_dim=16, heads=12), [1], [4])
    with pytest.raises(ValueError, match="lse"):
        attend(native, q, pages, SPEC, [1], [4], torch.empty(2, 6))
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="qkv"):
        native.rope_write(q, Heads(SPEC, torch.zeros(1, 0)), slots, slots, pages.keys, pages.values)


def test_a_head_longer_than_the_kernels_take_is_refused(native):
    spec = AttentionSpec(heads=1, kv_heads=1, head_dim=1032, scale=1.0)
    pages = torch.zeros(1, 1, 16, spec.head_dim)
    with pytest.raises(ValueError, match="up to 1024"):
        native.rope_write(
            torch.zeros(1, 3 * spec.head_dim), Heads(spec, torch.zeros(1, 0)), torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32), pages, pages.clone(),
        )  # fmt: skip
