"""Attention of decode steps in one launch against the oracle, wherever the kernel runs."""

import torch

from tenfold.ops.gpu import decode
from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.oracle import Oracle

SMS = 132
EVEN_SPLITS = -1
ADVERSARIAL = [0.0, 8.0, 11.0, -17.0, 1e4, -1e4, float("nan"), float("inf")]


def check(
    device: torch.device,
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
    shape: tuple[int, int] | None = None,
    sms: int = SMS,
) -> int:
    """Results, log-sum-exp, the pages written and repeated bits; returns how many heads were computed again.

    splits 0: the plan of an H100; EVEN_SPLITS: shared out by lengths. shape: warps of a block and blocks of a
    multiprocessor, of which there are `sms`.
    """
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
        parts = decode.EVEN if splits == EVEN_SPLITS else splits
        plan = decode.DecodePlan(*(shape or shapes[depth]), parts, softmax, cluster, depth)
    own = None if phi is None else torch.full((heads,), phi, device=device)
    workspace = decode.Workspace(device, requests * kv_heads)
    workspace.sums.fill_(float("nan"))  # whatever lies there
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
        inputs = (qkv, layer, positions, slots, k, v, table, kv_lengths, lse)
        shared = decode.share(plan, spec, kv_lengths, sms, {}, k.data_ptr())
        results.append(decode.run(plan, workspace, *inputs, shared=shared))
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
