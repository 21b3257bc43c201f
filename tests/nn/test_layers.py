"""Layers hand the right things to the kernels: against the same arithmetic written out in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.nn.attention import Attention
from tenfold.nn.embed import Embedding, Head
from tenfold.nn.linear import Linear
from tenfold.nn.mlp import MLP
from tenfold.nn.norm import RMSNorm
from tenfold.nn.rope import RopeSpec, rope_table
from tenfold.ops.kernels import AttentionSpec, Heads, Kernels
from tenfold.ops.matrix import RawTensor
from tests.steps import Sequences, make_store

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(kernels: Kernels, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear(kernels, kernels.matrix([RawTensor("w", "F32", tuple(weight.shape), weight)]), bias)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def test_norm(kernels: Kernels) -> None:
    x, y, weight = random(3, 32, seed=1), random(3, 32, seed=2), random(32, seed=3)
    norm = RMSNorm(kernels, weight, 1e-5)
    torch.testing.assert_close(norm(x), normed(x, weight), **CLOSE)
    torch.testing.assert_close(norm.add(x, y), x + normed(y, weight), **CLOSE)


def test_mlp(kernels: Kernels) -> None:
    x, weight = random(3, 32, seed=1), random(32, seed=2)
    gate, up, down = random(48, 32, seed=3), random(48, 32, seed=4), random(32, 48, seed=5)
    bias, after = random(96, seed=6), random(32, seed=7)
    mlp = MLP(linear(kernels, torch.cat((gate, up)), bias), linear(kernels, down, after), "silu")
    inner = normed(x, weight)
    want = x + (F.silu(inner @ gate.T + bias[:48]) * (inner @ up.T + bias[48:])) @ down.T + after
    # Sums of products of normal numbers reach hundreds here; the tolerance is relative to that.
    torch.testing.assert_close(mlp(x, RMSNorm(kernels, weight, 1e-5), x), want, rtol=1e-5, atol=1e-3)


def test_embedding_and_head(kernels: Kernels) -> None:
    table, weight = random(40, 32, seed=1), torch.ones(32)
    matrix = kernels.matrix([RawTensor("t", "F32", (40, 32), table)])
    ids = torch.tensor([39, 0, 7])
    x = Embedding(kernels, matrix, 3.0)(ids)
    torch.testing.assert_close(x, table[ids] * 3, **CLOSE)
    norm = RMSNorm(kernels, weight, 1e-5)
    logits = normed(x, weight) @ table.T
    torch.testing.assert_close(Head(kernels, matrix)(x, norm), logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(Head(kernels, matrix, 2.0)(x, norm), 2 * (logits / 2).tanh(), **CLOSE)
    assert Head(kernels, matrix)(x[:0], norm).shape == (0, 40)


def test_attention_layers_keep_apart(kernels: Kernels) -> None:
    """A layer reads and writes its own keys and values, and nothing of its neighbours'."""
    spec = AttentionSpec(heads=2, kv_heads=1, head_dim=16, scale=0.25, rotary_dim=16)
    rope = rope_table(RopeSpec(1e4, 16, 64), 64)
    qkv, out = linear(kernels, random(64, 32, seed=1)), linear(kernels, random(32, 32, seed=2))
    layers = [Attention(kernels, i, Heads(spec, rope), qkv, out) for i in range(2)]
    store = make_store(layers=2, kv_heads=1, head_dim=16, page_size=4)
    sequences = Sequences(store)
    x = random(5, 32, seed=3)
    step = sequences.step({0: [1, 2, 3, 4, 5]})
    first = layers[0](x, step)
    assert store.values[1].isnan().all()
    torch.testing.assert_close(layers[1](x, step), first, **CLOSE)
    torch.testing.assert_close(layers[1](x, step, residual=x), first + x, **CLOSE)
