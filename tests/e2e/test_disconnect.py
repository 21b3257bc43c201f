"""Clients that leave, over real sockets, with the engine's own count of pages to show what became of their work."""

import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from tenfold.engine.llm import AsyncLLM
from tenfold.serve.app import create_app
from tenfold.serve.cli.server import bind, uvicorn_config
from tenfold.serve.settings import ServeConfig

PATIENCE = 20  # seconds


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def llm(tiny):
    """One row only, so that a second request has to wait for the first."""
    llm = AsyncLLM(str(tiny("llama")), kernels="torch", max_batch=1, prefix_cache=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def port(llm):
    settings = ServeConfig()
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(create_app({"tiny": llm}, settings), settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    until(lambda: server.started)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(PATIENCE)
    listener.close()


def send(port, stream, **fields):
    """A connection on which a long answer has been asked for."""
    body = {"model": "tiny", "prompt": "the", "max_tokens": 250, "ignore_eos": True, "stream": stream} | fields
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(head.encode() + content)
    return connection


def idle(llm):
    stats = llm.stats()
    return stats.running == stats.waiting == stats.pages_used == 0


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_pages_of_running_and_waiting_requests(llm, port, stream, monkeypatch):
    engine = llm._loop.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or step())  # an answer of seconds
    running = send(port, stream)
    until(lambda: llm.stats().running == 1)
    waiting = send(port, stream, prompt=["the", "and"])
    until(lambda: llm.stats().waiting == 2)
    assert llm.stats().pages_used > 0
    generated = llm.stats().generated_tokens
    waiting.close()
    until(lambda: llm.stats().waiting == 0)
    assert llm.stats().running == 1
    running.close()
    until(lambda: idle(llm))
    assert llm.stats().generated_tokens - generated < 200
    assert llm._loop.open_requests == 0
    monkeypatch.undo()
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": "tiny", "prompt": "the"}, timeout=60)
    assert answer.status_code == 200


def test_leaving_in_the_middle_of_the_body(llm, port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
    connection.close()
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    until(lambda: idle(llm))
