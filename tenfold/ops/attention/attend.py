"""`Kernels.attend`: a step's leading decodes split their contexts (Triton), chunks run in tiles (CUDA C++, or Triton).

Nothing is read back from the device: how a step divides follows from integers that the host has anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from tenfold.ops.attention import decode, prefill
from tenfold.ops.attention.plan import MOST_ROWS, plan_decode, plan_prefill, power_of_two
from tenfold.ops.gpu import prefill as tensor_prefill
from tenfold.ops.kernels import AttentionSpec

CHUNKS = ("wgmma", "tiles", "sdpa")
SHORT = 16  # new tokens of a request, at most, for which splitting the context can pay
LEAST_CHUNK = SHORT + 1  # new tokens of the longest chunk from which on "wgmma" is used (H100, 2026-11-28)


@dataclass(frozen=True, slots=True)
class Arms:
    """softmax, merge: as in `plan`. chunks: "wgmma", the kernel in CUDA C++ where it can run and chunks are long;
    "tiles", the one in Triton, which takes all else; "sdpa", PyTorch's attention, request by request, where the layer
    has neither window nor softcap, lengths are known to the host and no log-sum-exp is wanted. plan: of "wgmma", whose
    softmax is replaced; None: its rule's.
    """

    softmax: str = "lazy"
    merge: str = "last"
    chunks: str = "wgmma"
    plan: tensor_prefill.ChunkPlan | None = None

    def __post_init__(self) -> None:
        if self.chunks not in CHUNKS:
            raise ValueError(f"chunks is {self.chunks!r}; allowed: {', '.join(CHUNKS)}.")


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    spec: AttentionSpec,
    max_query: int,
    max_kv: int,
    lse: Tensor | None = None,
    *,
    workspace: decode.Workspace,
    sms: int,
    arms: Arms = Arms(),
    phi: Tensor | None = None,
    decodes: int = 0,
    lengths: Sequence[tuple[int, int]] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `Kernels.attend`, into `out` where it is given. decodes: leading requests that have one new token each (none
    need be named where max_query is 1). lengths: new tokens and context of each request, where the host has them. phi:
    see `decode.run`. Rows that phi did not serve are counted in workspace.recomputed.
    """
    requests = len(kv_lengths)
    alone = requests if max_query <= 1 else decodes
    out = torch.empty_like(q) if out is None else out
    if alone:
        plan = plan_decode(spec, alone, max_kv, sms, arms.softmax, arms.merge)
        first = slice(0, alone)
        decode.run(
            *(plan, workspace, q[first], keys, values, page_table[first], kv_lengths[first], spec),
            phi=phi,
            lse=None if lse is None else lse[first],
            out=out[first],
        )
    if alone == requests:
        return out
    rest = slice(alone, None)
    if arms.chunks == "sdpa" and lengths is not None and lse is None and not spec.window and not spec.softcap:
        library(q, keys, values, page_table[rest], lengths[rest], alone, spec, out)
        return out
    tables = (page_table[rest], query_start[alone:], kv_lengths[rest])
    if splits_pay(spec, requests - alone, max_query, sms):
        plan = plan_decode(spec, requests - alone, max_kv, sms, arms.softmax, arms.merge, max_query)
        table, starts, contexts = tables
        own = (plan, workspace, q, keys, values, table, contexts, spec)
        return decode.run(*own, query_start=starts, phi=phi, lse=lse, out=out)
    if arms.chunks == "wgmma" and suits(spec, q, keys, arms.softmax, max_query):
        return tensor_prefill.run(
            *(plan_chunks(arms, max_query), workspace.queue, sms, q, keys, values, *tables, spec, max_query),
            recomputed=workspace.recomputed,
            phi=phi,
            lse=lse,
            out=out,
        )
    return prefill.run(
        *(plan_prefill(spec, arms.softmax), q, keys, values, *tables, spec, max_query),
        recomputed=workspace.recomputed,
        phi=phi,
        lse=lse,
        out=out,
    )


def plan_chunks(arms: Arms, max_query: int) -> tensor_prefill.ChunkPlan:
    """The plan of "wgmma"."""
    if arms.plan is None:
        return tensor_prefill.rule(arms.softmax, max_query)
    return arms.plan if arms.plan.softmax == arms.softmax else replace(arms.plan, softmax=arms.softmax)


def suits(spec: AttentionSpec, q: Tensor, keys: Tensor, softmax: str, max_query: int) -> bool:
    """Whether chunks run through the kernel in CUDA C++. Shorter ones leave most of its tiles empty, which have a row
    for every token of one query head; Triton's have rows for all query heads of a KV head.
    """
    return (
        max_query >= LEAST_CHUNK
        and softmax in tensor_prefill.ARMS
        and q.dtype == keys.dtype
        and tensor_prefill.legal(spec, keys.dtype, keys.shape[2])
        and tensor_prefill.runs_on(q.device)
    )


def splits_pay(spec: AttentionSpec, requests: int, max_query: int, sms: int) -> bool:
    """Whether chunks, such as drafts to verify, are so short and few that tiles would leave most of the GPU idle."""
    rows = power_of_two(max_query) * (spec.heads // spec.kv_heads)
    return max_query <= SHORT and rows <= MOST_ROWS and requests * spec.kv_heads < sms


def library(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Sequence[tuple[int, int]],
    start: int,
    spec: AttentionSpec,
    out: Tensor,
) -> None:
    """PyTorch's attention for each request, whose first has its tokens from `start` on; pages are gathered first."""
    for r, (count, length) in enumerate(lengths):
        tokens = slice(start, start + count)
        start += count
        pages = page_table[r, : -(-length // keys.shape[2])]
        k, v = (
            store[pages].transpose(0, 1).reshape(1, spec.kv_heads, -1, spec.head_dim)[:, :, :length]
            for store in (keys, values)
        )
        queries = q[tokens].view(1, count, spec.heads, spec.head_dim).transpose(1, 2)
        whole = count == length
        result = F.scaled_dot_product_attention(
            queries.to(k.dtype),
            k,
            v,
            attn_mask=None if whole else causal_lower_right(count, length),
            is_causal=whole,
            scale=spec.scale,
            enable_gqa=spec.heads != spec.kv_heads,
        )
        out[tokens].view(count, spec.heads, spec.head_dim).copy_(result[0].transpose(0, 1))
