"""The life of a server: loading, serving, draining, stopping; with engines made of a few lines, on a real socket."""

import asyncio
import json
import logging
import signal
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from tenfold.engine.request import FinishReason, Output
from tenfold.serve.cli import server as module
from tenfold.serve.cli.server import Server, address, bind
from tenfold.serve.settings import ServeConfig

PATIENCE = 20  # seconds


class Held:
    """An engine that answers with one token, and with the last when `release` is called, or with "abort" when it is
    closed.
    """

    vocab_size = 256
    max_model_len = 128
    alive = True
    state = "ready"

    def __init__(self, fake):
        self._fake = fake
        self._ended = threading.Event()
        self.closed = False
        self.begun = threading.Semaphore(0)

    def __getattr__(self, name):
        return getattr(self._fake, name)

    def release(self):
        self._ended.set()

    def close(self, patience=None):
        self.closed = True
        self._ended.set()

    async def generate(self, prompt, params, *, request_id, **rest):
        yield Output(request_id, 0, (97,), "a")
        self.begun.release()
        while not self._ended.is_set():
            await asyncio.sleep(0.005)
        finish = FinishReason.ABORT if self.closed else FinishReason.STOP
        yield Output(request_id, 0, (98,), "b", finish=finish)


@pytest.fixture
def engine(llm):
    return Held(llm)


class Running:
    """A server on a thread. Its signals are calls: a thread gets none."""

    def __init__(self, models, settings, start=None):
        self.listener = bind("127.0.0.1", 0)
        self.url = address(self.listener)
        self.models = {}
        start = start or (lambda: self.models.update(models))
        self.server = Server(self.listener, settings, self.models, list(models), start)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def get(self, path):
        return httpx.get(self.url + path, timeout=PATIENCE)

    def complete(self, **fields):
        return httpx.post(
            f"{self.url}/v1/completions", json={"model": "tiny", "prompt": "x"} | fields, timeout=PATIENCE
        )

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.01)

    def until_status(self, path, status):
        def reached():
            try:
                return self.get(path).status_code == status
            except httpx.TransportError:
                return False

        self.until(reached)

    def stop(self):
        self.server.handle_exit(signal.SIGTERM, None)

    def wait(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def run(engine, monkeypatch):
    """`with run(...) as running` starts a server of one model and stops it."""
    monkeypatch.setattr(module, "AT_ONCE", 1000)  # whose end would end the tests
    level = logging.getLogger("uvicorn.error").level

    @contextmanager
    def start(start=None, **settings):
        running = Running({"tiny": engine}, ServeConfig(**settings), start)
        try:
            yield running
        finally:
            engine.release()
            running.stop()
            running.stop()
            running.wait()
            running.listener.close()

    yield start
    logging.getLogger("uvicorn.error").setLevel(level)


@contextmanager
def sent(running, **fields):
    """A request under way in a thread; its answer is in the list, or the error that came instead."""
    answers = []

    def send():
        try:
            answers.append(running.complete(**fields))
        except httpx.TransportError as error:
            answers.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    yield answers
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_it_answers_while_models_load_and_tells_the_truth(run, engine, capfd):
    loaded = threading.Event()
    holder = []

    def start():
        loaded.wait(PATIENCE)
        holder[0].models["tiny"] = engine

    with run(start) as running:
        holder.append(running)
        running.until_status("/health", 200)
        answer = running.get("/ready")
        assert (answer.status_code, answer.json()["models"]) == (503, {"tiny": "loading"})
        refused = running.complete()
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert "serving" not in capfd.readouterr().err
        loaded.set()
        running.until_status("/ready", 200)
        assert f"serving tiny on {running.url}/v1" in capfd.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_server(run):
    def start():
        raise ValueError("no such model")

    with run(start) as running:
        running.wait()
        assert str(running.server.failure) == "no such model"


def test_stopping_while_models_load(run):
    begun, never = threading.Event(), threading.Event()

    def start():
        begun.set()
        never.wait(PATIENCE)

    with run(start) as running:
        begun.wait(PATIENCE)
        running.stop()
        running.wait()
        assert running.server.forced == 0
        never.set()


def test_draining_lets_requests_end_and_takes_no_new_ones(run, engine):
    with run() as running:
        running.until_status("/ready", 200)
        with sent(running) as answers:
            engine.begun.acquire(timeout=PATIENCE)
            running.stop()
            refused = running.complete()
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert running.get("/ready").status_code == 503
            assert running.get("/health").status_code == 200
            engine.release()
        running.wait()
        assert answers[0].json()["choices"][0]["text"] == "ab"
        assert running.server.forced == 0
        assert not engine.closed  # whoever started it closes it


def test_work_without_a_client_is_waited_for_too(run, engine):
    engine.open_requests = 1
    with run(drain_timeout=1000) as running:
        running.until_status("/ready", 200)
        running.stop()
        running.until_status("/ready", 503)
        assert running.get("/health").status_code == 200
        engine.open_requests = 0
        running.wait()


def test_an_idle_server_stops_at_the_first_signal(run):
    with run(drain_timeout=1000) as running:
        running.until_status("/ready", 200)
        running.stop()
        running.wait()


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_outlast_the_drain_end_with_an_error(run, engine, stream):
    with run(drain_timeout=0) as running:
        running.until_status("/ready", 200)
        with sent(running, stream=stream) as answers:
            engine.begun.acquire(timeout=PATIENCE)
            running.stop()
        running.wait()
    (answer,) = answers
    if stream:
        *_, error, done = [line for line in answer.text.split("\n\n") if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "overloaded"
        assert done == "data: [DONE]"
    else:
        assert answer.status_code == 503
        assert answer.headers["retry-after"]


def test_the_second_signal_does_not_wait(run, engine):
    with run(drain_timeout=1000) as running:
        running.until_status("/ready", 200)
        with sent(running, stream=True) as answers:
            engine.begun.acquire(timeout=PATIENCE)
            running.stop()
            running.stop()
        running.wait()
        assert isinstance(answers[0], httpx.TransportError)
        assert running.server.forced == signal.SIGTERM


def test_those_who_only_look_are_not_waited_for(run, engine):
    with run(drain_timeout=1000) as running:
        running.until_status("/ready", 200)
        with httpx.Client(base_url=running.url) as idle:  # a connection that is kept
            idle.get("/health")
            running.stop()
            running.wait()
