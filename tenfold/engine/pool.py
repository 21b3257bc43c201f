"""`Pool`: requests for an encoder, which needs one forward and no cache, in batches of texts that are about as long, or
one by one where each is computed by itself.

Invariant: every entry gets exactly one end, result, error or cancellation; one that was cancelled before its batch
began costs nothing, and one that fails does not take the others of its batch along.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from tenfold.base.config import setting
from tenfold.base.log import logger
from tenfold.engine.loop import EngineDead
from tenfold.engine.opened import pick_device
from tenfold.engine.request import QueueFull
from tenfold.models.sentiment.folder import Classifier, open_folder, place
from tenfold.models.sentiment.prepare import Item
from tenfold.models.sentiment.served import Probabilities, Served, fits


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Settings of one pool."""

    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "auto (float32 on CPU, bfloat16 on a GPU), float32, bfloat16 or float16")
    batch: int = setting(64, "posts computed together at most, where they are")
    exact: str = setting(
        "auto",
        "whether a post's probabilities are the same bits alone and beside any others: auto (on a CPU), on, off",
        choices=("auto", "on", "off"),
    )
    queue: int = setting(1024, "posts that may wait; more are refused")
    threads: int = setting(0, "CPU threads (0: as PyTorch has them)")

    def check(self) -> None:
        """Raises ValueError."""
        for name, least in (("batch", 1), ("queue", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: from {least}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}; allowed: auto, float32, bfloat16, float16.")
        if self.exact not in ("auto", "on", "off"):
            raise ValueError(f"exact is {self.exact!r}; allowed: auto, on, off.")

    @property
    def is_exact(self) -> bool | None:
        """None: as the device has it."""
        return None if self.exact == "auto" else self.exact == "on"

    def type_on(self, device: torch.device) -> torch.dtype:
        named = ("bfloat16" if device.type == "cuda" else "float32") if self.dtype == "auto" else self.dtype
        found: torch.dtype = getattr(torch, named)
        return found


@dataclass(slots=True)
class PoolStats:
    """Since the start. padding: tokens computed for nothing; seconds: in which the device was at work."""

    waiting: int = 0
    posts: int = 0
    batches: int = 0
    tokens: int = 0
    padding: int = 0
    cancelled: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Entry:
    """deadline: of `time.monotonic()`, or None. began: when its batch did."""

    item: Item
    deadline: float | None
    future: "Future[Probabilities]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    began: float = 0.0

    @property
    def length(self) -> int:
        return len(self.item.ids)


class Pool:
    """Owns a thread that computes; `submit` may be called from any. classifier: on the pool's device, in its type."""

    def __init__(self, classifier: Classifier, config: PoolConfig | None = None) -> None:
        self.config = config or PoolConfig()
        self.config.check()
        self.classifier = classifier
        self._served = Served(classifier, self.config.is_exact, self.config.batch)
        self.device, self.dtype = self._served.device, self._served.dtype
        self.stats = PoolStats()
        self._waiting: list[Entry] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tenfold-pool", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def submit(self, item: Item, deadline: float | None = None) -> Entry:
        """The entry whose future gets the probability of each label. Raises as `submit_all`."""
        return self.submit_all([item], deadline)[0]

    def submit_all(self, items: Sequence[Item], deadline: float | None = None) -> list[Entry]:
        """All or none. Raises ValueError for more than may ever wait, QueueFull, and EngineDead once closed."""
        entries, most = [Entry(item, deadline) for item in items], self.config.queue
        if len(entries) > most:
            raise ValueError(f"{len(entries)} posts were given at once; allowed: up to {most}, as many as may wait.")
        with self._changed:
            if self._closed:
                raise EngineDead("The classifier was closed.")
            if len(self._waiting) + len(entries) > most:
                self._keep(self._live())
            if len(self._waiting) + len(entries) > most:
                raise QueueFull(
                    f"{len(self._waiting)} posts wait for the classifier, which takes up to {most}. Try again soon.", 1
                )
            self._keep([*self._waiting, *entries])
            self._changed.notify()
        return entries

    def close(self, patience: float | None = None) -> None:
        """Ends after the batch under way, or after `patience` seconds; what waits gets EngineDead. Idempotent."""
        self._end()
        self._thread.join(patience)

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            left = self._waiting
            self._keep([])
            self._changed.notify()
        for entry in left:
            _fail(entry, EngineDead("The classifier was closed."))

    def _run(self) -> None:
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        try:
            while (batch := self._next()) is not None:
                if batch:
                    self._compute(batch)
        finally:
            self._end()  # whatever ends this thread, nobody must wait for ever

    def _next(self) -> list[Entry] | None:
        """The next batch, empty where all that waited had ended; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            live = self._live()
            batch = chosen(live, 1 if self._served.alone else self.config.batch, self._served.fits)
            taken = set(map(id, batch))
            self._keep([entry for entry in live if id(entry) not in taken])
        started = [entry for entry in batch if entry.future.set_running_or_notify_cancel()]
        self.stats.cancelled += len(batch) - len(started)
        return started

    def _keep(self, waiting: list[Entry]) -> None:
        self._waiting = waiting
        self.stats.waiting = len(waiting)

    def _live(self) -> list[Entry]:
        """Those that wait and still want to be computed."""
        return [entry for entry in self._waiting if self._is_live(entry)]

    def _is_live(self, entry: Entry) -> bool:
        """Whether it still wants to be computed; one past its deadline is ended here."""
        if entry.future.cancelled():
            self.stats.cancelled += 1
            return False
        if entry.deadline is not None and time.monotonic() >= entry.deadline:
            self.stats.failed += 1
            _fail(entry, TimeoutError("The post waited for longer than it may."))
            return False
        return True

    def _compute(self, batch: list[Entry]) -> None:
        """A batch that fails is computed one by one, so that only the post at fault fails."""
        begun = time.monotonic()
        for entry in batch:
            entry.began = begun
        try:
            told = self._served([entry.item for entry in batch])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    self._compute([entry])
                return
            logger.error("a post could not be classified", exc_info=error)
            self.stats.failed += 1
            _fail(batch[0], error)
            return
        self.stats.seconds += time.monotonic() - begun
        self._count(batch)
        for entry, probabilities in zip(batch, told):
            entry.future.set_result(probabilities)

    def _count(self, batch: list[Entry]) -> None:
        tokens = sum(entry.length for entry in batch)
        self.stats.batches += 1
        self.stats.posts += len(batch)
        self.stats.tokens += tokens
        self.stats.padding += max(entry.length for entry in batch) * len(batch) - tokens


def open_pool(named: str, config: PoolConfig) -> Pool:
    """named: "default" or a folder. Raises ValueError for one that holds no classifier."""
    config.check()
    device = pick_device(config.device)
    return Pool(open_folder(place(named), device, config.type_on(device)), config)


def chosen(waiting: Sequence[Entry], most: int, beside: Callable[[Item, Item], bool] = fits) -> list[Entry]:
    """The batch after which nobody waits for ever: the one that waits longest, and of those that fit beside it the
    longest, so that little is padded.
    """
    if not waiting or most == 1:
        return [*waiting[:1]]
    first, *rest = waiting
    fitting = sorted((entry for entry in rest if beside(first.item, entry.item)), key=lambda entry: -entry.length)
    return [first, *fitting[: most - 1]]


def _fail(entry: Entry, error: Exception) -> None:
    with suppress(Exception):  # it was cancelled meanwhile
        entry.future.set_exception(error)
