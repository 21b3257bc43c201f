"""The flat product and the matrix-vector product in Triton against float64, interpreted on a CPU."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops.gpu.sums import Workspace
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

flat = pytest.importorskip("tenfold.ops.gemm.flat")
gemv = pytest.importorskip("tenfold.ops.gemm.gemv")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SMS = 132  # of an H100
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
# Roundings of sums of size one: of the inner dimension's products, of x times the norm's weight, and of the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
FUSED = list(itertools.product([False, True], [False, True], [None, "silu", "gelu_tanh"], [False, True]))
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return Workspace(torch.device(DEVICE))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def case(
    tokens: int, rows: int, cols: int, dtype: torch.dtype, fused: tuple[bool, bool, str | None, bool]
) -> tuple[Any, ...]:
    """Arguments x, w, bias, norm, act, residual."""
    biased, normed, act, added = fused
    return (
        random(tokens, cols, seed=0).to(dtype),
        (random(rows, cols, seed=1) / cols**0.5).to(dtype),
        random(rows, seed=2) if biased else None,
        Norm(random(cols, seed=3).abs() + 0.5, 1e-5) if normed else None,
        act,
        random(tokens, rows // 2 if act else rows, seed=4).to(dtype) if added else None,
    )


def reference(x: Tensor, w: Tensor, bias: Any, norm: Norm | None, act: str | None, residual: Any) -> Tensor:
    """The oracle in float64."""
    x, w = x.double(), w.double()
    if norm is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    kernels, matrix = Oracle(DEVICE, torch.float64), Matrix("dense", *w.shape, (w,))
    return kernels.linear(x, matrix, bias, act=act, residual=None if residual is None else residual.double())


def close(got: Tensor, wanted: Tensor) -> None:
    step = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=step, atol=step)


def poison(workspace: Workspace) -> None:
    """Partial sums that nobody wrote would show; counters must be found as they were left."""
    workspace.sums[: 1 << 20] = float("nan")


@BY_DTYPE
@pytest.mark.parametrize("ends", [(1, False), (3, False), (3, True)], ids=["whole", "last", "apart"])
def test_flat_with_all_that_is_fused(workspace: Workspace, ends: tuple[int, bool], dtype: torch.dtype) -> None:
    plan = flat.FlatPlan(32, 64, 2, *ends, early=True)
    assert flat.legal(plan, 3, 44, 176)
    for fused in FUSED if dtype == DTYPES[0] and not plan.apart else FUSED[::5]:
        given = case(3, 44, 176, dtype, fused)
        poison(workspace)
        close(flat.run(plan, workspace, *given), reference(*given))


@BY_DTYPE
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 1, 16), (16, 32, 64), (17, 70, 96), (64, 130, 272)])
def test_flat_sizes(workspace: Workspace, tokens: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    given = case(tokens, rows, cols, dtype, (True, True, None, True))
    for plan in (flat.FlatPlan(64, 32, 1), flat.FlatPlan(32, 16, 3, 4)):
        if flat.legal(plan, tokens, rows, cols):
            poison(workspace)
            close(flat.run(plan, workspace, *given), reference(*given))


def test_flat_repeats_bit_for_bit_and_leaves_counters_at_zero(workspace: Workspace) -> None:
    given = case(5, 96, 256, DTYPES[-1], (False, True, "silu", False))
    plan = flat.FlatPlan(32, 32, 2, 5)
    results = [flat.run(plan, workspace, *given) for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)
    assert not workspace.counters.any()


def test_who_adds_the_shares_up_does_not_change_the_result(workspace: Workspace) -> None:
    given = case(5, 96, 256, DTYPES[-1], (True, True, None, True))
    last = flat.run(flat.FlatPlan(32, 32, 2, 5), workspace, *given)
    workspace.counters.fill_(9)  # a second launch counts nobody
    apart = flat.run(flat.FlatPlan(32, 32, 2, 5, apart=True), workspace, *given)
    assert (workspace.counters == 9).all()
    workspace.counters.zero_()
    assert torch.equal(last, apart)


def test_a_share_without_columns_adds_nothing(workspace: Workspace) -> None:
    given = case(2, 32, 16 * 9, DTYPES[-1], (False, True, None, False))
    plan = flat.FlatPlan(32, 16, 2, 8)  # shares of two tiles: five of the eight have any
    poison(workspace)
    close(flat.run(plan, workspace, *given), reference(*given))


def test_stages_do_not_change_the_result(workspace: Workspace) -> None:
    given = case(2, 64, 256, DTYPES[-1], (False, False, None, False))
    plans = list(flat.ablation(flat.FlatPlan(64, 64, 4, 2), 2, 64, 256))
    assert [(p.stages, p.apart, p.early) for p in plans] == [
        *((stages, False, False) for stages in (1, 2, 3, 4, 6)),
        (4, True, False),
        (4, False, True),
    ]
    results = [flat.run(plan, workspace, *given) for plan in plans]
    assert all(torch.equal(results[0], other) for other in results)


@BY_DTYPE
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_gemv_with_all_that_is_fused(tokens: int, dtype: torch.dtype) -> None:
    for fused in FUSED if tokens == 3 and dtype == DTYPES[0] else FUSED[::7]:
        given = case(tokens, 20, 144, dtype, fused)
        close(gemv.run(gemv.GemvPlan(8, 64, tokens, early=True), *given), reference(*given))


@pytest.mark.parametrize("which", ["x", "w", "residual"])
def test_tensors_that_are_not_contiguous_are_refused(workspace: Workspace, which: str) -> None:
    given = list(case(2, 32, 64, DTYPES[0], (False, False, None, True)))
    at = {"x": 0, "w": 1, "residual": 5}[which]
    given[at] = given[at].t().contiguous().t()
    with pytest.raises(ValueError, match="contiguous"):
        flat.run(flat.FlatPlan(32, 32, 2), workspace, *given)
    with pytest.raises(ValueError, match="contiguous"):
        gemv.run(gemv.GemvPlan(8, 64), *given)


def test_plans_are_legal_and_keep_their_names() -> None:
    for tokens, rows, cols in ((1, 4096, 4096), (33, 128256, 4096), (64, 4096, 14336)):
        plans = list(flat.candidates(tokens, rows, cols, SMS))
        assert 0 < len(plans) <= 26
        assert all(flat.legal(p, tokens, rows, cols) and flat.parse(str(p)) == p for p in plans)
        assert all(gemv.parse(str(p)) == p for p in gemv.candidates(tokens, rows, cols))
    assert not list(flat.candidates(65, 4096, 4096, SMS))
    assert not list(flat.candidates(1, 4096, 4090, SMS))
    assert not list(gemv.candidates(5, 4096, 4096))
    assert any(p.splits > 1 for p in flat.candidates(1, 1024, 4096, SMS))


@pytest.mark.parametrize(
    "name", ["flat:64x128x4:s2", "flat:64x128x4:s2:apart", "flat:64x128x4:s1:early", "flat:64x128x4:s2:apart:early"]
)
def test_names_of_flat_plans(name: str) -> None:
    assert str(flat.parse(name)) == name


@pytest.mark.parametrize("name", ["gemv:8x512", "gemv:8x512x3", "gemv:4x1024:early"])
def test_names_of_matrix_vector_plans(name: str) -> None:
    assert str(gemv.parse(name)) == name


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize(
    ("rows", "cols"), [(4096, 4096), (6144, 4096), (22016, 4096), (4096, 14336), (1024, 1024), (128256, 4096)]
)
def test_the_rule_fills_the_gpu_evenly(rows: int, cols: int, tokens: int) -> None:
    plan = flat.plan(tokens, rows, cols, SMS)
    assert flat.legal(plan, tokens, rows, cols)
    assert flat.under_way(plan, tokens) >= 18 << 10
    programs = -(-rows // plan.rows) * plan.splits
    assert programs >= (1.5 if rows >= 4096 else 0.9) * SMS
    if rows >= 4096:
        assert programs / SMS / -(-programs // SMS) > 0.85  # of the time, the average multiprocessor is busy


def test_the_rule_has_no_plan_for_what_is_not_legal() -> None:
    assert flat.plan(65, 4096, 4096, SMS) is None
    assert flat.plan(1, 4096, 4090, SMS) is None


@pytest.mark.parametrize(
    "name", ["flat", "flat:64x64:s1", "flat:64x64x2", "gemv:8", "flat:axbxc:s1", "flat:1x2x3:s-1", "gemv:8x64:apart"]
)
def test_names_of_no_plan(name: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        flat.parse(name)
    with pytest.raises(ValueError, match="allowed"):
        gemv.parse(name)
