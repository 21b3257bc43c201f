"""Attention over latent vectors under Triton's interpreter, and on a GPU, against the oracle."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.oracle import Oracle

latent = pytest.importorskip("tenfold.ops.attention.latent")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PLAN = latent.LatentPlan(16, 16, 3, 4, 2)
WIDTH = 576 if ON_GPU else 80
PAGE = 8

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def compare(
    lengths: list[int], news: list[int], heads: int, dtype: torch.dtype, plan: "latent.LatentPlan", width: int = WIDTH
) -> None:
    """Requests with contexts of these lengths, of which so many tokens are new."""
    draw = torch.Generator().manual_seed(sum(lengths) + heads)
    spec = AttentionSpec(heads, 1, width, width**-0.5)
    columns = -(-max(lengths) // PAGE) + 1
    pages = columns * len(lengths)
    table = torch.randperm(pages, generator=draw).view(len(lengths), columns).to(torch.int32)
    kept = torch.randn(pages, 1, PAGE, width, generator=draw).to(dtype)
    q = torch.randn(sum(news), heads * width, generator=draw).to(dtype)
    starts = torch.tensor([0, *torch.tensor(news).cumsum(0).tolist()], dtype=torch.int32)
    inputs: list[Tensor] = [t.to(DEVICE) for t in (q, kept, table, starts, torch.tensor(lengths, dtype=torch.int32))]
    q, kept, table, starts, sizes = inputs
    found = latent.run(plan, q, kept, table, starts, sizes, spec, max(news))
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    want = Oracle(DEVICE, torch.float64).attend(
        exact[0], exact[1], exact[1], table, starts, sizes, spec, max(news), max(lengths)
    )
    assert found.dtype == dtype
    assert (found - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    assert torch.equal(found, latent.run(plan, q, kept, table, starts, sizes, spec, max(news)))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])
def test_decodes(dtype: torch.dtype, splits: int) -> None:
    compare([37, 1, 200], [1, 1, 1], 16, dtype, replace(PLAN, splits=splits))
    compare([65], [1], 5, dtype, replace(PLAN, splits=splits))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])
def test_chunks_and_decodes_together(dtype: torch.dtype, splits: int) -> None:
    compare([37, 90, 11], [1, 30, 11], 3, dtype, replace(PLAN, splits=splits))


@pytest.mark.parametrize("width", [64, 96, 192] if not ON_GPU else [576, 192])
def test_widths(width: int) -> None:
    compare([50, 3], [2, 1], 4, DTYPES[0], PLAN, width)


def test_rows_beyond_a_program() -> None:
    compare([70], [9], 7, DTYPES[0], replace(PLAN, rows=32, tile=32))


def test_what_is_served() -> None:
    spec = AttentionSpec(16, 1, 576, 0.1)
    assert latent.takes(spec)
    assert latent.parts(576) == (512, 64)
    for other in (replace(spec, kv_heads=2), replace(spec, window=9), replace(spec, head_dim=576 + 24)):
        assert not latent.takes(other)


@pytest.mark.parametrize("heads", [16, 128])
def test_rules_give_every_multiprocessor_work(heads: int) -> None:
    spec = AttentionSpec(heads, 1, 576, 0.1)
    alone = latent.plan(spec, 1, 1, 32768, 132)
    assert alone.splits * -(-heads // alone.rows) >= 32
    assert latent.plan(spec, 64, 1, 4096, 132).splits <= 8
    assert latent.plan(spec, 1, 4096, 4096, 132).splits == 1
    assert latent.plan(spec, 1, 1, 100, 132).splits == 1
