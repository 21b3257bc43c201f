"""Prefills and decodes in lanes beside each other: tokens, order, faults; random lives are in test_schedules.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tenfold.engine.core import Engine
from tenfold.engine.phases.controller import Decision, Observed, Split, Targets
from tenfold.engine.phases.lanes import OneStream, TwoDevices
from tenfold.engine.phases.loop import Phases
from tenfold.engine.request import FinishReason, Grammar, Request, SamplingParams
from tenfold.engine.rows import Place
from tenfold.engine.runner import Pending
from tests.engine import fake, test_grammar
from tests.engine.test_invariance import Case, answer, case

__all__ = ["case"]
LONG = tuple((3 * i) % 40 for i in range(40))


def laned(engine: Engine) -> Engine:
    engine.phases = Phases(engine, OneStream(engine.runner), slice=1)
    return engine


def test_tokens_keep_coming_while_a_prompt_is_computed() -> None:
    engine = laned(fake.make_engine(max_step_tokens=64, max_model_len=96))
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=30)))
    for _ in range(3):
        engine.step()
    engine.add(Request("b", LONG, SamplingParams(temperature=0.0, max_tokens=3)))
    order: list[str] = []
    while "b" not in order:
        order += [o.request_id for o in engine.step()]
        fake.check_pages(engine)
    assert order.count("a") >= 2  # a token for each of the two layers
    engine.abort("a")
    fake.drain(engine)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_answers_are_those_of_one_device_where_pages_move_to_another(lookahead: int) -> None:
    """The fake model reads back every token of a context: from the other store once its prompt is computed."""
    engine = fake.make_engine(
        lookahead=lookahead, prefix_cache=False, max_batch=6, max_step_tokens=24, max_model_len=96, pages=40
    )
    lanes = TwoDevices(engine.runner, fake.FakeModel(), engine.device)  # type: ignore[arg-type]
    del lanes._prefill.prepare  # the fake's check of copies, which belongs to the other store
    engine.phases = Phases(engine, lanes, slice=1)
    prompts = [tuple((7 * i + j) % 90 + 4 for j in range(3 + 9 * i)) for i in range(7)]
    outputs = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=14, n=1 + i % 2)
        engine.add(Request(str(i), prompt, params))
        outputs += engine.step()
        outputs += engine.step()
    outputs += fake.drain(engine)
    answers = fake.answers(outputs)
    for i, prompt in enumerate(prompts):
        for index in range(1 + i % 2):
            assert answers[str(i), index] == fake.reference(prompt, len(prompt) + 14)


def test_a_short_prompt_beside_answers_runs_as_a_whole() -> None:
    """As kernels may have recorded it: slices would be launched layer by layer."""
    model = fake.FakeModel()
    engine = fake.make_engine(model, max_step_tokens=64, max_model_len=96)
    engine.phases = Phases(engine, OneStream(engine.runner), slice=200)
    parts: list[int] = []
    part = model.part

    def told(step: Any, x: Any, layers: range) -> Any:
        parts.append(len(step.token_ids))
        return part(step, x, layers)

    model.part = told  # type: ignore[method-assign]
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
    engine.step()
    for length, launched in ((50, []), (60, [60, 60])):
        engine.phases.slice = 200 if length == 50 else 60
        engine.add(
            Request(str(length), tuple(range(length, 4, -1)) + (4,) * 4, SamplingParams(temperature=0.0, max_tokens=1))
        )
        for _ in range(3):
            engine.step()
        assert parts == launched
    fake.drain(engine)


def test_a_prompt_alone_is_computed_at_once() -> None:
    engine = laned(fake.make_engine(max_step_tokens=64, max_model_len=96))
    engine.add(Request("b", LONG, SamplingParams(temperature=0.0, max_tokens=1)))
    outputs = engine.step()
    assert [o.request_id for o in outputs] == ["b"]


@pytest.mark.parametrize("slow", ["a", "b"])
def test_neither_lane_waits_for_the_other(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is busy with one lane only: the other one goes on, and who comes meanwhile begins."""
    engine = laned(fake.make_engine(max_step_tokens=64, max_model_len=96, lookahead=1))
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=30)))
    while not engine._inflight:
        engine.step()
    done = Pending.ready
    monkeypatch.setattr(Pending, "ready", lambda self: all(e.sequence.request.id != slow for e in self.entries))
    engine.add(Request("b", LONG, SamplingParams(temperature=0.0, max_tokens=3)))
    found = [o.request_id for _ in range(8) for o in engine.step()]
    assert set(found) == {"a", "b"} - {slow}
    assert len(found) >= (1 if slow == "a" else 4)
    monkeypatch.setattr(Pending, "ready", done)
    outputs: list[Any] = fake.drain(engine)
    assert {o.request_id for o in outputs} == {"a", "b"}


LANES = pytest.mark.parametrize("lanes", [laned, fake.flipping])


@LANES
@pytest.mark.parametrize("lookahead", [0, 1])
def test_answers_are_those_of_one_lane(case: Case, lookahead: int, lanes: Callable[[Engine], Engine]) -> None:
    engine = lanes(case.engine(max_batch=9, lookahead=lookahead, max_step_tokens=20))
    answer(case, engine, list(range(9)), [2] * 9)
    answer(case, engine, [8, 5, 2, 7], n=2)


@LANES
@pytest.mark.parametrize("lookahead", [0, 1])
def test_answers_are_those_of_one_lane_after_preemption(
    case: Case, lookahead: int, lanes: Callable[[Engine], Engine]
) -> None:
    engine = lanes(case.engine(pages=9, max_batch=5, lookahead=lookahead, prefix_cache=False))
    answer(case, engine, [0, 1, 2, 3, 4, 5])
    assert engine.stats().preemptions > 0


@LANES
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_prompt_that_fails_ends_alone(lookahead: int, lanes: Callable[[Engine], Engine]) -> None:
    model = fake.FakeModel()
    model.fail_on = 41
    engine = lanes(fake.make_engine(model, lookahead=lookahead, max_model_len=96))
    engine.add(Request("good", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=12)))
    outputs = engine.step()
    engine.add(Request("bad", (1, 41, 3), SamplingParams(temperature=0.0, max_tokens=12)))
    engine.add(Request("late", (4, 5), SamplingParams(temperature=0.0, max_tokens=2)))
    outputs += fake.drain(engine)
    ends = {o.request_id: o for o in outputs if o.finish is not None}
    assert ends["bad"].finish is FinishReason.ERROR
    assert "not digestible" in (ends["bad"].error or "")
    for name, prompt, limit in (("good", (1, 2, 3), 15), ("late", (4, 5), 4)):
        assert fake.answers([o for o in outputs if o.request_id == name])[name, 0] == fake.reference(prompt, limit)


def test_inputs_of_steps_go_to_the_device_in_every_mode() -> None:
    place = Place(torch.device("cpu"))
    with torch.inference_mode():
        place.put(torch.zeros(8, dtype=torch.uint8))
    assert place.put(torch.arange(8, dtype=torch.uint8)).tolist() == list(range(8))


def test_grammars_hold_in_both_lanes() -> None:
    kinds = [Grammar("regex", "[a-m]{4}( [n-z]{2})*"), test_grammar.schema(test_grammar.SCHEMAS["object"]), None]

    def answers(lanes: Callable[[Engine], Engine] = lambda engine: engine) -> dict[tuple[str, int], list[int]]:
        engine = lanes(test_grammar.make_engine(lookahead=1))
        outputs = []
        for i in range(6):
            params = SamplingParams(temperature=0.0, max_tokens=30, grammar=kinds[i % 3])
            engine.add(Request(str(i), tuple(range(5, 30 + i)), params))
            outputs += engine.step()
        return fake.answers([*outputs, *fake.drain(engine)])

    assert answers(laned) == answers(fake.flipping) == answers()


def test_an_abort_in_the_middle_of_a_prefill_gives_everything_back() -> None:
    engine = laned(fake.make_engine(max_step_tokens=64, max_model_len=96))
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=30)))
    engine.step()
    engine.add(Request("b", LONG, SamplingParams(temperature=0.0, max_tokens=3)))
    engine.step()
    assert engine.phases is not None
    assert engine.phases.underway is not None
    engine.abort("b")
    outputs: list[Any] = fake.drain(engine)
    assert [o.finish for o in outputs if o.request_id == "b"] == [FinishReason.ABORT]
    assert engine.stats().pages_used == 0


def test_prompts_ride_in_steps_of_decodes_where_the_controller_says_so() -> None:
    engine = fake.make_engine(max_step_tokens=64, max_model_len=96, lookahead=0)
    phases = engine.phases = Phases(engine, OneStream(engine.runner), fake.Flips([7]), slice=1, tick=0.0)
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=30)))
    engine.step()
    engine.add(Request("b", LONG, SamplingParams(temperature=0.0, max_tokens=3)))
    order: list[str] = []
    while "b" not in order:
        order += [o.request_id for o in engine.step()]
        assert phases.underway is None
    assert order.count("a") == 6  # 40 tokens, 7 at a time
    assert len(phases.watch._firsts) == 2
    fake.drain(engine)


def test_a_prefill_under_way_is_ended_before_prompts_ride() -> None:
    engine = fake.make_engine(max_step_tokens=20, max_model_len=96)
    phases = engine.phases = Phases(engine, OneStream(engine.runner), fake.Flips([0, 0, 0, 9]), slice=1, tick=0.0)
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=30)))
    for _ in range(2):
        engine.step()
    engine.add(Request("b", LONG, SamplingParams(temperature=0.0, max_tokens=3)))
    engine.step()
    assert phases.underway is not None
    engine.step()
    assert phases.chunk == engine.stats().prompt_chunk == 9
    outputs = fake.drain(engine)
    found = fake.answers([o for o in outputs if o.request_id == "b"])
    assert found["b", 0] == fake.reference(LONG, len(LONG) + 3)


class Script:
    """A controller that notes what it sees, and moves the border each time."""

    targets = Targets(1.0, 0.1)

    def __init__(self) -> None:
        self.seen: list[Observed] = []

    def decide(self, seen: Observed, now: Split) -> Decision:
        self.seen.append(seen)
        return Decision(Split(now.prefill + 1, 1), "because")


def test_a_controller_is_asked_at_once_when_the_first_answer_begins() -> None:
    """What it said while nobody decoded, steps as large as can be, is not for a step with a decode in it."""
    clock, script = fake.Clock(), Script()
    engine = fake.make_engine(clock=clock, max_step_tokens=64, max_model_len=96, lookahead=0)
    engine.phases = Phases(engine, OneStream(engine.runner), script, slice=100)
    engine.add(Request("a", LONG, SamplingParams(temperature=0.0, max_tokens=8)))
    while not engine.scheduler.decoding:
        engine.step()
    engine.step()
    engine.step()
    assert [seen.requests for seen in script.seen] == [0, 1]


def test_a_controller_sees_what_requests_saw() -> None:
    clock, script = fake.Clock(), Script()
    engine = fake.make_engine(clock=clock, max_step_tokens=64, max_model_len=96)
    engine.phases = Phases(engine, OneStream(engine.runner), script, slice=1)
    engine.add(Request("a", LONG, SamplingParams(temperature=0.0, max_tokens=8), arrival=clock.now - 0.5))
    while engine.has_work:
        clock.now += 0.25
        engine.step()
        if len(script.seen) == 2:
            engine.add(Request("b", LONG[:7], SamplingParams(temperature=0.0, max_tokens=2), arrival=clock.now))
    first, later, last = script.seen[0], script.seen[3], script.seen[-1]
    assert (first.ttft, first.tpot, first.requests, first.queued, first.waited) == (None, None, 0, 40, 0.75)
    assert later.ttft == 0.75  # computed at once, since nothing decoded
    assert (first.rate, later.rate) == (20.0, 21.5)  # what came, computed or not
    assert last.tpot == 0.25
    assert max(s.requests for s in script.seen) == 2
    assert any(0 < s.queued <= 7 for s in script.seen)
    assert engine.phases.changes == len(script.seen) == engine.phases.lanes.now.prefill - 1
    assert engine.phases.why == "because"


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_better_priority_preempts_in_lanes(lookahead: int) -> None:
    engine = laned(fake.make_engine(max_batch=1, max_model_len=96, lookahead=lookahead))
    engine.add(Request("low", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), priority=5))
    for _ in range(4):
        engine.step()
    engine.add(Request("high", (4, 5, 6), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)))
    order: list[str] = []
    while "high" not in order:
        order += [o.request_id for o in engine.step()]
        fake.check_pages(engine)
    assert len(order) <= 3
    assert engine.stats().preemptions == 1
    fake.drain(engine)


def test_penalties_follow_an_answer_to_another_row() -> None:
    """Decodes have a plan of sampling of their own, while prompts change who has which row."""

    class Level(fake.FakeModel):
        def forward(self, step: Any) -> torch.Tensor:
            return super().forward(step) * 0.2  # so that penalties decide

    def run(lanes: bool) -> list[int]:
        engine = fake.make_engine(Level(), max_step_tokens=8, pages=16, lookahead=1, prefix_cache=False)
        if lanes:
            laned(engine)
            assert engine.phases is not None
            del engine.phases.lanes._prefill.prepare  # the fake's check, which prepares the other runner
        bent = {"presence_penalty": 2.0, "temperature": 0.0, "ignore_eos": True}
        outputs = []
        engine.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=40, frequency_penalty=0.5, **bent), priority=5))
        for _ in range(4):
            outputs += engine.step()
        engine.add(Request("b", tuple(range(50)), SamplingParams(max_tokens=1, ignore_eos=True)))
        while not any(o.request_id == "b" for o in outputs):
            outputs += engine.step()
        for _ in range(6):
            outputs += engine.step()
        engine.add(Request("c", (5,) * 6, SamplingParams(max_tokens=3, **bent)))
        outputs += fake.drain(engine)
        assert engine.stats().preemptions
        return fake.answers(outputs)["a", 0]

    assert run(lanes=True) == run(lanes=False)


def test_a_controller_sees_steps_that_wait_for_grammars() -> None:
    class Seeing:
        targets = Targets(1.0, 0.1)

        def __init__(self) -> None:
            self.requests: list[int] = []

        def decide(self, seen: Observed, now: Split) -> Decision:
            return Decision(now, "the test wants it", 8)

        def observe(self, split: Split, requests: int, step: float, tokens: int = 0) -> None:
            self.requests.append(requests)

        def prefilled(self, split: Split, tokens: int, seconds: float) -> None:
            raise AssertionError("all prompts ride")

    def run(grammar: Grammar | None) -> int:
        engine, seeing = test_grammar.make_engine(lookahead=1), Seeing()
        engine.phases = Phases(engine, OneStream(engine.runner), seeing)
        greedy = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, grammar=grammar)
        engine.add(Request("a", (1, 2, 3), greedy))
        for i in range(3):
            for _ in range(6):
                engine.step()
            engine.add(Request(str(i), (4, 5, 6), SamplingParams(temperature=0.0, max_tokens=2)))
        fake.drain(engine)
        return len(seeing.requests)

    assert run(Grammar("regex", "a{40}")) == run(None) == 3


def test_a_prompt_that_nobody_decodes_beside_says_nothing_of_what_phases_cost_each_other() -> None:
    class Learning:
        targets = Targets(1.0, 0.1)

        def __init__(self, split: Split) -> None:
            self.split, self.learned = split, 0

        def decide(self, seen: Observed, now: Split) -> Decision:
            return Decision(self.split, "the test wants it")

        def observe(self, split: Split, requests: int, step: float, tokens: int = 0) -> None: ...

        def prefilled(self, split: Split, tokens: int, seconds: float) -> None:
            self.learned += 1

    for split, learned in ((Split(132, 0), 0), (Split(64, 68), 1), (Split(132, 132), 0)):
        engine, learning = fake.make_engine(), Learning(split)
        engine.phases = Phases(engine, OneStream(engine.runner), learning)
        engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=1)))
        fake.drain(engine)
        assert learning.learned == learned
