"""The plain-torch meaning of every operation, for any device and floating type.

Invariant: norms, rotary embedding, softmax and everything between query and attention output are computed in float32,
whatever the compute type. Other implementations are tested against this one; it serves where no compiled kernels run.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops.blocks import dequantize
from tenfold.ops.formats import unpack
from tenfold.ops.kernels import AttentionSpec, Heads, Norm, Replay, Separate, run
from tenfold.ops.matrix import Bank, Matrix, RawTensor, dense_bank

# Elements of the largest float32 temporary of one attention block: 64 MiB on a CPU, 512 MiB on a GPU.
WORKSPACE = {"cpu": 1 << 24, "cuda": 1 << 27}


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


class Oracle(Separate):
    """`Kernels` in plain torch. Matrices are made dense in the compute type; packed ones that other kernels made
    (`formats.stack`) are unpacked at each use.
    """

    name = "torch"
    reason = ""

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"The compute type is {dtype}; allowed: float32, bfloat16 or float16.")
        self.device = torch.device(device)
        self.dtype = dtype

    def replay(self) -> Replay:
        return run

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        """Dense [rows, cols] on the device; a single part already there in the compute type is not copied."""
        dense = [dequantize(part, self.dtype).to(self.device) for part in parts]
        data = dense[0] if len(dense) == 1 else torch.cat(dense)
        return Matrix("dense", data.shape[0], data.shape[1], (data.contiguous(),))

    def bank(self, experts: Sequence[Sequence[RawTensor]], pairs: bool = False, beside: Collection[str] = ()) -> Bank:
        """Dense experts lie in one memory, which grows by one expert at a time."""
        first = self.matrix(experts[0])
        if first.format != "dense":
            return Bank((first, *(self.matrix(parts) for parts in experts[1:])))
        stacked = torch.empty(len(experts), first.rows, first.cols, dtype=self.dtype, device=self.device)
        stacked[0] = first.data[0]
        for place, parts in zip(stacked[1:], experts[1:]):
            place.copy_(self.dense(self.matrix(parts)))
        return dense_bank(stacked)

    def dense(self, w: Matrix) -> Tensor:
        """The values [rows, cols] in the compute type."""
        return w.data[0] if w.format == "dense" else unpack(w, self.dtype)

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        rows = F.embedding(ids, self.dense(table))
        return rows if scale == 1.0 else rows * scale

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps).to(x.dtype)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return x + self.norm(y, norm)

    def linear(
        self,
        x: Tensor,
        w: Matrix,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if norm is not None:
            x = self.norm(x, norm)
        y = F.linear(x, self.dense(w), None if bias is None else bias.to(x.dtype))
        if act is not None:
            gate, up = y.chunk(2, dim=-1)
            y = ACTIVATIONS[act](gate) * up
        return y if residual is None else y + residual

    def each(self, x: Tensor, bank: Bank) -> Tensor:
        if bank.stacked is None:
            return super().each(x, bank)
        return torch.bmm(x.transpose(0, 1), bank.stacked.transpose(1, 2)).transpose(0, 1)

    def rope_write(
        self, qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        spec, tokens = heads.spec, qkv.shape[0]
        each = qkv.view(tokens, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = each.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        if heads.q_norm is not None:
            q = self.norm(q, heads.q_norm)
        if heads.k_norm is not None:
            k = self.norm(k, heads.k_norm)
        if spec.rotary_dim:
            cos, sin = heads.rope[positions][:, None].chunk(2, dim=-1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        page_size = keys.shape[2]
        pages, offsets = slots // page_size, slots % page_size
        keys[pages, :, offsets] = k.to(keys.dtype)
        values[pages, :, offsets] = v.to(values.dtype)
        return q.reshape(tokens, spec.heads * spec.head_dim)

    def attend(
        self,
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
    ) -> Tensor:
        """Decodes run as one batch; each longer chunk by itself, in blocks of queries that bound the workspace."""
        queries = q.view(-1, spec.heads, spec.head_dim)
        out = torch.empty_like(queries)
        for block in blocks(queries.shape[0], query_start, kv_lengths, spec, max_query, max_kv):
            requests = slice(block.first, block.last)
            rows = slice(block.start, block.start + (block.last - block.first) * block.queries)
            lengths = kv_lengths[requests] - block.rest if block.rest else kv_lengths[requests]
            chunk = queries[rows].view(-1, block.queries, spec.heads, spec.head_dim)
            result, sums = attend_block(
                chunk, keys, values, page_table[requests], lengths, spec, block.longest, lse is not None
            )
            out[rows] = result.view(-1, spec.heads, spec.head_dim)
            if lse is not None and sums is not None:
                lse[rows] = sums.view(-1, spec.heads)
        return out.view(q.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading features of x [T, heads, D] in half-split pairs; cos, sin [T, 1, rotary_dim / 2] float32."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


class Block(NamedTuple):
    """Requests first:last, `queries` of each from token `start` on, `rest` tokens of the request after them."""

    first: int
    last: int
    start: int
    queries: int
    rest: int
    longest: int  # context of the longest request, up to the block's end


def blocks(
    tokens: int, query_start: Tensor, kv_lengths: Tensor, spec: AttentionSpec, max_query: int, max_kv: int
) -> Iterator[Block]:
    """Cut a step into attention blocks of bounded workspace.

    A step of decodes only needs no value from the device; others read the lengths once.
    """
    requests = kv_lengths.shape[0]
    budget = WORKSPACE.get(kv_lengths.device.type, WORKSPACE["cpu"])
    if max_query <= 1 and tokens == requests:
        yield from decodes(0, requests, 0, max_kv, budget // (spec.kv_heads * spec.head_dim * max(1, max_kv)))
        return
    starts, lengths = query_start.tolist(), kv_lengths.tolist()
    first = 0
    while first < requests:
        start, last, longest = starts[first], first + 1, lengths[first]
        count = starts[last] - start
        if count == 1:
            while last < requests and starts[last + 1] - starts[last] == 1:
                last += 1
            longest = max(lengths[first:last])
            yield from decodes(first, last, start, longest, budget // (spec.kv_heads * spec.head_dim * longest))
        chunk = max(1, budget // (spec.heads * max(1, longest)))
        for done in range(0, count if count > 1 else 0, chunk):
            size = min(chunk, count - done)
            rest = count - done - size
            yield Block(first, last, start + done, size, rest, longest - rest)
        first = last


def decodes(first: int, last: int, start: int, longest: int, chunk: int) -> Iterator[Block]:
    """Requests of one token each, at most `chunk` (but at least one) at a time."""
    for begin in range(first, last, max(1, chunk)):
        yield Block(begin, min(last, begin + max(1, chunk)), start + begin - first, 1, 0, longest)


def attend_block(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    spec: AttentionSpec,
    longest: int,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q [R, n, heads, D], the last n tokens of contexts of `lengths` [R].

    Returns the output, like q, and the log-sum-exp [R, n, heads] where wanted.
    """
    requests, count = q.shape[:2]
    group = spec.heads // spec.kv_heads
    k, v, places = gather(keys, values, page_table, lengths, count, spec.window, longest)
    own = lengths[:, None] - count + torch.arange(count, device=q.device, dtype=lengths.dtype)
    hidden = places[:, None, :] > own[:, :, None]
    if spec.window:
        hidden |= places[:, None, :] <= own[:, :, None] - spec.window
    # [R, kv_heads, group * n, D]: the heads that share keys are rows of one product.
    grouped = q.float().view(requests, count, spec.kv_heads, group, spec.head_dim).permute(0, 2, 3, 1, 4)
    scores = grouped.reshape(requests, spec.kv_heads, group * count, spec.head_dim) @ k.transpose(2, 3)
    scores = (scores * spec.scale).view(requests, spec.kv_heads, group, count, -1)
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.masked_fill_(hidden[:, None, None], float("-inf"))
    out = scores.softmax(dim=-1).view(requests, spec.kv_heads, group * count, -1) @ v
    out = out.view(requests, spec.kv_heads, group, count, spec.head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)
    lse = scores.logsumexp(dim=-1).permute(0, 3, 1, 2).reshape(requests, count, spec.heads) if want_lse else None
    return out.to(q.dtype), lse


def gather(
    keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor, count: int, window: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the last `count` queries of each context can see: k, v [R, kv_heads, S, D] float32, positions [R, S]."""
    page_size = keys.shape[2]
    span = -(-longest // page_size)
    first = torch.zeros_like(lengths)
    if window:
        span = min(span, (window + count + page_size - 2) // page_size + 1)
        first = (lengths - (count + window - 1)).clamp_(min=0) // page_size
    index = first[:, None] + torch.arange(span, device=lengths.device, dtype=lengths.dtype)
    pages = page_table.gather(1, index.clamp(max=page_table.shape[1] - 1).long())
    places = (index[:, :, None] * page_size + torch.arange(page_size, device=index.device, dtype=index.dtype)).flatten(
        1
    )
    k, v = (
        store[pages].transpose(1, 2).reshape(len(pages), store.shape[1], -1, store.shape[3]).float()
        for store in (keys, values)
    )
    # What lies past the end of a context is undefined, perhaps NaN, which a weight of zero would not silence.
    v = v.masked_fill_((places >= lengths[:, None])[:, None, :, None], 0.0)
    return k, v, places
