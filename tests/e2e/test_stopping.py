"""How real servers end, and that none leaves an engine or its files behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tenfold.bench.serving import command
from tests.e2e.conftest import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PATIENCE = 30  # seconds
TORCH = ("--kernels", "torch")


@pytest.fixture
def short():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def children(pid):
    """Process ids of the engines that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == pid and b"tenfold.engine.process" in words:
                found.append(int(entry.name))
    return found


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def complete(server, model, **fields):
    body = {"model": model, "prompt": "the", "max_tokens": 4} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)


def test_two_models_and_a_server_that_is_killed(tiny, serve, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(f"[[models]]\nname = 'first'\nmodel = '{tiny('llama')}'\n[[models]]\nmodel = '{tiny('qwen3')}'\n")
    with serve("--config", str(config), *TORCH) as server:
        assert httpx.get(f"{server.url}/ready").json()["models"] == {"first": "ready", "qwen3": "ready"}
        for model, answers in (("first", "first"), ("qwen3", "qwen3"), ("default", "first")):
            assert complete(server, model).json()["model"] == answers
        assert complete(server, "llama").status_code == 404
        log = "".join(server.log)
        assert log.index("together ") < log.index("first ready: ") < log.index("qwen3 ready: ")
        engines = children(server.process.pid)
        assert len(engines) == 2
        server.process.kill()
        until(lambda: not any(map(alive, engines)))
        assert server.wait() == -signal.SIGKILL


def test_models_that_do_not_fit_are_refused_before_they_load(inside, tiny):
    model = str(tiny("llama"))
    result = inside("serve", f"a={model}", f"b={model}", *TORCH, "--port", "0", "--max-step-tokens", "100000000")
    assert result.returncode == 2
    assert "do not fit into memory together" in result.stderr
    assert "leaving out" not in result.stderr  # neither would fit alone
    assert "--max-step-tokens" in result.stderr
    assert " ready: " not in result.stderr


def test_plan_of_two_models(inside, tiny):
    result = inside("plan", str(tiny("llama")), f"other={tiny('qwen3')}", *TORCH)
    assert result.returncode == 0
    head, first, second, total = result.stdout.splitlines()
    assert head.startswith("MODEL")
    assert (first.split()[0], second.split()[0]) == ("llama", "other")
    assert total.startswith("together ")
    assert inside("plan", str(tiny("llama")), f"other={tiny('qwen3')}", *TORCH, "--memory", "100M").returncode == 3


def test_the_second_signal_ends_a_server_whose_engine_hangs(tiny, serve, short):
    with serve("--model", str(tiny("llama")), *TORCH, TMPDIR=str(short)) as server:
        (engine,) = children(server.process.pid)
        os.kill(engine, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(complete, server, "llama", stream=True)
            until(lambda: 'tenfold_requests_open{model="llama"} 1.0' in httpx.get(f"{server.url}/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            assert complete(server, "llama").json()["error"]["code"] == "draining"
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                hanging.result(PATIENCE)
        assert server.wait() == 128 + signal.SIGTERM
        until(lambda: not alive(engine))
        assert not list(short.glob("tenfold-*"))
        assert "Traceback" not in "".join(server.log)


def test_stopping_a_server_that_loads(tiny, short):
    arguments = command("serve", "--port", "0", "--model", str(tiny("llama")), *TORCH)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment() | {"TMPDIR": str(short)})
    until(lambda: children(process.pid))
    engines = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "stopping: no model is loaded yet" in said
    assert "Traceback" not in said
    until(lambda: not any(map(alive, engines)))
    assert not list(short.glob("tenfold-*"))
