"""The plain-torch kernels against formulas written another way, in float64 where rounding would blur the answer.

Tolerances: float32 sums of a few hundred terms of size one round to about 1e-6; 1e-5 leaves room for the order of sums.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops import oracle
from tenfold.ops.blocks import dequantize, quantize
from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.matrix import Matrix, RawTensor
from tenfold.ops.oracle import Oracle

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KERNELS = Oracle()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(tensor: Tensor) -> Matrix:
    return Matrix("dense", tensor.shape[0], tensor.shape[1], (tensor,))


@dataclass
class Paged:
    """Contexts scattered over a store whose other contents are NaN, and the same contexts dense."""

    spec: AttentionSpec
    counts: list[int]
    lengths: list[int]
    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    keys: Tensor
    values: Tensor
    table: Tensor

    @classmethod
    def make(
        cls, spec: AttentionSpec, counts: list[int], lengths: list[int], page_size: int = 4, order: int = 0
    ) -> "Paged":
        """order: seed of the page numbers; all else is the same for every order."""
        shape = (spec.kv_heads, spec.head_dim)
        k = [random(n, *shape, seed=1 + i) for i, n in enumerate(lengths)]
        v = [random(n, *shape, seed=101 + i) for i, n in enumerate(lengths)]
        widths = [-(-n // page_size) for n in lengths]
        pages = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(order)).tolist()
        keys = torch.full((len(pages), spec.kv_heads, page_size, spec.head_dim), float("nan"))
        values = keys.clone()
        table = torch.zeros(len(lengths), max(widths, default=1) + 1, dtype=torch.int32)
        for r, width in enumerate(widths):
            for column in range(width):
                page = table[r, column] = pages.pop()
                part = slice(column * page_size, min((column + 1) * page_size, lengths[r]))
                size = part.stop - part.start
                keys[page, :, :size] = k[r][part].transpose(0, 1)
                values[page, :, :size] = v[r][part].transpose(0, 1)
        q = random(sum(counts), spec.heads * spec.head_dim, seed=201)
        return cls(spec, counts, lengths, q, k, v, keys, values, table)

    def attend(self, lse: Tensor | None = None) -> Tensor:
        starts = torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        longest, most = max(self.lengths, default=0), max(self.counts, default=0)
        return KERNELS.attend(
            self.q, self.keys, self.values, self.table, starts, lengths, self.spec, most, longest, lse=lse
        )

    def scores(self, r: int) -> Tensor:
        """Masked scores of request r [heads, n, S] in float64."""
        spec, n, length = self.spec, self.counts[r], self.lengths[r]
        begin = sum(self.counts[:r])
        q = self.q[begin : begin + n].view(n, spec.heads, spec.head_dim).double()
        k = self.k[r].double().repeat_interleave(spec.heads // spec.kv_heads, dim=1)
        scores = torch.einsum("nhd,shd->hns", q, k) * spec.scale
        if spec.softcap:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        distance = torch.arange(length - n, length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < spec.window if spec.window else True)
        return scores.masked_fill(~seen, float("-inf"))

    def expected(self) -> Tensor:
        group = self.spec.heads // self.spec.kv_heads
        rows = [
            torch.einsum("hns,shd->nhd", self.scores(r).softmax(-1), self.v[r].double().repeat_interleave(group, dim=1))
            for r in range(len(self.counts))
        ]
        return torch.cat(rows).flatten(1).float()


SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=0.3)
BATCHES = {
    "one token": ([1], [1]),
    "one decode": ([1], [13]),
    "decodes": ([1, 1, 1], [5, 1, 12]),
    "prefill": ([9], [9]),
    "chunk": ([3], [11]),
    "prefills": ([2, 7, 4], [2, 7, 4]),
    "mixed": ([1, 5, 1, 1, 3], [8, 5, 4, 9, 17]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"window": 1},
        {"window": 3},
        {"window": 4},
        {"window": 100},
        {"softcap": 0.7},
        {"window": 5, "softcap": 2.0, "kv_heads": 1},
        {"head_dim": 7},
    ],
    ids=str,
)
def test_attend(batch: str, changes: dict[str, int | float]) -> None:
    paged = Paged.make(replace(SPEC, **changes), *BATCHES[batch])  # type: ignore[arg-type]
    torch.testing.assert_close(paged.attend(), paged.expected(), **CLOSE)


@pytest.mark.parametrize("page_size", [1, 2, 5, 16])
@pytest.mark.parametrize("window", [0, 6])
def test_attend_page_sizes(page_size: int, window: int) -> None:
    paged = Paged.make(replace(SPEC, window=window), *BATCHES["mixed"], page_size=page_size)
    torch.testing.assert_close(paged.attend(), paged.expected(), **CLOSE)


def test_attend_agrees_with_torch() -> None:
    """The reference above is ours too; this one is not."""
    paged = Paged.make(replace(SPEC, kv_heads=4), [9], [9])
    q, k, v = (t.view(9, 4, 8).transpose(0, 1) for t in (paged.q, paged.k[0], paged.v[0]))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SPEC.scale)
    torch.testing.assert_close(paged.attend(), want.transpose(0, 1).reshape(9, 32), **CLOSE)


@pytest.mark.parametrize("batch", BATCHES)
def test_attend_lse(batch: str) -> None:
    paged = Paged.make(replace(SPEC, softcap=3.0), *BATCHES[batch])
    lse = torch.full((sum(paged.counts), SPEC.heads), float("nan"))
    paged.attend(lse)
    want = torch.cat([paged.scores(r).logsumexp(-1).T for r in range(len(paged.counts))])
    torch.testing.assert_close(lse, want.float(), **CLOSE)


def test_attend_merges_by_lse() -> None:
    """Two halves of a context, weighted by their log-sum-exps, are the whole."""
    whole = Paged.make(SPEC, [1], [11])
    left = replace(whole, lengths=[8])
    right = replace(whole, lengths=[3], table=whole.table[:, 2:])
    sums = [torch.empty(1, SPEC.heads) for _ in range(2)]
    outs = [part.attend(lse).view(1, SPEC.heads, -1) for part, lse in zip((left, right), sums, strict=True)]
    weights = torch.stack(sums).softmax(dim=0)[..., None]
    merged = (weights * torch.stack(outs)).sum(dim=0).view(1, -1)
    torch.testing.assert_close(merged, whole.attend(), **CLOSE)


@pytest.mark.parametrize("window", [0, 3])
def test_attend_ignores_where_pages_are(window: int) -> None:
    spec = replace(SPEC, window=window)
    outs = [Paged.make(spec, *BATCHES["mixed"], order=order).attend() for order in range(3)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("window", [0, 5])
def test_attend_in_chunks(window: int) -> None:
    """A prompt cut anywhere gives what the whole prompt gives."""
    spec = replace(SPEC, window=window)
    whole = Paged.make(spec, [17], [17])
    want = whole.attend()
    for cut in (1, 4, 16):
        first = replace(whole, counts=[cut], lengths=[cut], q=whole.q[:cut])
        second = replace(whole, counts=[17 - cut], q=whole.q[cut:])
        torch.testing.assert_close(torch.cat([first.attend(), second.attend()]), want, **CLOSE)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [0, 5])
def test_attend_in_bounded_workspace(batch: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the workspace, and so the blocks, the result is the same."""
    paged = Paged.make(replace(SPEC, window=window), *BATCHES[batch])
    want = paged.attend(), torch.empty(sum(paged.counts), SPEC.heads)
    paged.attend(want[1])
    for elements in (1, 100, 300):
        monkeypatch.setitem(oracle.WORKSPACE, "cpu", elements)
        lse = torch.empty_like(want[1])
        torch.testing.assert_close(paged.attend(lse), want[0], **CLOSE)
        torch.testing.assert_close(lse, want[1], **CLOSE)


def test_attend_nobody() -> None:
    paged = Paged.make(SPEC, [], [])
    assert paged.attend().shape == (0, 32)


def test_attend_a_request_without_tokens() -> None:
    paged = Paged.make(SPEC, [1, 0, 2], [4, 6, 5])
    torch.testing.assert_close(paged.attend(), paged.expected(), **CLOSE)
    decodes = Paged.make(SPEC, [1, 0, 1], [4, 6, 5])
    torch.testing.assert_close(decodes.attend(), decodes.expected(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_in_half_precision(dtype: torch.dtype) -> None:
    """Only inputs and output are rounded: the error is that of a few roundings, not of a sum in half precision."""
    paged = Paged.make(SPEC, *BATCHES["mixed"])
    half = replace(paged, q=paged.q.to(dtype), keys=paged.keys.to(dtype), values=paged.values.to(dtype))
    out = half.attend()
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), paged.expected(), rtol=0.02, atol=0.02)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).float()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_norm(tokens: int) -> None:
    x, y = random(tokens, 24) * 3, random(tokens, 24, seed=1)
    norm = Norm(random(24, seed=2), 1e-2)
    torch.testing.assert_close(KERNELS.norm(x, norm), rms(x, norm.weight, 1e-2), **CLOSE)
    torch.testing.assert_close(KERNELS.add_norm(x, y, norm), x + rms(y, norm.weight, 1e-2), **CLOSE)


def test_norm_of_large_halves() -> None:
    """Squares overflow float16, so the norm must not be computed in it."""
    norm = Norm(torch.ones(16), 1e-6)
    out = KERNELS.norm(torch.full((1, 16), 1000.0, dtype=torch.float16), norm)
    assert out.dtype == torch.float16
    assert torch.equal(out, torch.ones(1, 16, dtype=torch.float16))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("act", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("extras", [(), ("bias",), ("norm",), ("residual",), ("bias", "norm", "residual")], ids=str)
def test_linear(tokens: int, act: str | None, extras: tuple[str, ...]) -> None:
    x, w = random(tokens, 12), random(10, 12, seed=1)
    out_rows = 5 if act else 10
    bias = random(10, seed=2) if "bias" in extras else None
    norm = Norm(random(12, seed=3), 1e-5) if "norm" in extras else None
    residual = random(tokens, out_rows, seed=4) if "residual" in extras else None
    want = (rms(x, norm.weight, norm.eps) if norm else x) @ w.T
    if bias is not None:
        want = want + bias
    if act == "silu":
        want = want[:, :5] / (1 + (-want[:, :5]).exp()) * want[:, 5:]
    elif act == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (want[:, :5] + 0.044715 * want[:, :5] ** 3)
        want = 0.5 * want[:, :5] * (1 + inner.tanh()) * want[:, 5:]
    if residual is not None:
        want = want + residual
    got = KERNELS.linear(x, dense(w), bias, norm=norm, act=act, residual=residual)
    torch.testing.assert_close(got, want, **CLOSE)


def test_linear_leaves_its_inputs_alone() -> None:
    x, w, residual = random(3, 8), dense(random(8, 8, seed=1)), random(3, 8, seed=2)
    before = x.clone(), residual.clone()
    KERNELS.linear(x, w, random(8, seed=3), norm=Norm(torch.ones(8), 1e-5), residual=residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_embed() -> None:
    table = dense(random(6, 4))
    ids = torch.tensor([5, 0, 5])
    assert torch.equal(KERNELS.embed(ids, table), table.data[0][[5, 0, 5]])
    assert torch.equal(KERNELS.embed(ids, table, 2.5), table.data[0][[5, 0, 5]] * 2.5)
    assert KERNELS.embed(ids[:0], table).shape == (0, 4)


@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write(rotary_dim: int, normed: bool) -> None:
    """Rotation as complex numbers; rows land at their slots, and no other slot changes."""
    spec = AttentionSpec(heads=3, kv_heads=1, head_dim=8, scale=1.0, rotary_dim=rotary_dim)
    half = rotary_dim // 2
    angles = torch.rand(10, half, generator=torch.Generator().manual_seed(1)) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([7, 0, 9], dtype=torch.int32)
    slots = torch.tensor([5, 8, 3], dtype=torch.int32)
    keys, values = torch.full((3, 1, 4, 8), 9.0), torch.full((3, 1, 4, 8), 9.0)
    qkv = random(3, 5 * 8)
    norms = [Norm(random(8, seed=s), 1e-3) if normed else None for s in (2, 3)]
    q = KERNELS.rope_write(qkv, Heads(spec, table, *norms), positions, slots, keys, values)

    heads = qkv.view(3, 5, 8)
    turn = torch.polar(torch.ones(10, half), angles)[positions.long()][:, None]

    def turned(x: Tensor, norm: Norm | None) -> Tensor:
        x = rms(x, norm.weight, norm.eps) if norm else x
        pairs = torch.complex(x[..., :half], x[..., half:rotary_dim]) * turn
        return torch.cat((pairs.real, pairs.imag, x[..., rotary_dim:]), dim=-1)

    torch.testing.assert_close(q, turned(heads[:, :3], norms[0]).reshape(3, 24), **CLOSE)
    rows = keys.transpose(1, 2).reshape(12, 8)
    torch.testing.assert_close(rows[slots.long()], turned(heads[:, 3:4], norms[1])[:, 0], **CLOSE)
    assert torch.equal(values.transpose(1, 2).reshape(12, 8)[slots.long()], heads[:, 4])
    others = [s for s in range(12) if s not in slots]
    assert (rows[others] == 9).all()


def test_matrix_stacks_what_files_store() -> None:
    parts = [
        RawTensor("a", "F32", (2, 32), random(2, 32)),
        quantize(RawTensor("b", "F32", (3, 32), random(3, 32, seed=1)), "Q8_0"),
        RawTensor("c", "BF16", (1, 32), random(1, 32, seed=2).bfloat16()),
    ]
    matrix = KERNELS.matrix(parts)
    assert (matrix.rows, matrix.cols, matrix.format) == (6, 32, "dense")
    assert torch.equal(matrix.data[0], torch.cat([dequantize(part) for part in parts]))
    assert Oracle(dtype=torch.bfloat16).matrix(parts).data[0].dtype == torch.bfloat16


def test_matrix_does_not_copy_what_fits() -> None:
    data = random(4, 8)
    assert KERNELS.matrix([RawTensor("a", "F32", (4, 8), data)]).data[0].data_ptr() == data.data_ptr()


def test_compute_type_is_checked() -> None:
    with pytest.raises(ValueError, match="allowed: float32"):
        Oracle(dtype=torch.int8)
