"""Layers of vision towers: patches of pictures in, one vector a patch out.

The tokens of all tiles or windows lie one after the other, [T, D]; `Spans` says which of them see each other. Nothing
here is causal, and nothing is cached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm
from tenfold.ops.kernels import Kernels

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class LayerNorm:
    """weight, bias [D] float32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


Norm = LayerNorm | RMSNorm


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Runs of tokens that see each other and nothing else, grouped by length so that equal ones run as one batch.

    groups: of each length, places [n, length] int64 of the tokens, None where all tokens are in order; and the length.
    """

    groups: tuple[tuple[Tensor | None, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Spans":
        """lengths: of runs that follow each other."""
        if len(set(lengths)) == 1:
            return cls(((None, lengths[0]),))
        starts: dict[int, list[int]] = {}
        at = 0
        for length in lengths:
            starts.setdefault(length, []).append(at)
            at += length
        return cls(
            tuple(
                (torch.tensor(own, device=device)[:, None] + torch.arange(length, device=device), length)
                for length, own in sorted(starts.items())
            )
        )


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """`softmax(q @ k.T / sqrt(features)) @ v` inside each span: q, k, v [T, heads, features] -> [T, heads *
    features].
    """
    heads, features = q.shape[1:]
    out = torch.empty_like(q)
    for places, length in spans.groups:
        own = (x if places is None else x[places.flatten()] for x in (q, k, v))
        queries, keys, values = (x.reshape(-1, length, heads, features).transpose(1, 2) for x in own)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        rows = attended.transpose(1, 2).reshape(-1, heads, features)
        if places is None:
            return rows.flatten(1)
        out[places.flatten()] = rows
    return out.flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Axial:
    """Rotation of a tower's queries and keys by rows and columns. cos, sin [T, features / 2] float32: a quarter of the
    features by row, a quarter by column.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, features: int, theta: float) -> "Axial":
        """rows, columns [T] int64."""
        powers = torch.arange(0, features // 2, 2, dtype=torch.float32, device=rows.device) / (features // 2)
        frequencies = 1.0 / (theta**powers)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads, features], of which those half a head apart are pairs."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all blocks of a tower share for one picture."""

    spans: Spans
    axial: Axial | None = None


class VisionAttention:
    """qkv: rows of q, then k, then v. q_norm, k_norm: over all features, where a family has them."""

    def __init__(
        self, kernels: Kernels, heads: int, qkv: Linear, out: Linear, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> None:
        self.kernels = kernels
        self.heads = heads
        self.qkv = qkv
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(
        self, x: Tensor, around: Surroundings, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x, norm=norm).chunk(3, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in (q, k, v))
        if around.axial is not None:
            q, k = around.axial(q), around.axial(k)
        return self.out(attend(q, k, v, around.spans).contiguous(), residual=residual)


class VisionMLP:
    """`down(act(up(x)))`, without a gate."""

    def __init__(self, up: Linear, down: Linear, act: Activation) -> None:
        self.up = up
        self.down = down
        self.act = act

    def __call__(self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        return self.down(self.act(self.up(x, norm=norm)), residual=residual)


class VisionBlock:
    """Norm, attention, norm, feed-forward, each of the two around a residual. scales: what their results are
    multiplied by [D], where a family does that.
    """

    def __init__(
        self,
        norms: tuple[Norm, Norm],
        attention: VisionAttention,
        mlp: Callable[..., Tensor],
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.norms = norms
        self.attention = attention
        self.mlp = mlp
        self.scales = scales

    def __call__(self, x: Tensor, around: Surroundings) -> Tensor:
        x = self._around(x, 0, lambda y, **rest: self.attention(y, around, **rest))
        return self._around(x, 1, self.mlp)

    def _around(self, x: Tensor, index: int, layer: Callable[..., Tensor]) -> Tensor:
        norm = self.norms[index]
        fused, y = (norm, x) if isinstance(norm, RMSNorm) else (None, norm(x))
        if self.scales is None:
            return layer(y, norm=fused, residual=x)
        return x + self.scales[index] * layer(y, norm=fused)


def patches(pixels: Tensor, size: int) -> Tensor:
    """Tiles cut into squares: [n, C, H, W] -> [n, rows * columns, C * size * size], in the order of a convolution's
    weights; what is left over at the right and below is left out.
    """
    n, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    cut = pixels[:, :, : rows * size, : columns * size].reshape(n, channels, rows, size, columns, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels * size * size)


def standardised(pixels: Tensor, scale: float, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(pixels * scale - mean) / std` in float32: uint8 [n, H, W, 3] -> [n, 3, H, W]."""
    middle, spread = (torch.tensor(each, dtype=torch.float32, device=pixels.device) for each in (mean, std))
    return ((pixels.float() * scale - middle) / spread).permute(0, 3, 1, 2)


def fold(x: Tensor, side: int) -> Tensor:
    """Squares of side x side neighbours become one vector, row by row: [n, rows, columns, D] -> [n, rows / side,
    columns / side, side * side * D].
    """
    n, rows, columns, features = x.shape
    cut = x.reshape(n, rows // side, side, columns // side, side, features)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(n, rows // side, columns // side, side * side * features)
