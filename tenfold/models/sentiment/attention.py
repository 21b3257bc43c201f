"""Transformer blocks of encoders, with the norm before (ViT) or after (BERT) each half; and which tokens see which."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Self-attention and an MLP, each with a residual. before: whether norms stand before them."""

    def __init__(self, width: int, heads: int, inner: int, eps: float, dropout: float, before: bool = False) -> None:
        super().__init__()
        self.heads, self.before, self.dropout = heads, before, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attended = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, sees: Tensor | None) -> Tensor:
        """x [B, T, d]; sees: bool, broadcast over [B, heads, T, T], True where a token may look; None: everywhere."""
        if self.before:
            x = x + self.attend(self.attention_norm(x), sees)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attend(x, sees))
        return self.mlp_norm(x + self.mlp(x))

    def attend(self, x: Tensor, sees: Tensor | None) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v, sees, self.dropout if self.training else 0.0)
        return self.drop(self.attended(out.transpose(1, 2).flatten(2)))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, heads, T, d / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mlp(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))


def across(real: Tensor, first: int) -> Tensor:
    """[B, 1, T, T]: each token sees itself and the real ones of the other modality, whose border is before token
    number `first`. Itself, so that nobody sees nothing. real [B, T]: False for padding.
    """
    count = real.shape[1]
    is_second = torch.arange(count, device=real.device) >= first
    other = is_second[:, None] != is_second[None, :]
    itself = torch.eye(count, dtype=torch.bool, device=real.device)
    return (other[None] & real[:, None, :] | itself[None])[:, None]
