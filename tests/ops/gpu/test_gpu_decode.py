"""On a GPU: attention of decode steps in one launch against the oracle, whatever the softmax, splits and merge."""

import pytest
import torch

from tenfold.ops.gpu import argmax, decode
from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.oracle import Oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMS = 132
ADVERSARIAL = [0.0, 8.0, 11.0, -17.0, 1e4, -1e4, float("nan"), float("inf")]


def check(
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    *,
    page: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    norms: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    softmax: str = "lazy",
    phi: float | None = None,
    splits: int = 0,
    cluster: bool = False,
    rotary: int | None = None,
    depth: int = 1,
) -> int:
    """Results, log-sum-exp, the pages written and repeated bits; returns how many heads were computed again."""
    device = torch.device("cuda")
    torch.manual_seed(sum(lengths))
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window, softcap, rotary or head_dim)
    requests, columns = len(lengths), max(1, -(-max(lengths) // page))
    pages = requests * columns + 3
    keys = torch.full((pages, kv_heads, page, head_dim), float("nan"), device=device, dtype=dtype)
    values = keys.clone()
    table = torch.randperm(pages, device=device)[: requests * columns].view(requests, columns).int()
    slots = torch.full((requests,), -1, device=device, dtype=torch.int32)
    positions = torch.zeros(requests, device=device, dtype=torch.int32)
    for r, length in enumerate(lengths):
        for p in range(columns):
            count = min(page, max(0, length - 1 - p * page))
            for store in (keys, values):
                store[table[r, p], :, :count] = torch.randn(kv_heads, count, head_dim, device=device).to(dtype)
        if length:
            slots[r] = table[r, (length - 1) // page] * page + (length - 1) % page
            positions[r] = length - 1
    rope = torch.randn(max(lengths) + 1, spec.rotary_dim, device=device)
    qkv = torch.randn(requests, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    q_norm, k_norm = ([Norm(torch.rand(head_dim, device=device) + 0.5, 1e-6)] * 2) if norms else (None, None)
    kv_lengths = torch.tensor(lengths, device=device, dtype=torch.int32)
    plan = decode.plan(spec, requests, max(lengths), SMS, softmax)
    if splits:
        shapes = {1: (4, 3), 2: (8, 1), 3: (4, 2) if heads > 4 * kv_heads else (8, 1), 6: (4, 1)}
        plan = decode.DecodePlan(*shapes[depth], splits, softmax, cluster, depth)
    own = None if phi is None else torch.full((heads,), phi, device=device)
    workspace = decode.Workspace(device, requests * kv_heads)
    live = [r for r, length in enumerate(lengths) if length]
    expected_lse = torch.empty(len(live), heads, device=device)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    oracle = Oracle(device, dtype)
    layer = Heads(spec, rope, q_norm, k_norm, own)
    q = oracle.rope_write(qkv[live], layer, positions[live], slots[live], wanted_keys, wanted_values)
    starts = torch.arange(len(live) + 1, device=device, dtype=torch.int32)
    expected = oracle.attend(
        *(q, wanted_keys, wanted_values, table[live].contiguous(), starts, kv_lengths[live], spec),
        *(1, max(lengths), expected_lse),
    )
    results = []
    for _ in range(2):
        k, v = keys.clone(), values.clone()
        lse = torch.full((requests, heads), float("nan"), device=device)
        results.append(decode.run(plan, workspace, qkv, layer, positions, slots, k, v, table, kv_lengths, lse))
        # A norm's mean is added up in another order, which may move a rounding of a key.
        far = 2e-2 if norms else 0.0
        torch.testing.assert_close(k, wanted_keys, rtol=far, atol=far, equal_nan=True)
        torch.testing.assert_close(v, wanted_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(*results)
    error = (results[0][live].double() - expected.double()).norm() / expected.double().norm()
    assert error < 8e-3  # the weights of values are rounded to 16 bits, the oracle's are not
    assert (lse[live] - expected_lse).abs().max() < 2e-2
    for r, length in enumerate(lengths):
        assert length or not results[0][r].any()
    assert not workspace.counters.any()
    return int(workspace.recomputed)


@pytest.mark.parametrize("softmax", ["online", "lazy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shapes(softmax: str, dtype: torch.dtype) -> None:
    check(32, 32, 128, [1], softmax=softmax, dtype=dtype)
    check(32, 8, 128, [1000, 17], softmax=softmax, dtype=dtype)
    check(8, 2, 64, [5, 0, 333], softmax=softmax, dtype=dtype, norms=True)
    check(9, 3, 64, [16, 15, 17, 100], page=32, softmax=softmax, dtype=dtype)
    check(28, 4, 128, [3000, 700], norms=True, softmax=softmax, dtype=dtype)
    check(16, 2, 128, [3000, 700], window=100, softmax=softmax, dtype=dtype)
    check(4, 4, 128, [300, 70], softcap=20.0, softmax=softmax, dtype=dtype)
    check(8, 2, 128, [300, 70], rotary=64, softmax=softmax, dtype=dtype)


@pytest.mark.parametrize("lengths", [[2000], [4096, 1], [33] * 40])
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("cluster", [False, True])
def test_splits_and_merges(lengths: list[int], splits: int, cluster: bool) -> None:
    for heads, kv_heads in ((32, 8), (32, 4), (8, 8)):
        check(heads, kv_heads, 128, lengths, splits=splits, cluster=cluster and splits > 1)


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("softmax", ["online", "lazy"])
def test_two_tiles_a_warp(softmax: str, splits: int) -> None:
    """At the borders of a tile, of a block's tiles and of twice as many."""
    for lengths in ([1, 16, 17, 127, 128, 129], [255, 256, 257, 300, 0], [5000, 2049]):
        check(32, 8, 128, lengths, splits=splits, softmax=softmax, depth=2)
    check(16, 2, 128, [3000, 700], window=100, splits=splits, softmax=softmax, depth=2)
    check(28, 4, 128, [3000, 700], norms=True, splits=splits, softmax=softmax, depth=2)


@pytest.mark.parametrize("depth", [3, 6])
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_through_shared_memory(dtype: torch.dtype, splits: int, depth: int) -> None:
    """At the borders of a tile, of a ring, and of the 32 tiles whose pages a warp knows; pages of several tiles."""
    for lengths in ([1, 16, 17, 127, 128, 129], [383, 384, 385, 512, 0], [8192, 8193, 8200, 2049], [20000, 30]):
        check(32, 8, 128, lengths, splits=splits, dtype=dtype, depth=depth)
    check(16, 2, 128, [3000, 700], window=100, splits=splits, dtype=dtype, depth=depth)
    check(28, 4, 128, [3000, 700], norms=True, splits=splits, dtype=dtype, depth=depth, page=64)
    check(8, 8, 128, [5000, 0, 33], splits=splits, dtype=dtype, depth=depth, page=32)
    check(9, 3, 64, [5000, 33], splits=splits, dtype=dtype, depth=depth)
    check(32, 8, 128, [3000, 700], splits=splits, softmax="unified", phi=2.0, dtype=dtype, depth=depth)


@pytest.mark.parametrize("phi", ADVERSARIAL)
@pytest.mark.parametrize("softmax", ["unified", "paper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_unified_maximum_costs_time_only(softmax: str, phi: float, dtype: torch.dtype) -> None:
    again = check(32, 8, 128, [1000, 17], softmax=softmax, phi=phi, dtype=dtype)
    if not abs(phi) < 100:
        assert again == 2 * 2 * 32  # two runs of two requests
    for depth in (2, 3, 6):
        again = check(32, 8, 128, [1000, 17], softmax=softmax, phi=phi, dtype=dtype, splits=2, depth=depth)
        if not abs(phi) < 100:
            assert again == 2 * 2 * 32
    again = check(32, 8, 128, [1000, 17], softmax=softmax, phi=phi, dtype=dtype, splits=4, cluster=True)
    if not abs(phi) < 100:
        assert again == 2 * 2 * 32  # two runs of two requests


def test_argmax_takes_the_first_of_the_best() -> None:
    for rows, width in ((1, 128256), (8, 32000), (33, 151936), (300, 777), (5000, 7)):
        logits = torch.randn(rows, width, device="cuda")
        logits[0, [3, width - 1]] = 99.0
        for _ in range(2):
            found = argmax.argmax(logits)
            assert found[0] == 3
            assert torch.equal(found[1:], logits[1:].argmax(-1))
