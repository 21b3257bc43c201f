"""The engine's thread: what it shows of a step that does not end, and what it says of itself."""

import threading
import time
from collections.abc import Iterator

import pytest

from tenfold.engine import inspect
from tenfold.engine.loop import EngineDead, EngineLoop, stacks
from tenfold.engine.request import FinishReason, Output, Request, SamplingParams
from tests.engine.fake import make_engine


class Inbox:
    def __init__(self) -> None:
        self.items: list[Output | Exception] = []

    def send(self, batch: list[tuple[str, Output | Exception]]) -> bool:
        self.items += [item for _, item in batch]
        return True


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


ENDLESS = Request("r", (5, 6), SamplingParams(temperature=0, ignore_eos=True))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def stuck_loop(gate: threading.Event, watchdog: float) -> EngineLoop:
    """Its engine's steps wait for the gate."""
    engine = make_engine(clock=time.monotonic)
    step = engine.step

    def wait_and_step() -> list[Output]:
        assert gate.wait(20)
        return step()

    engine.step = wait_and_step  # type: ignore[method-assign]
    return EngineLoop(lambda: engine, watchdog=watchdog)


def test_a_step_that_does_not_end_is_shown_once(gate, caplog):
    loop = stuck_loop(gate, watchdog=0.04)
    loop.submit(ENDLESS, Inbox())
    wait_until(lambda: "in wait_and_step" in caplog.text)
    assert "no progress for" in caplog.text
    assert "running=0, waiting=1" in caplog.text
    assert loop.ready, "an engine in this process is still the one that takes requests"
    time.sleep(0.1)
    assert caplog.text.count("no progress for") == 1
    gate.set()
    loop.close()


def test_an_idle_engine_is_not_slow(gate, caplog):
    loop = stuck_loop(gate, watchdog=0.02)
    assert (loop.busy, loop.age) == (False, 0.0)
    time.sleep(0.1)
    loop.close()
    assert not caplog.text


def test_the_watchdog_ends_with_the_loop(gate):
    loop = stuck_loop(gate, watchdog=0.02)
    gate.set()
    loop.close()
    wait_until(lambda: not any(t.name == "tenfold-engine-watchdog" for t in threading.enumerate()))


def test_progress_is_counted(gate):
    loop, inbox = stuck_loop(gate, watchdog=0), Inbox()
    loop.submit(Request("r", (5, 6), SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)), inbox)
    wait_until(lambda: loop.busy)
    assert loop.turns == 0
    gate.set()
    wait_until(lambda: not loop.busy)
    assert loop.turns == 3
    assert inbox.items[-1].finish is FinishReason.LENGTH  # type: ignore[union-attr]
    loop.close()


def test_states():
    loop = EngineLoop(make_engine)
    assert (loop.state, loop.ready, loop.alive, loop.restarts) == ("ready", True, True, 0)
    with pytest.raises(ValueError, match="isolate=True"):
        loop.restart()
    loop.close()
    assert (loop.state, loop.ready, loop.alive) == ("closed", False, False)
    broken = make_engine()
    broken.step = lambda: 1 / 0  # type: ignore[method-assign]
    loop = EngineLoop(lambda: broken)
    loop.submit(ENDLESS, Inbox())
    wait_until(lambda: not loop.alive)
    assert loop.state == "failed"


def test_a_request_at_which_the_engine_fails_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    engine, inbox = make_engine(), Inbox()
    engine.check = lambda request: 1 / 0  # type: ignore
    loop = EngineLoop(lambda: engine)
    loop.submit(ENDLESS, inbox)
    assert loop.wait(20)
    (end,) = inbox.items
    assert (type(end), str(end)) == (EngineDead, "The engine failed: ZeroDivisionError: division by zero")
    assert loop.open_requests == 0


def test_facts_of_an_engine():
    engine = make_engine()
    loop = EngineLoop(lambda: engine)
    assert loop.facts == inspect.facts(engine)
    assert (loop.facts.family, loop.facts.vocab_size, loop.facts.max_model_len) == ("FakeModel", 97, 64)
    assert (loop.facts.pages, loop.facts.config, loop.facts.device) == (64, engine.config, "cpu")
    (only,) = loop.facts.choices
    assert only["source"] == "only"
    loop.close()


def test_a_description_shows_who_runs_and_who_waits():
    engine = make_engine(max_batch=1)
    for id in ("first", "second"):
        engine.add(Request(id, (5, 6, 7), SamplingParams(temperature=0, ignore_eos=True)))
    engine.step()
    engine.step()
    text = engine.describe()
    assert "running=1, waiting=1" in text
    assert "row 0: first/0 DECODE, prompt 3, computed 4 of 5, limit 64, 1 pages" in text


def test_a_description_in_the_middle_of_a_change():
    engine = make_engine()
    engine.describe = lambda: 1 / 0  # type: ignore[method-assign]
    loop = EngineLoop(lambda: engine)
    assert "in the middle of a change: ZeroDivisionError" in loop.describe()
    loop.close()


def test_stacks_name_their_threads():
    assert "Thread MainThread:" in stacks()
    assert "in test_stacks_name_their_threads" in stacks()
