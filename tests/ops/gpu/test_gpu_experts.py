"""Experts on Hopper against float64: every width, any picks; graphs replayed."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops.choose import Table
from tenfold.ops.matrix import Experts, dense_bank
from tenfold.ops.oracle import Oracle
from tenfold.ops.route import Routing, route

experts = pytest.importorskip("tenfold.ops.gpu.experts")
arms = pytest.importorskip("tenfold.ops.gpu.expert_arms")
sort = pytest.importorskip("tenfold.ops.gemm.grouped").sort

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLANS = [experts.ExpertsPlan(width, height, 2, 4, 1) for width, height in itertools.product((8, 16, 32, 64), (64, 128))]
PLANS += [experts.ExpertsPlan(128, 128, 1, 4), experts.ExpertsPlan(256, 128, 1, 3), experts.ExpertsPlan(256, 64, 1, 4)]
PLANS += [experts.ExpertsPlan(192, 128, 1, 4), experts.ExpertsPlan(192, 64, 2, 2)]
PLANS += [experts.ExpertsPlan(192, 192, 1, 4), experts.ExpertsPlan(128, 256, 1, 4), experts.ExpertsPlan(64, 192, 2, 2)]
PLANS += [experts.ExpertsPlan(width, 128, 1, 3, cluster=2) for width in (64, 128, 192, 256)]
PLANS += [experts.ExpertsPlan(192, 192, 1, 4, cluster=2), experts.ExpertsPlan(128, 256, 1, 4, cluster=2)]
COUNT = 16
RAGGED = (300, 1, 0, 7, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)  # picks of each expert
GUARD = 8  # rows past an output


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def picks(kind: str, tokens: int, top: int) -> Tensor:
    draw = torch.Generator().manual_seed(len(kind))
    if kind == "all on one":
        return torch.full((tokens, 1), COUNT - 2).cuda()
    if kind == "few experts":
        return torch.tensor([[3, 9]]).repeat(tokens, 1).cuda()
    return torch.stack([torch.randperm(COUNT, generator=draw)[:top] for _ in range(tokens)]).cuda()


def case(kind: str, tokens: int, dtype: torch.dtype, cols: int = 512, inner: int = 192) -> tuple[Tensor, ...]:
    ids = picks(kind, tokens, 4)
    return (
        random(tokens, cols, seed=1).to(dtype),
        ids,
        random(*ids.shape, seed=2).abs(),
        (random(COUNT, 2 * inner, cols, seed=3) * cols**-0.5).to(dtype),
        (random(COUNT, cols, inner, seed=4) * inner**-0.5).to(dtype),
        random(tokens, cols, seed=5).to(dtype),
    )


def exact(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor, act: str) -> Tensor:
    own = Experts(dense_bank(gate_up.double()), dense_bank(down.double()), act)
    return Oracle("cuda", torch.float64).experts(x.double(), ids, weights, own, residual.double())


def run(
    plan: Any, x: Tensor, by: Any, weights: Tensor, gate_up: Tensor, down: Tensor, act: str, residual: Tensor
) -> Tensor:
    own = Experts(dense_bank(gate_up), dense_bank(down), act)
    found: Tensor = arms.ExpertArms(Table("none", ""), 132).run(plan, x, by, weights, own, residual)
    return found


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("kind", ["spread", "all on one", "few experts"])
    @pytest.mark.parametrize("plan", PLANS, ids=str)
    def test_sums_of_experts(self, plan: Any, kind: str) -> None:
        for tokens, dtype, act, sizes in (
            (1, torch.bfloat16, "silu", (512, 192)),
            (37, torch.float16, "gelu_tanh", (576, 200)),
            (300, torch.bfloat16, "silu", (512, 192)),
        ):
            x, ids, weights, gate_up, down, residual = case(kind, tokens, dtype, *sizes)
            want = exact(x, ids, weights, gate_up, down, residual, act)
            by = sort(ids, COUNT, plan.width)
            found = run(plan, x, by, weights, gate_up, down, act, residual)
            tolerance = 4e-3 if dtype == torch.float16 else 3e-2
            assert (found - want).abs().max() <= tolerance * want.abs().max()
            again = run(plan, x, by, weights, gate_up, down, act, residual)
            assert torch.equal(found, again)

    @pytest.mark.parametrize("sizes", [RAGGED, RAGGED[::-1], (0,) * 15 + (1,), (520,) + (0,) * 15])
    @pytest.mark.parametrize("plan", PLANS, ids=str)
    def test_products_of_ragged_experts(self, plan: Any, sizes: tuple[int, ...]) -> None:
        """Each way by itself: every sum is stored, and nothing past the picks."""
        for dtype, cols, inner, seed in ((torch.bfloat16, 512, 192, 0), (torch.float16, 328, 200, 1)):
            ids = torch.repeat_interleave(torch.arange(COUNT), torch.tensor(sizes))
            ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))].cuda()[:, None]
            by, shares = sort(ids, COUNT, plan.width), random(len(ids), 1, seed=2).abs()
            x = random(len(ids), cols, seed=1).to(dtype)
            gate_up = (random(COUNT, 2 * inner, cols, seed=3) * cols**-0.5).to(dtype)
            down = (random(COUNT, cols, inner, seed=4) * inner**-0.5).to(dtype)
            halfway, parts = (torch.full((len(ids) + GUARD, n), torch.nan, dtype=dtype).cuda() for n in (inner, cols))
            gathered = experts.gather(x, by, shares)
            experts.product(plan, 132, gathered, gate_up, halfway, by, shares, "silu")
            experts.product(plan, 132, halfway[: len(ids)], down, parts, by, shares, None)
            assert halfway[len(ids) :].isnan().all()
            assert parts[len(ids) :].isnan().all()
            own = ids[by.order.long(), 0]
            for expert in own.unique().tolist():
                at = own == expert
                gate, up = (gathered[at].double() @ gate_up[expert].double().T).chunk(2, 1)
                want = torch.nn.functional.silu(gate) * up
                assert (halfway[: len(ids)][at] - want).abs().max() <= 2e-2 * want.abs().max()
                picks = by.order[at].long()
                want = halfway[: len(ids)][at].double() @ down[expert].double().T * shares[picks].double()
                assert (parts[picks] - want).abs().max() <= 2e-2 * want.abs().max()

    def test_a_replayed_graph_follows_other_picks(self) -> None:
        plan = experts.plan(64, COUNT)
        x, ids, weights, gate_up, down, residual = case("spread", 16, torch.bfloat16)

        def again() -> Tensor:
            by = sort(ids, COUNT, plan.width)
            return run(plan, x, by, weights, gate_up, down, "silu", residual)

        again()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = again()
        for seed in (7, 8):
            x.copy_(random(*x.shape, seed=seed))
            draw = torch.Generator().manual_seed(seed)
            ids.copy_(torch.stack([torch.randperm(COUNT, generator=draw)[:4] for _ in range(16)]))
            graph.replay()
            want = exact(x, ids, weights, gate_up, down, residual, "silu")
            assert (found - want).abs().max() <= 3e-2 * want.abs().max()

    @pytest.mark.parametrize("tokens", [1, 64, 600])
    def test_kernels_of_a_gpu_route_and_sum(self, tokens: int) -> None:
        from tenfold.ops.gpu.native import Gpu

        x, _, _, gate_up, down, residual = case("spread", tokens, torch.bfloat16)
        scores, routing = random(tokens, COUNT, seed=9) * 2, Routing(COUNT, 4, normed=True)
        found = Gpu().routed(x, scores, routing, Experts(dense_bank(gate_up), dense_bank(down), "silu"), residual)
        ids, weights = route(scores, routing)
        want = exact(x, ids, weights, gate_up, down, residual, "silu")
        assert (found - want).abs().max() <= 3e-2 * want.abs().max()


def test_plans_by_name_and_by_the_picks_of_an_expert() -> None:
    for plan in PLANS:
        assert experts.parse(str(plan)) == plan
    for wrong in ("experts:12x64x2x4x1", "experts:8x96x2x4x1", "experts:8x64x2x4x1:even"):
        with pytest.raises(ValueError, match="width of 8, 16"):
            experts.parse(wrong)
    assert all(experts.legal(plan, 1536, 2048, True) for plan in PLANS)
    for wide in ("experts:256x192x1x2x1", "experts:192x256x1x2x1", "experts:128x64x1x2x2"):  # registers
        assert not experts.legal(experts.parse(wide), 1536, 2048, True)
    widths = [experts.plan(n, 128).width for n in (8, 512, 2048, 8192, 65536)]
    assert widths == sorted(widths)
    for picks_of in (8, 64, 512, 4096, 65536):
        for gate, rows, cols in ((True, 1536, 2048), (False, 2048, 768)):
            assert experts.legal(experts.plan(picks_of, 128), rows, cols, gate)
            assert any(experts.legal(p, rows, cols, gate) for p in experts.candidates(picks_of, 128))
