"""Kernels that a model is tried out on: no cache, so gradients flow; matrices may be rounded in their place; and what
chosen matrices take in or give out can be looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import ACTIVATIONS, Oracle, rotate
from tenfold.quantize.schemes import Scheme, round_activations

Watch = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True, eq=False)
class Swap:
    """What stands in for a matrix: weight [rows, cols] of inputs that are divided `by` [cols] first and rounded as the
    scheme says; bias [rows] in place of its own.
    """

    weight: Tensor
    scheme: Scheme
    by: Tensor | None = None
    bias: Tensor | None = None


class Trial(Oracle):
    """The oracle for steps whose sequences all begin in the step and have the same length (see `batches`).

    swaps, inputs, outputs: by the id of a matrix; inputs sees what it multiplies, outputs what it gives, before a
    residual is added.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(device, dtype)
        self.swaps: Mapping[int, Swap] = {}
        self.inputs: Mapping[int, Watch] = {}
        self.outputs: Mapping[int, Watch] = {}
        self.tracking = False  # whether embeddings begin a graph of gradients

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        rows = super().embed(ids, table, scale)
        return rows.detach().requires_grad_() if self.tracking else rows

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, x.shape[-1:], norm.weight.to(wide.dtype), norm.eps).to(x.dtype)

    def logits(self, x: Tensor, w: Matrix, norm: Norm | None = None) -> Tensor:
        found = self.linear(x, w, norm=norm)
        return found if found.dtype == torch.float64 else found.float()

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
        if id(w) in self.inputs:
            self.inputs[id(w)](x)
        swap = self.swaps.get(id(w))
        if swap is None:
            y = F.linear(x, self.dense(w), None if bias is None else bias.to(x.dtype))
        else:
            bias = bias if swap.bias is None else swap.bias
            x = x if swap.by is None else x / swap.by.to(x.dtype)
            x = round_activations(x, swap.scheme)
            y = F.linear(x, swap.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if act is not None:
            gate, up = y.chunk(2, dim=-1)
            y = ACTIVATIONS[act](gate) * up
        if id(w) in self.outputs:
            self.outputs[id(w)](y)
        return y if residual is None else y + residual

    def attention(self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        """qkv [sequences * length, features]; nothing is read from or written to the cache."""
        spec, length = heads.spec, step.max_query
        each = qkv.view(len(qkv), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = each.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        q = q if heads.q_norm is None else self.norm(q, heads.q_norm)
        k = k if heads.k_norm is None else self.norm(k, heads.k_norm)
        if spec.rotary_dim:
            cos, sin = heads.rope[step.positions][:, None].chunk(2, dim=-1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (part.view(-1, length, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        return attended(q, k, v, spec).transpose(1, 2).reshape(len(qkv), -1)


def attended(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of q [B, heads, T, D] to k, v [B, kv_heads, T, D], of sequences from their first token on."""
    group, length = spec.heads // spec.kv_heads, q.shape[2]
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    if not spec.softcap and not 0 < spec.window < length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
    places = torch.arange(length, device=q.device)
    hidden = places[None] > places[:, None]
    if spec.window:
        hidden |= places[None] <= places[:, None] - spec.window
    scores = (q @ k.transpose(2, 3)) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
