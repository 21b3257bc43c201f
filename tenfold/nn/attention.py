"""Self-attention over the paged cache."""

from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm
from tenfold.nn.step import Step
from tenfold.ops.kernels import Heads, Kernels


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
        keys, values = step.kv.keys[self.layer], step.kv.values[self.layer]
        attended = self.kernels.attention(self.qkv(x, norm=norm), self.heads, keys, values, step)
        return self.out(attended, residual=residual)
