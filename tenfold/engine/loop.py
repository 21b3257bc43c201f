"""`EngineLoop`: the thread that owns an engine, and the only one that touches it.

Invariant: every request that was submitted gets exactly one end: outputs until each of its answers has a finish
reason, or a refusal; also when it is aborted, when the engine fails, and when the loop is closed. A failure of the
engine is final.

Between threads goes one batch per step and receiver, not one message per token.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from tenfold.engine.request import FinishReason, Output, Request

logger = logging.getLogger(__name__)

Batch = list[tuple[str, Output | Exception]]


class EngineDead(RuntimeError):
    """The engine failed or was closed; make a new one."""


class Engine(Protocol):
    """What the loop needs of an engine. `add` raises ValueError for a request that is refused; the last outputs of
    one that was aborted come with the next step, whatever phase it was in. `close`, where there is one, is called at
    the end.
    """

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, id: str) -> Any: ...

    def step(self) -> list[Output]: ...

    def stats(self) -> Any: ...


class Receiver(Protocol):
    """Where outputs go. `send` is called on the loop's thread with (request id, output, or why the request was
    refused); it returns False when nobody will ever read what it sends.
    """

    def send(self, batch: Batch) -> bool: ...


class _Open:
    """A request under way: its receiver and the answers without a finish reason."""

    __slots__ = ("missing", "receiver")

    def __init__(self, receiver: Receiver, n: int) -> None:
        self.receiver = receiver
        self.missing = set(range(n))


class EngineLoop:
    """Makes an engine with `load` on a thread of its own and runs it there. Returns from the constructor when it is
    loaded, or raises what `load` raised. Methods may be called from any thread.
    """

    def __init__(self, load: Callable[[], Engine], name: str = "tenfold-engine") -> None:
        self._load = load
        self._open: dict[str, _Open] = {}
        self._commands: deque[Callable[[Engine], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dead: str | None = None
        self._failure: BaseException | None = None
        self._stats: Any = None
        self._loaded = threading.Event()
        self.engine: Engine | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._loaded.wait()
        if self.engine is None:
            assert self._failure is not None
            raise self._failure

    @property
    def alive(self) -> bool:
        return self._dead is None

    @property
    def open_requests(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._open)

    def stats(self) -> Any:
        """The engine's numbers after its latest step."""
        return self._stats

    def submit(self, request: Request, receiver: Receiver) -> None:
        """Raises EngineDead; whatever else is wrong goes to the receiver."""
        self._post(lambda engine: self._add(engine, request, receiver))

    def abort(self, id: str) -> None:
        """End a request, in whatever phase it is, before the next step; its receiver gets outputs with reason
        "abort".
        """
        with suppress(EngineDead):  # then it has ended already
            self._post(lambda engine: self._end(engine, id))

    def close(self, patience: float | None = None) -> None:
        """Ends the loop after the step under way, for which it waits `patience` seconds (None: as long as it takes);
        open requests end with reason "abort". Idempotent.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # the garbage collector may call this on any thread
            self._thread.join(patience)

    def _post(self, command: Callable[[Engine], None]) -> None:
        with self._changed:
            if self._dead is not None or self._closing:
                raise EngineDead(self._dead or "The engine was closed.")
            self._commands.append(command)
            self._changed.notify()

    # On the loop's thread

    def _run(self) -> None:
        try:
            engine = self._load()
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
            while self._wait_for_work(engine):
                while self._commands:
                    self._commands.popleft()(engine)
                if engine.has_work:
                    outputs = engine.step()
                    self._stats = engine.stats()  # first, so that who has an output sees numbers that include it
                    self._deliver(engine, outputs)
            self._end_all(FinishReason.ABORT, "The engine was closed.")
            close = getattr(engine, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            logger.exception("the engine failed")
            self._end_all(FinishReason.ERROR, f"The engine failed: {type(error).__name__}: {error}")
        self.engine = None

    def _wait_for_work(self, engine: Engine) -> bool:
        """Returns at once while there is work; False when the loop is to end."""
        if not engine.has_work:
            with self._changed:
                self._changed.wait_for(lambda: self._commands or self._closing)
        return not self._closing

    def _add(self, engine: Engine, request: Request, receiver: Receiver) -> None:
        if request.id in self._open:
            error = ValueError(f"request_id is {request.id!r}; a request with this id is under way, choose another.")
            receiver.send([(request.id, error)])
            return
        try:
            engine.add(request)
        except (ValueError, EngineDead) as error:
            receiver.send([(request.id, error)])
            return
        self._open[request.id] = _Open(receiver, 1 if request.pool is not None else request.params.n)

    def _end(self, engine: Engine, id: str) -> None:
        if id in self._open:
            engine.abort(id)  # its last outputs come with the next step

    def _deliver(self, engine: Engine, outputs: list[Output]) -> None:
        batches: dict[Receiver, Batch] = {}
        for output in outputs:
            entry = self._open.get(output.request_id)
            if entry is None:  # of a request that was aborted
                continue
            if output.finish is not None:
                entry.missing.discard(output.index)
                if not entry.missing:
                    del self._open[output.request_id]
            batches.setdefault(entry.receiver, []).append((output.request_id, output))
        for receiver, batch in batches.items():
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
            entry.receiver.send([(id, Output(id, i, finish=reason, error=why)) for i in sorted(entry.missing)])
        self._open.clear()


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
