"""`RemoteLoop`: an engine in a process of its own, which is started again when it ends, hangs or is stopped.

Invariant: every request that was submitted gets exactly one end, as in `loop.EngineLoop`, whatever becomes of the
process. A request the engine had begun is never given to another engine: it may be what brought the engine down, and a
part of its answer may have been shown. It ends with EngineRestarted. One that had not begun waits for the next engine,
in its order, and is given to LIVES of them at most.
"""

import asyncio
import logging
import math
import threading
import time
from dataclasses import dataclass

import msgspec

from tenfold.base.config import EngineConfig
from tenfold.engine import wire
from tenfold.engine.child import Child, Wake
from tenfold.engine.facts import Facts, Stats
from tenfold.engine.loop import CLOSED, EngineDead, EngineRestarted, Open, Receiver, batches, taken
from tenfold.engine.process import FAILURES, REFUSALS
from tenfold.engine.pump import Pump
from tenfold.engine.request import FinishReason, Output, QueueFull, Request

logger = logging.getLogger(__name__)

FACTORY = "tenfold.engine.core:Engine"
BEAT = 0.5  # seconds between two heartbeats, if the watchdog is patient enough
LIVES = 3  # engines a request that has not begun is given to
CLOSING = 10.0  # seconds a step under way gets when the loop is closed
SHOWN = 64  # requests in a description
LATE = "Its deadline has passed."
ABORTED = "The request was aborted."
GRACE = 1.0  # seconds the engine has for ending a request before it is ended here
QUIET = 2.0  # seconds without a sign of life after which the engine does not count as ready


@dataclass(slots=True)
class Backoff:
    """When to start the next engine. A failure within `healthy` seconds of being ready is one more in a row."""

    first: float = 0.5
    longest: float = 30.0
    most: int = 8  # failures in a row after which there is no next engine
    healthy: float = 60.0
    failures: int = 0

    def after(self, lived: float) -> float | None:
        """Seconds to wait after an engine that ran for `lived`: 0, then `first`, twice that, ...; None: give up."""
        self.failures = 1 if lived >= self.healthy else self.failures + 1
        if self.failures >= self.most:
            return None
        return 0.0 if self.failures == 1 else float(min(self.longest, self.first * 2 ** (self.failures - 2)))


class Patience:
    """How long there was no sign of life and no progress, in the time that this process itself was running: when both
    were stopped, or the machine slept, nobody hangs.
    """

    def __init__(self, limit: float, beat: float) -> None:
        self._limit = limit
        self._most = 2 * beat  # seconds a look at it can be late
        self._turns = -1
        self._at = time.monotonic()
        self.silent = 0.0
        self._stalled = 0.0
        self._heard = False
        self._beats: list[wire.Beat] = []

    def hear(self, event: wire.Event) -> None:
        """A message has come."""
        self._heard = True
        if isinstance(event, wire.Beat):
            self._beats.append(event)

    def look(self, has_open: bool, listening: bool = True) -> str:
        """Takes account of what was heard since the last look. Returns what is wrong, or an empty text. listening:
        whether anybody would have heard.
        """
        now = time.monotonic()
        passed = min(now - self._at, self._most) if listening else 0.0
        self._at = now
        self.silent = 0.0 if self._heard else self.silent + passed
        self._stalled += passed
        beats, self._beats, self._heard = self._beats, [], False
        for beat in beats:
            if beat.turns != self._turns or not (beat.busy or has_open):
                self._turns = beat.turns
                self._stalled = 0.0
        if not self._limit or max(self.silent, self._stalled) <= self._limit:
            return ""
        if self.silent > self._most:
            return f"it gave no sign of life for {self.silent:.1f} s"
        return f"it has work and finished no step for {self._stalled:.1f} s"


class _Sent(Open):
    """An open request, and what another engine needs to take it over."""

    __slots__ = ("aborted", "lives", "request", "started")

    def __init__(self, request: Request, receiver: Receiver) -> None:
        super().__init__(request, receiver)
        self.request = request
        self.started = False
        self.aborted = math.inf  # when
        self.lives = 0

    def over(self, now: float) -> bool:
        """Whether it should have ended by `now`."""
        return now >= self.aborted or (self.request.deadline is not None and now >= self.request.deadline)

    def cut(self) -> None:
        """Tell the receiver of such an end."""
        why = LATE if self.aborted == math.inf else ABORTED
        self.end(self.request.id, FinishReason.ABORT, why)


class RemoteLoop:
    """Starts a process for an engine made by `factory` ("module:class") of `config`, and keeps one running. `wait`
    returns when it is loaded. Methods may be called from any thread.

    watchdog: seconds without a sign of life, or with work and without a finished step, after which the process is
    killed; loading does not count (0: never).
    """

    def __init__(
        self,
        config: EngineConfig,
        factory: str = FACTORY,
        watchdog: float = 60.0,
        backoff: Backoff | None = None,
        name: str = "tenfold-supervisor",
    ) -> None:
        self._config = config
        self._factory = factory
        self._watchdog = watchdog
        self._beat = min(BEAT, watchdog / 4) if watchdog else BEAT
        self._backoff = backoff or Backoff()
        self._lock = threading.RLock()  # the garbage collector may call `close` while this thread has it
        self._open: dict[str, _Sent] = {}  # in the order of arrival
        self._child: Child | None = None  # while it takes requests
        self._wake = Wake()
        self._closing = False
        self._close_within = CLOSING
        self._restart = False
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._pump: Pump | None = None
        self._broken: Exception | None = None  # a message that is none
        self._patience = Patience(0.0, self._beat)
        self._dead = ""
        self._failure: Exception | None = None
        self._loaded = threading.Event()
        self._stats: Stats | None = None
        self._last_state = ""
        self._silent = 0.0  # seconds without a sign of life
        self._ended_at = 0.0
        self._load_seconds = 1.0
        self.facts: Facts | None = None
        self.restarts = 0
        self.state = "loading"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the engine is loaded; raises what kept it from that: ValueError for what was asked, else
        OSError, ImportError or RuntimeError.
        """
        self._loaded.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests and shows signs of life."""
        return self.state == "ready" and self._silent < QUIET

    @property
    def alive(self) -> bool:
        """False once it was closed, or failed too often in a row."""
        return not self._dead

    @property
    def pid(self) -> int | None:
        """Of the engine process that takes requests."""
        child = self._child
        return None if child is None else child.pid

    @property
    def open_requests(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._open)

    def stats(self) -> Stats | None:
        """The engine's numbers after its latest step; None while there is no engine."""
        return self._stats

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Receivers live on this event loop: read the engine's messages there. The first loop that is not closed
        counts.
        """
        if self._event_loop is None or self._event_loop.is_closed():
            self._event_loop = loop
            self._wake.set()

    def submit(self, request: Request, receiver: Receiver) -> None:
        """Raises EngineDead; whatever else is wrong goes to the receiver."""
        with self._lock:
            if self._dead or self._closing:
                raise EngineDead(self._dead or CLOSED)
            error = self._refuse(request)
            if error is None:
                entry = self._open[request.id] = _Sent(request, receiver)
                error = self._send(entry) if self._child is not None else None
        if error is not None:
            receiver.send([(request.id, error)])

    def abort(self, id: str) -> None:
        """End a request, in whatever phase it is, before the next step; its receiver gets outputs with reason
        "abort".
        """
        with self._lock:
            entry = self._open.get(id)
            if entry is None:
                return
            entry.aborted = time.monotonic()
            self._tell_aborted(id)
        if self._child is None:
            self._wake.set()

    def dump(self) -> None:
        """Have the stacks of the engine process and its scheduler's state written to the log; where it shows no sign
        of life, to standard error.
        """
        with self._lock:
            logger.warning("the engine is %s\n%s", self.state, self._describe())
            if self._child is None:
                return
            if self.ready:
                self._child.send(wire.encode(wire.Dump()))
            else:
                self._child.dump()

    def restart(self) -> None:
        """End the engine process at once and start another; requests it had begun end with EngineRestarted. Raises
        EngineDead.
        """
        if self._dead or self._closing:
            raise EngineDead(self._dead or CLOSED)
        self._restart = self._loaded.is_set()  # the first one is being started just now
        self._wake.set()

    def close(self, patience: float | None = None) -> None:
        """Ends the engine process after the step under way, or after `patience` seconds; open requests end with
        reason "abort". Idempotent.
        """
        self._close_within = CLOSING if patience is None else patience
        self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:  # the garbage collector may call this on any thread
            self._thread.join()

    # With the lock held

    def _refuse(self, request: Request) -> ValueError | None:
        """Why a request is not even kept for the engine. Which ones may wait is the engine's to say; without it, or
        when it does not read, as many wait as could with it.
        """
        if request.id in self._open:
            return taken(request.id)
        config = self.facts.config if self.facts else self._config
        away = self._child is None
        most = config.max_queue + (0 if away else config.max_batch)
        if len(self._open) < most and not (away and config.max_queue_tokens):
            return None
        waiting = [e for e in self._open.values() if not e.started]
        count = sum(len(e.missing) for e in waiting)
        if count >= most:
            return self._queue_full(f"{count} requests wait, {config.max_queue} may")
        tokens = sum(len(e.request.prompt) for e in waiting)
        if away and waiting and 0 < config.max_queue_tokens < tokens + len(request.prompt):
            return self._queue_full(
                f"{tokens} prompt tokens wait, {config.max_queue_tokens} may, and this prompt has {len(request.prompt)}"
            )
        return None

    def _queue_full(self, why: str) -> QueueFull:
        seconds = self._retry_after(0.0)
        return QueueFull(f"The queue is full: {why}. Try again in {seconds} s.", seconds)

    def _send(self, entry: _Sent) -> ValueError | None:
        """Give a request to the engine process, or say why it cannot be."""
        assert self._child is not None
        try:
            message = wire.submit(entry.request)
        except ValueError as error:
            del self._open[entry.request.id]
            return error
        if not self._child.has_room(message):
            del self._open[entry.request.id]
            return self._queue_full("the engine has not read what it was sent")
        entry.lives += 1
        self._child.send(message)
        return None

    def _describe(self) -> str:
        """What this process knows of the engine's work."""
        with self._lock:
            begun = [id for id, entry in self._open.items() if entry.started]
            return (
                f"begun: {', '.join(begun[:SHOWN]) or 'nothing'}; open requests: {len(self._open)}; "
                f"its latest heartbeat says:\n{self._last_state}"
            )

    def _retry_after(self, delay: float) -> int:
        return max(1, min(60, math.ceil(delay + self._load_seconds)))

    # On the supervisor's thread

    def _run(self) -> None:
        try:
            self._supervise()
        except BaseException as error:
            logger.exception("the supervisor of the engine failed")
            self._end("failed", f"The engine's supervisor failed: {type(error).__name__}: {error}")
        finally:
            if self._failure is None and not self._loaded.is_set():
                self._failure = EngineDead(self._dead)
            self._loaded.set()
            self._wake.close()

    def _supervise(self) -> None:
        """One engine after the other, until it is closed or there were too many failures."""
        while True:
            why, lived = self._live()
            if self._closing:
                self._end("closed", CLOSED)
                return
            if not self._loaded.is_set():
                self._failure = self._failure or RuntimeError(f"The engine process {why}.")
                self._end("failed", "The engine could not be loaded.")
                return
            delay: float | None = 0.0
            if self._restart:
                self._restart = False
                logger.warning("the engine is started again, as asked")
            else:
                delay = self._backoff.after(lived)
            if delay is None:
                logger.error("the engine %s; it failed %d times in a row and stays off", why, self._backoff.failures)
                self._end(
                    "failed", f"The engine failed {self._backoff.failures} times in a row; the last time it {why}."
                )
                return
            if why:
                logger.error("the engine %s; it is started again in %g s", why, delay)
            self._end_begun(self._retry_after(delay))
            self._stay_away(delay)

    def _live(self) -> tuple[str, float]:
        """One engine process from beginning to end: why it ended, and the seconds it took requests."""
        ready = None
        self._broken = None
        try:
            child = Child(self._factory, self._config, self._beat)
        except Exception as error:  # of the system: no memory, no file descriptors
            return f"could not be started: {type(error).__name__}: {error}", 0.0
        try:
            why = self._load(child)
            if self._child is not None:
                ready = time.monotonic()
                why = self._serve(child)
        except msgspec.MsgspecError as error:
            why = f"sent what is no message: {error}"
        finally:
            with self._lock:
                self._child = None
                if not self._closing:
                    self.state = "restarting" if self._loaded.is_set() else "failed"
                    self._stats = None
            self._ended_at = time.monotonic()
            child.end()
        return why, 0.0 if ready is None else self._ended_at - ready

    def _load(self, child: Child) -> str:
        """Until the engine is ready, which is when `_child` is set; else why it is not."""
        begun = time.monotonic()
        while not (self._closing or self._restart):
            ended = child.ended  # first, so that what it sent before its end is read below
            for event in child.read() if ended else self._receive(child):
                if isinstance(event, wire.Ready):
                    self._begin(child, event, time.monotonic() - begun)
                elif isinstance(event, wire.Failed):
                    self._failure = self._failure if self._loaded.is_set() else _exception(event)
                    return f"could not be loaded: {event.message}"
                else:
                    self._take(event)
            if self._child is not None:
                return ""
            if ended:
                return f"{ended} while it loaded the model"
            self._sweep()
        return ""

    def _begin(self, child: Child, event: wire.Ready, seconds: float) -> None:
        """The engine takes requests, first those that wait for it, in their order."""
        refused: list[tuple[_Sent, ValueError]] = []
        with self._lock:
            self.facts, self._stats, self._child = event.facts, event.stats, child
            self._load_seconds, self._silent = seconds, 0.0
            for entry in list(self._open.values()):
                error = self._send(entry)
                if error is not None:
                    refused.append((entry, error))
            waiting = len(self._open)
            self.state = "ready"
            if self._loaded.is_set():
                self.restarts += 1
        for entry, error in refused:
            entry.receiver.send([(entry.request.id, error)])
        if self._loaded.is_set():
            away = time.monotonic() - self._ended_at
            logger.warning("the engine is back after %.2f s; %d requests had waited for it", away, waiting)
        self._loaded.set()

    def _serve(self, child: Child) -> str:
        """Until the process ends or has to be ended: why."""
        self._patience = Patience(self._watchdog, self._beat)
        try:
            return self._watch(child, self._patience)
        finally:
            self._stop_pump()

    def _watch(self, child: Child, patience: Patience) -> str:
        look_at, stop_at = 0.0, math.inf
        while not self._restart:
            turns = self._pump.turns if self._pump else 0
            busy = self._listen(child)
            now = time.monotonic()
            if busy and now < look_at and not self._closing:
                continue  # what follows need not be done for every token
            look_at = now + self._beat / 2
            if child.ended:
                self._stop_pump()
                self._take_rest(child)
                return child.ended
            if self._broken is not None:
                raise self._broken
            wrong = patience.look(bool(self._open), self._pump is None or self._pump.turns != turns)
            if wrong:
                logger.error("the engine hangs: %s\n%s", wrong, self._describe())
                child.dump_and_kill()
                return f"was killed because {wrong}"
            self._silent = patience.silent
            self._sweep(GRACE)
            if self._closing and stop_at == math.inf:
                stop_at = now + self._close_within
                child.send(wire.encode(wire.Stop()))
            if now >= stop_at:
                break
        return ""

    def _listen(self, child: Child) -> bool:
        """Take what comes within half a heartbeat; whether anything did. With a pump, that is its work."""
        if self._pump is None and self._event_loop is not None and not self._event_loop.is_closed():
            self._pump = Pump(self._event_loop, child, self._hear, self._fail)
        if self._pump is not None and self._pump.nudge():
            child.wait(self._beat / 2, self._wake.fd)
            self._wake.clear()
            return False
        self._stop_pump()
        events = self._receive(child)
        for event in events:
            self._hear(event)
        return bool(events)

    def _hear(self, event: wire.Event) -> None:
        self._patience.hear(event)
        self._take(event)

    def _fail(self, error: Exception) -> None:
        self._broken = error
        self._wake.set()

    def _stop_pump(self) -> None:
        if self._pump is not None:
            self._pump.stop()
            self._pump = None

    def _take_rest(self, child: Child) -> None:
        """What a process that has ended had sent."""
        while events := child.read():
            for event in events:
                self._take(event)

    def _receive(self, child: Child) -> list[wire.Event]:
        events = child.receive(self._beat, self._wake.fd)
        if not events:
            self._wake.clear()
        return events

    def _take(self, event: wire.Event) -> None:
        match event:
            case wire.Outputs(outputs, stats):
                self._stats = stats
                self._deliver(outputs)
            case wire.Beat(stats, _, _, _, state):
                self._stats, self._last_state = stats, state
            case wire.Started(ids):
                for id in ids:
                    if id in self._open:
                        self._open[id].started = True
            case wire.Refused(id):
                self._refused(event)
            case wire.Log(name, level, message):
                logging.getLogger(name).log(level, "%s", message)
            case wire.Failed(_, message):
                logger.error("the engine failed: %s", message)

    def _deliver(self, outputs: list[Output]) -> None:
        with self._lock:
            found = batches(self._open, outputs)
        for receiver, batch in found.items():
            if not receiver.send(batch):
                self._drop(receiver)

    def _drop(self, receiver: Receiver) -> None:
        with self._lock:
            left = [id for id, entry in self._open.items() if entry.receiver is receiver]
            for id in left:
                del self._open[id]
                self._tell_aborted(id)

    def _refused(self, event: wire.Refused) -> None:
        with self._lock:
            entry = self._open.pop(event.id, None)
        if entry is not None:
            kind = REFUSALS[event.kind]
            error = QueueFull(event.message, event.retry_after) if kind is QueueFull else kind(event.message)
            entry.receiver.send([(event.id, error)])

    def _end_begun(self, retry_after: int) -> None:
        """After the end of an engine: end what it had begun, and keep the rest for the next."""
        with self._lock:
            begun = [e for e in self._open.values() if e.started or e.lives >= LIVES or e.aborted < math.inf]
            for entry in begun:
                del self._open[entry.request.id]
        for entry in begun:
            if entry.aborted < math.inf:
                entry.cut()
                continue
            what = "while it worked on this request" if entry.started else f"{LIVES} times before it began this request"
            error = EngineRestarted(
                f"The engine failed {what} and is being started again. Send the request again in {retry_after} s.",
                retry_after,
            )
            entry.receiver.send([(entry.request.id, error)])

    def _stay_away(self, seconds: float) -> None:
        """Until the next engine may be started; aborts and deadlines count meanwhile."""
        until = time.monotonic() + seconds
        while not (self._closing or self._restart) and (left := until - time.monotonic()) > 0:
            self._sweep()
            self._wake.wait(min(left, BEAT))

    def _sweep(self, grace: float = 0.0) -> None:
        """End what was aborted or is past its deadline, where no engine has done it for `grace` seconds."""
        now = time.monotonic() - grace
        with self._lock:
            over = [entry for entry in self._open.values() if entry.over(now)]
            for entry in over:
                del self._open[entry.request.id]
                self._tell_aborted(entry.request.id)
        for entry in over:
            entry.cut()

    def _tell_aborted(self, id: str) -> None:
        if self._child is not None:
            self._child.send(wire.encode(wire.Abort(id)))

    def _end(self, state: str, why: str) -> None:
        """No engine follows: end all requests."""
        with self._lock:
            self._dead, self.state = why, state
            left = list(self._open.values())
            self._open.clear()
        for entry in left:
            if state == "closed":
                entry.end(entry.request.id, FinishReason.ABORT, why)
            else:
                entry.receiver.send([(entry.request.id, EngineDead(why))])


def _exception(event: wire.Failed) -> Exception:
    return FAILURES.get(event.kind, RuntimeError)(event.message)
