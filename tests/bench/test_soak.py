"""The soak: it crowds an engine, sees what is wrong, and several runs are told together as they were."""

import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from tenfold.bench import claims_gpu, soak
from tenfold.bench.lengths import parse
from tenfold.bench.soak import Crowd, Plan, Result, Sample, Soak, Watch
from tenfold.engine.core import Engine
from tenfold.engine.phases.controller import Observed, Split
from tenfold.engine.request import FinishReason, Output

PLAN = Plan("shape:tiny@layers=1", "cpu", 2.0, 400.0, parse("8-96"), parse("1-48"), 0.1, settings={"threads": 1})


def sample(seconds: float, resident: int = 0, allocated: int = 0) -> Sample:
    return Sample(seconds, 0, 0, allocated, allocated, resident, int(seconds), 3, 0, 0, 0)


def result(**own: Any) -> Result:
    made = Result("shape:llama-3-8b@positions=1408", {"hardware": "H", "commit": "c", "date": "d"}, "soak it", {})
    made.minutes, made.kinds, made.pages_held, made.samples = 10.0, {"greedy": 5}, 0, [sample(0.0), sample(600.0)]
    made.growth = {"process": 1.0, "GPU memory allocated": 2.0, "GPU memory reserved": 0.0}
    made.slopes = {name: 9 * value for name, value in made.growth.items()}
    for name, value in own.items():
        setattr(made, name, value)
    return made


def test_a_crowded_engine_comes_through_and_nothing_is_left() -> None:
    found = soak.run(PLAN, say=lambda _: None)
    assert found.faults == []
    assert found.passed
    assert found.preemptions > 0
    assert found.prefix_hit_tokens > 0
    assert sum(found.ends.values()) >= found.requests  # the warm-up's are not among them
    assert found.samples[0].steps < found.samples[-1].steps
    assert {"length", "abort"} <= set(found.ends)
    assert set(found.kinds) >= {kind for kind in soak.KINDS if "grammar" not in kind}
    assert found.pages == soak.CROWD * (96 + 48 + 16) // 16
    assert soak.loaded(json.loads(json.dumps(found.plain()))) == found


def test_greedy_answers_are_judged_when_all_is_over() -> None:
    found = soak.run(replace(PLAN, seconds=1.0, judged=20), say=lambda _: None)
    assert found.faults == []
    assert 10 <= found.judged <= 20
    assert found.farthest < 1e-3
    assert f"{found.judged} greedy answers judged" in found.line()


def test_an_answer_that_another_prompt_would_have_is_a_fault() -> None:
    run = made(replace(PLAN, judged=2))
    run.greedy = {"a": ((1, 2, 3), [9, 8, 7, 6, 5]), "b": ((4,), [])}  # b was cancelled before it had any
    run.judge()
    assert run.result.judged == 1
    assert run.result.faults[0].count("a says token 9 at place 0") == 2  # and again, read by itself


def test_a_border_wanders_where_there_is_one() -> None:
    with pytest.raises(ValueError, match="--set schedule=phases"):
        soak.run(replace(PLAN, wander=1.0), say=lambda _: None)
    splits = [Split(132, 132), Split(96, 36), Split(64, 68)]
    wandering, now, seen = soak.Wandering(splits, 3), splits[0], Observed(None, None, 0, 0.0, 0, 0.0)
    places, chunks = set(), set()
    for _ in range(60):
        decision = wandering.decide(seen, now)
        assert decision.split != now
        now = decision.split
        places.add(now)
        chunks.add(decision.chunk)
    assert (places, chunks) == (set(splits), {0, soak.RIDING})


def test_too_much_memory_to_preempt_is_a_fault() -> None:
    roomy = replace(PLAN, seconds=0.3, rate=20.0, settings={"threads": 1, "kv_memory": 64 << 20})
    assert any("nobody was preempted" in fault for fault in soak.run(roomy, say=lambda _: None).faults)


def made(plan: Plan = PLAN) -> Soak:
    engine = Engine.load(plan.config(), tokens_only=True)
    return Soak(engine, plan, result(samples=[]), Watch(100.0, lambda: None), lambda _: None)


def test_wrong_outputs_and_lost_pages_are_faults() -> None:
    run = made()
    run.arrive()  # the first of a crowd is greedy
    (name,) = run.open
    run.take(Output("nobody", 0, (1,)))
    run.take(Output(name, 0, tuple(range(run.limits[name] + 1))))
    run.take(Output(name, 0, (), finish=FinishReason.ERROR, error="broken"))
    run.take(Output(name, 0, (1,)))
    run.arrive()
    run.engine.pool.allocate(2)
    run.sample()
    run.close()
    said = "; ".join(run.result.faults)
    for part in (
        "nobody[0] was told",
        "more tokens",
        "broken",
        f"{name}[0] was told",
        "never ended",
        "2 wait",
        "pages",
    ):
        assert part in said
    assert run.result.pages_held == 2
    assert not run.result.passed


def test_a_watch_calls_once_when_nobody_beats() -> None:
    called, count = threading.Event(), [0]

    def hung() -> None:
        count[0] += 1
        called.set()

    watch = Watch(0.05, hung)
    assert called.wait(10)
    watch.close()
    assert count == [1]


def test_a_seed_sends_the_same_and_another_does_not() -> None:
    first, again, other = (
        [Crowd(replace(PLAN, seed=seed), 500, True).next()[1].prompt for _ in range(1)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_slopes_are_of_the_second_half() -> None:
    samples = [sample(36.0 * i, (100 * i if i < 10 else 1000 + i) << 20) for i in range(20)]
    assert soak.slopes(samples)["process"] == pytest.approx(100.0)
    assert soak.growth(samples)["process"] == 9


def test_runs_of_one_model_are_told_together() -> None:
    runs = [result(samples=[sample(0.0, allocated=9), sample(1.0)]), result(growth={"process": 40.0}), result()]
    minutes, *rest = soak.claims_of(runs)
    assert (minutes.value, minutes.met, minutes.hardware) == (30.0, True, "H")
    assert soak.claims_of([result()] * 4)[0].target == ">= 30 min"  # not what the runs happen to have
    assert "3 runs of 10.0, 10.0, 10.0 min, each an engine of its own" in minutes.note
    growth = {claim.what: claim for claim in rest}
    assert not growth["growth under soak, process, worst of 3 runs, llama-3-8b"].met
    allocated = growth["growth under soak, GPU memory allocated, worst of 2 runs, llama-3-8b"]
    assert (allocated.value, allocated.met) == (2.0, True)
    assert "+18.0, +18.0" in allocated.note


def test_schedules_are_told_apart() -> None:
    phases = result(settings={"schedule": "phases"}, border_changes=540, judged=200, farthest=0.0625)
    made = {claim.what: claim for claim in soak.claims_of([result(settings={"schedule": "chunked"}), phases])}
    one = made["minutes of soak without fault, llama-3-8b, phases"]
    assert "200 greedy answers judged, at most 0.06 nats below the best, 540 moves of the border" in one.note
    assert "moves" not in made["minutes of soak without fault, llama-3-8b"].note


def test_a_run_that_failed_counts_for_nothing() -> None:
    minutes = soak.claims_of([result(), result(), result(faults=["hung"])])[0]
    assert (minutes.value, minutes.met) == (20.0, False)
    assert "1 faults: hung" in minutes.note
    assert not soak.claims_of([result(pages_held=1)] * 4)[0].met
    assert not soak.claims_of([*[result()] * 4, result(pages_held=1)])[0].met


def test_a_short_soak_meets_nothing() -> None:
    assert not soak.claims_of([result()])[0].met


def test_a_folder_of_results_has_the_claim(tmp_path: Any) -> None:
    for i in range(3):
        (tmp_path / f"soak-{i}.json").write_text(json.dumps(result().plain()))
    assert [claim.met for claim in claims_gpu.of_folder(tmp_path) if claim.id == "F9"] == [True, True]
