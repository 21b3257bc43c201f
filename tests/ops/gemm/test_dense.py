"""The library's arm against float64: every combination of what is fused around the product."""

import itertools

import pytest
import torch
from torch import Tensor

from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

dense = pytest.importorskip("tenfold.ops.gemm.dense")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# Roundings of sums of size one: of the inner dimension's products, of the norm, the gate and the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
FUSED = list(itertools.product([False, True], [False, True], [None, "silu", "gelu_tanh"], [False, True]))

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(autouse=True)
def full_precision() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(0, 16, 32), (1, 16, 32), (3, 10, 33), (70, 36, 64)])
def test_all_that_is_fused(tokens: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    x, w = random(tokens, cols, seed=0).to(dtype), (random(rows, cols, seed=1) / cols**0.5).to(dtype)
    for biased, normed, act, added in FUSED if tokens < 70 else FUSED[::5]:
        bias = random(rows, seed=2).to(dtype).float() if biased else None
        norm = Norm(random(cols, seed=3).abs() + 0.5, 1e-5) if normed else None
        residual = random(tokens, rows // 2 if act else rows, seed=4).to(dtype) if added else None
        got = dense.linear(x, w, bias, norm, act, residual)
        wanted = reference(x, w, bias, norm, act, residual)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def reference(
    x: Tensor, w: Tensor, bias: Tensor | None, norm: Norm | None, act: str | None, residual: Tensor | None
) -> Tensor:
    """The oracle in float64."""
    x, w = x.double(), w.double()
    if norm is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    kernels, matrix = Oracle(DEVICE, torch.float64), Matrix("dense", *w.shape, (w,))
    return kernels.linear(x, matrix, bias, act=act, residual=None if residual is None else residual.double())


def test_a_residual_is_left_as_it_was() -> None:
    residual = random(2, 16, seed=5)
    before = residual.clone()
    dense.linear(random(2, 32, seed=6), random(16, 32, seed=7), residual=residual)
    assert torch.equal(residual, before)
