"""Choosing among arms of GPU kernels: rule, table, resumable tuning, report. Timers are fake; nothing needs a GPU."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.ops.choose import Table
from tenfold.ops.kernels import GEMM, Norm, Options
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

arms = pytest.importorskip("tenfold.ops.gpu.arms")
report = pytest.importorskip("tenfold.ops.gpu.report")
tuning = pytest.importorskip("tenfold.ops.gpu.tune")
timing = pytest.importorskip("tenfold.ops.gpu.timing")

SMS = 132
CPU = torch.device("cpu")
Use, Work = arms.Use, arms.Work
QKV = Work(6144, 4096, "dense", Use(norm=True), 1)
SMALL = Work(48, 64, "dense", Use(norm=True, act="silu"), 1)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table("gpu H100", "1", tmp_path / "gpu.json")


def running(table: Table, dtype: torch.dtype = torch.bfloat16) -> Any:
    return arms.Arms(CPU, dtype, SMS, table)


class FakeTimer:
    """Times that follow from the names of arms; `fail_at`: which measurement is interrupted."""

    def __init__(self, fail_at: int = -1) -> None:
        self.measured: list[list[str]] = []
        self.copied = 0
        self.fail_at = fail_at

    def copies(self, nbytes: int) -> int:
        return 2

    def measure(
        self, arms: Mapping[str, Any], copies: int, reference: Any = None, farthest: float = 1.0
    ) -> dict[str, float]:
        assert copies == 2
        assert farthest < 0.1
        expected = reference(0)
        assert expected.isfinite().all()
        if len(self.measured) == self.fail_at:
            raise KeyboardInterrupt
        self.measured.append(list(arms))
        return {name: 5.0 + len(name) for name in arms}

    def memory_microseconds(self) -> dict[str, float]:
        self.copied += 1
        return {"copy": 2e-3 * (1 << 30) / 3000.0, "read": 1e-3 * (1 << 30) / 3100.0}


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (4, 4), (5, 8), (17, 24), (33, 48), (128, 128), (129, 0)])
def test_buckets(tokens: int, bucket: int) -> None:
    assert arms.bucket(tokens) == bucket


@pytest.mark.parametrize(
    ("work", "first"),
    [
        (QKV, "bulk"),
        (Work(6144, 2048, "dense", Use(), 2), "stream"),
        (Work(6144, 4096, "dense", Use(), 3), "ring"),
        (Work(4096, 14336, "dense", Use(), 4), "bulk"),
        (Work(4096, 4096, "dense", Use(), 32), "ring"),
        (Work(6144, 4096, "dense", Use(), 16), "ring"),
        (Work(4096, 14336, "dense", Use(), 16), "ring"),
        (Work(6144, 4096, "dense", Use(), 64), "ring"),
        (Work(4096, 4096, "dense", Use(), 64), "cublas"),
        (Work(6144, 4096, "dense", Use(), 65), "cublas"),
        (Work(6144, 4096, "dense", Use(), 4000), "cublas"),
        (Work(6144, 4090, "dense", Use(), 1), "cublas"),
        (Work(6144, 4096, "dense", Use(), 1, torch.float32), "cublas"),
        (Work(6144, 4096, "int4g128", Use(), 1), "digits4"),
        (Work(6144, 4096, "int3g128z", Use(), 2), "digits3"),
        (Work(6144, 4096, "int4g128", Use(), 3), "bulk4"),
        (Work(6144, 4096, "int4g256", Use(), 1), "stream4"),
        (Work(6144, 4096, "int2g128", Use(), 1), "stream2"),
        (Work(6144, 4096, "int8g128z", Use(), 1), "digits8"),
        (Work(6144, 4096, "fp8a8", Use(), 8), "stream8"),
        (Work(6144, 4096, "fp8a8", Use(norm=True, act="silu"), 64), "ring-fp8"),
        (Work(6144, 4096, "fp8g128a8", Use(), 9), "ring-fp8"),
        (Work(4096, 14336, "fp8a8", Use(), 8), "ring-fp8"),  # so many columns of 8 tokens fit no shared memory
        (Work(6144, 4096, "fp8a8", Use(), 65), "library"),
        (Work(6144, 4096, "fp8", Use(), 64), "ring8"),
        (Work(4096, 14336, "int4g128", Use(residual=True), 9), "ring4"),
        (Work(28672, 4096, "int4g128z", Use(norm=True, act="silu"), 64), "ring4"),
        (Work(6144, 4096, "int4g128", Use(), 65), "fused"),
        (Work(6144, 4096, "int8g128o", Use(), 1), "fused"),
        (Work(6144, 4096, "int4a8", Use(norm=True, act="silu"), 65), "w4a8"),
        (Work(6144, 4096, "int4a8", Use(), 64), "ring4"),
        (Work(6136, 4096, "int4a8", Use(), 1000), "dense"),  # rows that are no multiple of 16
        (Work(6144, 4096, "int4g64", Use(), 1), "fused"),
        (Work(6144, 4096, "int1g128z", Use(norm=True, act="silu"), 1), "fused"),
        (Work(6144, 4096, "int1g128z", Use(), 64), "fused"),
        (Work(6144, 4096, "int1g32z", Use(), 257), "dense"),
    ],
    ids=str,
)
def test_the_rule_gives_a_legal_arm(work: Any, first: str) -> None:
    name = arms.rule(work, SMS)
    assert name.partition(":")[0] == first
    assert arms.legal(name, work)


def test_weights_of_an_unknown_format_are_refused() -> None:
    with pytest.raises(ValueError, match="Q9_9"):
        arms.rule(Work(64, 64, "Q9_9", Use(), 1), SMS)


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 128])
def test_candidates_are_legal_and_hold_the_rule_and_the_library(tokens: int) -> None:
    work = Work(6144, 4096, "dense", Use(norm=True), tokens)
    found = arms.candidates(work, SMS)
    assert len(found) == len(set(found))
    assert {"cublas", arms.rule(work, SMS)} <= set(found)
    assert all(arms.legal(name, work) for name in found)
    families = {name.partition(":")[0] for name in found}
    assert ("gemv" in families, "stream" in families, "flat" in families) == (tokens <= 4, tokens <= 16, tokens <= 64)


@pytest.mark.parametrize(
    ("format", "tokens", "kind"),
    [("int4g128z", 64, "ring4"), ("int8", 9, "ring8"), ("fp8", 33, "ring8"), ("fp8g128a8", 1, "ring8")],
)
def test_packed_weights_may_come_through_a_ring(format: str, tokens: int, kind: str) -> None:
    found = arms.candidates(Work(6144, 4096, format, Use(norm=True, act="silu"), tokens), SMS)
    assert kind in {name.partition(":")[0] for name in found}
    for other in ("dense", "int4g64", "int8g128o", "int2g128", "int3g128z"):
        names = arms.candidates(Work(6144, 4096, other, Use(), tokens), SMS)
        assert not {name.partition(":")[0] for name in names} & {"ring4", "ring8"}
    assert not arms.legal("ring4:8x1x64", Work(6144, 4096, "int8", Use(), 8))
    assert not arms.legal(f"{kind}:8x1x64", Work(6144, 4096, format, Use(), 65))


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64, 128])
def test_weights_of_one_bit_run_in_triton_alone(tokens: int) -> None:
    found = arms.candidates(Work(6144, 4096, "int1g128z", Use(norm=True, act="silu"), tokens), SMS)
    assert {name.partition(":")[0] for name in found} == {"fused", "dense"} - ({"dense"} if tokens <= 32 else set())
    for name in ("stream2:8x4x2", "bulk2:14x2x1x4x1", "digits2:14x2x1x4x1"):
        assert arms.legal(name, Work(6144, 4096, "int2g128z", Use(), 1))
        assert not arms.legal(name, Work(6144, 4096, "int1g128z", Use(), 1))


def test_norms_that_might_overflow_in_float16_are_no_candidates() -> None:
    for tokens in (1, 32):
        found = arms.candidates(Work(6144, 4096, "dense", Use(norm=True), tokens, torch.float16), SMS)
        assert not {name.partition(":")[0] for name in found} & {"flat"}


@pytest.mark.parametrize("name", ["gone:1x2", "stream:axb", "flat:1", "", "cublas:2"])
def test_arms_of_other_versions_are_not_legal(name: str) -> None:
    assert not arms.legal(name, QKV)


def test_what_was_measured_runs_where_it_can(table: Table) -> None:
    at = arms.key(QKV, SMS)
    assert arms.choice(QKV, table, SMS).source == "rule"
    table.record(at, {"cublas": 20.0, "gemv:8x512": 15.0, arms.rule(QKV, SMS): 18.0})
    found = arms.choice(QKV, table, SMS)
    assert (found.arm, found.source, found.runner_up) == ("gemv:8x512", "measured", arms.rule(QKV, SMS))
    table.record(at, {"cublas": 20.0, "gone:1": 1.0})
    assert arms.choice(QKV, table, SMS).arm == arms.rule(QKV, SMS)
    large = Work(6144, 4096, "dense", Use(norm=True), 1000)
    assert arms.choice(large, table, SMS).arm == "cublas"
    assert arms.choice(Work(6144, 4096, "dense", Use(), 1), table, SMS).source == "rule"  # another use


@pytest.mark.parametrize(
    ("gemm", "tokens", "arm"),
    [
        ("library", 1, "cublas"),
        ("flat", 1, "flat:64x64x6:s4"),  # the best that was measured, though the library is faster
        ("flat-1", 1, "flat:64x64x1:s4"),
        ("flat-2", 1, "flat:64x64x2:s4"),
        ("flat", 8, str(arms.flat.plan(8, 6144, 4096, SMS))),
        ("flat", 65, "cublas"),
        ("flat", 1000, "cublas"),
    ],
)
def test_what_a_user_fixed_runs(table: Table, gemm: str, tokens: int, arm: str) -> None:
    table.record(arms.key(QKV, SMS), {"cublas": 2.0, "flat:64x64x6:s4": 3.0, "flat:64x128x4:s1": 4.0})
    found = arms.choice(replace(QKV, tokens=tokens), table, SMS, gemm)
    assert (found.arm, found.source, found.key.batch) == (arm, "fixed", arms.bucket(tokens) or tokens)
    assert found.microseconds == table.times(arms.key(QKV, SMS)).get(arm if tokens == 1 else "")
    packed = Work(6144, 4096, "int4g128", Use(), tokens)
    assert arms.choice(packed, table, SMS, gemm).arm == arms.rule(packed, SMS)


def test_the_settings_of_an_engine_are_what_kernels_take() -> None:
    settings = {field.name: field.metadata["choices"] for field in fields(EngineConfig) if "choices" in field.metadata}
    assert settings["gemm"] == ("auto", *GEMM)
    assert all(Options(gemm=gemm).gemm == gemm for gemm in settings["gemm"])
    with pytest.raises(ValueError, match="flat-2"):
        Options(gemm="flat-3")


def test_flat_products_do_not_overflow_in_float16_though_fixed(table: Table) -> None:
    assert arms.choice(replace(QKV, dtype=torch.float16), table, SMS, "flat").arm == "cublas"


def test_arms_of_a_device_obey_what_was_fixed(table: Table) -> None:
    w = Matrix("dense", 48, 64, (torch.randn(48, 64).bfloat16(),))
    linear = arms.Arms(CPU, torch.bfloat16, SMS, table, "library")
    linear(torch.randn(1, 64).bfloat16(), w)
    assert {(row.arm, row.source) for row in linear.explain()} == {("cublas", "fixed")}


def test_linear_runs_the_library_where_nothing_else_can(table: Table) -> None:
    linear, oracle = running(table, torch.float32), Oracle()
    x, w = torch.randn(3, 64), Matrix("dense", 48, 64, (torch.randn(48, 64),))
    norm, bias, residual = Norm(torch.rand(64), 1e-5), torch.randn(48), torch.randn(3, 24)
    got = linear(x, w, bias, norm, "silu", residual)
    torch.testing.assert_close(got, oracle.linear(x, w, bias, norm=norm, act="silu", residual=residual))
    assert linear(x[:0], w).shape == (0, 48)


def test_linear_asks_once_for_each_use_and_number_of_tokens(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fake:
        def candidates(self, work: Any, sms: int) -> Any:
            return iter(())

        def legal(self, name: str, work: Any) -> bool:
            asked.append((work.tokens, str(work.use)))
            return True

        def bind(self, name: str) -> Any:
            return lambda context, x, w, fused: x.new_full((len(x), w.rows), 7.0)

    monkeypatch.setitem(arms.FAMILIES, "fake", Fake())
    for batch in (1, 8):
        for use in (Use(), Use(residual=True)):
            one = Work(48, 64, "dense", use, batch, torch.float32)
            table.record(arms.key(one, SMS), {"fake:1": 1.0, "cublas": 9.0})
    linear, w = running(table, torch.float32), Matrix("dense", 48, 64, (torch.zeros(48, 64),))
    for tokens in (1, 5, 5, 1):
        assert (linear(torch.zeros(tokens, 64), w) == 7.0).all()
    assert (linear(torch.zeros(1, 64), w, residual=torch.zeros(1, 48)) == 7.0).all()
    assert asked == [(1, "linear"), (5, "linear"), (1, "linear+residual")]
    rows = linear.explain()
    assert [row.key.op for row in rows] == ["linear"] * len(arms.BATCHES) + ["linear+residual"] * len(arms.BATCHES)
    assert [(row.key.batch, row.arm) for row in rows[:3]] == [(1, "fake:1"), (2, "cublas"), (3, "cublas")]


def test_tuning_measures_every_work_once_and_the_copy(table: Table) -> None:
    timer, seen = FakeTimer(), []
    works = [SMALL, SMALL, Work(64, 48, "dense", Use(residual=True), 7)]
    count = tuning.tune(works, running(table), timer, (1, 8, 128), progress=lambda *what: seen.append(what))
    assert count == len(timer.measured) == 6
    assert [(done, total) for done, total, _ in seen] == [(i, 6) for i in range(6)]
    assert "linear+norm+silu 48 x 64 bfloat16, batch 8" in seen[1][2]
    assert timer.copied == 1
    again = Table("gpu H100", "1", table.path)
    assert set(again.times(arms.key(SMALL, SMS))) == set(timer.measured[0])
    assert report.bandwidth(again, SMS) == pytest.approx(3000.0, rel=1e-6)
    assert report.bandwidth(again, SMS, "read") == pytest.approx(3100.0, rel=1e-6)


def test_tuning_goes_on_where_it_was_stopped(table: Table) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuning.tune([SMALL], running(table), FakeTimer(fail_at=2), (1, 2, 3, 4))
    timer = FakeTimer()
    assert tuning.tune([SMALL], running(Table("gpu H100", "1", table.path)), timer, (1, 2, 3, 4)) == 2
    assert timer.copied == 0
    forced = FakeTimer()
    assert tuning.tune([SMALL], running(table), forced, (1, 2), force=True) == 2
    assert forced.copied == 1


def test_tuning_some_families_times_the_rule_and_the_library_too(table: Table) -> None:
    timer = FakeTimer()
    tuning.tune([QKV], running(table), timer, (1,), families=("gemv",))
    assert {name.partition(":")[0] for name in timer.measured[0]} == {"gemv", "bulk", "cublas"}
    assert sum(name.startswith("bulk") for name in timer.measured[0]) == 1


def test_tuning_packed_weights(table: Table) -> None:
    timer = FakeTimer()
    tuning.tune([Work(64, 128, "int4g128", Use(norm=True), 1)], running(table), timer, (1,))
    assert {name.partition(":")[0] for name in timer.measured[0]} == {"stream4", "ring4", "fused"}


def test_a_gpu_on_which_nothing_runs_is_told(table: Table) -> None:
    timer = FakeTimer()
    timer.measure = lambda *given: {}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the log says why"):
        tuning.tune([SMALL], running(table), timer, (1,))
    assert not Table("gpu H100", "1", table.path).times(arms.key(SMALL, SMS))


def test_tables_of_other_gpus_and_other_kernels_are_ignored(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    tuning.tune([SMALL], running(table), FakeTimer(), (1,))
    with caplog.at_level(logging.INFO, "tenfold"):
        assert len(Table("gpu H200", "1", table.path)) == 0
        assert len(Table("gpu H100", "2", table.path)) == 0
    assert len(caplog.records) == 2
    assert arms.version() == arms.version()


def recorded(path: Path) -> Table:
    """A table as a file holds it: GEMV wins at 1, flat products at 2 to 8, the library from 16 on."""
    rows = [{"op": "copy", "rows": 1, "cols": 1 << 30, "format": "int64", "batch": 1, "budget": SMS}]
    rows[0]["microseconds"] = {"copy": 2e-3 * (1 << 30) / 3000.0}
    for batch in arms.BATCHES[:-1]:
        times = {"cublas": 25.0, "flat:64x128x4:s2": 18.0 + batch / 2}
        if batch <= 4:
            times["gemv:8x512"] = 17.0 + 3.0 * (batch - 1)
        at = {"op": "linear+norm", "rows": 6144, "cols": 4096, "format": "bfloat16", "batch": batch, "budget": SMS}
        rows.append({**at, "microseconds": times})
    path.write_text(json.dumps({"schema": 1, "device": "gpu H100", "version": "1", "choices": rows}))
    return Table("gpu H100", "1", path)


def test_the_report_of_a_recorded_table(tmp_path: Path) -> None:
    (shape,) = report.explain([QKV, QKV], recorded(tmp_path / "t.json"), SMS)
    assert (shape.m1, shape.m2) == (2, 16)
    assert [line.choice.arm for line in shape.lines[:2]] == ["gemv:8x512", "flat:64x128x4:s2"]
    first, last = shape.lines[0], shape.lines[-1]
    moved = 2 * (6144 * 4096 + 4096 + 6144)
    assert first.floor == pytest.approx(moved / 3e6)
    assert first.share == pytest.approx(first.floor / 17.0)
    assert (last.choice.source, last.share) == ("rule", None)
    head, *bars = report.chart(shape)
    assert "M1 2, M2 16" in head
    assert len(bars) == len(arms.BATCHES)
    assert bars[0].count("=") < bars[1].count("=")
    assert all(":" in bar.partition("|")[2].partition("|")[0] for bar in bars[:-1])
    assert "not measured" in bars[-1]


def test_a_report_without_a_table(table: Table) -> None:
    (shape,) = report.explain([QKV], table, SMS)
    assert (shape.m1, shape.m2) == (None, None)
    assert {line.choice.source for line in shape.lines} == {"rule"}
    assert "not measured" in report.chart(shape)[1]


def test_bytes_that_must_move() -> None:
    assert report.moved(Work(64, 32, "dense", Use(residual=True), 2)) == 2 * (64 * 32 + 2 * (32 + 2 * 64))
    assert report.moved(Work(64, 32, "dense", Use(act="silu"), 1)) == 2 * (64 * 32 + 32 + 32)
    packed = report.moved(Work(64, 128, "int4g128", Use(), 1))
    assert packed < 2 * 64 * 128 / 3


def test_a_wrong_result_is_told_from_a_rounded_one() -> None:
    wanted = torch.randn(8, 8)
    assert timing.difference(wanted.bfloat16(), wanted) == ""
    assert timing.difference(wanted * 1.1, wanted) != ""
    assert timing.difference(torch.full_like(wanted, float("nan")), wanted) != ""


def test_plans_that_share_a_kernel_are_compiled_once() -> None:
    names = ["flat:64x128x4:s1", "flat:64x128x4:s2", "flat:64x128x4:s16", "stream:8x4x1", "fused:64x64x16:s2:w4:n3"]
    assert len({timing.kernel(name) for name in names}) == 4
