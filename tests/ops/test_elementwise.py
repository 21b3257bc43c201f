"""Triton's elementwise kernels against the oracle, interpreted on a CPU, and against float64 on a GPU.

Results come in poisoned memory and slots nobody owns hold NaN. float16 results may differ from the oracle's by one
rounding of float16 (2^-11 of the value), where float32 sums differ in order before they are rounded.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

elementwise = pytest.importorskip("tenfold.ops.elementwise")
rope = pytest.importorskip("tenfold.ops.gpu.rope")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ORACLE = Oracle(DEVICE)
# The interpreter has no arithmetic in bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
STEP = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1]),
    *([pytest.mark.gpu] if ON_GPU else []),
]


def run(name: str, *arguments: Any, of: Any = elementwise) -> Tensor:
    """A function of `elementwise`, or of another module, on memory that is NaN where it is not written."""
    torch.use_deterministic_algorithms(True)
    try:
        return getattr(of, name)(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: Tensor, wanted: Tensor, steps: float = 1.0) -> None:
    """Equal but for roundings: `steps` of the type, relative to values of size one."""
    assert got.shape == wanted.shape
    step = STEP[got.dtype] * steps
    torch.testing.assert_close(got.double(), wanted.double(), rtol=step, atol=step)


def gain(size: int, seed: int = 9) -> Norm:
    return Norm(random(size, seed=seed).abs() + 0.5, 1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (1, 64), (3, 96), (65, 80), (2, 1), (2, 2050), (1, 5000)])
def test_norm_and_the_norm_of_a_residual(dtype: torch.dtype, rows: int, cols: int) -> None:
    x, y, norm = random(rows, cols, dtype=dtype), random(rows, cols, dtype=dtype, seed=1), gain(cols)
    close(run("norm", x, norm), ORACLE.norm(x, norm))
    close(run("add_norm", x, y, norm), ORACLE.add_norm(x, y, norm), 4)


def test_norms_of_heads_and_of_large_numbers(dtype: torch.dtype) -> None:
    heads = random(3, 5, 64, dtype=dtype)
    close(run("norm", heads, gain(64)), ORACLE.norm(heads, gain(64)))
    huge = random(2, 64, dtype=dtype) * 1e4
    close(run("norm", huge, gain(64)), ORACLE.norm(huge, gain(64)), 2)


@pytest.mark.parametrize("scale", [1.0, 8.1])
@pytest.mark.parametrize(("tokens", "cols"), [(0, 64), (1, 64), (7, 2050), (3, 33)])
def test_embedding_rows(dtype: torch.dtype, tokens: int, cols: int, scale: float) -> None:
    table = random(11, cols, dtype=dtype)
    ids = torch.randint(0, 11, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wanted = ORACLE.embed(ids, Matrix("dense", 11, cols, (table,)), scale)
    assert torch.equal(run("embed", ids, table, scale), wanted)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 64), (1, 64), (5, 33), (2, 2051)])
def test_gate(dtype: torch.dtype, tokens: int, width: int, act: str) -> None:
    y = random(tokens, 2 * width, dtype=dtype) * 3
    close(run("act_mul", y, act), gated(y, act), 4)


def test_gates_of_extreme_numbers(dtype: torch.dtype) -> None:
    y = torch.tensor([[-6e4, -300.0, -0.0, 0.0, 300.0, 6e4] + [1.0] * 6], device=DEVICE).to(dtype)
    for act in ("silu", "gelu_tanh"):
        close(run("act_mul", y, act), gated(y, act))


def gated(y: Tensor, act: str) -> Tensor:
    width = y.shape[1] // 2
    eye = torch.eye(2 * width, dtype=y.dtype, device=DEVICE)
    return ORACLE.linear(y, Matrix("dense", 2 * width, 2 * width, (eye,)), act=act)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 2049)])
def test_add(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, y = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    assert torch.equal(run("add", x, y), x + y)


HEADS = [
    (4, 2, 64, 64),
    (3, 1, 80, 80),
    (2, 2, 96, 48),
    (4, 1, 112, 112),
    (2, 1, 128, 128),
    (1, 1, 256, 64),
    (2, 1, 64, 0),
    (3, 1, 576, 0),  # latent attention's
]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5, 19])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary"), HEADS)
def test_rotary_and_pages(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary: int, tokens: int, normed: bool
) -> None:
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0, rotary_dim=rotary)
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    table = random(40, max(1, rotary)).clamp(-1, 1)
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 40, (tokens,), generator=generator).int().to(DEVICE)
    slots = torch.randperm(4 * 8, generator=generator)[:tokens].int().to(DEVICE)
    owned = slots % 3 != 0
    layer = Heads(spec, table, *((gain(head_dim, 5), gain(head_dim, 6)) if normed else ()))
    wanted = torch.full((2, 4, kv_heads, 8, head_dim), float("nan"), device=DEVICE, dtype=dtype)
    q = ORACLE.rope_write(qkv, layer, positions, slots, wanted[0], wanted[1])
    left = slots[~owned].long()  # what is not owned stays as it was
    clean = torch.full_like(wanted, float("nan"))
    wanted[:, left // 8, :, left % 8] = float("nan")
    given = torch.where(owned, slots, -1 - slots)
    for module, name in ((elementwise, "rope_write"), (rope, "write")):  # the second is the first on a CPU
        got = clean.clone()
        close(run(name, qkv, layer, positions, given, got[0], got[1], of=module), q, 4)
        assert torch.equal(got.isnan(), wanted.isnan())
        close(got[0].nan_to_num(), wanted[0].nan_to_num(), 4)
        assert torch.equal(got[1].nan_to_num(), wanted[1].nan_to_num())


def test_tensors_that_are_not_contiguous_are_refused(dtype: torch.dtype) -> None:
    x = random(4, 8, dtype=dtype)
    strided, norm = random(8, 4, dtype=dtype).t(), gain(8)
    calls = (
        lambda: elementwise.norm(strided, norm),
        lambda: elementwise.add_norm(x, strided, norm),
        lambda: elementwise.add(x, strided),
        lambda: elementwise.act_mul(strided, "silu"),
        lambda: elementwise.embed(torch.zeros(2, dtype=torch.int64, device=DEVICE), strided),
    )
    for call in calls:
        with pytest.raises(ValueError, match="contiguous"):
            call()
