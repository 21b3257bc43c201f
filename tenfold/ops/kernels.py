"""`Kernels`: the operations every forward is made of. One meaning (`oracle.py`), several implementations, one object
per engine.

Layers get the object when they are built and call it with tensors only; nothing here knows of requests or models.
T tokens, R requests, D features. Activations are [T, D], contiguous, in the compute type (float32 for the CPU kernels).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tenfold.ops.experts import experts
from tenfold.ops.matrix import Bank, Experts, Matrix, RawTensor
from tenfold.ops.route import Routing, route

if TYPE_CHECKING:
    from tenfold.ops.kv.layer import PackedLayer

SOFTMAX = ("online", "lazy", "unified", "paper")
"""How attention keeps its exponentials in range: a running maximum; one that moves only when it must; one that was
measured before, checked by the sum; the same, checked by every score (FlashDecoding++)."""
UNIFIED = SOFTMAX[2:]  # those that want a maximum to be known

GEMM = ("library", "flat", "flat-1", "flat-2")
"""What runs linear operations on dense weights: cuBLAS; the flat GEMM of FlashDecoding++ up to 64 tokens; that without
buffering; that with the paper's double buffering."""

MERGE = ("global", "cluster", "launch")
"""How splits of a context meet in decode attention: the last of them merges all through global memory; blocks of a
cluster merge through each other's shared memory; a second launch merges."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user fixed by hand about GPU kernels. graphs: capture steps of decodes; softmax: an arm of SOFTMAX; gemm:
    one of GEMM; merge: one of MERGE; "auto": what was measured, else a rule. Raises ValueError.
    """

    graphs: bool = True
    softmax: str = "auto"
    gemm: str = "auto"
    merge: str = "auto"

    def __post_init__(self) -> None:
        for name, arms in (("softmax", SOFTMAX), ("gemm", GEMM), ("merge", MERGE)):
            allowed = ("auto", *arms)
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")


FREE = Options()

PAGE_STRIDE = 8  # a step's page table is widened in these strides, so that its shape changes seldom


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMS norm: `x / sqrt(mean(x^2) + eps) * weight`, computed in float32; weight float32 [D] (Gemma's +1 already
    added).
    """

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shape and rules of one attention layer.

    scale multiplies q.k; window > 0 lets a query at position p see keys p-window+1..p only; softcap > 0 replaces
    score s by softcap * tanh(s / softcap); rotary_dim: leading features of each head that rotate (half-split pairs i,
    i + rotary_dim/2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    rotary_dim: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """The attention of one layer. rope: the table of `rope_write`; q_norm, k_norm: norms of each head, where the family
    has them; phi [heads] float32: a unified maximum of the scores of each head, measured before, which may change the
    time, never the result.
    """

    spec: AttentionSpec
    rope: Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    phi: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """Where the T tokens of a step's R requests go, packed one request after the other, and what they read.

    positions [T] int32, place in the request's sequence · slots [T] int32, where each token's K and V go (page *
    page_size + offset) · page_table [R, P] int32 · query_start [R+1] int32, request r owns tokens
    query_start[r]:query_start[r+1] · kv_lengths [R] int32, tokens of r in the cache after this step · max_query,
    max_kv: host integers, the longest of each · decodes: host integer, leading requests that have one token each (there
    may be more) · shared: whether a request may read what another one of this step writes (a sequence's guesses are
    requests of their own) · rooms [R] int32, where a packed cache keeps what each request has exact (`kv.layer`), None
    for other caches · memo: what was worked out of this step for all layers. Tensors are contiguous, on the kernels'
    device.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    max_query: int
    max_kv: int
    decodes: int = 0
    shared: bool = False
    rooms: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def parted(self) -> "tuple[Contexts, Contexts] | None":
        """The leading decodes of a step, and the other requests by themselves; None where they are not to be parted."""
        if self.shared or not 0 < self.decodes < len(self.kv_lengths):
            return None
        if "parted" not in self.memo:
            rest = len(self.kv_lengths) - self.decodes
            self.memo["parted"] = self._part(0, self.decodes, 1), self._part(self.decodes, rest, self.max_query)
        parts: tuple[Contexts, Contexts] = self.memo["parted"]
        return parts

    def parted_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of x [T, ...] that each of `parted` has."""
        return x.split((self.decodes, len(x) - self.decodes))

    def _part(self, begin: int, requests: int, max_query: int) -> "Contexts":
        """Requests from `begin` on, before which all are decodes."""
        alone = max_query == 1
        own, tokens = slice(begin, begin + requests), slice(begin, begin + requests if alone else None)
        return Contexts(
            self.positions[tokens],
            self.slots[tokens],
            self.page_table[own],
            self.query_start[begin : begin + requests + 1] - begin,
            self.kv_lengths[own],
            max_query,
            self.max_kv,
            requests if alone else 0,
            rooms=None if self.rooms is None else self.rooms[own],
        )


class Replay(Protocol):
    """See `Kernels.replay`."""

    def __call__(self, forward: Callable[[Any], Tensor], step: Any, /) -> Tensor: ...


class Kernels(Protocol):
    """A set of implementations for one device."""

    name: str
    reason: str  # why these kernels were picked, set by `make_kernels`

    @property
    def recomputed(self) -> int:
        """Rows of attention (a token's query head) so far whose unified maximum did not hold; may lag by a second."""
        ...

    def replay(self) -> "Replay":
        """A way to run the forwards of one model: `replay(forward, step)` is `forward(step)`, and may record the
        operations of one step to run them again for later ones."""
        ...

    def graph(self) -> "Replay":
        """The same for whole forwards, head included."""
        ...

    def bucket(self, requests: int, pages: int) -> tuple[int, int]:
        """The requests and page columns a step of decodes only is padded to, so that few shapes occur."""
        ...

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        """One Matrix of the parts stacked by rows, in the layout these kernels want."""
        ...

    def bank(self, experts: Sequence[Sequence[RawTensor]], pairs: bool = False, beside: Collection[str] = ()) -> Bank:
        """The same of every expert, each the parts of `matrix`. pairs: their rows are gate, then up; beside: storages
        of the projection that one kernel would run together with this one.
        """
        ...

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        """`table[ids] * scale`: ids [T] int64 -> [T, cols]."""
        ...

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """RMS norm over the last dimension."""
        ...

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        """`x + rms_norm(y)` (a norm after the sublayer, as Gemma has)."""
        ...

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
        """`y = (rms_norm(x) if norm else x) @ w.T + bias`; act "silu" or "gelu_tanh": the rows of w are gate then up
        and `y = act(gate) * up`; then `y + residual`. x [T, cols], bias [rows] float32, residual as the result -> [T,
        rows] (rows / 2 with act).
        """
        ...

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, own: Experts, residual: Tensor | None = None) -> Tensor:
        """`sum over k of weights[t, k] * down[e] @ (act(gate) * up)` with e = ids[t, k]; then `+ residual`. x [T,
        cols], ids [T, K] int64, weights [T, K] float32, residual as the result -> [T, rows of down].
        """
        ...

    def each(self, x: Tensor, bank: Bank) -> Tensor:
        """`x[:, h] @ bank[h].T` for every h: x [T, H, cols] -> [T, H, rows]."""
        ...

    def routed(
        self, x: Tensor, scores: Tensor, routing: Routing, own: Experts, residual: Tensor | None = None
    ) -> Tensor:
        """`experts` with the picks that a router's scores [T, experts] float32 make."""
        ...

    def records(self, own: Experts) -> bool:
        """Whether `experts` and `routed` of these can be recorded: the host need not know who goes where."""
        ...

    def logits(self, x: Tensor, w: Matrix, norm: Norm | None = None) -> Tensor:
        """`linear` of a model's head or router, in float32 [T, rows]; better not rounded to the compute type before."""
        ...

    def rope_write(
        self, qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Split qkv [T, (heads + 2 kv_heads) * head_dim]; norm each head of q and k (where there are norms); rotate
        both by heads.rope[position] ([P, rotary_dim]: cosines then sines, rotary_dim/2 each, float32); write k and v
        into the pages at slots; return q [T, heads * head_dim].
        """
        ...

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
        """Causal attention over pages. The queries of request r are its last tokens: query i of n stands at
        kv_lengths[r] - n + i. keys, values [pages, kv_heads, page_size, head_dim]; lse, where given, [T, heads]
        float32, receives log-sum-exp of the scores -> [T, heads * head_dim].
        """
        ...

    def attention(self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        """`attend` on what `rope_write` returns, qkv [T, (heads + 2 kv_heads) * head_dim] -> [T, heads * head_dim]."""
        ...

    def attention_packed(self, qkv: Tensor, heads: Heads, layer: "PackedLayer", step: Contexts) -> Tensor:
        """The same over a layer of a packed cache, which has no sliding window of its own (`kv.attend` is what it
        means).
        """
        ...


class Separate:
    """What kernels do that neither fuse `rope_write` and `attend` nor experts nor capture graphs."""

    @property
    def recomputed(self) -> int:
        return 0

    def logits(self: Any, x: Tensor, w: Matrix, norm: Norm | None = None) -> Tensor:
        return self.linear(x, w, norm=norm).float()

    def bank(
        self: Any, experts: Sequence[Sequence[RawTensor]], pairs: bool = False, beside: Collection[str] = ()
    ) -> Bank:
        return Bank(tuple(self.matrix(parts) for parts in experts))

    def experts(
        self: Any, x: Tensor, ids: Tensor, weights: Tensor, own: Experts, residual: Tensor | None = None
    ) -> Tensor:
        return experts(self, x, ids, weights, own, residual)

    def routed(
        self: Any, x: Tensor, scores: Tensor, routing: Routing, own: Experts, residual: Tensor | None = None
    ) -> Tensor:
        return self.experts(x, *route(scores, routing), own, residual)

    def records(self, own: Experts) -> bool:
        return False

    def each(self: Any, x: Tensor, bank: Bank) -> Tensor:
        return torch.stack([self.linear(part.contiguous(), w) for part, w in zip(x.unbind(1), bank.each)], dim=1)

    def graph(self) -> Replay:
        return run

    def bucket(self, requests: int, pages: int) -> tuple[int, int]:
        return requests, -(-pages // PAGE_STRIDE) * PAGE_STRIDE

    def attention(self: Any, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        q = self.rope_write(qkv, heads, step.positions, step.slots, keys, values)
        return self.attend(
            *(q, keys, values, step.page_table, step.query_start, step.kv_lengths, heads.spec),
            *(step.max_query, step.max_kv),
        )

    def attention_packed(self: Any, qkv: Tensor, heads: Heads, layer: "PackedLayer", step: Contexts) -> Tensor:
        from tenfold.ops.kv.attend import attention  # which is made of kernels

        return attention(self, qkv, heads, layer, step)


def run(forward: Callable[[Any], Tensor], step: Any) -> Tensor:
    return forward(step)
