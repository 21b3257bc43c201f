"""Real `tenfold serve` processes on real ports, and `tenfold` commands as a user runs them."""

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tenfold.serve.cli import commands
from tenfold.serve.cli.failures import run_reporting

READY = 60  # seconds until a server must be ready


def environment() -> dict[str, str]:
    """Ours, without settings of whoever runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TENFOLD_") or k == "TENFOLD_HOME"}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error", "TENFOLD_CONFIG": ""}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tenfold.serve.cli", *arguments]


@pytest.fixture(scope="session")
def tenfold() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`tenfold("run", "Hi", input="...")` runs a command to its end."""

    def run(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        kwargs.setdefault("stdin" if "input" not in kwargs else "input", kwargs.get("input", subprocess.DEVNULL))
        env = environment() | kwargs.pop("env", {})
        return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, env=env, **kwargs)

    return run


@dataclass
class Result:
    """What a command in this process did."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Like `tenfold`, in this process: importing PyTorch anew for every mistake would take most of the tests' time."""

    def run(*arguments: str, input: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["tenfold", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        capfd.readouterr()
        status = run_reporting(commands.app, debug=False)
        out, err = capfd.readouterr()
        return Result(status, out, err)

    for name in [name for name in os.environ if name.startswith("TENFOLD_") and name != "TENFOLD_HOME"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TENFOLD_CONFIG", "")
    return run


class Server:
    """A running `tenfold serve`. `log` grows while it writes."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            command("serve", "--port", "0", *arguments), stderr=subprocess.PIPE, text=True, env=environment() | env
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(READY) or not self.url:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"on (http://\S+)/v1", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def wait(self) -> int:
        """The exit status, with the log complete."""
        status = self.process.wait(READY)
        self._reader.join(READY)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def stop(self) -> int:
        self.process.terminate()
        return self.wait()


@contextmanager
def serving(*arguments: str, **env: str) -> Iterator[Server]:
    server = Server(*arguments, **env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """`with serve("--model", path) as server` starts one and stops it."""
    return serving
