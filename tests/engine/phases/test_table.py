"""The schedule a user names: what is allowed, what it falls back to, whose targets count, what is told of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tenfold.base.config import EngineConfig
from tenfold.engine.memory import check_sizes
from tenfold.engine.phases import start, stored, table
from tenfold.engine.phases.controller import Adaptive, Algorithm1, Decision, Observed, Split, Staircase, Targets
from tenfold.engine.phases.lanes import OneStream
from tenfold.engine.phases.latency import Stairs
from tenfold.engine.phases.loop import Phases
from tenfold.engine.phases.stored import Subject
from tenfold.engine.request import Request, SamplingParams
from tenfold.ops.choose import Key, Table
from tenfold.ops.gpu import green
from tenfold.serve.cli import choices
from tests.engine import fake
from tests.engine.test_invariance import Case, answer, case

__all__ = ["case"]
STAIRS = Stairs(
    dict.fromkeys((64, 132), ((256, 0.01), (2048, 0.04))), dict.fromkeys((68, 132), ((1, 0.006), (8, 0.007)))
)
SPLITS = [Split(64, 68), Split(96, 36)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "phased"}, ["schedule is 'phased'", "chunked, prefill-first, phases, disaggregated"]),
        ({"border": "half"}, ["border is 'half'", "adaptive, staircase, paper, shared", "a multiple of 8"]),
        ({"border": "4"}, ["border is '4'"]),
        ({"border": "97"}, ["border is '97'", "a multiple of 8 such as 96"]),
        ({"border": "\u00b2"}, ["border is", "a multiple of 8"]),
        ({"ttft": float("1e400")}, ["ttft is inf", "a finite number of seconds", "0 (derive it)"]),
        ({"tpot": float("inf"), "schedule": "phases"}, ["tpot is inf"]),
        ({"ttft": -1.0}, ["ttft is -1.0", "or 0 (derive it)"]),
        ({"tpot": float("nan")}, ["tpot is nan"]),
        ({"schedule": "phases", "speculate": "ngram"}, ["do not go together", "schedule=chunked"]),
        ({"schedule": "prefill-first", "speculate": "ngram"}, ["do not go together"]),
        ({"schedule": "disaggregated"}, ["set prefix_cache=false"]),
        ({"schedule": "disaggregated", "prefix_cache": False, "kv_cache": "fp8"}, ["leave kv_cache at auto"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"allowed|together|set") as raised:
        check_sizes(replace(EngineConfig(), **changes))
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"schedule": "phases", "ttft": 0.5, "tpot": 0.03}, []),
        ({"ttft": 0.5}, ["ttft", "schedule=chunked"]),
        ({"ttft": 0.5, "tpot": 0.03, "schedule": "prefill-first"}, ["ttft and tpot", "schedule=prefill-first"]),
        ({"tpot": 0.03, "schedule": "phases", "border": "96"}, ["tpot", "border=96"]),
    ],
)
def test_targets_that_nothing_aims_at_are_told(
    changes: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    check_sizes(replace(EngineConfig(), **changes))
    assert len(caplog.records) == bool(told)
    for word in told:
        assert word in caplog.text


def test_a_border_is_held_against_the_gpu() -> None:
    assert table.splits_of("96", 132) == (96,)
    assert table.splits_of("shared", 132) == ()
    assert table.splits_of("adaptive", 132) == table.SIZES
    assert max(table.splits_of("paper", 100)) <= 80
    for wrong in ("100", "120"):
        with pytest.raises(ValueError, match=r"this GPU of 132 multiprocessors: multiples of 8 from 8 to 112"):
            table.splits_of(wrong, 132)


def test_controllers_by_name() -> None:
    targets = Targets(1.0, 0.1)
    kinds = {"adaptive": Adaptive, "staircase": Staircase, "paper": Algorithm1}
    for name, kind in kinds.items():
        made = table.make_controller(name, targets, SPLITS, STAIRS)
        assert isinstance(made, kind)
        assert made.targets == targets
    assert table.make_controller("shared", targets, SPLITS, STAIRS) is None
    assert table.make_controller("96", targets, SPLITS, STAIRS) is None


def test_targets_follow_from_what_was_measured_unless_they_were_set() -> None:
    config = EngineConfig()
    derived = table.targets_of(config, STAIRS, 132)
    assert derived.ttft == pytest.approx(7.5 * STAIRS.prefill_seconds(132, 1024))
    assert derived.tpot == pytest.approx(7.5 * 0.006)
    assert table.targets_of(replace(config, ttft=0.3, tpot=0.05), STAIRS, 132) == Targets(0.3, 0.05)


def test_without_a_gpu_prompts_run_in_chunks_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = fake.make_engine(schedule="phases")
    assert start.start(engine) is None
    (record,) = caplog.records
    assert "no GPU here" in record.getMessage()
    assert "as with schedule=chunked" in record.getMessage()
    assert start.start(fake.make_engine()) is None
    assert len(caplog.records) == 1
    assert start.start(fake.make_engine(schedule="disaggregated", prefix_cache=False)) is None
    assert "it needs two GPUs and there is none" in caplog.records[1].getMessage()


def test_a_second_device_needs_the_weights_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = fake.make_engine(schedule="disaggregated", prefix_cache=False)
    assert start.apart(engine, engine.device) is None
    assert "loaded twice" in caplog.text
    own = SimpleNamespace(recomputed=3)
    engine.replica = lambda device: (fake.FakeModel(), own)  # type: ignore[assignment,return-value]
    before = engine.stats().recomputed_rows
    assert start.apart(engine, engine.device) is not None
    assert engine.stats().recomputed_rows == before + 3


@pytest.mark.parametrize("lookahead", [0, 1])
def test_answers_do_not_depend_on_prompts_first(case: Case, lookahead: int) -> None:
    engine = case.engine(max_batch=9, lookahead=lookahead, max_step_tokens=20, schedule="prefill-first")
    answer(case, engine, list(range(9)), [2] * 9)
    answer(case, engine, [8, 5, 2, 7], n=2)


def test_prompts_come_first_and_by_themselves() -> None:
    engine = fake.make_engine(schedule="prefill-first", max_step_tokens=8, max_model_len=96)
    plans: list[tuple[int, int]] = []
    forward = engine.runner.forward

    def told(entries: Any, decodes: int) -> Any:
        plans.append((len(entries), decodes))
        return forward(entries, decodes)

    engine.runner.forward = told  # type: ignore[method-assign]
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    plans.clear()
    engine.add(Request("b", tuple(range(5, 29)), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    assert plans == [(1, 0), (1, 0), (1, 0), (2, 2)]
    fake.drain(engine)


class Recording:
    """A controller that keeps what it saw."""

    targets = Targets(1.0, 0.1)

    def __init__(self) -> None:
        self.seen: list[Observed] = []

    def decide(self, seen: Observed, now: Split) -> Decision:
        self.seen.append(seen)
        return Decision(Split(64, 68), "the test wants it")


def test_the_strictest_request_sets_the_targets_and_the_border_is_told() -> None:
    engine = fake.make_engine(max_step_tokens=64, max_model_len=96)
    recorder = Recording()
    lanes = OneStream(engine.runner)
    engine.phases = Phases(engine, lanes, recorder, slice=1, targets=recorder.targets)
    greedy = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    engine.add(Request("a", (1, 2, 3), greedy))
    engine.step()
    engine.add(Request("b", (4, 5, 6), greedy, ttft=0.2, tpot=0.03))
    for _ in range(6):
        engine.clock.now += 1.0  # type: ignore[attr-defined]
        engine.step()
    wanted = [seen.targets for seen in recorder.seen]
    assert wanted[0] is None
    assert Targets(0.2, 0.1) in wanted  # while b waits for its first token
    assert wanted[-1] == Targets(1.0, 0.03)
    stats = engine.stats()
    assert (stats.prefill_sms, stats.decode_sms, stats.border_changes, stats.prompt_chunk) == (64, 68, 1, 0)
    assert stats.border_why == "the test wants it"
    fake.drain(engine)


def test_targets_and_waits_are_of_the_whole_queue() -> None:
    """Not of its head: whoever is behind it may be stricter, or have come before."""
    engine = fake.make_engine(max_batch=2, max_step_tokens=64, max_model_len=96)
    recorder, now = Recording(), engine.clock()
    engine.phases = Phases(engine, OneStream(engine.runner), recorder, slice=1, targets=recorder.targets, tick=0.0)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for name in ("a", "b"):
        engine.add(Request(name, (1, 2, 3), greedy, arrival=now, priority=-1))
    engine.step()
    engine.add(Request("head", (4, 5), greedy, arrival=now - 1.0, priority=-1))
    engine.add(Request("old", (4, 5), greedy, arrival=now - 3.0, ttft=5.0))
    engine.add(Request("strict", (4, 5), greedy, arrival=now - 2.0, ttft=0.2))
    engine.step()
    assert engine.scheduler.waiting == 3
    assert recorder.seen[-1].waited == 3.0
    assert recorder.seen[-1].targets == Targets(0.2, 0.1)
    engine.abort("strict")
    engine.abort("old")
    engine.step()
    assert recorder.seen[-1].waited == 1.0
    assert recorder.seen[-1].targets is None
    fake.drain(engine)


def test_controllers_keep_to_the_targets_of_the_requests() -> None:
    staircase = Staircase(Targets(10.0, 1.0), SPLITS, STAIRS)
    seen = Observed(0.1, 0.01, 2048, 0.0, 8, 100.0)
    assert staircase.promise(SPLITS[0], seen).miss == 1.0
    assert staircase.promise(SPLITS[0], replace(seen, targets=Targets(10.0, 0.001))).miss > 1.0


def test_what_was_measured_is_said() -> None:
    said = start.said(STAIRS)
    assert said == "prefill of 2048 tokens by SMs, ms: 64: 40.0, 132: 40.0; decode of 8: 68: 7.00, 132: 7.00"


def test_other_kernels_than_those_for_gpus_have_no_lanes() -> None:
    engine: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), kernels=SimpleNamespace(name="torch", reason="asked for")
    )
    assert "kernels are torch (asked for)" in start.unable(engine)


def test_a_small_part_of_a_gpu_has_no_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(green, "unavailable", lambda: "")
    engine: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        kernels=SimpleNamespace(name="gpu", sms=72),
        config=EngineConfig(border="adaptive"),
    )
    assert "72 multiprocessors and the first border needs 84" in start.unable(engine)
    engine.kernels.sms = 84
    assert not start.unable(engine)
    engine.kernels.sms, engine.config = 72, EngineConfig(border="shared")
    assert not start.unable(engine)


def test_stairs_are_remembered_and_explained(tmp_path: Path) -> None:
    shape: Any = SimpleNamespace(layers=2, heads=8, kv_heads=2, vocab_size=97, hidden_size=64, intermediate_size=256)
    config = EngineConfig(dtype="bfloat16", max_model_len=4096, max_batch=16)
    sizes = stored.sizes_of(4096, 16)
    assert sizes == ([128, 256, 512, 1024, 2048], [1, 8])
    prefills = {sms: tuple((n, n / sms / 1e3) for n in sizes[0]) for sms in (132, *table.SIZES)}
    decodes = {sms: tuple((n, 0.005 + 0.2 / sms) for n in sizes[1]) for sms in (132, *(132 - s for s in table.SIZES))}
    stairs = Stairs(prefills, decodes)
    known = Table("some GPU", "1", tmp_path / "choices.json")
    assert stored.recall(known, Subject(shape, config, 9), prefills, decodes, *sizes) is None
    assert choices.phase_lines(known, Subject(shape, config, 9), 132) == []
    stored.keep(known, Subject(shape, config, 9), stairs)
    again = Table("some GPU", "1", tmp_path / "choices.json")
    found = stored.recall(again, Subject(shape, config, 9), prefills, decodes, *sizes)
    assert found is not None
    assert found.prefill_seconds(96, 2048) == pytest.approx(stairs.prefill_seconds(96, 2048))
    assert found.decode_seconds(36, 8) == pytest.approx(stairs.decode_seconds(36, 8))
    for other in (Subject(shape, replace(config, kv_cache="fp8"), 9), Subject(shape, config, 8)):
        assert stored.recall(again, other, prefills, decodes, *sizes) is None
    wanted = replace(config, tpot=0.0125, border="staircase")
    head, whole, *splits = choices.phase_lines(again, Subject(shape, wanted, 9), 132)
    assert head[:3] == ("prompts + answers", "prefill 128", "prefill 256")
    assert head[-3:] == ("decode 1", "decode 8", "for")
    assert whole[0] == "132+132"
    assert [row[0] for row in splits] == [f"{size}+{132 - size}" for size in table.SIZES]
    assert [row[-1] for row in splits] == [
        "",
        "",
        "1 answers, 8 answers",
        "",
    ]  # 36 SMs decode in 10.6 ms, beside a prefill in 12.1
    _, whole, *splits = choices.phase_lines(again, Subject(shape, replace(wanted, border="adaptive"), 9), 132)
    assert whole[-1] == "1 answers in steps with 128 tokens of prompts, 8 answers in steps with 128 tokens of prompts"


def test_stairs_that_were_forgotten_are_measured_again(tmp_path: Path) -> None:
    shape: Any = SimpleNamespace(layers=2, heads=8, kv_heads=2, vocab_size=97, hidden_size=64, intermediate_size=256)
    other: Any = SimpleNamespace(**vars(shape) | {"layers": 3})
    config = EngineConfig(dtype="bfloat16", max_model_len=4096, max_batch=16)
    asked = ([64, 132], [68, 132], [256, 2048], [1, 8])
    known, linear = Table("some GPU", "1", tmp_path / "choices.json"), Key("linear", 64, 64, "bfloat16", 1, 132)
    known.record(linear, {"cublas": 1.0})
    for model in (shape, other):
        stored.keep(known, Subject(model, config, 9), STAIRS)
    stored.forget(known, shape)
    for table_of in (known, Table("some GPU", "1", tmp_path / "choices.json")):
        assert stored.recall(table_of, Subject(shape, config, 9), *asked) is None
        assert stored.recall(table_of, Subject(other, config, 9), *asked) == STAIRS
        assert table_of.times(linear) == {"cublas": 1.0}
    stored.keep(known, Subject(shape, config, 9), STAIRS)
    assert stored.recall(Table("some GPU", "1", tmp_path / "choices.json"), Subject(shape, config, 9), *asked) == STAIRS


@pytest.mark.parametrize(
    ("border", "rows"),
    [
        ("96", ["96+36 all"]),
        ("shared", ["132+132 all"]),
        ("paper", ["64+68 ", "80+52 8 answers", "96+36 the start, 1 answers", "112+20 "]),
    ],
)
def test_each_border_explains_its_own_splits(tmp_path: Path, border: str, rows: list[str]) -> None:
    shape: Any = SimpleNamespace(layers=2, heads=8, kv_heads=2, vocab_size=97, hidden_size=64, intermediate_size=256)
    config = EngineConfig(dtype="bfloat16", max_model_len=4096, max_batch=16, border=border, ttft=1.0, tpot=0.0112)
    sizes, splits = stored.sizes_of(4096, 16), table.splits_of(border, 132)
    prefills = {sms: tuple((n, n / sms / 1e3) for n in sizes[0]) for sms in (132, *splits)}
    decodes = {
        sms: tuple((n, 0.005 + 0.2 / sms + n / 1e4) for n in sizes[1]) for sms in (132, *(132 - s for s in splits))
    }
    known = Table("some GPU", "1", tmp_path / "choices.json")
    stored.keep(known, Subject(shape, config, 9), Stairs(prefills, decodes))
    lines = choices.phase_lines(known, Subject(shape, config, 9), 132)[1:]
    assert lines[0][0] == "132+132"
    assert [f"{row[0]} {row[-1]}" for row in lines[1 if splits else 0 :]] == rows


def test_explain_says_that_a_cpu_has_no_phases(capsys: pytest.CaptureFixture[str]) -> None:
    opened: Any = SimpleNamespace(
        config=EngineConfig(schedule="phases"), device=SimpleNamespace(type="cpu"), choose=lambda: None
    )
    choices.show_phases(opened, SimpleNamespace(name="native"))
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "no GPU here" in line
    assert "prompts run in chunks" in line
    opened.config = EngineConfig()
    choices.show_phases(opened, SimpleNamespace(name="native"))
    assert not capsys.readouterr().out
