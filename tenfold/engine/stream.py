"""Requests of a synchronous caller: `Stream` follows one, `Run` sees many to their end.

Invariant: a caller that goes away, by closing, by an exception or by Ctrl-C, leaves no request of its own under way.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterator

from tenfold.engine.completion import Collector
from tenfold.engine.loop import Batch, EngineDead, Loop
from tenfold.engine.request import FinishReason, Output, QueueFull, Request

Job = tuple[str | None, Request]  # the prompt as text, if it was one


class RequestFailed(RuntimeError):
    """The engine could not answer one request; others are not affected."""


class _Mailbox:
    """A receiver for one synchronous caller."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Batch] = queue.SimpleQueue()

    def send(self, batch: Batch) -> bool:
        self._queue.put(batch)
        return True

    def receive(self) -> Batch:
        """Waits for the next batch; Ctrl-C interrupts it."""
        return self._queue.get()


class Stream(Iterator[Output]):
    """Outputs of one request as they come. Closing it, leaving its `with` block or dropping it aborts the request."""

    def __init__(self, loop: Loop, request: Request) -> None:
        self.request = request
        self._loop = loop
        self._mailbox = _Mailbox()
        self._ready: deque[Output] = deque()
        self._missing = 1 if request.pool is not None else request.params.n
        loop.submit(request, self._mailbox)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Output:
        if not self._missing:
            raise StopIteration
        while not self._ready:
            for _, item in self._mailbox.receive():
                if isinstance(item, Exception):
                    self._missing = 0
                    raise item
                self._ready.append(item)
        output = self._ready.popleft()
        self._missing -= output.finish is not None
        return output

    def close(self) -> None:
        """Abort the request unless it has ended. Idempotent."""
        if self._missing:
            self._missing = 0
            self._loop.abort(self.request.id)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_missing"):  # not where the constructor was refused
            self.close()


class Run:
    """Many requests of one call. `window`: sequences under way at most."""

    def __init__(self, loop: Loop, window: int) -> None:
        self._loop = loop
        self._window = window
        self._mailbox = _Mailbox()
        self._under_way: dict[str, tuple[int, Request, Collector]] = {}
        self._sequences = 0
        self._again: deque[tuple[int, Request, Collector]] = deque()

    def all(self, jobs: Iterator[Job], count: int, advance: Callable[[], None] | None) -> list[Collector]:
        """Collectors in the order of `jobs`, each complete."""
        collectors: list[Collector] = []
        finished = 0
        while finished < count:
            self._fill(jobs, collectors)
            for id, item in self._mailbox.receive():
                finished += self._take(id, item, count)
                if advance is not None and id not in self._under_way and isinstance(item, Output):
                    advance()
        return collectors

    def close(self) -> None:
        """Abort what is under way."""
        for id in self._under_way:
            self._loop.abort(id)

    def _fill(self, jobs: Iterator[Job], collectors: list[Collector]) -> None:
        while self._sequences < self._window:
            if self._again:
                job = self._again.popleft()
            else:
                following = next(jobs, None)
                if following is None:
                    return
                prompt, request = following
                collectors.append(Collector(request, prompt))
                job = len(collectors) - 1, request, collectors[-1]
            self._under_way[job[1].id] = job
            self._sequences += job[1].params.n
            self._loop.submit(job[1], self._mailbox)

    def _take(self, id: str, item: Output | Exception, count: int) -> bool:
        """Whether this ended a request."""
        place, request, collector = self._under_way[id]
        where = f"prompts[{place}]: " if count > 1 else ""
        if isinstance(item, Output):
            if item.finish is FinishReason.ERROR:
                raise (RequestFailed if self._loop.alive else EngineDead)(f"{where}{item.error}")
            collector.add(item)
            if collector.missing:
                return False
        self._sequences -= request.params.n
        del self._under_way[id]
        if isinstance(item, QueueFull) and self._under_way:  # the queue has a limit in tokens, too: wait for an end
            self._again.append((place, request, collector))
            self._window = max(1, self._sequences)
            return False
        if isinstance(item, Exception):
            raise ValueError(where + str(item)) if where and type(item) is ValueError else item
        return True


class Bar:
    """A progress bar over prompts."""

    def __init__(self, total: int) -> None:
        from rich.progress import Progress  # costs 50 ms of start-up, and few ask for it

        self._progress = Progress()
        self._task = self._progress.add_task("prompts", total=total)
        self._progress.start()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def close(self) -> None:
        self._progress.stop()
