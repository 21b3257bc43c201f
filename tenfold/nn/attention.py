"""Self-attention over the paged cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm
from tenfold.nn.step import Step
from tenfold.ops.kernels import AttentionSpec, Heads, Kernels
from tenfold.ops.kv.layer import PackedLayer
from tenfold.ops.matrix import Bank
from tenfold.ops.oracle import rotate


@dataclass(frozen=True, slots=True, eq=False)
class Wide:
    """What OLMoE does before there are heads: a norm over all features of queries and of keys, then a clip of these and
    of values (0: none).
    """

    q_norm: RMSNorm
    k_norm: RMSNorm
    clip: float = 0.0

    def __call__(self, qkv: Tensor, q: int, kv: int) -> Tensor:
        """qkv [T, q + 2 kv] -> the same, changed."""
        queries, keys, values = qkv.split([q, kv, kv], dim=1)
        normed = [norm(part.contiguous()) for norm, part in ((self.q_norm, queries), (self.k_norm, keys))]
        changed = torch.cat([*normed, values], dim=1)
        return changed.clamp_(-self.clip, self.clip) if self.clip else changed


class Attention:
    """One layer's attention: keys and values go to the step's slots, then contexts are read through the page table.

    layer: index in the KV store. qkv: rows of q, then k, then v.
    """

    def __init__(
        self, kernels: Kernels, layer: int, heads: Heads, qkv: Linear, out: Linear, wide: Wide | None = None
    ) -> None:
        self.kernels = kernels
        self.layer = layer
        self.heads = heads
        self.qkv = qkv
        self.out = out
        self.wide = wide

    def __call__(self, x: Tensor, step: Step, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """x [T, D] -> `out(attention) + residual` [T, D], computed on norm(x)."""
        qkv = self.qkv(x, norm=norm)
        if self.wide is not None:
            spec = self.heads.spec
            qkv = self.wide(qkv, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        layer = step.kv.layers[self.layer]
        if isinstance(layer, PackedLayer):
            attended = self.kernels.attention_packed(qkv, self.heads, layer, step)
        else:
            attended = self.kernels.attention(qkv, self.heads, *layer, step)
        return self.out(attended, residual=residual)


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Queries of all heads, from tokens or from what they are compressed to. full: rows of the heads."""

    full: Linear
    down: Linear | None = None
    norm: RMSNorm | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.full(x) if self.down is None else self.full(self.down(x), norm=self.norm)


class LatentAttention:
    """Attention whose keys and values are made from one latent vector of a token (DeepSeek-V2), which is all that is
    cached: what makes keys of it is taken over by the queries, what makes values by the output ("absorbed").

    What is cached of a token is [latent, rotated features], key and value of one head for all queries. down: rows of
    the latent, then of the features that rotate. to_keys: of each head, [rank, plain]; to_values: [value, rank]. rope:
    table of the rotated features, of which neighbours are pairs where `paired`, else halves.
    """

    def __init__(
        self,
        kernels: Kernels,
        layer: int,
        spec: AttentionSpec,
        rope: Tensor,
        queries: Queries,
        down: Linear,
        norm: RMSNorm,
        to_keys: Bank,
        to_values: Bank,
        out: Linear,
        paired: bool,
    ) -> None:
        self.kernels = kernels
        self.layer = layer
        self.heads = Heads(spec, rope)
        self.queries = queries
        self.down = down
        self.norm = norm
        self.to_keys = to_keys
        self.to_values = to_values
        self.out = out
        self.paired = paired

    def __call__(self, x: Tensor, step: Step, norm: RMSNorm, residual: Tensor) -> Tensor:
        """x [T, D] -> `out(attention) + residual` [T, D], computed on norm(x)."""
        x = norm(x)
        heads, rank, plain = self.heads.spec.heads, self.to_keys.each[0].rows, self.to_keys.each[0].cols
        q, k = self.queries(x).view(len(x), heads, -1), self.down(x)
        cos, sin = self.heads.rope[step.positions][:, None].chunk(2, dim=-1)
        absorbed = self.kernels.each(q[..., :plain], self.to_keys)
        queries = torch.cat([absorbed, self._rotated(q[..., plain:], cos, sin)], dim=2).flatten(1)
        latent = self.norm(k[:, :rank].contiguous())
        kept = torch.cat([latent, self._rotated(k[:, None, rank:], cos, sin)[:, 0]], dim=1)
        keys, values = step.kv.keys[self.layer], step.kv.values[self.layer]  # such layers are never packed
        attended = self.kernels.attention(torch.cat([queries, kept, kept], dim=1), self.heads, keys, values, step)
        values_of = self.kernels.each(attended.view(len(x), heads, -1)[..., :rank], self.to_values)
        return self.out(values_of.flatten(1), residual=residual)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, heads, features]; pairs are put in halves, alike for queries and keys, which changes no product."""
        if self.paired:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x, cos, sin)
