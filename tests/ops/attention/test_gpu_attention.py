"""Attention kernels compiled for a GPU, in the types models run in, against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops.attention import decode, prefill, tune
from tenfold.ops.attention.attend import Arms, attend
from tenfold.ops.attention.plan import MERGES, DecodePlan, PrefillPlan, plan_decode, plan_prefill
from tenfold.ops.kernels import SOFTMAX
from tests.ops.attention.cases import Case, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TYPES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 1.6e-2, torch.float16: 3e-3}


def exact(case: Case) -> Tensor:
    """softmax(q k) v in float64 -> [T, heads * head_dim]; of idle requests zeros."""
    spec = case.spec
    q = case.q.double().view(-1, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
    out = torch.zeros_like(q)
    for r, length in enumerate(case.lengths):
        if not length:
            continue
        pages = case.page_table[r, : -(-length // case.keys.shape[2])].long()
        k, v = (
            store[pages].transpose(0, 1).reshape(spec.kv_heads, -1, spec.head_dim)[:, :length].double()
            for store in (case.keys, case.values)
        )
        begin, count = int(case.query_start[r]), case.counts[r]
        s = torch.einsum("tkgd,ksd->tkgs", q[begin : begin + count], k) * spec.scale
        if spec.softcap:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        places = torch.arange(length, device=s.device)
        own = length - count + torch.arange(count, device=s.device)[:, None]
        hidden = places > own
        if spec.window:
            hidden |= places <= own - spec.window
        s = s.masked_fill(hidden[:, None, None], float("-inf"))
        out[begin : begin + count] = torch.einsum("tkgs,ksd->tkgd", s.softmax(-1), v)
    return out.view(case.q.shape)


def close(found: Tensor, case: Case) -> None:
    loose = ROUNDING[case.q.dtype]
    torch.testing.assert_close(found.double(), exact(case), atol=loose, rtol=loose)


def decoded(case: Case, plan: DecodePlan, phi: Tensor | None = None, **rest: Any) -> tuple[Tensor, int]:
    workspace = decode.Workspace("cuda")
    out, _ = case.blank()
    starts = case.query_start if plan.queries > 1 else None
    arguments = (case.q, case.keys, case.values, case.page_table, case.kv_lengths, case.spec)
    decode.run(plan, workspace, *arguments, query_start=starts, phi=phi, out=out, **rest)
    torch.cuda.synchronize()
    assert not workspace.counters.any()
    return out, int(workspace.recomputed)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("heads", [(8, 8), (7, 1)], ids=str)
def test_decode_arms(dtype: torch.dtype, softmax: str, merge: str, heads: tuple[int, int]) -> None:
    case = make(
        [3000, 0, 1, 517],
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        page_size=16,
        dtype=dtype,
        device="cuda",
    )
    found, again = decoded(case, DecodePlan(8, softmax=softmax, merge=merge), case.phi)
    close(found, case)
    assert again == 0 or softmax == "paper"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 1), (96, 256), (112, 16), (128, 256), (256, 1)])
def test_decode_shapes(dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    case = make(
        [700, 33], heads=4, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=dtype, device="cuda", window=400
    )
    for softmax in ("lazy", "unified"):
        plan = plan_decode(case.spec, 2, 700, 132, softmax=softmax)
        close(decoded(case, plan, case.phi)[0], case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tile", [16, 32])
def test_decode_on_cuda_cores(dtype: torch.dtype, tile: int) -> None:
    case = make([900, 0, 5], heads=4, kv_heads=4, head_dim=128, page_size=16, dtype=dtype, device="cuda", softcap=30.0)
    for softmax in SOFTMAX:
        close(decoded(case, DecodePlan(6, tile, dot=False, softmax=softmax), case.phi)[0], case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_decode_of_drafts(dtype: torch.dtype) -> None:
    case = make([800, 5, 90], [5, 3, 1], heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=dtype, device="cuda")
    for softmax in SOFTMAX:
        for merge in MERGES:
            close(decoded(case, DecodePlan(6, queries=8, softmax=softmax, merge=merge), case.phi)[0], case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("bad", [1e4, -1e4, float("nan"), float("inf")])
def test_decode_with_an_absurd_phi(dtype: torch.dtype, merge: str, bad: float) -> None:
    case = make([900, 40], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=dtype, device="cuda")
    phi = case.phi.clone()
    phi[3] = bad
    for softmax in ("unified", "paper"):
        found, again = decoded(case, DecodePlan(6, softmax=softmax, merge=merge), phi)
        close(found, case)
        assert again >= 2


def test_decode_repeats_bit_for_bit() -> None:
    case = make([5000, 4000], heads=8, kv_heads=8, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda")
    plan = DecodePlan(16, softmax="unified", merge="last")
    first = decoded(case, plan, case.phi)[0]
    assert all(torch.equal(first, decoded(case, plan, case.phi)[0]) for _ in range(20))


@pytest.mark.parametrize("merge", MERGES)
def test_a_captured_decode_serves_every_length(merge: str) -> None:
    """With a phi that never holds for one head, so that the recomputation is inside the graph."""
    case = make([2000, 2000], heads=4, kv_heads=2, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda")
    phi = case.phi.clone()
    phi[1] = 500.0
    workspace = decode.Workspace("cuda")
    plan = DecodePlan(12, softmax="unified", merge=merge)
    lengths, out = case.kv_lengths.clone(), torch.empty_like(case.q)
    arguments = (plan, workspace, case.q, case.keys, case.values, case.page_table, lengths, case.spec)
    decode.run(*arguments, phi=phi, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.run(*arguments, phi=phi, out=out)
    for now in ([2000, 1], [1, 0], [700, 1999], [0, 0], [64, 65]):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        workspace.recomputed.zero_()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        close(out, replace(case, lengths=tuple(now)))
        assert int(workspace.recomputed) == sum(n > 0 for n in now)


def prefilled(case: Case, plan: PrefillPlan, phi: Tensor | None = None) -> tuple[Tensor, int]:
    out, _ = case.blank()
    recomputed = torch.zeros(1, dtype=torch.int64, device="cuda")
    tables = (case.page_table, case.query_start, case.kv_lengths)
    arguments = (plan, case.q, case.keys, case.values, *tables, case.spec, max(case.counts))
    prefill.run(*arguments, recomputed=recomputed, phi=phi, out=out)
    return out, int(recomputed)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("heads", [(8, 8), (7, 1)], ids=str)
def test_prefill_arms(dtype: torch.dtype, softmax: str, heads: tuple[int, int]) -> None:
    shape = {"heads": heads[0], "kv_heads": heads[1], "head_dim": 128, "page_size": 16}
    case = make([600, 700, 1, 129], [600, 50, 1, 129], dtype=dtype, device="cuda", **shape)
    for rows, warps in ((128, 8), (64, 4)):
        close(prefilled(case, PrefillPlan(rows, warps=warps, softmax=softmax), case.phi)[0], case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "rules"),
    [
        (64, {}),
        (80, {"window": 100}),
        (96, {}),
        (112, {"softcap": 30.0}),
        (128, {"window": 100, "softcap": 30.0}),
        (256, {"window": 100}),
    ],
    ids=str,
)
def test_prefill_shapes(dtype: torch.dtype, head_dim: int, rules: dict[str, Any]) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": head_dim, "page_size": 16}
    case = make([300, 333], [300, 40], dtype=dtype, device="cuda", **shape, **rules)
    for softmax in ("lazy", "unified"):
        close(prefilled(case, plan_prefill(case.spec, softmax), case.phi)[0], case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [1e4, -1e4, float("nan"), float("inf")])
def test_prefill_with_an_absurd_phi(dtype: torch.dtype, bad: float) -> None:
    case = make([300, 70], [300, 20], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=dtype, device="cuda")
    phi = case.phi.clone()
    phi[3] = bad
    for softmax in ("unified", "paper"):
        found, again = prefilled(case, plan_prefill(case.spec, softmax), phi)
        close(found, case)
        assert again >= 320


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("chunks", ["tiles", "sdpa"])
def test_a_mixed_step(dtype: torch.dtype, chunks: str) -> None:
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 16}
    case = make([900, 300, 333, 200], [1, 1, 40, 200], dtype=dtype, device="cuda", **shape)
    tables = (case.page_table, case.query_start, case.kv_lengths)
    found = attend(
        *(case.q, case.keys, case.values, *tables, case.spec, 200, 900),
        workspace=decode.Workspace("cuda"),
        sms=132,
        arms=Arms("unified", chunks=chunks),
        phi=case.phi,
        decodes=2,
        lengths=[(1, 900), (1, 300), (40, 333), (200, 200)],
    )
    close(found, case)


def test_every_candidate_runs_and_is_timed() -> None:
    """Small shapes: whether the measuring works, not what it finds."""
    case = make([600], heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda")
    said: list[str] = []
    plans = tune.decode_candidates(case.spec, 2, 600, 132)
    assert len(tune.measure_decode(case.spec, 2, 600, plans, say=said.append)) == len(plans)
    chunks = tune.prefill_candidates(case.spec)
    assert len(tune.measure_prefill(case.spec, 2, 300, chunks, prefix=30, say=said.append)) == len(chunks) + 2
    for plan in plans:
        close(decoded(case, plan, case.phi)[0], case)
