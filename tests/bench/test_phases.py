"""The benchmark of schedules: every arm in one engine, what is counted, what is claimed."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tenfold.bench import claims_phases, phases, plots, report
from tenfold.bench.engines import Answer, Job
from tenfold.bench.phases import Result, Row
from tenfold.engine.phases import start
from tenfold.engine.request import Request, SamplingParams

MODEL = "shape:llama-3.2-1b@layers=2"
PAIRS = [[20, 4], [40, 6], [6, 3]]


def test_all_arms_answer_the_same_requests_in_turn(tmp_path: Path) -> None:
    told: list[str] = []
    engine = phases.load(MODEL, "cpu", 200, {"kv_memory": 8 << 20, "max_step_tokens": 64})
    arms = ["chunked", "chunked:16", "prefill-first", "shared"]
    result = Result(MODEL, {"hardware": "here"}, arms=arms, long=0.3, long_tokens=100)
    kept: list[int] = []
    phases.run(engine, result, PAIRS, [20.0, 40.0], 0.2, 0.05, 2, 1, told.append, lambda r: kept.append(len(r.rows)))
    assert [row.arm for row in result.rows] == [*arms, *reversed(arms)]
    for rate in (20.0, 40.0):
        rows = [row for row in result.rows if row.rate == rate]
        assert len({(row.requests, row.tokens) for row in rows}) == 1
        assert all(row.failed == 0 and row.requests > 0 for row in rows)
    assert kept == [4, 8]
    assert min(result.alone.values()) > 0
    assert {arm: len(rates) for arm, rates in result.full.items()} == {"chunked": 2}  # of these arms
    assert phases.loaded(result.plain()) == result
    assert "prefill-first" in report.phases_table(result)
    assert plots.phases(result, tmp_path / "a.png").stat().st_size > 10_000
    for name in ("phases", "phases-two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result.plain()))
    drawn = report.charts(tmp_path)
    assert [path.name for path in drawn] == ["attainment-phases-two.png", "attainment-phases.png"]
    assert not engine.has_work
    assert engine.pool.used == 0


def test_a_second_device_is_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = phases.load(MODEL, "cpu", 100, {"kv_memory": 4 << 20})
    with pytest.raises(ValueError, match="cannot run here"):
        phases.Arms(engine, ["disaggregated"])
    monkeypatch.setattr(phases, "apart", lambda engine: start.apart(engine, engine.device))
    result = Result(MODEL, {"hardware": "here"}, arms=["chunked", "disaggregated"])
    phases.run(engine, result, PAIRS, [20.0], 0.2, 0.05, 0, say=lambda line: None)
    assert [(row.arm, row.failed) for row in result.rows] == [("chunked", 0), ("disaggregated", 0)]
    assert result.rows[0].tokens == result.rows[1].tokens > 0


def test_what_is_no_arm_is_refused() -> None:
    engine = phases.load(MODEL, "cpu", 100, {"kv_memory": 4 << 20})
    for wrong in ("chunks", "chunked:many", "adaptiv"):
        with pytest.raises(ValueError, match="is no arm"):
            phases.Arms(engine, [wrong])


def test_long_prompts_are_a_share_and_arrivals_repeat() -> None:
    asks = phases.drawn(PAIRS, 100.0, 20.0, 3, 0.25, 999)
    assert asks == phases.drawn(PAIRS, 100.0, 20.0, 3, 0.25, 999)
    assert len(asks) == pytest.approx(2000, rel=0.1)
    assert sum(ask.prompt == 999 for ask in asks) / len(asks) == pytest.approx(0.25, abs=0.04)


def test_requests_count_where_both_targets_hold() -> None:
    alone = {"ttft": 10.0, "tpot": 2.0}
    good = Answer(0.0, [0.05, 0.06], [1, 1])  # 50 ms, then 10 ms a token
    late = Answer(0.0, [0.09, 0.1], [1, 1])  # loose only
    slow = Answer(0.0, [0.05, 0.09], [1, 1])  # 40 ms a token
    failed = Answer(0.0, [0.05], [1], "broken")
    row = phases.row_of("a", 2.0, [good, late, slow, failed], 1.0, alone)
    assert (row.tight, row.loose, row.failed, row.tokens) == (0.25, 0.5, 1, 6)
    assert row.latency == pytest.approx((0.06 + 0.1 + 0.09) / 3)


def test_gaps_beside_long_prompts_are_told_apart() -> None:
    asks = [phases.Ask(0.0, 10, 3), phases.Ask(0.1, 999, 1), phases.Ask(0.9, 10, 2)]
    answers = [Answer(0.0, [0.05, 0.15, 0.40, 0.45], [1] * 4), Answer(0.1, [0.3], [1]), Answer(0.9, [1.0, 1.1], [1, 1])]
    assert phases.beside(asks, answers, 999) == pytest.approx([100.0, 250.0])
    assert phases.beside(asks, answers, 0) == []
    found = phases.row_of("a", 2.0, answers, 1.0, {"ttft": 1.0, "tpot": 1.0}, [100.0, 250.0])
    assert found.beside["p99"] == pytest.approx(250.0, rel=0.02)
    assert "beside long prompts" in found.line()


def row(arm: str, rate: float, tight: float, loose: float, **values: float) -> Row:
    own = {"latency": 1.0, "ttft": 100.0, "itl": 20.0, "beside": 20.0} | values
    percentiles = [dict.fromkeys(("p50", "p90", "p99"), own[name]) for name in ("ttft", "ttft", "itl", "beside")]
    return Row(arm, rate, 100, 0, 10.0, 1000, tight, loose, own["latency"], *percentiles, moved=3)


def made() -> Result:
    machine = {"hardware": "GPU", "cuda": "13", "commit": "abc", "date": "2026-01-01"}
    result = Result("shape:some", machine, "command", ["chunked", "shared", "adaptive"], {"ttft": 1.0, "tpot": 1.0})
    result.rows = [
        row("chunked", 10, 1.0, 1.0),
        row("chunked", 20, 0.8, 1.0, latency=4.0),
        row("shared", 10, 0.7, 0.7),
        row("shared", 20, 0.5, 0.6, latency=3.0),
        row("adaptive", 10, 1.0, 1.0),
        row("adaptive", 20, 0.95, 1.0, latency=2.0),
    ]
    result.full = {"chunked": [100.0, 90.0], "adaptive": [95.0, 99.0], "shared": [80.0]}
    result.flip_us = 12.0
    return result


def test_claims_are_those_of_the_rows() -> None:
    result = made()
    assert claims_phases.capacity(result, "chunked", "tight") == pytest.approx(15.0)
    assert claims_phases.capacity(result, "shared", "tight") == 0.0
    found = {(c.id, "tight" in c.what): c for c in claims_phases.of_results([result])}
    assert found["P1", True].value == pytest.approx(20 / 15, rel=1e-3)
    assert not found["P1", True].met
    assert found["P1", False].value == 1.0
    assert (found["P2", False].value, found["P2", False].met) == (1.5, True)
    assert (found["P4", False].value, found["P4", False].met) == (12.0, True)
    assert (found["P5", False].value, found["P5", False].met) == (0.99, True)


def test_a_mix_with_long_prompts_counts_gaps_between_tokens() -> None:
    result = made()
    result.long, result.long_tokens = 0.1, 8192
    result.arms.append("chunked:512")
    result.rows = [
        row("chunked", 4, 1, 1, beside=300.0, ttft=500.0),
        row("chunked:512", 4, 1, 1, beside=60.0, ttft=900.0),
        row("adaptive", 4, 1, 1, beside=25.0, ttft=1000.0),
    ]
    result.rows += [row("chunked", 6, 1, 1, beside=100.0), row("adaptive", 6, 1, 1, beside=50.0)]
    *large, gaps, first = (c for c in claims_phases.of_results([result]) if c.id == "P3")
    assert [(c.value, c.spread, c.met) for c in large] == [(2.0, (2.0, 12.0), True), (2.0, (1.0, 2.0), False)]
    assert "worst of 2 rates" in large[0].what
    assert large[0].note == "4/s: 25 and 300 ms, 6/s: 50 and 100 ms"
    assert (gaps.value, gaps.met) == (2.4, True)
    assert (first.value, first.met) == (1.111, True)
    assert "chunked:512 over adaptive" in gaps.what


def test_vllm_and_two_gpus_are_no_rivals_of_one_gpu() -> None:
    result = made()
    result.arms += ["disaggregated", "vllm:2048"]
    result.rows += [row("disaggregated", 20, 1.0, 1.0, latency=0.5), row("vllm:2048", 20, 1.0, 1.0, latency=3.0)]
    assert claims_phases.capacity(result, "disaggregated", "tight") == 10.0
    found = [c for c in claims_phases.of_results([result]) if c.id in ("P1", "P2")]
    against = {(c.id, "tight" in c.what, c.against): c.value for c in found}
    assert against["P1", True, "the best of our rivals"] == pytest.approx(20 / 15, rel=1e-3)
    assert against["P1", True, "vLLM"] == 1.0
    assert against["P2", False, "the best of our rivals"] == 1.5  # of `shared`
    assert against["P2", False, "vLLM"] == 1.5


class Elsewhere:
    """Stands in for vLLM in a process of its own: an answer's tokens come together, a second after the request."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        self.jobs += jobs
        return [Answer(job.due, [job.due + 1.0], [job.tokens]) for job in jobs]


def test_another_engine_is_an_arm_and_gets_the_same_requests() -> None:
    engine = phases.load(MODEL, "cpu", 100, {"kv_memory": 4 << 20})
    result, peer = Result(MODEL, {"hardware": "here"}, arms=["vllm", "chunked"]), Elsewhere()
    phases.run(engine, result, PAIRS, [20.0], 0.3, 0.0, 0, say=lambda line: None, peer=peer)
    theirs, ours = result.rows
    assert (theirs.arm, theirs.tokens, theirs.requests) == ("vllm", ours.tokens, ours.requests)
    assert theirs.ttft["p50"] == pytest.approx(1000.0)
    assert [job.due for job in peer.jobs] == sorted(job.due for job in peer.jobs)
    assert {(len(job.prompt), job.tokens) for job in peer.jobs} <= {tuple(pair) for pair in PAIRS}
    with pytest.raises(ValueError, match="--peer-path"):
        phases.Arms(engine, ["vllm", "chunked"]).serve("vllm", [], 1)
    assert phases.start_peer(MODEL, 100, ["chunked"], "") is None


def test_an_arm_that_was_hopeless_is_left_out_of_higher_rates() -> None:
    engine = phases.load(MODEL, "cpu", 100, {"kv_memory": 4 << 20})
    result = Result(MODEL, {"hardware": "here"}, arms=["chunked", "shared"])
    phases.run(engine, result, PAIRS, [20.0, 40.0], 0.2, 0.05, 0, say=lambda line: None, hopeless=2.0)
    assert [(row.arm, row.rate) for row in result.rows] == [("chunked", 20.0), ("shared", 20.0)]
    assert [note.partition(":")[0] for note in result.notes] == ["shared", "chunked"]


def test_an_arm_may_take_prompts_in_the_order_they_come() -> None:
    engine = phases.load(MODEL, "cpu", 100, {"kv_memory": 4 << 20}, ["chunked:64@arrival"])
    arms = phases.Arms(engine, ["chunked:64@arrival", "chunked", "shared@arrival"])
    for name, overtake, tokens in (("chunked:64@arrival", 0.0, 64), ("chunked", 4.0, 512)):
        arms.use(name)
        assert engine.scheduler.limits.overtake == overtake
        assert engine.scheduler.limits.max_step_tokens == tokens
    assert arms.use("shared@arrival") is not None
    assert engine.scheduler.limits.overtake == 0.0
    for name, first in (("chunked", "short"), ("chunked:64@arrival", "long")):
        arms.use(name)
        for request, length in (("long", 60), ("short", 3)):
            engine.add(Request(request, tuple(range(length)), SamplingParams(max_tokens=1, temperature=0.0)))
        head = engine.scheduler.queue.head()
        assert head is not None
        assert head.request.id == first
        while engine.has_work:
            engine.step()


def test_a_mix_has_the_mean_times_of_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(engine: object, asks: Sequence[phases.Ask]) -> dict[str, float]:
        return {"ttft": max(ask.prompt for ask in asks), "tpot": 1.0}

    monkeypatch.setattr(phases, "_one_by_one", times)
    assert phases.by_itself(None, PAIRS, 0.25, 800) == {"ttft": 0.75 * 40 + 0.25 * 800, "tpot": 1.0}  # type: ignore[arg-type]
    assert phases.by_itself(None, PAIRS)["ttft"] == 40  # type: ignore[arg-type]


def test_rivals_take_prompts_as_they_come_where_a_run_has_such() -> None:
    result = made()
    result.arms.append("chunked@arrival")
    result.rows += [row("chunked@arrival", 10, 1.0, 1.0), row("chunked@arrival", 20, 0.5, 0.5, latency=8.0)]
    assert claims_phases.rivals(result) == ["chunked@arrival"]
    assert claims_phases.kin(result) == ["chunked", "shared"]
    found = {(c.id, c.against): c for c in claims_phases.of_results([result]) if "tight" in c.what or c.id == "P2"}
    assert found["P1", "the best of our rivals"].value == pytest.approx(20 / 12, rel=1e-3)
    assert found["P1", "the best of our arms that overtake too"].value == pytest.approx(20 / 15, rel=1e-3)
    assert found["P2", "the best of our rivals"].value == 4.0


def test_each_arm_is_drawn_in_a_style_of_its_own() -> None:
    arms = [*phases.ARMS.split(","), *(arm + phases.ARRIVAL for arm in phases.ARMS.split(",")), "vllm"]
    styles = plots.arm_styles(arms)
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == len(arms)
    assert (styles["adaptive"]["linestyle"], styles["chunked@arrival"]["linestyle"]) == ("-", ":")


def test_a_measurement_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(phases, "HOPELESS", 0.0)  # on a busy machine all may be late
    lengths = tmp_path / "pairs.json"
    lengths.write_text("[[4, 3], [9, 2]]")
    own = ["--model", "shape:tiny", "--device", "cpu", "--lengths", str(lengths), "--arms", "chunked,shared"]
    own += ["--seconds", "0.1", "--warm", "0.05", "--full", "4", "--out", str(tmp_path), "--set", "kv_memory=4194304"]
    path = phases.main([*own, "--rates", "50,80", "--limit", "0"])
    assert path is not None
    begun = phases.loaded(json.loads(path.read_text()))
    assert not begun.rows
    assert len(begun.notes) == 2
    phases.main([*own, "--rates", "50,80", "--resume"])
    done = phases.loaded(json.loads(path.read_text()))
    assert [(row.arm, row.rate) for row in done.rows] == [
        *(("chunked", 50.0), ("shared", 50.0)),
        *(("shared", 80.0), ("chunked", 80.0)),
    ]
    assert (done.alone, done.full) == (begun.alone, begun.full)
    assert not done.notes
    phases.main([*own, "--rates", "50,80", "--resume"])
    assert phases.loaded(json.loads(path.read_text())).rows == done.rows
    capsys.readouterr()
    path.write_text(json.dumps(done.plain() | {"full": {"chunked": [1.0]}}))
    phases.main([*own, "--rates", "50,80", "--resume", "--commit", "another"])
    anew = phases.loaded(json.loads(path.read_text()))
    assert "is measured anew: it was with commit" in capsys.readouterr().out
    assert (anew.machine["commit"], len(anew.rows)) == ("another", 4)
    assert anew.full != {"chunked": [1.0]}
    with pytest.raises(ValueError, match=r"another command.*--resume goes on with the same alone"):
        phases.main([*own, "--rates", "50", "--resume"])
