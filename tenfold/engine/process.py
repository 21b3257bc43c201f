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
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

import zmq

from tenfold.base.log import Timeline
from tenfold.base.table import entry
from tenfold.engine import wire
from tenfold.engine.loop import Batch, EngineDead, EngineLoop
from tenfold.engine.request import Output, QueueFull

logger = logging.getLogger(__name__)

IGNORED = ("SIGINT", "SIGTERM", "SIGHUP")
PR_SET_PDEATHSIG = 1  # prctl: the signal to get when the parent ends
FLUSH = 2000  # milliseconds for the last messages to reach the parent
TRIM = 60.0  # seconds between two times that free memory is given back

# How an exception is called on the wire, the first that fits.
FAILURES: dict[str, type[Exception]] = {"value": ValueError, "import": ImportError, "os": OSError}
REFUSALS: dict[str, type[Exception]] = {"queue": QueueFull, "value": ValueError, "dead": EngineDead}


class Events:
    """The way to the parent; may be used from any thread, never waits. begun: as in `wire.Start`."""

    def __init__(self, address: str, begun: int) -> None:
        self._begun = socket.socket(fileno=begun)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndhwm = 0
        self._socket.connect(address)
        self._lock = threading.Lock()

    def send(self, event: wire.Message) -> None:
        message = wire.encode(event)
        with self._lock:
            if not self._socket.closed:
                self._socket.send(message)

    def begin(self, ids: list[str]) -> None:
        """Tell which requests begin. Has reached the parent when it returns, whatever becomes of this process."""
        event = wire.Started(ids)
        try:
            self._begun.send(wire.encode(event), socket.MSG_DONTWAIT)
        except OSError:  # too long for one datagram, or the parent has not read for long
            self.send(event)

    def close(self) -> None:
        """Waits until all has been sent, for a moment."""
        with self._lock:
            self._socket.close(FLUSH)
        self._context.term()


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
        self._events = Events(start.events, start.begun)
        self._answers = Answers(self._events)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Relay(self._events)])
        logging.getLogger("tenfold").setLevel(start.level)

    def run(self) -> NoReturn:
        commands = zmq.Context().socket(zmq.PULL)
        commands.rcvhwm = 0
        commands.bind(self._start.commands)
        try:
            answers = self._answers
            loop = answers.loop = EngineLoop(self._load, on_failure=self._fail, on_step=answers.after_step)
        except BaseException as error:
            self._fail(error)
        assert loop.facts is not None, "the engine has no facts()"
        gc.freeze()  # a model and its tokenizer stay; a collection that walks them would show as a pause between tokens
        commands.recv()  # Hello
        self._events.send(wire.Ready(loop.facts, loop.stats()))
        threading.Thread(target=self._beat, args=(loop,), daemon=True).start()
        while self._obey(loop, wire.decode_command(commands.recv())):
            pass
        loop.close()
        self._exit(0)

    def _load(self) -> Any:
        timeline = Timeline()
        with timeline.phase("imports"):
            kind = entry({"engine": self._start.factory}, "engine", "factory")
        engine = kind.load(self._start.config, timeline=timeline)
        engine.on_start = self._events.begin
        return engine

    def _obey(self, loop: EngineLoop, command: wire.Command) -> bool:
        """False for the last command."""
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
                return False
        return True

    def _beat(self, loop: EngineLoop) -> None:
        trim_at = time.monotonic()
        while True:
            self._events.send(wire.Beat(loop.stats(), loop.busy, loop.turns, loop.age, loop.describe()))
            if time.monotonic() >= trim_at:
                give_back()
                trim_at = time.monotonic() + TRIM
            time.sleep(self._start.beat)

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


def give_back() -> None:
    """Have the C library return whole pages to the system that nothing uses any more: what loading and the latest
    steps left behind, about 10 of 580 MB (SmolLM2-135M, November 2026). By itself it keeps them. Takes a few
    milliseconds.
    """
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


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
    try:
        start = wire.read_start(lambda count: os.read(0, count))
    except EOFError:
        os._exit(3)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()
    EngineProcess(start).run()


if __name__ == "__main__":
    main()
