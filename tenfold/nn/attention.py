"""Self-attention over the paged cache."""

from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm
from tenfold.nn.step import Step
from tenfold.ops.kernels import Heads, Kernels
from tenfold.ops.kv.layer import PackedLayer


class Attention:
    """One layer's attention: keys and values go to the step's slots, then contexts are read through the page table.

    layer: index in the KV store. qkv: rows of q, then k, then v.
    """

    def __init__(self, kernels: Kernels, layer: int, heads: Heads, qkv: Linear, out: Linear) -> None:
        self.kernels = kernels
        self.layer = layer
        self.heads = heads
        self.qkv = qkv
        self.out = out

    def __call__(self, x: Tensor, step: Step, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """x [T, D] -> `out(attention) + residual` [T, D], computed on norm(x)."""
        qkv = self.qkv(x, norm=norm)
        layer = step.kv.layers[self.layer]
        if isinstance(layer, PackedLayer):
            attended = self.kernels.attention_packed(qkv, self.heads, layer, step)
        else:
            attended = self.kernels.attention(qkv, self.heads, *layer, step)
        return self.out(attended, residual=residual)
