"""What happened lately, in bounded memory: tokens per second, and percentiles of times.

Invariant: adding costs under a microsecond whatever was added before; memory does not grow with traffic.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

SPAN = 300  # seconds that are kept
MOST = 2048  # times kept of one kind; under more traffic the window is shorter
# Numbers of the engine's `Stats` that are kept.
LEVELS = ("running", "waiting", "prefill_sms", "decode_sms", "prompt_chunk")


class Series:
    """Sums per second of the last SPAN seconds, in a ring. `now`: `time.monotonic()` seconds."""

    __slots__ = ("second", "sums")

    def __init__(self) -> None:
        self.sums = [0] * SPAN
        self.second = 0  # the latest with a sum in the ring

    def add(self, now: float, count: int) -> None:
        second = int(now)
        if second > self.second:
            self._advance(second)
        self.sums[self.second % SPAN] += count

    def last(self, now: float, seconds: int = SPAN - 1) -> list[int]:
        """Sums of the last whole seconds, oldest first."""
        if int(now) > self.second:
            self._advance(int(now))
        return [self.sums[second % SPAN] for second in range(self.second - seconds, self.second)]

    def _advance(self, second: int) -> None:
        for empty in range(max(self.second + 1, second - SPAN + 1), second + 1):
            self.sums[empty % SPAN] = 0
        self.second = second


class Window:
    """The latest values with their times."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: deque[tuple[float, float]] = deque(maxlen=MOST)

    def add(self, now: float, value: float) -> None:
        self.values.append((now, value))

    def percentiles(self, now: float, seconds: float = SPAN) -> dict[str, float | int | None]:
        """p50, p90 and p99 (nearest rank) of the values of the last `seconds`, and their count."""
        values = sorted(value for at, value in self.values if at > now - seconds)
        count = len(values)
        ranks = {f"p{p}": values[max(0, -(-p * count // 100) - 1)] if count else None for p in (50, 90, 99)}
        return {"count": count, **ranks}


class Levels:
    """The latest value of each of the last SPAN seconds, in a ring; a second without one has that of the one before."""

    __slots__ = ("second", "values")

    def __init__(self) -> None:
        self.values = [0.0] * SPAN
        self.second = 0

    def put(self, now: float, value: float) -> None:
        self._advance(int(now))
        self.values[self.second % SPAN] = value

    def last(self, now: float, seconds: int = SPAN - 1) -> list[float]:
        """Values up to this second, oldest first."""
        self._advance(int(now))
        return [self.values[second % SPAN] for second in range(self.second - seconds + 1, self.second + 1)]

    def _advance(self, second: int) -> None:
        before = self.values[self.second % SPAN]
        for later in range(max(self.second + 1, second - SPAN + 1), second + 1):
            self.values[later % SPAN] = before
        self.second = max(self.second, second)


class Recent:
    """What one model did lately. generated, prompt: tokens; ttft, tpot: seconds; levels: numbers of `Stats`.

    `stats` is asked once a second while there are tokens, when a request ends, and when someone looks.
    """

    __slots__ = ("generated", "levels", "prompt", "second", "stats", "tpot", "ttft")

    def __init__(self, stats: Callable[[], Any] = lambda: None) -> None:
        self.stats = stats
        self.second = 0
        self.generated, self.prompt = Series(), Series()
        self.ttft, self.tpot = Window(), Window()
        self.levels = {name: Levels() for name in LEVELS}

    def tokens(self, now: float, count: int) -> None:
        """`count` were generated."""
        self.generated.add(now, count)
        if int(now) != self.second:
            self.look(now)

    def look(self, now: float) -> None:
        """Take the engine's numbers down."""
        self.second = int(now)
        stats = self.stats()
        for name, levels in self.levels.items():
            levels.put(now, getattr(stats, name, 0))
