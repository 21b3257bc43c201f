"""Experts of packed formats on Hopper, mixed in one launch, against float64 on the values their codes mean."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops import tiles
from tenfold.ops.blocks import dequantize
from tenfold.ops.choose import Table
from tenfold.ops.formats import format_of, raw_tensor
from tenfold.ops.matrix import Bank, Experts, Matrix, RawTensor
from tenfold.ops.oracle import Oracle
from tenfold.ops.route import Routing, route

packed = pytest.importorskip("tenfold.ops.gpu.experts_packed")
arms = pytest.importorskip("tenfold.ops.gpu.expert_arms")
quantize = pytest.importorskip("tenfold.ops.gpu.quantize")
sort = pytest.importorskip("tenfold.ops.gemm.grouped").sort

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Plan = packed.PackedExpertsPlan
COUNT = 16
RAGGED = (300, 1, 0, 7, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)  # picks of each expert
MIXES = {
    **{name: (name,) for name in ("int2g128", "int2g128z", "int3g128", "int3g128z", "int4g128", "int4g128z")},
    **{name: (name,) for name in ("int8g128", "int8g128z", "int8", "fp8", "int4g256", "int4")},
    "all": ("int4g128", "int2g128z", "dense", "int8g128", "int3g128z", "fp8a8", "int4g128z", "int2g128"),
}
PLANS = [
    Plan(8, 128, 4, 1, 4),
    Plan(16, 64, 3, 2, 2),
    Plan(32, 128, 3, 1, 2),
    Plan(64, 128, 3, cluster=2),
    Plan(64, 64, 2, 2),
    Plan(64, 192, 2),
    Plan(64, 256, 2),
    Plan(128, 128, 2),
]

WHOLE = ("int2g128", "int2g128z", "int3g128", "int3g128z", "int4g128", "int4g128z", "int8g128")
DIGIT_MIXES = {**{name: (name,) for name in (*WHOLE, "int8g128z", "int8", "int4", "int4g256")}, "whole": WHOLE}
DIGIT_PLANS = [
    Plan(2, 64, 3, 2, 4, digits=True),
    Plan(2, 128, 2, 2, 2, digits=True),
    Plan(4, 64, 2, 2, 4, digits=True),
    Plan(4, 128, 4, 1, 2, digits=True),
    Plan(8, 64, 3, 2, 2, digits=True),
    Plan(8, 128, 3, 1, 1, digits=True),
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(name: str, w: Tensor, scales: torch.dtype) -> RawTensor:
    if name == "dense":
        return RawTensor("w", "F32", tuple(w.shape), w)
    made = format_of(name).pack(w, scales)
    if made.zeros is not None:  # fractions, as `tenfold quantize` writes them
        made.zeros.add_(torch.rand(made.zeros.shape, generator=torch.Generator().manual_seed(6)).to(made.zeros) - 0.5)
    return raw_tensor("w", format_of(name), *w.shape, made)


def bank(names: tuple[str, ...], w: Tensor, pairs: bool, dtype: torch.dtype, scales: torch.dtype) -> tiles.Tiled:
    parts = [[raw(names[i % len(names)], each, scales)] for i, each in enumerate(w)]
    return tiles.bank(parts, pairs, lambda own: own[0].data, torch.device("cuda"), dtype)


def doubled(tiled: tiles.Tiled) -> Bank:
    """The values of every expert, exactly as tiles mean them."""
    values = []
    for i, data in enumerate(tiled.data):
        kind = tiled.kinds[tiled.of[i]]
        exact = torch.float32 if kind.name != "dense" else tiled.dtype
        values.append(tiles.untile(kind, data, tiled.rows, tiled.cols, exact, tiled.pairs).double())
    return Bank(tuple(Matrix("dense", *v.shape, (v,)) for v in values))


def unpacked(parts: list[list[RawTensor]]) -> Bank:
    """The values of every expert, one part each."""
    values = [dequantize(own[0]).cuda() for own in parts]
    return Bank(tuple(Matrix("dense", *v.shape, (v,)) for v in values))


def case(
    names: tuple[str, ...], tokens: int, dtype: torch.dtype, cols: int, inner: int, scales: torch.dtype = torch.float16
) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(COUNT, generator=draw)[:4] for _ in range(tokens)]).cuda()
    gate_up = bank(names, random(COUNT, 2 * inner, cols, seed=3).cuda() * cols**-0.5, True, dtype, scales)
    down = bank(names[::-1], random(COUNT, cols, inner, seed=4).cuda() * inner**-0.5, False, dtype, scales)
    x, residual = (random(tokens, cols, seed=seed).to(dtype).cuda() for seed in (1, 5))
    return x, ids, random(*ids.shape, seed=2).abs().cuda(), gate_up, down, residual


def exact(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Any, down: Any, residual: Tensor, act: str) -> Tensor:
    own = Experts(doubled(gate_up), doubled(down), act)
    return Oracle("cuda", torch.float64).experts(x.double(), ids, weights, own, residual.double())


def run(plan: Any, x: Tensor, by: Any, weights: Tensor, gate_up: Any, down: Any, act: str, residual: Tensor) -> Tensor:
    banks = [Bank(tiles.Untiled(tiled), tiled=tiled) for tiled in (gate_up, down)]
    found: Tensor = arms.ExpertArms(Table("none", ""), 132).run(plan, x, by, weights, Experts(*banks, act), residual)
    return found


def poison() -> None:
    """What is allocated next, small or large, holds no numbers."""
    kept = [torch.full((size,), float("nan"), device="cuda") for size in (*[1 << 17] * 32, 16 << 20)]
    del kept


class TestDigitsOnGpu:
    """Plans that write activations in base 256. What lies between the two products is rounded to 16 bits, which the
    bounds are for.
    """

    pytestmark = gpu

    def found(
        self, plan: Any, ids: Tensor, x: Tensor, weights: Tensor, banks: Any, act: str, residual: Tensor
    ) -> Tensor:
        assert packed.legal(plan, banks[0].kinds + banks[1].kinds)
        by = sort(ids, COUNT, plan.width, packed.turns(*banks))
        poison()
        return run(plan, x, by, weights, *banks, act, residual)

    @pytest.mark.parametrize("mix", DIGIT_MIXES)
    @pytest.mark.parametrize("plan", DIGIT_PLANS, ids=str)
    def test_sums_of_experts(self, plan: Any, mix: str) -> None:
        for tokens, dtype, act, sizes, scales in (
            (1, torch.bfloat16, "silu", (512, 256), torch.float16),
            (7, torch.float16, "gelu_tanh", (768, 512), torch.bfloat16),
            (37, torch.bfloat16, "silu", (1280, 768), torch.float32),
        ):
            x, ids, weights, gate_up, down, residual = case(DIGIT_MIXES[mix], tokens, dtype, *sizes, scales)
            want = exact(x, ids, weights, gate_up, down, residual, act)
            found = self.found(plan, ids, x, weights, (gate_up, down), act, residual)
            tolerance = 4e-3 if dtype == torch.float16 else 3e-2
            assert (found - want).abs().max() <= tolerance * want.abs().max()
            assert (found - want).norm() <= tolerance / 4 * want.norm()
            assert torch.equal(found, self.found(plan, ids, x, weights, (gate_up, down), act, residual))

    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16, 33, 64])
    @pytest.mark.parametrize("plan", DIGIT_PLANS, ids=str)
    def test_numbers_of_tokens_and_odd_sizes(self, plan: Any, tokens: int) -> None:
        """11 and 3 tiles across, a last one that is not full, and rows that fill no tile."""
        for mix, sizes in (
            (WHOLE, (1408, 384)),
            (("int8",), (272, 144)),
            (("int8",), (80, 32)),
            (("int4",), (320, 64)),
        ):
            x, ids, weights, gate_up, down, residual = case(mix, tokens, torch.float16, *sizes)
            want = exact(x, ids, weights, gate_up, down, residual, "silu")
            found = self.found(plan, ids, x, weights, (gate_up, down), "silu", residual)
            assert (found - want).norm() <= 1e-3 * want.norm(), sizes

    @pytest.mark.parametrize("chosen", [[[COUNT - 2]], [[3, 9]], [[0, 1, 15]]], ids=str)
    @pytest.mark.parametrize("plan", DIGIT_PLANS, ids=str)
    def test_experts_without_tokens(self, plan: Any, chosen: list[list[int]]) -> None:
        x, _, _, gate_up, down, residual = case(WHOLE, 45, torch.bfloat16, 512, 256)
        ids = torch.tensor(chosen).repeat(45, 1).cuda()
        weights = torch.ones(ids.shape, device="cuda")
        want = exact(x, ids, weights, gate_up, down, residual, "silu")
        found = self.found(plan, ids, x, weights, (gate_up, down), "silu", residual)
        assert (found - want).norm() <= 8e-3 * want.norm()

    @pytest.mark.parametrize("plan", DIGIT_PLANS, ids=str)
    def test_tokens_of_all_sizes(self, plan: Any) -> None:
        x, ids, weights, gate_up, down, residual = case(WHOLE, 6, torch.bfloat16, 512, 256)
        x[0] *= 2.0**40
        x[1] *= 2.0**-30
        x[2] = 0
        x[3, ::128] *= 1000  # of each 128 columns one
        x[4, :256] *= 2.0**-20
        residual.zero_()
        want = exact(x, ids, weights, gate_up, down, residual, "silu")
        found = self.found(plan, ids, x, weights, (gate_up, down), "silu", residual)
        assert not found[2].any()
        for one, of in zip(found, want):
            assert (one - of).norm() <= 1e-2 * of.norm()

    @pytest.mark.parametrize("plan", DIGIT_PLANS, ids=str)
    def test_numbers_that_are_none_stay_so(self, plan: Any) -> None:
        """And spoil no other token's, though digits of several stand in one operand."""
        x, ids, weights, gate_up, down, residual = case(WHOLE, 9, torch.bfloat16, 512, 256)
        clean = self.found(plan, ids, x, weights, (gate_up, down), "silu", residual)
        x[0, 100], x[4, 300], x[8, 0] = float("nan"), float("inf"), -float("inf")
        found = self.found(plan, ids, x, weights, (gate_up, down), "silu", residual)
        spoilt = [0, 4, 8]
        assert not found[spoilt].isfinite().any()
        others = [i for i in range(9) if i not in spoilt]
        assert torch.equal(found[others], clean[others])

    @pytest.mark.parametrize("plan", DIGIT_PLANS, ids=str)
    def test_bits_do_not_depend_on_other_tokens(self, plan: Any) -> None:
        x, ids, weights, gate_up, down, residual = case(WHOLE, 21, torch.float16, 512, 256)
        together = self.found(plan, ids, x, weights, (gate_up, down), "silu", residual)
        for i in (0, 7, 20):
            one = (each[i : i + 1].contiguous() for each in (ids, x, weights))
            alone = self.found(plan, *one, (gate_up, down), "silu", residual[i : i + 1].contiguous())
            assert torch.equal(alone[0], together[i])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("columns", [128, 424, 2048])
    def test_digits_of_the_gpu_are_those_emulated(self, columns: int, dtype: torch.dtype) -> None:
        """Against what they mean; test_experts_digits.py has the orders of columns."""
        x = random(9, columns, seed=3).to(dtype)
        kinds = (tiles.Kind("int4"), tiles.Kind("int3"))
        digits, counts = packed.spread(x.cuda(), kinds)
        chunks = -(-columns // 128)
        powers = 256 ** torch.arange(4, dtype=torch.float64)
        every = digits.cpu().view(torch.int8).unflatten(0, (9, 4)).unflatten(2, (3, chunks, 128))[:, :, 0].double()
        unit = counts[:, :9, 0].cpu().double().T[..., None]
        got = ((every * powers[:, None, None]).sum(1) * unit).unflatten(2, (8, 4, 2, 2))  # j, t, c, h
        values = got.permute(0, 1, 2, 5, 3, 4).reshape(9, -1)  # column 16 j + 8 h + 2 t + c
        assert not values[:, columns:].any()
        assert ((values[:, :columns] - x.double()).abs() <= 2.0**-20 * x.double().abs().amax(1, keepdim=True)).all()

    @pytest.mark.parametrize("tokens", [1, 3])
    def test_layers_that_follow_each_other_in_a_graph(self, tokens: int) -> None:
        """Each kernel begins before the one in front has ended; scores differ by layer and by replay."""
        from tenfold.ops.gpu.native import Gpu

        kernels, layers, routing = Gpu(), 6, Routing(COUNT, 4, normed=True)
        w = [random(COUNT, rows, cols, seed=rows) * cols**-0.5 for rows, cols in ((512, 512), (512, 256))]
        parts = [[[raw(WHOLE[i % 7], one, torch.float16)] for i, one in enumerate(each)] for each in w]
        own = Experts(kernels.bank(parts[0], pairs=True), kernels.bank(parts[1]), "silu")
        assert own.tiled is not None
        x = torch.zeros(tokens, 512, dtype=torch.bfloat16, device="cuda")
        scores = torch.zeros(layers, tokens, COUNT, device="cuda")
        plan = kernels.expert_arms.plan(x, 4, own)
        assert isinstance(plan, Plan)
        assert plan.digits

        def chain() -> list[Tensor]:
            found = [x]
            for each in scores:
                found.append(kernels.routed(found[-1], each, routing, own, found[-1]))
            return found

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = chain()
        for seed in range(20):
            x.copy_(random(tokens, 512, seed=seed))
            scores.copy_(random(layers, tokens, COUNT, seed=seed + 100) * 2)
            graph.replay()
            torch.cuda.synchronize()
            for before, after, each in zip(kept, kept[1:], scores):
                want = exact(before, *route(each, routing), *own.tiled, before, "silu")
                assert (after - want).norm() <= 8e-3 * want.norm()


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(
        ("plan", "mix"), [(plan, mix) for plan in PLANS for mix in (MIXES if plan in PLANS[::4] else ("all",))], ids=str
    )
    def test_sums_of_experts(self, plan: Any, mix: str) -> None:
        for tokens, dtype, act, sizes, scales in (
            (1, torch.bfloat16, "silu", (512, 256), torch.float16),
            (37, torch.float16, "gelu_tanh", (640, 128), torch.bfloat16),
            (300, torch.bfloat16, "silu", (512, 384), torch.float32),
        ):
            x, ids, weights, gate_up, down, residual = case(MIXES[mix], tokens, dtype, *sizes, scales)
            want = exact(x, ids, weights, gate_up, down, residual, act)
            assert packed.legal(plan, gate_up.kinds + down.kinds)
            by = sort(ids, COUNT, plan.width, packed.turns(gate_up, down))
            found = run(plan, x, by, weights, gate_up, down, act, residual)
            tolerance = 4e-3 if dtype == torch.float16 else 3e-2
            assert (found - want).abs().max() <= tolerance * want.abs().max()
            again = run(plan, x, by, weights, gate_up, down, act, residual)
            assert torch.equal(found, again)

    @pytest.mark.parametrize("mix", [("int4g128a8", "fp8a8"), MIXES["all"]], ids=len)
    @pytest.mark.parametrize(
        "plan",
        [
            *(Plan(64, 128, 3), Plan(128, 128, 2), Plan(128, 128, 2, cluster=2)),
            *(Plan(width, 128, 3, acts8=True, cluster=pairs) for width in (128, 192) for pairs in (1, 2)),
            Plan(128, 64, 3, acts8=True),
        ],
        ids=str,
    )
    def test_ragged_experts(self, plan: Any, mix: tuple[str, ...]) -> None:
        """Each way by itself: every sum is stored, and nothing past the picks; a few picks cost no less precision."""
        x, _, _, gate_up, down, _ = case(mix, sum(RAGGED), torch.bfloat16, 512, 256)
        if not packed.legal(plan, gate_up.kinds + down.kinds):
            pytest.skip("needs more registers than there are")
        ids = torch.repeat_interleave(torch.arange(COUNT), torch.tensor(RAGGED))
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].cuda()[:, None]
        by, shares = sort(ids, COUNT, plan.width, packed.turns(gate_up, down)), random(len(ids), 1, seed=2).abs().cuda()
        own, gathered = ids[by.order.long(), 0], arms.experts.gather(x, by, shares)
        halfway, parts = (torch.full((len(ids) + 8, n), torch.nan).bfloat16().cuda() for n in (256, 512))
        eights = quantize.for_tiles(x, by.order, 1) if packed.some(plan, gate_up) else None
        packed.product(plan, 132, gathered, eights, gate_up, halfway, by, shares, "silu")
        eights = quantize.for_tiles(halfway[: len(ids)]) if packed.some(plan, down) else None
        packed.product(plan, 132, halfway[: len(ids)], eights, down, parts, by, shares, None)
        assert halfway[len(ids) :].isnan().all()
        assert parts[len(ids) :].isnan().all()
        up, back = doubled(gate_up), doubled(down)
        for expert in own.unique().tolist():
            at = own == expert
            gate, value = (gathered[at].double() @ up.each[expert].data[0].T).chunk(2, 1)
            want = torch.nn.functional.silu(gate) * value
            assert (halfway[: len(ids)][at] - want).norm() <= (0.1 if plan.acts8 else 0.01) * want.norm()
            picks = by.order[at].long()
            want = halfway[: len(ids)][at].double() @ back.each[expert].data[0].T * shares[picks].double()
            assert (parts[picks] - want).norm() <= (0.1 if plan.acts8 else 0.01) * want.norm()

    @pytest.mark.parametrize("kind", ["all on one", "few experts"])
    @pytest.mark.parametrize("plan", PLANS, ids=str)
    def test_experts_without_tokens(self, plan: Any, kind: str) -> None:
        x, _, _, gate_up, down, residual = case(MIXES["all"], 90, torch.bfloat16, 512, 256)
        one = torch.tensor([[COUNT - 2]] if kind == "all on one" else [[3, 9]]).repeat(90, 1).cuda()
        weights = torch.ones(one.shape, device="cuda")
        want = exact(x, one, weights, gate_up, down, residual, "silu")
        by = sort(one, COUNT, plan.width)
        found = run(plan, x, by, weights, gate_up, down, "silu", residual)
        assert (found - want).abs().max() <= 3e-2 * want.abs().max()

    @pytest.mark.parametrize(
        "mix", [("fp8a8",), ("int4g128a8",), ("int4g128a8", "int3g128", "fp8a8", "dense")], ids=str
    )
    @pytest.mark.parametrize("width", [8, 32, 64, 128, 192])
    def test_activations_of_8_bits(self, width: int, mix: tuple[str, ...]) -> None:
        """As far from the exact sums as rounding activations to float8 explains, and further than without."""
        x, ids, weights, gate_up, down, residual = case(mix, 500, torch.bfloat16, 512, 256)
        want = exact(x, ids, weights, gate_up, down, residual, "silu")
        by = sort(ids, COUNT, width)
        plan = lambda acts8: Plan(width, 128, 2, span=2 if width < 64 else 1, acts8=acts8, cluster=1 + (width == 128))  # noqa: E731
        found = [run(plan(acts8), x, by, weights, gate_up, down, "silu", residual) for acts8 in (False, True)]
        off, error = ((each - want).norm() / want.norm() for each in found)
        assert off < 0.01
        assert off < error < 0.06

    def test_columns_of_rounded_picks(self) -> None:
        x = random(5, 416, seed=7).bfloat16().cuda()
        order = torch.tensor([9, 3, 0, 7], dtype=torch.int32, device="cuda")  # of two picks a token
        codes, scales = quantize.for_tiles(x, order, 2)
        plain, same = quantize.quantize(x[(order // 2).long()])
        h, c, t = (
            g.flatten() for g in torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(4), indexing="ij")
        )
        columns = torch.empty(16, dtype=torch.int64)
        columns[4 * t + 2 * c + h] = 2 * t + 8 * h + c
        assert torch.equal(scales, same)
        want = plain.view(torch.uint8).unflatten(1, (-1, 16))[:, :, columns].flatten(1)
        assert torch.equal(codes.view(torch.uint8), want)

    @pytest.mark.parametrize("tokens", [1, 64, 600])
    def test_kernels_of_a_gpu_load_route_and_sum(self, tokens: int) -> None:
        from tenfold.ops.gpu.native import Gpu

        kernels = Gpu()
        names = ("int4g128", "int2g128z", "int8g128", "dense")
        w = [random(COUNT, rows, cols, seed=rows) * cols**-0.5 for rows, cols in ((512, 512), (512, 256))]
        parts = [[[raw(names[i % 4], one, torch.float16)] for i, one in enumerate(each)] for each in w]
        own = Experts(kernels.bank(parts[0], pairs=True), kernels.bank(parts[1]), "silu")
        assert own.tiled is not None
        assert kernels.records(own)
        x, residual = (random(tokens, 512, seed=seed).bfloat16().cuda() for seed in (1, 2))
        scores, routing = random(tokens, COUNT, seed=9).cuda() * 2, Routing(COUNT, 4, normed=True)
        found = kernels.routed(x, scores, routing, own, residual)
        want = exact(x, *route(scores, routing), *own.tiled, residual, "silu")
        assert (found - want).abs().max() <= 3e-2 * want.abs().max()
        assert torch.allclose(Oracle.experts(kernels, x, *route(scores, routing), own, residual), found, atol=0.3)

    @pytest.mark.parametrize("tokens", [1, 64, 600])
    def test_blocks_of_one_bit_beside_others(self, tokens: int) -> None:
        """They run one by one, all of the layer packed."""
        from tenfold.ops.gpu.native import Gpu

        kernels = Gpu()
        w = [random(COUNT, rows, cols, seed=rows) * cols**-0.5 for rows, cols in ((512, 512), (512, 256))]
        for names in (("int1g128z", "int2g128z", "int4g128"), ("int4g128",)):
            parts = [[raw(names[i % len(names)], one, torch.float16)] for i, one in enumerate(w[0])]
            down = [[raw(("int3g128z", "int1g128z")[i % 2], one, torch.float16)] for i, one in enumerate(w[1])]
            stored = [{own[0].storage for own in each} for each in (parts, down)]
            banks = kernels.bank(parts, pairs=True, beside=stored[1]), kernels.bank(down, beside=stored[0])
            own = Experts(*banks, "silu")
            assert own.gate_up.tiled is own.down.tiled is None
            assert not kernels.records(own)
            x, residual = (random(tokens, 512, seed=seed).bfloat16().cuda() for seed in (1, 2))
            scores, routing = random(tokens, COUNT, seed=9).cuda() * 2, Routing(COUNT, 4, normed=True)
            found = kernels.routed(x, scores, routing, own, residual)
            exactly = Experts(unpacked(parts), unpacked(down), "silu")
            want = Oracle("cuda", torch.float32).routed(x.float(), scores, routing, exactly, residual.float())
            assert (found - want).abs().max() <= 3e-2 * want.abs().max()


def test_plans_by_name_and_by_the_picks_of_an_expert() -> None:
    kinds = (tiles.Kind("int4"), tiles.Kind("int8", zeros=True, scales=2), tiles.DENSE)
    for plan in (*PLANS, *DIGIT_PLANS, Plan(64, 128, 3, acts8=True), Plan(64, 64, 2, cluster=2)):
        assert packed.parse(str(plan)) == plan
    for wrong in ("tiles:12x64x2x1x1", "tiles:8x96x2x1x1", "experts:8x64x2x6x1"):
        with pytest.raises(ValueError, match="width of 8, 16"):
            packed.parse(wrong)
    widths = [packed.plan(n, 128, kinds).width for n in (8, 512, 2048, 8192, 65536)]
    assert widths == sorted(widths)
    for picks in (8, 64, 512, 4096, 65536):
        assert packed.legal(packed.plan(picks, 128, kinds), kinds)
        every = list(packed.candidates(picks, 128, kinds))
        assert every
        assert all(packed.legal(plan, kinds) for plan in every)
        assert not any(plan.acts8 for plan in every)
    eight = (tiles.Kind("fp8", scales=2, acts8=True),)
    assert packed.plan(65536, 128, eight).acts8
    assert packed.plan(64, 128, eight).acts8
    assert not packed.plan(64, 128, (*eight, tiles.DENSE)).acts8
    assert packed.plan(65536, 128, eight).width == 192
    assert packed.plan(65536, 128, (*eight, tiles.DENSE)).width == 128
    wide = Plan(192, 128, 3, acts8=True)
    assert packed.legal(wide, eight)
    assert not packed.legal(wide, (*eight, tiles.DENSE))  # registers
    assert not packed.legal(Plan(192, 128, 3), eight)
    assert packed.shared_bytes(wide, eight) < packed.shared_bytes(wide, eight, 2)
