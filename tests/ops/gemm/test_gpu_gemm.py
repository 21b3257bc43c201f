"""On a GPU: the paper's GEMM and GEMV on shapes of real models against float64, and what only a GPU can get wrong:
repeats, captured graphs, launches that begin before what they read was written.

Relative to the norm of the result, roundings to bfloat16 (2^-9) or float16 (2^-12) of x times the norm's weight and of
the result add to less than two of them.
"""

import pytest
import torch
from torch import Tensor

from tenfold.ops.gpu.sums import Workspace
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

flat = pytest.importorskip("tenfold.ops.gemm.flat")
gemv = pytest.importorskip("tenfold.ops.gemm.gemv")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
# Rows, columns, norm, act, residual: as layers of Llama-2-7B, Llama-3-8B and odd sizes call them.
LAYERS = [
    (12288, 4096, True, None, False),
    (4096, 4096, False, None, True),
    (22016, 4096, True, "silu", False),
    (4096, 14336, False, None, True),
    (1000, 1040, True, "gelu_tanh", True),
]
# Few, as every combination of shape, type, width and plan is a kernel of its own, which takes a second to compile.
CASES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in LAYERS), *((shape, torch.float16) for shape in LAYERS[1:5:3])],
    ids=lambda value: f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value).split(".")[-1],
)


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return Workspace(torch.device("cuda"))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def layer(tokens: int, shape: tuple, dtype: torch.dtype) -> tuple:
    """Arguments x, w, bias, norm, act, residual."""
    rows, cols, normed, act, added = shape
    return (
        random(tokens, cols, seed=0).to(dtype),
        (random(rows, cols, seed=1) / cols**0.5).to(dtype),
        random(rows, seed=2),
        Norm(random(cols, seed=3).abs() + 0.5, 1e-5) if normed else None,
        act,
        random(tokens, rows // 2 if act else rows, seed=4).to(dtype) if added else None,
    )


def assert_near(got: Tensor, given: tuple) -> None:
    x, w, bias, norm, act, residual = given
    exact, oracle = x.double(), Oracle("cuda", torch.float64)
    if norm is not None:
        exact = exact * (exact.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    residual = None if residual is None else residual.double()
    wanted = oracle.linear(exact, Matrix("dense", *w.shape, (w.double(),)), bias, act=act, residual=residual)
    assert ((got.double() - wanted).norm() / wanted.norm()).item() < 2 * UNIT[x.dtype]


@CASES
@pytest.mark.parametrize("tokens", [1, 7, 20, 64])
def test_flat(workspace: Workspace, shape: tuple, tokens: int, dtype: torch.dtype) -> None:
    given = layer(tokens, shape, dtype)
    plan = flat.plan(tokens, *shape[:2], 132)
    shares = flat.FlatPlan(64, 128, 2, 4, apart=True)
    for one in (plan, shares, flat.FlatPlan(64, 64, 1)):
        workspace.sums.fill_(float("nan"))
        assert_near(flat.run(one, workspace, *given), given)
    assert not workspace.counters.any()


@CASES
@pytest.mark.parametrize("tokens", [1, 4])
def test_gemv(shape: tuple, tokens: int, dtype: torch.dtype) -> None:
    given = layer(tokens, shape, dtype)
    for plan in (gemv.GemvPlan(8, 512), gemv.GemvPlan(4, 1024, 3), gemv.GemvPlan(4, 512, 4, early=True)):
        assert_near(gemv.run(plan, *given), given)


@pytest.mark.parametrize("tokens", [1, 4, 64])
@pytest.mark.parametrize("apart", [False, True], ids=["last", "apart"])
def test_chains_that_begin_early_wait_for_what_they_read(workspace: Workspace, apart: bool, tokens: int) -> None:
    """Each launch reads what the launch before wrote, and all share the memory of partial sums."""
    width, depth = 2048, 24
    weights = [(random(width, width, seed=i) / width**0.5).bfloat16() for i in range(depth)]
    norm = Norm(torch.ones(width, device="cuda"), 1e-5)
    x = random(tokens, width, seed=99).bfloat16()

    def chain(early: bool) -> Tensor:
        y = x
        for i, w in enumerate(weights):
            if i % 2 and tokens <= 4:
                y = gemv.run(gemv.GemvPlan(4, 512, 4, early=early), y, w, None, norm)
            else:
                y = flat.run(flat.FlatPlan(64, 128, 4, 4, apart, early), workspace, y, w, None, norm, None, y)
        return y

    expected = chain(early=False)
    chain(early=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(early=True)
    for _ in range(50):
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, expected)
    assert not workspace.counters.any()


@pytest.mark.parametrize("apart", [False, True], ids=["last", "apart"])
def test_shares_are_added_in_one_order(workspace: Workspace, apart: bool) -> None:
    given = layer(8, LAYERS[3], torch.bfloat16)
    plan = flat.FlatPlan(64, 128, 4, 6, apart)
    first = flat.run(plan, workspace, *given)
    assert all(torch.equal(first, flat.run(plan, workspace, *given)) for _ in range(50))
