"""Ablations: a case is a row, and one that this version cannot run says why."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.bench import arms, report
from tenfold.bench.arms import CASES, Case, of
from tenfold.bench.engines import Engine, Setup
from tenfold.weights.open import open_checkpoint
from tenfold.weights.softmax import load_phi


def test_cases_differ_between_off_and_on_and_have_names_of_their_own() -> None:
    assert all(case.off != case.on and case.points for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_groups_of_arms_and_none_that_there_is_not() -> None:
    assert arms.cases_of([]) == list(CASES)
    assert {case.group for case in arms.cases_of(["gemm", "merge"])} == {"gemm", "merge"}
    with pytest.raises(ValueError, match="no group of arms 'linear'; allowed: kernels, launches"):
        arms.cases_of(["gemm", "linear"])


def test_a_setting_that_does_not_exist_is_said() -> None:
    assert "no setting wings" in arms.obstacle(Case("x", "wings", of("wings", 0), of("wings", 1)))
    assert "not among" in arms.obstacle(Case("x", "k", of("kernels", "torch"), of("kernels", "magic")))
    assert arms.obstacle(Case("x", "lookahead", of("lookahead", 0), of("lookahead", 1))) == ""
    known = {f.name for f in fields(EngineConfig)}
    for case in CASES:
        assert bool(arms.obstacle(case)) >= any(name not in known for name, _ in (*case.off, *case.on))


def test_a_case_is_measured_in_turn_and_a_broken_one_stops_nothing() -> None:
    cases = [
        Case("launches", "ahead", of("lookahead", 0), of("lookahead", 1), ((1, 8), (2, 8))),
        Case("x", "wings", of("wings", 0), of("wings", 1)),
        Case("x", "broken", (), of("page_size", 10**9), ((1, 8),)),
        Case("kernels", "kernels", of("kernels", "torch"), of("kernels", "auto"), ((1, 8),)),
    ]
    seen: list[int] = []
    found = arms.run(
        *("shape:tiny@layers=1", "cpu", 2, 4),
        cases=cases,
        threads=1,
        say=lambda _: None,
        done=lambda result: seen.append(len(result.rows)),
    )
    assert [(r.name, r.batch, len(r.off_ms), len(r.on_ms)) for r in found.rows] == [
        *(("ahead", 1, 2, 2), ("ahead", 2, 2, 2)),
        ("kernels", 1, 2, 2),
    ]
    assert seen == [2, 3]
    assert {name for name, _ in found.skipped} == {"wings", "broken"}
    assert arms.loaded(json.loads(json.dumps(found.plain()))) == found


def test_every_case_can_be_set_in_this_version() -> None:
    assert {case.name: why for case in CASES if (why := arms.obstacle(case))} == {}
    groups = {case.group for case in CASES}
    assert groups == {"kernels", "launches", "softmax", "merge", "gemm", "dispatch", "weights"}


def test_a_unified_maximum_is_measured_first_and_leaves_other_rows_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    made: list[dict[str, object]] = []
    original = arms.make_engine

    def make(name: str, setup: Setup) -> Engine:
        made.append(dict(setup.settings))
        checkpoint = open_checkpoint(Path(setup.model))
        assert load_phi(checkpoint, 1, 4, torch.bfloat16) is not None
        return original(name, setup)

    monkeypatch.setattr(arms, "make_engine", make)
    cases = [
        Case("softmax", "unified", of("softmax", "online"), of("softmax", "unified"), ((1, 8),)),
        Case("launches", "ahead", of("lookahead", 0), of("lookahead", 1), ((1, 8),)),
    ]
    found = arms.run("shape:tiny@layers=1", "cpu", 1, 4, cases=cases, threads=1, say=lambda _: None)
    assert [settings["softmax"] for settings in made] == ["online", "unified", "lazy", "lazy"]
    assert found.notes == ["a unified maximum, measured on 2048 random tokens, serves 1 of 1 layers"]
    assert found.notes[0] in found.lines()
    assert arms.loaded(json.loads(json.dumps(found.plain()))) == found


def test_the_gain_is_paired() -> None:
    row = arms.Row("g", "n", {}, {}, 1, 8, [2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert row.gain.samples == (2.0, 3.0, 1.0)
    assert row.gain.median == 2.0


def test_engines_that_the_next_case_can_use_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []
    monkeypatch.setattr(arms, "make_engine", lambda name, setup: made.append(dict(setup.settings)) or object())
    pool = arms.Pool("shape:tiny", "cpu", 1, {"threads": 1})
    part = arms.Session(("off", "on"), (arms.Point(1, 8, 3),))
    first = pool.pair(Case("x", "a", of("lookahead", 0), of("lookahead", 1)), part)
    second = pool.pair(Case("x", "b", of("graphs", False), of("lookahead", 1)), part)
    assert first["on"] is second["on"]
    assert made == [
        {"threads": 1, "lookahead": 0},
        {"threads": 1, "lookahead": 1},
        {"threads": 1, "graphs": False},
    ]


@pytest.mark.parametrize(("by", "title"), [("table", "measured table"), ("rule", "rule"), ("", "auto")])
def test_a_row_is_named_after_what_ran(by: str, title: str) -> None:
    def row(name: str) -> arms.Row:
        return arms.Row("dispatch", name, {"gemm": "flat"}, {"gemm": "auto"}, 1, 8, [2.0], [1.0], by)

    rows = [row("auto over cuBLAS always"), row("automatic over manual")]
    assert [r.title for r in rows] == [f"{title} over cuBLAS always", "automatic over manual"]
    result = arms.Result("m", {"hardware": "H"}, "c", rows)
    assert f"{title} over cuBLAS always" in result.lines()[0]
    assert f"| dispatch: {title} over cuBLAS always | gemm=flat | gemm=auto |" in report.arms_table(result)
    assert arms.loaded(json.loads(json.dumps(result.plain()))) == result


def test_results_that_said_beforehand_what_auto_would_be_are_named_after_their_note() -> None:
    old = {"group": "dispatch", "off": {}, "on": {}, "batch": 1, "context": 8, "off_ms": [2.0], "on_ms": [1.0]}
    rows = [
        old | {"name": name} for name in ("measured table over cuBLAS", "measured or rule, over a launch", "graphs")
    ]
    data = {"model": "m", "machine": {}, "command": "c", "rows": rows, "skipped": []}
    for notes, by in ((["the table of choices held 0 measurements: auto is the rule"], "rule"), ([], "auto")):
        titles = [row.title for row in arms.loaded(data | {"notes": notes}).rows]
        assert titles == [f"{by} over cuBLAS", f"{by} over a launch", "graphs"]


def test_a_case_was_decided_by_the_table_where_it_measured_what_the_case_left_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [("linear+norm", 1, "rule"), ("linear+norm", 8, "step"), ("attention 4/2 heads of 16", 1, "measured")]
    rows += [("prefill attention 4/2 heads of 16", 64, "measured"), ("all", None, "only")]
    found = [{"operation": op, "batch": batch, "source": source} for op, batch, source in rows]
    monkeypatch.setattr("tenfold.engine.inspect.choices", lambda core: found)
    engine = SimpleNamespace(core=None)
    for name, batch, by in (("gemm", 1, "rule"), ("gemm", 8, "table"), ("merge", 1, "table"), ("merge", 8, "rule")):
        assert arms.decided_by(engine, Case("x", "auto over y", of(name, "library"), of(name, "auto")), batch) == by
    graphs = Case("x", "graphs", of("graphs", False), of("graphs", True))
    assert [arms.decided_by(engine, graphs, batch) for batch in (1, 8, 64)] == ["table", "table", "rule"]
