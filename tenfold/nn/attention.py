"""Self-attention over the paged cache."""

from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm
from tenfold.nn.step import Step
from tenfold.ops.kernels import AttentionSpec, Kernels


class Attention:
    """One layer's attention: keys and values go to the step's slots, then contexts are read through the page table.

    layer: index in the KV store. qkv: rows of q, then k, then v. rope: table of `nn.rope.rope_table`, shared by layers.
    q_norm, k_norm: norms of each head, where the family has them. phi [heads] float32: see `Kernels.attention`.
    """

    def __init__(
        self,
        kernels: Kernels,
        layer: int,
        spec: AttentionSpec,
        qkv: Linear,
        out: Linear,
        rope: Tensor,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        phi: Tensor | None = None,
    ) -> None:
        self.kernels = kernels
        self.layer = layer
        self.spec = spec
        self.qkv = qkv
        self.out = out
        self.rope = rope
        self.q_norm = None if q_norm is None else q_norm.spec
        self.k_norm = None if k_norm is None else k_norm.spec
        self.phi = phi

    def __call__(self, x: Tensor, step: Step, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """x [T, D] -> `out(attention) + residual` [T, D], computed on norm(x)."""
        keys, values = step.kv.keys[self.layer], step.kv.values[self.layer]
        qkv = self.qkv(x, norm=norm)
        heads = self.kernels.attention(
            qkv,
            self.rope,
            step.positions,
            step.slots,
            keys,
            values,
            step.page_table,
            step.query_start,
            step.kv_lengths,
            self.spec,
            step.max_query,
            step.max_kv,
            self.q_norm,
            self.k_norm,
            self.phi,
            step.decodes,
            step.shared,
        )
        return self.out(heads, residual=residual)
