"""The engine process and its supervisor: an engine that dies, hangs, is stopped, cannot be loaded, and comes back."""

import asyncio
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from tenfold import LLM, AsyncLLM, EngineConfig, SamplingParams
from tenfold.engine import child, remote
from tenfold.engine.child import Child
from tenfold.engine.loop import Batch, EngineDead, EngineRestarted
from tenfold.engine.remote import Backoff, Patience, RemoteLoop
from tenfold.engine.request import FinishReason, Output, QueueFull, Request
from tenfold.engine.wire import Beat
from tests.engine.scripted import ANSWER, FULL, HANG, HANG_WITH_LOCK, KILL, KILL_AT_ADD, LOG, QUIET, RAISE, WRONG

ROOT = str(Path(__file__).parents[2])
FACTORY = "tests.engine.scripted:Scripted"
SOON = 20.0  # seconds in which everything here has happened, on a machine that does much else


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


class Inbox:
    """A receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.items: dict[str, list[Output | Exception]] = {}
        self.batches = 0
        self.wanted = True

    def send(self, batch: Batch) -> bool:
        self.batches += 1
        for id, item in batch:
            self.items.setdefault(id, []).append(item)
        return self.wanted

    def ended(self, *ids: str) -> bool:
        return all(isinstance(i := self.items.get(id, [None])[-1], Exception) or (i and i.finish) for id in ids)

    def tokens(self, id: str) -> list[int]:
        return [t for item in self.items[id] if isinstance(item, Output) for t in item.tokens]

    def last(self, id: str) -> Any:
        wait_until(lambda: self.ended(id))
        return self.items[id][-1]


class Bed:
    """A supervised scripted engine, and what tests do with it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.inbox = Inbox()
        config = {"max_batch": 2, "max_queue": 5} | {k: settings.pop(k) for k in ("max_queue_tokens",) if k in settings}
        settings = {"watchdog": 0, "backoff": Backoff(first=0.01, longest=0.02, most=3)} | settings
        self.loop = RemoteLoop(EngineConfig(model=str(folder), **config), FACTORY, **settings)

    def submit(self, id: str, what: int = ANSWER, tokens: int | None = 3, **fields: Any) -> None:
        self.loop.submit(Request(id, (what, 1), SamplingParams(max_tokens=tokens), **fields), self.inbox)

    def begin(self, *ids: str) -> None:
        """Endless requests, each of which has brought a token."""
        for id in ids:
            self.submit(id, tokens=None)
        wait_until(lambda: all(id in self.inbox.items for id in ids))

    def kill(self, how: int = signal.SIGKILL) -> None:
        assert self.loop.pid is not None
        os.kill(self.loop.pid, how)
        tasks = Path(f"/proc/{self.loop.pid}/task")
        if how == signal.SIGSTOP and tasks.is_dir():  # its threads end what they are at, one after the other
            wait_until(
                lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in tasks.glob("*/stat"))
            )

    def tell(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def forget(self, name: str) -> None:
        (self.folder / name).unlink()

    def added(self) -> list[list[str]]:
        """Ids of requests each engine was given, one list for each."""
        lives: dict[str, list[str]] = {}
        for line in (self.folder / "added").read_text().splitlines():
            pid, _, id = line.partition(" ")
            lives.setdefault(pid, []).append(id)
        return list(lives.values())


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bed]]:
    monkeypatch.syspath_prepend(ROOT)
    beds: list[Bed] = []

    def make(wait: bool = True, **settings: Any) -> Bed:
        beds.append(Bed(tmp_path, **settings))
        if wait:
            beds[-1].loop.wait()
        return beds[-1]

    yield make
    for bed in beds:
        bed.loop.close()
        assert not bed.loop._thread.is_alive()


# An engine in good health


def test_answers_cross_over_once_a_step(make):
    bed = make()
    loop = bed.loop
    assert (loop.state, loop.ready, loop.alive, loop.restarts) == ("ready", True, True, 0)
    assert loop.facts.config.threads == 7
    for id in ("a", "b"):
        bed.submit(id, tokens=50)
    wait_until(lambda: bed.inbox.ended("a", "b"))
    assert bed.inbox.tokens("a") == bed.inbox.tokens("b") == list(range(50))
    assert loop.stats().steps < 100  # they shared steps, however late the second came
    assert bed.inbox.batches <= loop.stats().steps
    assert loop.open_requests == 0


def test_an_output_comes_with_numbers_that_include_it(make):
    bed = make()
    bed.begin("a")
    assert bed.loop.stats().running == 1
    bed.loop.abort("a")
    bed.inbox.last("a")
    assert bed.loop.stats().running == 0


def test_numbers_are_new_without_outputs_and_heartbeats(make, monkeypatch):
    monkeypatch.setattr(remote, "BEAT", 60)
    bed = make()
    bed.submit("a", QUIET, tokens=None)
    wait_until(lambda: bed.loop.stats().steps > 3)
    assert not bed.inbox.items
    bed.loop.abort("a")
    assert bed.inbox.last("a").finish is FinishReason.ABORT


def test_refusals_keep_their_type(make):
    bed = make()
    bed.submit("full", FULL)
    bed.submit("wrong", WRONG)
    full, wrong = bed.inbox.last("full"), bed.inbox.last("wrong")
    assert (type(full), str(full), full.retry_after) == (QueueFull, "The queue is full of it.", 7)
    assert (type(wrong), str(wrong)) == (ValueError, "prompt is not to my liking.")


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (SamplingParams(seed=2**70), "^seed is 1180591620717411303424; allowed: a 64-bit"),
        (SamplingParams(stop=("\ud800",)), "^The request cannot be sent to the engine: .*surrogate"),
        (SamplingParams(seed=object()), "^The request cannot be sent to the engine: a object cannot"),  # type: ignore
        (SamplingParams(max_tokens=2.5), "^params.max_tokens has the wrong type: Expected `int | null`, got `float`"),
    ],
)
def test_what_cannot_be_sent_is_refused_and_leaves_nothing_behind(make, params, reason):
    bed = make()
    bed.loop.submit(Request("r", (1,), params), bed.inbox)
    with pytest.raises(ValueError, match=reason):
        raise bed.inbox.last("r")
    assert bed.loop.open_requests == 0
    bed.submit("next")
    assert bed.inbox.last("next").finish is FinishReason.LENGTH


def test_an_id_under_way_is_refused(make):
    bed = make()
    bed.begin("a")
    second = Inbox()
    bed.loop.submit(Request("a", (ANSWER,)), second)
    with pytest.raises(ValueError, match="request_id is 'a'"):
        raise second.last("a")


def test_a_receiver_nobody_reads_is_dropped(make):
    bed = make()
    bed.begin("a", "b")
    bed.inbox.wanted = False
    wait_until(lambda: not bed.loop.open_requests)
    wait_until(lambda: bed.loop.stats().running == 0)


def test_the_engines_log_is_ours(make, caplog):
    bed = make()
    bed.submit("a", LOG)
    wait_until(lambda: "I was told to say this" in caplog.text)
    (record,) = [r for r in caplog.records if r.name == "tenfold.scripted"]
    assert record.levelno == logging.WARNING


def test_dump(make, caplog):
    bed = make()
    bed.begin("a")
    bed.loop.dump()
    wait_until(lambda: "tenfold-engine" in caplog.text)
    assert "the scripted engine has 1 running" in caplog.text


# Loading


@pytest.mark.parametrize(
    ("name", "text", "kind", "reason"),
    [
        ("refuse", "model is too big; take a smaller one.", ValueError, "^model is too big; take a smaller one.$"),
        ("broken", "", RuntimeError, "^KeyError: 'a fault of ours'$"),
        ("exit", "", RuntimeError, "^The engine process was ended by SIGKILL while it loaded the model.$"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(make, tmp_path, name, text, kind, reason):
    (tmp_path / name).write_text(text)
    loop = make(wait=False).loop
    with pytest.raises(kind, match=reason):
        loop.wait()
    assert (loop.alive, loop.state, loop.restarts, loop.pid) == (False, "failed", 0, None)
    with pytest.raises(EngineDead, match="could not be loaded"):
        loop.submit(Request("a", (1,)), Inbox())


def test_closing_while_it_loads(make, tmp_path):
    (tmp_path / "hold").touch()
    bed = make(wait=False)
    assert (bed.loop.state, bed.loop.ready) == ("loading", False)
    bed.submit("a")
    bed.loop.close()
    assert bed.inbox.last("a").finish is FinishReason.ABORT
    with pytest.raises(EngineDead, match="The engine was closed"):
        bed.loop.wait()


# Ends


HOW = {"killed": KILL, "with an exception": RAISE}


@pytest.mark.parametrize("how", HOW)
def test_what_had_begun_ends_and_what_had_not_is_served(make, how, caplog):
    bed = make()
    bed.begin("begun")
    bed.submit("culprit", HOW[how])
    for id in ("c", "d", "e"):
        bed.submit(id, tokens=20)
    for id in ("begun", "culprit"):
        error = bed.inbox.last(id)
        assert type(error) is EngineRestarted
        assert error.retry_after >= 1
        assert "Send the request again" in str(error)
    for id in ("c", "d", "e"):
        assert bed.inbox.last(id).finish is FinishReason.LENGTH
        assert bed.inbox.tokens(id) == list(range(20))
    assert bed.added() == [["begun", "culprit", "c", "d", "e"], ["c", "d", "e"]]
    assert (bed.loop.restarts, bed.loop.state, bed.loop.open_requests) == (1, "ready", 0)
    assert "3 requests had waited for it" in caplog.text
    if how == "with an exception":
        assert "the scripted engine has had enough" in caplog.text


def test_killed_from_outside_with_several_answers_to_one_prompt(make):
    bed = make()
    bed.loop.submit(Request("r", (ANSWER,), SamplingParams(n=3)), bed.inbox)
    wait_until(lambda: bed.inbox.items)
    bed.kill()
    assert type(bed.inbox.last("r")) is EngineRestarted
    assert sum(isinstance(item, Exception) for item in bed.inbox.items["r"]) == 1


HANGS = {
    "stopped": (signal.SIGSTOP, "no sign of life"),
    "in a step": (HANG, "finished no step"),
    "in a step, with the interpreter's lock": (HANG_WITH_LOCK, "the engine hangs: it"),  # both are true
}


@pytest.mark.parametrize("how", HANGS)
def test_a_hang_is_shown_and_ended(make, how, caplog, capfd):
    bed = make(watchdog=0.6)
    what, told = HANGS[how]
    bed.begin("other")
    if how == "stopped":
        bed.begin("culprit")
        bed.submit("next")
        bed.kill(what)
    else:
        bed.submit("culprit", what)
        bed.submit("next")
    for id in ("culprit", "other"):
        assert type(bed.inbox.last(id)) is EngineRestarted
    assert bed.inbox.last("next").finish is FinishReason.LENGTH
    assert bed.loop.restarts == 1
    assert told in caplog.text
    assert "the scripted engine has " in caplog.text
    stacks = capfd.readouterr().err
    assert "most recent call first" in stacks
    assert how == "stopped" or "in misbehave" in stacks


def test_what_is_told_of_a_hang_is_read_while_nobody_changes_it(make, caplog):
    class Guarded(dict):
        def items(self):
            assert bed.loop._lock._is_owned()
            return super().items()

    bed = make(watchdog=0.6)
    bed.begin("other")
    with bed.loop._lock:
        bed.loop._open = Guarded(bed.loop._open)
    bed.submit("culprit", HANG)
    assert type(bed.inbox.last("culprit")) is EngineRestarted
    assert "begun: other, culprit" in caplog.text


def test_a_stopped_engine_is_not_ready(make, monkeypatch):
    monkeypatch.setattr(remote, "QUIET", 0.1)
    monkeypatch.setattr(remote, "BEAT", 0.02)
    bed = make(watchdog=60)
    bed.begin("a")
    bed.kill(signal.SIGSTOP)
    wait_until(lambda: not bed.loop.ready)
    bed.submit("late", deadline=time.monotonic())
    monkeypatch.setattr(remote, "GRACE", 0.1)
    assert bed.inbox.last("late").error == remote.LATE
    bed.kill(signal.SIGCONT)
    wait_until(lambda: bed.loop.ready)
    bed.loop.abort("a")
    assert bed.inbox.last("a").finish is FinishReason.ABORT
    assert bed.loop.restarts == 0


def test_a_request_is_given_to_so_many_engines_only(make):
    """Before it begins nothing tells which of those that wait is the one that kills."""
    bed = make(backoff=Backoff(first=0.01, most=10))
    bed.submit("culprit", KILL_AT_ADD)
    assert type(bed.inbox.last("culprit")) is EngineRestarted
    assert bed.added() == [["culprit"]] * remote.LIVES
    bed.submit("next")
    assert bed.inbox.last("next").finish is FinishReason.LENGTH


def test_too_many_failures_in_a_row(make, caplog):
    bed = make()
    bed.begin("begun", "other")
    bed.tell("exit")
    bed.submit("waits")
    bed.kill()
    assert type(bed.inbox.last("begun")) is EngineRestarted
    assert type(bed.inbox.last("waits")) is EngineDead
    assert (bed.loop.alive, bed.loop.ready, bed.loop.state) == (False, False, "failed")
    assert "failed 3 times in a row" in caplog.text
    for call in (lambda: bed.submit("late"), bed.loop.restart):
        with pytest.raises(EngineDead, match="failed 3 times in a row; the last time it was ended by SIGKILL"):
            call()
    bed.loop.abort("waits")
    assert bed.loop.stats() is None


def test_a_model_that_cannot_be_loaded_for_a_while(make, caplog):
    bed = make(backoff=Backoff(first=0.01, longest=0.02, most=10**6))
    bed.tell("refuse", "there is no memory at the moment.")
    bed.kill()
    wait_until(lambda: "there is no memory at the moment." in caplog.text)
    bed.submit("a")
    bed.forget("refuse")
    assert bed.inbox.last("a").finish is FinishReason.LENGTH


def test_every_request_has_one_end_whatever_happens(make):
    """Requests come, are aborted and end, while the engine is killed and stopped at any moment."""
    bed = make(watchdog=0.4, backoff=Backoff(first=0.01, longest=0.01, most=10**6))
    rng = random.Random(5)
    count = 0
    for _ in range(6):
        for _ in range(rng.randrange(1, 12)):
            bed.submit(str(count), tokens=rng.choice([1, 5, 40, None]))
            count += 1
            time.sleep(rng.random() * 0.01)
        for id in rng.sample(range(count), count // 2):
            bed.loop.abort(str(id))
        if bed.loop.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(bed.loop.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
        time.sleep(rng.random() * 0.3)
    for id in range(count):
        bed.loop.abort(str(id))
    ids = [str(id) for id in range(count)]
    wait_until(lambda: bed.inbox.ended(*ids))
    wait_until(lambda: bed.loop.ready and not bed.loop.stats().running)
    assert bed.loop.open_requests == 0
    assert bed.loop.restarts > 1
    for id in ids:
        items = bed.inbox.items[id]
        assert [isinstance(i, Exception) or i.finish is not None for i in items] == [False] * (len(items) - 1) + [True]
        assert bed.inbox.tokens(id) == list(range(len(bed.inbox.tokens(id))))


def test_restart_as_asked(make):
    bed = make(backoff=Backoff(most=1))  # any failure would be the last
    bed.begin("begun")
    pid = bed.loop.pid
    bed.loop.restart()
    assert type(bed.inbox.last("begun")) is EngineRestarted
    wait_until(lambda: bed.loop.ready)
    assert bed.loop.pid != pid
    assert bed.loop.restarts == 1


# While there is no engine


@pytest.fixture
def away(make):
    """A bed whose engine was killed with two requests begun and "waits" in its queue, and whose next one loads."""
    bed = make()
    bed.begin("a", "b")
    bed.submit("waits")
    wait_until(lambda: bed.loop.stats().waiting == 1)
    bed.tell("hold")
    bed.kill()
    wait_until(lambda: bed.inbox.ended("a", "b"))
    yield bed
    if (bed.folder / "hold").exists():
        bed.forget("hold")


def test_state_tells_the_truth(away):
    assert (away.loop.state, away.loop.ready, away.loop.alive) == ("restarting", False, True)
    assert away.loop.stats() is None
    away.loop.dump()
    away.forget("hold")
    wait_until(lambda: away.loop.ready)
    assert away.loop.stats() is not None


def test_requests_wait_in_their_order(away):
    for id in ("c", "d"):
        away.submit(id)
    away.forget("hold")
    for id in ("waits", "c", "d"):
        assert away.inbox.last(id).finish is FinishReason.LENGTH
    assert away.added()[-1] == ["waits", "c", "d"]


def test_aborts_work_at_once(away):
    away.submit("c")
    for id in ("waits", "c"):
        away.loop.abort(id)
        assert away.inbox.last(id).finish is FinishReason.ABORT
    away.loop.abort("nobody")
    assert away.loop.open_requests == 0
    away.forget("hold")
    wait_until(lambda: away.loop.ready)
    away.submit("d")
    assert away.inbox.last("d").finish is FinishReason.LENGTH
    assert away.added()[-1] == ["d"]


def test_deadlines_hold(away):
    away.submit("c", deadline=time.monotonic() + 0.01)
    last = away.inbox.last("c")
    assert (last.finish, last.error) == (FinishReason.ABORT, "Its deadline has passed.")
    assert away.loop.open_requests == 1


def test_the_queue_is_bounded(away):
    for id in "cdef":
        away.submit(id)
    away.submit("g")
    refused = away.inbox.last("g")
    assert type(refused) is QueueFull
    assert "5 requests wait, 5 may" in str(refused)
    assert refused.retry_after >= 1
    away.loop.abort("c")
    away.inbox.last("c")
    away.submit("h")
    away.forget("hold")
    assert away.inbox.last("h").finish is FinishReason.LENGTH


def test_what_cannot_be_sent_is_refused_when_the_engine_is_back(away):
    away.loop.submit(Request("c", (1,), SamplingParams(stop=("\ud800",))), away.inbox)
    away.forget("hold")
    assert type(away.inbox.last("c")) is ValueError
    assert away.inbox.last("waits").finish is FinishReason.LENGTH


def test_a_queue_bounded_in_tokens(make):
    bed = make(max_queue_tokens=5)
    bed.tell("hold")
    bed.kill()
    wait_until(lambda: bed.loop.state == "restarting")
    for id in "ab":
        bed.submit(id)  # two tokens each
    bed.submit("c")
    with pytest.raises(QueueFull, match="4 prompt tokens wait, 5 may, and this prompt has 2"):
        raise bed.inbox.last("c")
    bed.forget("hold")
    assert bed.inbox.last("b").finish is FinishReason.LENGTH


def test_an_engine_that_does_not_read_bounds_the_queue_too(make):
    bed = make()
    bed.kill(signal.SIGSTOP)
    for i in range(7):
        bed.submit(str(i))
    assert not bed.inbox.items
    bed.submit("more")
    assert type(bed.inbox.last("more")) is QueueFull
    bed.kill(signal.SIGCONT)
    assert bed.inbox.last("6").finish is FinishReason.LENGTH


def test_what_an_engine_does_not_read_is_bounded_in_bytes(make, monkeypatch):
    monkeypatch.setattr(child, "MOST", 1 << 20)
    bed = make()
    bed.kill(signal.SIGSTOP)
    prompt = (ANSWER, *[70_000] * 100_000)  # half of it in MessagePack
    for id in ("a", "b", "more"):
        bed.loop.submit(Request(id, prompt, SamplingParams(max_tokens=3)), bed.inbox)
    assert list(bed.inbox.items) == ["more"]
    assert "has not read" in str(bed.inbox.last("more"))
    bed.kill(signal.SIGCONT)
    assert bed.inbox.last("a").finish is FinishReason.LENGTH
    assert bed.inbox.last("b").finish is FinishReason.LENGTH


def test_closing_while_it_is_away(away):
    away.loop.close()
    assert away.inbox.last("waits").finish is FinishReason.ABORT
    assert (away.loop.state, away.loop.alive) == ("closed", False)


# What is left behind


def process_is_there(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_closing_leaves_nothing(make, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    gc.collect()
    descriptors, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    bed = make()
    bed.begin("a")
    first = bed.loop.pid
    bed.kill()
    wait_until(lambda: bed.loop.restarts == 1)
    bed.begin("b")
    pid = bed.loop.pid
    bed.loop.close()
    bed.loop.close()
    assert bed.inbox.last("b").finish is FinishReason.ABORT
    assert not process_is_there(first)
    assert not process_is_there(pid)
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert not list(place.iterdir())


def test_closing_a_stuck_engine_ends_it(make):
    bed = make()
    bed.begin("a")
    pid = bed.loop.pid
    bed.kill(signal.SIGSTOP)
    bed.loop.close(0.05)
    assert bed.inbox.last("a").finish is FinishReason.ABORT
    assert not process_is_there(pid)


PARENT = """
import sys, time
from tenfold import EngineConfig
from tenfold.engine.remote import RemoteLoop
loop = RemoteLoop(EngineConfig(model=sys.argv[1]), "tests.engine.scripted:Scripted")
loop.wait()
print(loop.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_parent_leaves_no_engine(tmp_path, stopped):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ROOT},
    ) as parent:
        pid = int(parent.stdout.readline())
        assert process_is_there(pid)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    wait_until(lambda: not process_is_there(pid))


def test_signals_to_the_whole_group_are_the_parents(make):
    bed = make()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        bed.kill(number)
    bed.submit("a")
    assert bed.inbox.last("a").finish is FinishReason.LENGTH
    assert bed.loop.restarts == 0


def test_a_process_that_cannot_be_started_leaves_nothing(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no more processes"):
        Child(FACTORY, EngineConfig(), 1.0)
    assert not list(tmp_path.iterdir())
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    loop = RemoteLoop(EngineConfig(), FACTORY)
    with pytest.raises(RuntimeError, match="could not be started: OSError: no more processes"):
        loop.wait()
    loop.close()


# Rules


def test_backoff():
    backoff = Backoff(most=8)
    assert [backoff.after(1) for _ in range(8)] == [0, 0.5, 1, 2, 4, 8, 16, None]
    assert backoff.after(60) == 0
    assert backoff.after(59) == 0.5
    assert [Backoff(most=10, failures=i).after(0) for i in (7, 8)] == [30, 30]


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(remote.time, "monotonic", lambda: self.now)


def beat(turns: int, busy: bool = True) -> Beat:
    return Beat(None, busy, turns, 0.0, "")  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def looks(clock: Clock, patience: Patience, events: list[Any], has_open: bool = True) -> list[str]:
    """What is found at looks 0.5 s apart."""
    found = []
    for event in events:
        clock.now += 0.5
        if event is not None:
            patience.hear(event)
        found.append(patience.look(has_open))
    return found


def test_patience_with_silence(clock):
    patience = Patience(1.4, 0.5)
    assert looks(clock, patience, [beat(1), None, None]) == [""] * 3
    assert looks(clock, patience, [None]) == ["it gave no sign of life for 1.5 s"]
    assert looks(clock, Patience(0, 0.5), [None] * 99) == [""] * 99


def test_patience_with_work_that_does_not_go_on(clock):
    patience = Patience(1.4, 0.5)
    assert looks(clock, patience, [beat(i) for i in range(9)]) == [""] * 9
    assert looks(clock, patience, [beat(8, busy=False)] * 9, has_open=False) == [""] * 9
    assert looks(clock, patience, [beat(8)] * 3)[1:] == ["", "it has work and finished no step for 1.5 s"]


def test_patience_with_requests_the_engine_knows_nothing_of(clock):
    patience = Patience(1.4, 0.5)
    assert looks(clock, patience, [beat(0, busy=False)] * 9, has_open=False)[-1] == ""
    assert "finished no step" in looks(clock, patience, [beat(0, busy=False)] * 9)[-1]


def test_time_in_which_we_were_stopped_ourselves_does_not_count(clock):
    patience = Patience(1.4, 0.5)
    looks(clock, patience, [beat(0)])
    clock.now += 3600
    assert patience.look(True) == ""
    assert looks(clock, patience, [beat(1)]) == [""]


def test_time_in_which_nobody_listened_does_not_count(clock):
    patience = Patience(1.4, 0.5)
    looks(clock, patience, [beat(0)])
    for _ in range(9):
        clock.now += 0.5
        assert patience.look(True, listening=False) == ""
    assert looks(clock, patience, [beat(1)]) == [""]


# The whole, with a model

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SETTINGS = {"kernels": "torch", "max_model_len": 128, "threads": 1}


def test_a_model_answers_as_it_does_in_process(tiny):
    path = str(tiny("llama"))
    prompts = ["the sun", "a dog and a cat", [5, 6, 7]]
    with LLM(path, **SETTINGS) as llm:
        expected = [c.tokens for c in llm.generate(prompts, GREEDY)]
        facts = llm.facts

    async def main():
        async with await AsyncLLM.load(path, isolate=True, watchdog=30, **SETTINGS) as llm:
            assert (llm.state, llm.ready, llm.facts.choices) == ("ready", True, facts.choices)
            assert (llm.vocab_size, llm.max_model_len, llm.config.device) == (facts.vocab_size, 128, "cpu")
            assert llm.facts.family == "Llama"
            assert {name for name, _ in llm.timeline.phases} >= {"imports", "weights", "warm-up"}

            async def collect(prompt):
                async with aclosing(llm.generate(prompt, GREEDY)) as outputs:
                    return [o async for o in outputs]

            found = await asyncio.gather(*map(collect, prompts))
            assert [tuple(t for o in outputs for t in o.tokens) for outputs in found] == expected
            assert llm.decode(expected[0]) == "".join(o.text for o in found[0])

            left = llm.generate("the sun", SamplingParams(temperature=0, ignore_eos=True))
            await anext(left)
            assert llm.stats().pages_used > 0
            await left.aclose()
            await asyncio.to_thread(wait_until, lambda: not llm.stats().pages_used)
            assert llm.stats().running == 0
            with pytest.raises(ValueError, match="prompt is empty"):
                await collect([])

    asyncio.run(main())


def test_what_an_isolated_model_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"), isolate=True)
    with pytest.raises(ValueError, match="engine is in this process already"):
        LLM(engine=object(), isolate=True)
    assert not any(t.name == "tenfold-supervisor" for t in threading.enumerate())


def test_a_setting_the_engine_refuses(tiny):
    with pytest.raises(ValueError, match=r"^page_size is 5000; allowed"):
        LLM(str(tiny("llama")), isolate=True, page_size=5000)
