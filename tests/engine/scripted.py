"""An engine that runs in a real engine process and does what a test tells it to, without a model.

`config.model` names a folder: the test says there how loading goes, and the engine writes there what it was given.
The first token of a prompt says what becomes of the request; an answer is the numbers 0, 1, 2, ...
"""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold.engine.facts import Facts, Stats
from tenfold.engine.request import FinishReason, Output, QueueFull, Request

logger = logging.getLogger("tenfold.scripted")

ANSWER, KILL, RAISE, HANG, HANG_WITH_LOCK, KILL_AT_ADD, FULL, WRONG, LOG, QUIET = range(10)
LATE = 0.02  # seconds of one step


class Scripted:
    """Files of the folder: "hold" (loading waits until it is gone), "refuse" (its text is what loading says), "broken"
    (loading has a fault), "exit" (the process is killed while loading). "added" gets a line for each request.
    """

    @classmethod
    def load(cls, config: Any, timeline: Any = None) -> "Scripted":
        folder = Path(config.model)
        while (folder / "hold").exists():
            time.sleep(0.005)
        if (folder / "refuse").exists():
            raise ValueError((folder / "refuse").read_text())
        if (folder / "broken").exists():
            raise KeyError("a fault of ours")
        if (folder / "exit").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return cls(config, folder)

    def __init__(self, config: Any, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.on_start: Callable[[list[str]], None] | None = None
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, tuple[Request, int]] = {}
        self.ready: list[Output] = []
        self.steps = 0

    def facts(self) -> Facts:
        return Facts(replace(self.config, threads=7), vocab_size=100, max_model_len=64, pages=8)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.ready)

    def describe(self) -> str:
        return f"the scripted engine has {len(self.running)} running"

    def add(self, request: Request) -> None:
        with (self.folder / "added").open("a") as file:
            file.write(f"{os.getpid()} {request.id}\n")
        what = request.prompt[0]
        if what == KILL_AT_ADD:
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == FULL:
            raise QueueFull("The queue is full of it.", 7)
        elif what == WRONG:
            raise ValueError("prompt is not to my liking.")
        elif what == LOG:
            logger.warning("I was told to say this")
        self.waiting[request.id] = request

    def abort(self, id: str) -> None:
        request = self.waiting.pop(id, None) or self.running.pop(id, (None, 0))[0]
        if request is not None:
            self.ready += [Output(id, i, finish=FinishReason.ABORT) for i in range(request.params.n)]

    def step(self) -> list[Output]:
        self.steps += 1
        outputs, self.ready = self.ready, []
        new = list(self.waiting)[: self.config.max_batch - len(self.running)]
        if new:
            assert self.on_start is not None
            self.on_start(new)
        for id in new:
            self.running[id] = self.waiting.pop(id), 0
        for id, (request, done) in list(self.running.items()):
            if done == 1:
                misbehave(request.prompt[0])
            last = done + 1 == (request.params.max_tokens or 10**9)
            finish = FinishReason.LENGTH if last else None
            if request.prompt[0] != QUIET:
                outputs += [Output(id, i, (done,), str(done), finish=finish) for i in range(request.params.n)]
            self.running[id] = request, done + 1
            if last:
                del self.running[id]
        time.sleep(LATE if any(r.params.max_tokens is None for r, _ in self.running.values()) else 0)
        return outputs

    def stats(self) -> Stats:
        count, waiting = len(self.running), len(self.waiting)
        return Stats(count, waiting, 8, count, 0, 8 - count, self.steps, 0.0, 0.0, 0, 0, 0, 0, 0, 0)


def misbehave(what: int) -> None:
    """At the second token of an answer."""
    if what == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == RAISE:
        raise RuntimeError("the scripted engine has had enough")
    elif what == HANG:
        time.sleep(10**6)
    elif what == HANG_WITH_LOCK:
        ctypes.PyDLL(None).sleep(10**6)  # no other thread of the process gets a turn
