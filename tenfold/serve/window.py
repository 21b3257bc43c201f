"""What happened lately, in bounded memory: tokens per second, and percentiles of times.

Invariant: adding costs under a microsecond whatever was added before; memory does not grow with traffic.
"""

from collections import deque

SPAN = 300  # seconds that are kept
MOST = 2048  # times kept of one kind; under more traffic the window is shorter


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


class Recent:
    """What one model did lately. generated, prompt: tokens; ttft, tpot: seconds."""

    __slots__ = ("generated", "prompt", "tpot", "ttft")

    def __init__(self) -> None:
        self.generated, self.prompt = Series(), Series()
        self.ttft, self.tpot = Window(), Window()
