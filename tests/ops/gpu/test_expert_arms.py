"""Which plan runs experts: works, keys, the table against the rule, and measuring with a timer that only counts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.engine.linears import Tracing, traced
from tenfold.ops import tiles
from tenfold.ops.choose import Table
from tenfold.ops.matrix import Bank, Experts, Matrix
from tenfold.ops.oracle import Oracle
from tenfold.ops.route import Routing
from tenfold.weights.open import open_checkpoint

arms = pytest.importorskip("tenfold.ops.gpu.expert_arms")
report = pytest.importorskip("tenfold.ops.gpu.report")
tuning = pytest.importorskip("tenfold.ops.gpu.tune_experts")
grouped = pytest.importorskip("tenfold.ops.gemm.grouped")
experts_packed = pytest.importorskip("tenfold.ops.gpu.experts_packed")
linear_arms = pytest.importorskip("tenfold.ops.gpu.arms")
Gpu = pytest.importorskip("tenfold.ops.gpu.native").Gpu

DENSE = arms.ExpertsWork(8, 2, 256, 128, (("dense", "dense", 8),))
MIXED = replace(DENSE, formats=(("int4g128", "int3g128z", 6), ("fp8a8", "fp8a8", 2)))
SMS = 132


class Counting:
    """A timer whose times are the lengths of the names, and which runs nothing."""

    def __init__(self) -> None:
        self.measured: list[list[str]] = []

    def copies(self, nbytes: int) -> int:
        assert nbytes > 0
        return 3

    def measure(
        self, arms: Mapping[str, Any], copies: int, reference: Any = None, farthest: float = 0.0
    ) -> dict[str, float]:
        assert copies == 3
        assert reference is not None
        self.measured.append(list(arms))
        return {name: float(len(name)) for name in arms}

    def memory_microseconds(self) -> dict[str, float]:
        return {}


def test_a_table_tells_formats_apart_and_not_their_groups() -> None:
    assert DENSE.stored == "bfloat16"
    assert replace(DENSE, dtype=torch.float16).stored == "float16"
    assert MIXED.stored == "2 fp8a8 + 6 int4/int3z"
    assert replace(DENSE, formats=(("int4g128", "int4g256", 8),)).stored == "int4"
    assert [kind.name for kind in MIXED.kinds] == ["int4", "int3", "fp8"]
    at = arms.key(replace(MIXED, tokens=5), SMS)
    assert (at.op, at.rows, at.cols, at.batch, at.budget) == ("experts 8/2 silu", 256, 256, 8, SMS)
    assert arms.key(replace(MIXED, tokens=9000), SMS).batch == 9000


@pytest.mark.parametrize("work", [DENSE, MIXED, replace(DENSE, inner=20)])
def test_every_plan_is_named_parsed_and_legal(work: Any) -> None:
    for tokens in (*arms.TOKENS, 20000):
        one = replace(work, tokens=tokens)
        every = arms.candidates(one)
        assert every[0] == arms.rule(one)
        for plan in every:
            assert arms.parse(str(plan)) == plan
            assert arms.legal(plan, one)
    assert isinstance(arms.rule(replace(DENSE, inner=20)), grouped.GroupedPlan)
    for wrong in ("grouped:1x2", "tiles:1x2", "stream:1", ""):
        with pytest.raises(ValueError, match="allowed"):
            arms.parse(wrong)


def test_what_was_measured_runs_unless_it_cannot(tmp_path: Path) -> None:
    table, one = Table("gpu", "1", tmp_path / "t.json"), replace(DENSE, tokens=64)
    assert arms.choice(one, table, SMS).source == "rule"
    table.record(arms.key(one, SMS), {str(arms.rule(one)): 9.0, "experts:64x128x2x4x1": 3.0})
    assert arms.choice(one, table, SMS).arm == "experts:64x128x2x4x1"
    assert arms.choice(replace(one, tokens=50), table, SMS).arm == "experts:64x128x2x4x1"
    for wrong in ("experts:256x128x2x9x1", "tiles:8x64x8x2x1", "nonsense"):
        table.record(arms.key(one, SMS), {wrong: 1.0})
        assert arms.choice(one, table, SMS).source == "rule"


def test_what_was_asked_for_is_explained_at_every_number_of_tokens(tmp_path: Path) -> None:
    running = arms.ExpertArms(Table("gpu", "1", tmp_path / "t.json"), SMS)
    assert running.explain() == []
    running.seen[DENSE] = None
    assert running.explain() == [arms.choice(replace(DENSE, tokens=n), running.table, SMS) for n in arms.TOKENS]


def test_measured_keys_are_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "whole_arm", lambda case, plan: lambda i: None)
    timer, told = Counting(), []
    running = arms.ExpertArms(Table("gpu", "1", tmp_path / "t.json"), SMS)

    def tune(**more: Any) -> int:
        works = [DENSE, MIXED, replace(DENSE, tokens=4)]
        found: int = tuning.tune(
            works, running, timer, torch.device("cpu"), (1, 64), progress=lambda *now: told.append(now), **more
        )
        return found

    assert tune() == 4
    assert [(done, total) for done, total, _ in told] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert told[2][2] == "experts 8/2 silu 2 fp8a8 + 6 int4/int3z, 1 tokens"
    assert timer.measured[0] == [str(plan) for plan in arms.candidates(DENSE)]
    again = arms.ExpertArms(Table("gpu", "1", tmp_path / "t.json"), SMS)
    assert again.table.times(arms.key(replace(MIXED, tokens=64), SMS)) == {n: float(len(n)) for n in timer.measured[3]}
    assert tune() == 0
    assert tune(force=True) == 4


def test_random_experts_have_the_formats_of_the_work() -> None:
    own = tuning.random_experts(MIXED, torch.device("cpu"))
    assert own.tiled is not None
    up, down = own.tiled
    assert sorted(tiles_names(up)) == ["fp8"] * 2 + ["int4"] * 6
    assert sorted(tiles_names(down)) == ["fp8"] * 2 + ["int3"] * 6
    assert "fp8" in tiles_names(up)[:5]  # spread, not at one end
    found = arms.work_of(own, 2, 3, torch.bfloat16)
    assert found.stored == MIXED.stored
    assert arms.key(found, SMS) == arms.key(replace(MIXED, tokens=3), SMS)
    dense = tuning.random_experts(DENSE, torch.device("cpu"))
    assert arms.work_of(dense, 2, 1, torch.bfloat16) == DENSE


def tiles_names(tiled: Any) -> list[str]:
    return [tiled.kinds[at].name for at in tiled.of]


def test_plans_are_remembered_by_experts_and_bucket(tmp_path: Path) -> None:
    running = arms.ExpertArms(Table("gpu", "1", tmp_path / "t.json"), SMS)
    own = tuning.random_experts(MIXED, torch.device("cpu"))
    x = torch.zeros(5, 256, dtype=torch.bfloat16)
    first = running.plan(x, 2, own)
    assert first == arms.rule(replace(arms.work_of(own, 2, 5, torch.bfloat16)))
    assert running.plan(x[:5], 2, own) is first
    assert list(running.seen) == [arms.work_of(own, 2, 1, torch.bfloat16)]
    assert running.plan(x.float(), 2, tuning.random_experts(MIXED, torch.device("cpu"))) is None
    assert running.plan(x, 2, Experts(Bank(()), Bank(()), "silu")) is None
    order = running.turns(own)
    assert order is not None
    sizes = experts_packed.expert_bytes(*own.tiled)
    assert [sizes[e] for e in order.tolist()] == sorted(sizes, reverse=True)


class Interpreted(Gpu):
    """A GPU's kernels where only those in Triton can run, interpreted."""

    def __init__(self, table: Table) -> None:
        Oracle.__init__(self, "cpu", torch.float16)
        self.arms = linear_arms.Arms(self.device, self.dtype, SMS, table)
        self.expert_arms = arms.ExpertArms(table, SMS)


def layer(kernels: Interpreted, ups: Sequence[str], downs: Sequence[str]) -> Experts:
    """Experts of these formats, 128 features inside and out."""
    draw = torch.Generator().manual_seed(1)
    sizes = ((256, 128), (128, 128))
    raws = [
        [[tuning.raw(name, torch.randn(size, generator=draw).half() / 11)] for name in names]
        for names, size in zip((ups, downs), sizes)
    ]
    return Experts(kernels.bank(raws[0], pairs=True, beside=set(downs)), kernels.bank(raws[1], beside=set(ups)), "silu")


def test_experts_with_blocks_of_one_bit_stay_packed_and_run_one_by_one(tmp_path: Path) -> None:
    """No tiles hold them, so their layer has none, and no kernel that takes a layer's experts is chosen."""
    kernels, x = Interpreted(Table("gpu", "1", tmp_path / "t.json")), torch.zeros(3, 128, dtype=torch.float16)
    names = ["int2g128z", "int1g128z", "int4g128", "int1g128z"]
    own = layer(kernels, names, names)
    assert [w.format for w in own.gate_up.each] == [w.format for w in own.down.each] == names
    for one in (own, layer(kernels, ["int4g128"] * 4, names), layer(kernels, names, ["int4g128"] * 4)):
        assert one.stacked is one.gate_up.tiled is one.down.tiled is None
        assert kernels.expert_arms.plan(x, 2, one) is None
        assert not kernels.records(one)
    assert kernels.expert_arms.plan(x, 2, layer(kernels, names[:1], names[2:3])) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_experts_packed.py runs these on the GPU")
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_of_one_bit_give_what_their_values_do(tokens: int, tmp_path: Path) -> None:
    kernels = Interpreted(Table("gpu", "1", tmp_path / "t.json"))
    own = layer(kernels, ["int1g128z", "int1g32z", "int1g64z"], ["int1g64z"] * 3)
    draw = torch.Generator().manual_seed(tokens)
    x, residual = (torch.randn(tokens, 128, generator=draw).half() for _ in range(2))
    scores, routing = torch.randn(tokens, 3, generator=draw), Routing(3, 2, normed=True)
    found = kernels.routed(x, scores, routing, own, residual)
    want = Oracle().routed(x.float(), scores, routing, own, residual.float())
    assert (found - want).abs().max() <= 2e-3 * want.abs().max()
    assert {work.format for work in kernels.arms.seen} == {"int1g128z", "int1g32z", "int1g64z"}


def test_floors_are_those_of_the_experts_that_even_picks_hit() -> None:
    each = 3 * 256 * 128 * 2
    assert arms.moved(DENSE)[0] == pytest.approx(2 * each)
    assert arms.moved(replace(DENSE, tokens=1000))[0] == pytest.approx(8 * each)
    assert arms.moved(MIXED)[0] < 2 * each / 3


def test_tables_are_shown_with_their_reasons(tmp_path: Path) -> None:
    table = Table("gpu", "1", tmp_path / "t.json")
    table.record(arms.key(DENSE, SMS), {str(arms.rule(DENSE)): 5.0})
    lines = report.experts([DENSE, replace(DENSE, tokens=8)], table, SMS)
    assert [line.work.tokens for line in lines] == list(arms.TOKENS)
    assert [line.choice.source for line in lines] == ["measured"] + ["rule"] * 13


def test_layers_of_experts_are_found_without_their_weights() -> None:
    (work,) = traced(open_checkpoint("shape:qwen3-30b-a3b"), torch.bfloat16).experts
    assert work == arms.ExpertsWork(128, 8, 2048, 768, (("dense", "dense", 128),))
    (packed,) = traced(open_checkpoint("shape:qwen3-30b-a3b"), torch.bfloat16, "int4").experts
    assert packed.formats == (("int4g128", "int4g128", 128),)
    assert traced(open_checkpoint("shape:llama-3-8b"), torch.bfloat16).experts == []
    assert tiles.DENSE in work.kinds


def test_layers_that_run_one_by_one_are_none_to_tune() -> None:
    tracing, x = Tracing(torch.bfloat16), torch.zeros(1, 128)
    for names, count in ((["int4g128", "int2g128z"], 1), (["int4g128", "int1g128z"], 1)):
        bank = Bank(tuple(Matrix(name, 128, 128, ()) for name in names))
        tracing.experts(x, torch.zeros(1, 1), x, Experts(bank, bank, "silu"))
        assert len(tracing.calls) == count
