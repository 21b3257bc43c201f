"""`EngineLoop`: the thread that owns an engine, and the only one that touches it.

Invariant: every request that was submitted gets exactly one end: outputs until each of its answers has a finish
reason, or an exception; also when it is aborted, when the engine fails, and when the loop is closed. A failure of the
engine is final here; `remote.RemoteLoop`, which has the same methods, survives it.

Between threads goes one batch per step and receiver, not one message per token.
"""

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from tenfold.engine import wire
from tenfold.engine.facts import Facts
from tenfold.engine.request import FinishReason, Output, Request

logger = logging.getLogger(__name__)

CLOSED = "The engine was closed."
Batch = list[tuple[str, Output | Exception]]


class EngineDead(RuntimeError):
    """The engine failed or was closed; make a new one."""


class EngineRestarted(RuntimeError):
    """The engine failed while it computed this request, which may be sent again: retry_after is the number of seconds
    until the engine should be back.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Engine(Protocol):
    """What the loop needs of an engine. `add` raises ValueError for a request that is refused; the last outputs of
    one that was aborted come with the next step, whatever phase it was in. Where there are such methods, `close` is
    called at the end, `facts` after loading, and `describe`, from any thread, to look for a fault.
    """

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, id: str) -> Any: ...

    def step(self) -> list[Output]: ...

    def stats(self) -> Any: ...


class Receiver(Protocol):
    """Where outputs go. `send` is called on the loop's thread with (request id, output, or the exception that ends
    the request); it returns False when nobody will ever read what it sends.
    """

    def send(self, batch: Batch) -> bool: ...


class Loop(Protocol):
    """What `LLM` and `AsyncLLM` need of the thread or process that runs their engine."""

    facts: Facts | None
    restarts: int

    @property
    def state(self) -> str: ...

    @property
    def ready(self) -> bool: ...

    @property
    def alive(self) -> bool: ...

    @property
    def open_requests(self) -> int: ...

    def stats(self) -> Any: ...

    def submit(self, request: Request, receiver: Receiver) -> None: ...

    def abort(self, id: str) -> None: ...

    def dump(self) -> None: ...

    def restart(self) -> None: ...

    def close(self, patience: float | None = None) -> None: ...


class Commands(Protocol):
    """Where a loop's commands come from, if not from other threads alone. Both methods call the loop's, on the loop's
    thread: `take` for what is here; `wait` waits where there is nothing yet.
    """

    def take(self) -> None: ...

    def wait(self) -> None: ...


class Open:
    """A request under way: its receiver and the answers without a finish reason."""

    __slots__ = ("missing", "receiver")

    def __init__(self, request: Request, receiver: Receiver) -> None:
        self.receiver = receiver
        self.missing = set(range(1 if request.pool is not None else request.params.n))

    def end(self, id: str, reason: FinishReason, why: str) -> None:
        """Tell the receiver that all that is missing ends like this."""
        self.receiver.send([(id, Output(id, i, finish=reason, error=why)) for i in sorted(self.missing)])


def batches(requests: dict[str, Any], outputs: Iterable[Output]) -> dict[Receiver, Batch]:
    """Outputs by receiver. Requests that end with them are taken out of `requests`; outputs of others are left out."""
    found: dict[Receiver, Batch] = {}
    for output in outputs:
        entry = requests.get(output.request_id)
        if entry is None:  # of a request that was aborted
            continue
        if output.finish is not None:
            entry.missing.discard(output.index)
            if not entry.missing:
                del requests[output.request_id]
        found.setdefault(entry.receiver, []).append((output.request_id, output))
    return found


def failed(error: BaseException) -> str:
    return f"The engine failed: {type(error).__name__}: {error}"


def taken(id: str) -> ValueError:
    """Why a second request of the same id is refused."""
    return ValueError(f"request_id is {id!r}; a request with this id is under way, choose another.")


class EngineLoop:
    """Makes an engine with `load` on a thread of its own and runs it there. Returns from the constructor when it is
    loaded, or raises what `load` raised. Methods may be called from any thread.

    watchdog: seconds without progress after which stacks and the scheduler's state go to the log (0: never).
    on_failure: called on the loop's thread when the engine fails, in place of ending the requests; must not return.
    on_step: called there after each step. commands: the loop's thread reads them itself; nothing then ends its wait
    for work but they.
    """

    restarts = 0

    def __init__(
        self,
        load: Callable[[], Engine],
        name: str = "tenfold-engine",
        watchdog: float = 0.0,
        on_failure: Callable[[BaseException], None] | None = None,
        on_step: Callable[[], None] | None = None,
        commands: Commands | None = None,
    ) -> None:
        self._load = load
        self._source = commands
        self._on_step = on_step
        self._on_failure = on_failure
        self._open: dict[str, Open] = {}
        self._commands: deque[Callable[[Engine], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dead: str | None = None
        self._failure: BaseException | None = None
        self._stats: Any = None
        self._loaded = threading.Event()
        self._ended = threading.Event()
        self._since = 0.0  # of the latest progress, or since when there is work again
        self.turns = 0  # steps that got something done
        self.busy = False
        self.engine: Engine | None = None
        self.facts: Facts | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._loaded.wait()
        if self.engine is None:
            assert self._failure is not None
            raise self._failure
        if watchdog:
            threading.Thread(target=self._watch, args=(watchdog,), name=f"{name}-watchdog", daemon=True).start()

    @property
    def state(self) -> str:
        """ "ready", "failed" or "closed"."""
        if self._dead is None:
            return "ready"
        return "closed" if self._dead == CLOSED else "failed"

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._dead is None

    @property
    def alive(self) -> bool:
        return self._dead is None

    @property
    def open_requests(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._open)

    @property
    def age(self) -> float:
        """Seconds that a step, or a command before it, has taken so far; 0 where there is nothing to do."""
        return time.monotonic() - self._since if self.busy else 0.0

    def stats(self) -> Any:
        """The engine's numbers after its latest step."""
        return self._stats

    def submit(self, request: Request, receiver: Receiver) -> None:
        """Raises EngineDead; whatever else is wrong goes to the receiver."""
        if self._source is None:  # what comes from another process was checked when it was read
            try:
                request = wire.as_sent(request)
            except ValueError as error:
                receiver.send([(request.id, error)])
                return
        self._post(lambda engine: self._add(engine, request, receiver))

    def abort(self, id: str) -> None:
        """End a request, in whatever phase it is, before the next step; its receiver gets outputs with reason
        "abort".
        """
        with suppress(EngineDead):  # then it has ended already
            self._post(lambda engine: self._end(engine, id))

    def describe(self) -> str:
        """Who runs and who waits, as far as the engine can tell; from any thread."""
        describe = getattr(self.engine, "describe", None)
        try:
            return str(describe()) if describe is not None else str(self._stats)
        except Exception as error:  # what it reads changes while it reads
            return f"{self._stats} (in the middle of a change: {error!r})"

    def dump(self) -> None:
        """Write what all threads do and the scheduler's state to the log."""
        logger.warning("%d requests are open\n%s\n%s", len(self._open), self.describe(), stacks())

    def restart(self) -> None:
        """Raises ValueError: only an engine process can be restarted."""
        raise ValueError("This engine runs inside this process and cannot be restarted alone; use isolate=True.")

    def close(self, patience: float | None = None) -> None:
        """Ends the loop after the step under way, for which it waits `patience` seconds (None: as long as it takes);
        open requests end with reason "abort". Idempotent.
        """
        self.end()
        if threading.current_thread() is not self._thread:  # the garbage collector may call this on any thread
            self._thread.join(patience)

    def end(self) -> None:
        """As `close`, without waiting."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether the loop has ended, after waiting for that."""
        return self._ended.wait(seconds)

    def _post(self, command: Callable[[Engine], None]) -> None:
        with self._changed:
            if self._dead is not None or self._closing:
                raise EngineDead(self._dead or CLOSED)
            self._commands.append(command)
            self._changed.notify()

    # On the loop's thread

    def _run(self) -> None:
        try:
            engine = self._load()
            self.facts = engine.facts() if hasattr(engine, "facts") else None
        except BaseException as error:
            self._failure = error
            self._dead = "The engine could not be loaded."
            self._loaded.set()
            return
        finally:
            del self._load  # it may hold what is needed for loading only
        self._stats = engine.stats()
        self.engine = engine
        self._loaded.set()
        try:
            self._turn(engine)
            self._end_all(FinishReason.ABORT, CLOSED)
            close = getattr(engine, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            if self._on_failure is not None:
                self._on_failure(error)
            logger.exception("the engine failed")
            self._end_all(FinishReason.ERROR, failed(error))
        self.engine = None
        self._ended.set()

    def _turn(self, engine: Engine) -> None:
        """Commands and steps by turns, until the loop is to end."""
        while self._wait_for_work(engine):
            if not self.busy:
                self._since = time.monotonic()
                self.busy = True
            while self._commands:
                self._commands.popleft()(engine)
            if engine.has_work:
                outputs = engine.step()
                before, self._stats = self._stats, engine.stats()
                # The numbers first, so that who has an output sees numbers that include it.
                self._deliver(engine, outputs)
                if self._on_step is not None:
                    self._on_step()
                if outputs or getattr(self._stats, "steps", 0) != getattr(before, "steps", 0):
                    self.turns += 1
                    self._since = time.monotonic()
                if hasattr(engine, "rest"):
                    engine.rest()

    def _wait_for_work(self, engine: Engine) -> bool:
        """Returns at once while there is work; False when the loop is to end."""
        if self._source is not None:
            self._source.take()
            while not (engine.has_work or self._commands or self._closing):
                self.busy = False
                self._source.wait()
        elif not engine.has_work:
            with self._changed:
                self.busy = bool(self._commands)
                self._changed.wait_for(lambda: self._commands or self._closing)
        return not self._closing

    def _add(self, engine: Engine, request: Request, receiver: Receiver) -> None:
        if request.id in self._open:
            receiver.send([(request.id, taken(request.id))])
            return
        try:
            engine.add(request)
        except (ValueError, EngineDead) as error:
            receiver.send([(request.id, error)])
            return
        except Exception as error:  # the engine ends, and this request as all others do
            receiver.send([(request.id, EngineDead(failed(error)))])
            raise
        self._open[request.id] = Open(request, receiver)

    def _end(self, engine: Engine, id: str) -> None:
        if id in self._open:
            engine.abort(id)  # its last outputs come with the next step

    def _deliver(self, engine: Engine, outputs: list[Output]) -> None:
        for receiver, batch in batches(self._open, outputs).items():
            if not receiver.send(batch):
                self._drop(engine, receiver)

    def _drop(self, engine: Engine, receiver: Receiver) -> None:
        for id in [id for id, entry in self._open.items() if entry.receiver is receiver]:
            del self._open[id]
            engine.abort(id)

    def _end_all(self, reason: FinishReason, why: str) -> None:
        with self._changed:
            self._dead = why
            commands = list(self._commands)
            self._commands.clear()
        refusing = _Refusing(why)
        for command in commands:
            command(refusing)
        for id, entry in self._open.items():
            entry.end(id, reason, why)
        self._open.clear()
        self.busy = False

    # On the watchdog's thread

    def _watch(self, patience: float) -> None:
        reported = -1
        while not self._ended.wait(patience / 4):
            if self.age > patience and self.turns != reported:
                reported = self.turns
                logger.error(
                    "no progress for %.0f s; an engine inside this process cannot be restarted without it", self.age
                )
                self.dump()


class _Refusing:
    """Stands in for an engine that is gone, for the commands that came too late for it."""

    has_work = False

    def __init__(self, why: str) -> None:
        self._why = why

    def add(self, request: Request) -> None:
        raise EngineDead(self._why)

    def abort(self, id: str) -> None:
        pass

    def step(self) -> list[Output]:
        return []

    def stats(self) -> Any:
        return None


def stacks() -> str:
    """What every thread of this process does."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(id, '?')}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for id, frame in sys._current_frames().items()
    )
