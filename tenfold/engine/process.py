"""The engine process: `python -m tenfold.engine.process`, started by `child.Child`, runs one engine for the process at
the other end of its standard input.

Invariant: when that process is gone, however it ended, this one ends at once. It takes no orders from the terminal:
Ctrl-C and SIGTERM go to the whole group, and the parent decides what they mean.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import platform
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from tenfold.base.log import Timeline
from tenfold.base.table import entry
from tenfold.engine import wire
from tenfold.engine.channel import MOST, Channel
from tenfold.engine.loop import Batch, EngineDead, EngineLoop
from tenfold.engine.request import Output, QueueFull

logger = logging.getLogger(__name__)

IGNORED = ("SIGINT", "SIGTERM", "SIGHUP")
PR_SET_PDEATHSIG = 1  # prctl: the signal to get when the parent ends
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # the system call's number
SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # sched_setattr(2)
SLICE = 30_000_000  # nanoseconds; usual are 1 to 3 ms
FLUSH = 2.0  # seconds for the last messages to reach the parent

# How an exception is called on the wire, the first that fits.
FAILURES: dict[str, type[Exception]] = {"value": ValueError, "import": ImportError, "os": OSError}
REFUSALS: dict[str, type[Exception]] = {"queue": QueueFull, "value": ValueError, "dead": EngineDead}


class Events:
    """The way to the parent; may be used from any thread, never waits. begun: as in `wire.Start`.

    A parent that does not read for long, for it is stopped or stuck, misses heartbeats and log records first; the
    process ends before more than `channel.MOST` bytes wait for it.
    """

    def __init__(self, channel: Channel, begun: int) -> None:
        self._begun = socket.socket(fileno=begun)
        self._channel = channel

    def send(self, event: wire.Message) -> None:
        if self._channel.waiting and isinstance(event, wire.Beat):
            return  # one that says more will follow
        message = wire.encode(event)
        if self._channel.waiting + len(message) > MOST // 2 and isinstance(event, wire.Log):
            return
        if self._channel.waiting + len(message) > MOST:
            os.write(2, b"the engine process ends, for nobody reads what it sends\n")
            os._exit(4)
        self._channel.send(message)

    def begin(self, ids: list[str]) -> None:
        """Tell which requests begin. Has reached the parent when it returns, whatever becomes of this process."""
        event = wire.Started(ids)
        try:
            self._begun.send(wire.encode(event), socket.MSG_DONTWAIT)
        except OSError:  # too long for one datagram, or the parent has not read for long
            self.send(event)

    def close(self) -> None:
        """Waits until all has been sent, for a moment."""
        self._channel.close(FLUSH)


class Commands:
    """The way from the parent. The engine's thread reads it itself, between steps and when there is nothing to do, so
    that a request wakes one thread; what comes in a step that takes long is read by `look`.

    obey: called for each command, on the thread that has read it.
    """

    def __init__(self, channel: Channel, obey: Callable[[wire.Command], None]) -> None:
        self._channel = channel
        self._obey = obey
        self._lock = threading.Lock()  # commands are obeyed in their order
        self._waits = False  # the engine's thread does, and reads what comes
        self._looked = False  # `look` has obeyed commands that the engine's thread may not have seen
        self._poller = select.poll()
        self._poller.register(channel.fd, select.POLLIN)

    def take(self) -> None:
        """Obey what is here."""
        with self._lock:
            self._waits = self._looked = False
            self._read()

    def wait(self) -> None:
        """Obey what is here, or if it is nothing what comes next. Returns at once after commands that `look` obeyed."""
        with self._lock:
            looked, self._looked = self._looked, False
            self._waits = not (self._read() or looked)
        if self._waits:
            self._poller.poll()
            self.take()

    def look(self) -> None:
        """`take`, from another thread, unless the engine's waits for commands."""
        with self._lock:
            if not self._waits and self._read():
                self._looked = True

    def _read(self) -> bool:
        """Whether there was a command. The process ends with its parent."""
        messages = self._channel.read()
        for message in messages:
            self._obey(wire.decode_command(message))
        if self._channel.ended:
            os._exit(3)
        return bool(messages)


class Relay(logging.Handler):
    """Sends log records to the parent, whose log they belong in."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._events.send(wire.Log(record.name, record.levelno, self.format(record)))
        except Exception:
            self.handleError(record)


class Answers:
    """The receiver of all requests. A step's outputs leave as one message; a step without any still tells its numbers,
    so that the parent's are never older than a step.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._told = False
        self.loop: EngineLoop | None = None

    def send(self, batch: Batch) -> bool:
        outputs = [item for _, item in batch if isinstance(item, Output)]
        if outputs:
            self._tell(outputs)
        for id, item in batch:
            if isinstance(item, Exception):
                self._events.send(refusal(id, item))
        return True

    def after_step(self) -> None:
        if not self._told:
            self._tell([])
        self._told = False

    def _tell(self, outputs: list[Output]) -> None:
        assert self.loop is not None
        self._events.send(wire.Outputs(outputs, self.loop.stats()))
        self._told = True


def refusal(id: str, error: Exception) -> wire.Refused:
    kind = next((kind for kind, of in REFUSALS.items() if isinstance(error, of)), "value")
    return wire.Refused(id, kind, str(error), getattr(error, "retry_after", 0))


def failure(error: BaseException) -> wire.Failed:
    for kind, of in FAILURES.items():
        if isinstance(error, of):
            return wire.Failed(kind, str(error))
    return wire.Failed("runtime", str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")


class EngineProcess:
    """Loads the engine, then does what the parent says."""

    def __init__(self, start: wire.Start) -> None:
        self._start = start
        channel = Channel(socket.socket(fileno=start.channel))
        self._events = Events(channel, start.begun)
        self._commands = Commands(channel, self._obey)
        self._answers = Answers(self._events)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Relay(self._events)])
        logging.getLogger("tenfold").setLevel(start.level)

    def run(self) -> NoReturn:
        try:
            answers = self._answers
            loop = answers.loop = EngineLoop(
                self._load, on_failure=self._fail, on_step=answers.after_step, commands=self._commands
            )
        except BaseException as error:
            self._fail(error)
        assert loop.facts is not None, "the engine has no facts()"
        gc.freeze()  # a model and its tokenizer stay; a collection that walks them would show as a pause between tokens
        self._events.send(wire.Ready(loop.facts, loop.stats()))
        self._beat(loop)
        while not loop.wait(self._start.beat):
            self._beat(loop)
            self._commands.look()
        self._exit(0)

    def _beat(self, loop: EngineLoop) -> None:
        self._events.send(wire.Beat(loop.stats(), loop.busy, loop.turns, loop.age, loop.describe()))

    def _load(self) -> Any:
        timeline = Timeline()
        with timeline.phase("imports"):
            kind = entry({"engine": self._start.factory}, "engine", "factory")
        engine = kind.load(self._start.config, timeline=timeline)
        engine.on_start = self._events.begin
        return engine

    def _obey(self, command: wire.Command) -> None:
        loop = self._answers.loop
        assert loop is not None
        match command:
            case wire.Submit(id):
                try:
                    loop.submit(wire.request_of(command), self._answers)
                except (ValueError, EngineDead) as error:
                    self._events.send(refusal(id, error))
            case wire.Abort(id):
                loop.abort(id)
            case wire.Dump():
                loop.dump()
            case wire.Stop():
                loop.end()

    def _fail(self, error: BaseException) -> NoReturn:
        told = failure(error)
        if told.kind == "runtime":
            logger.error("the engine process ends", exc_info=error)
        self._events.send(told)
        self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        """At once, for daemon threads and an interpreter that shuts down do not go together."""
        self._events.close()
        os._exit(code)


def let_others_in() -> None:
    """Ask Linux (6.12 or later) for long slices of processor time, for this thread and all it will start. Whoever wakes
    up then gets a core at once: the server that has a token to send on, or a client on the same machine. With slices
    like theirs they would wait for the end of ours, which is about a step (2.0 ms of 12.7 until a first token was read,
    2-core EPYC, SmolLM2-135M, November 2026).
    """
    number = SCHED_SETATTR.get(platform.machine()) if sys.platform == "linux" else None
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = SCHED_ATTR.pack(SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, SLICE, 0, 0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)  # older systems and refusals: all stays as it is


def end_with_parent() -> None:
    """Linux ends this process when its parent's thread ends, even while it is stopped or stuck."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_at_end_of_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(3)


def main() -> None:
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    end_with_parent()
    let_others_in()
    try:
        start = wire.read_start(lambda count: os.read(0, count))
    except EOFError:
        os._exit(3)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()
    EngineProcess(start).run()


if __name__ == "__main__":
    main()
