"""Real `tenfold serve` processes on real ports, and `tenfold` commands as a user runs them."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tenfold.bench.serving import ServerProcess, command
from tenfold.serve.cli import commands
from tenfold.serve.cli.failures import run_reporting


def environment() -> dict[str, str]:
    """Ours, without settings of whoever runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TENFOLD_") or k == "TENFOLD_HOME"}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error", "TENFOLD_CONFIG": ""}


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


class Server(ServerProcess):
    """A running `tenfold serve`, without settings of whoever runs the tests."""

    def __init__(self, *arguments: str, **env: str) -> None:
        super().__init__(*arguments, environment=environment() | env)


@contextmanager
def serving(*arguments: str, **env: str) -> Iterator[Server]:
    server = Server(*arguments, **env)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """`with serve("--model", path) as server` starts one and stops it."""
    return serving
