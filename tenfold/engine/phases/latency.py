"""How long prefill and decode take on some of a GPU's multiprocessors (SMs).

Two forms. The paper's: time to first token `a / (x - load) + b`, a queue in front of one server whose speed goes with
its share x, time per output token `a / y + b`. And a table of what was measured, for prefill is a staircase over SMs,
where tiles of a matrix product fill whole waves or not, and no smooth curve. Times are seconds, shares numbers of SMs.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST_SLOPE = 1e-9


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at a place between measured ones, in ascending order; beyond the last on the line through the last
    two, before the first that one's. Raises ValueError without points.
    """
    if not points:
        raise ValueError("Nothing was measured.")
    i = bisect_left(points, at, key=lambda point: point[0])
    if i == 0:
        return points[0][1]
    if len(points) == 1:
        points = [(0.0, 0.0), *points]
    (low, first), (high, second) = points[i - 1 : i + 1] if i < len(points) else points[-2:]
    return first + (second - first) * (at - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Stairs:
    """Measured times. prefill[sms]: (tokens, seconds) of a chunk, ascending; decode[sms]: (requests, seconds) of a
    step; both of every number of SMs that a phase may get. Raises ValueError where a phase was not measured.
    """

    prefill: Mapping[int, tuple[tuple[int, float], ...]]
    decode: Mapping[int, tuple[tuple[int, float], ...]]

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            measured = getattr(self, name)
            if not measured or not all(measured.values()):
                raise ValueError(f"No time of {name} was measured on some numbers of SMs.")

    def prefill_seconds(self, sms: int, tokens: int) -> float:
        """Of `tokens` in chunks of the usual size. sms: of those measured; others take the next smaller one."""
        return interpolated(self.prefill[self._below(self.prefill, sms)], tokens) if tokens else 0.0

    def decode_seconds(self, sms: int, requests: int) -> float:
        return interpolated(self.decode[self._below(self.decode, sms)], requests) if requests else 0.0

    def mixed_seconds(self, tokens: int, requests: int) -> float:
        """Of a step of the whole GPU that computes tokens of prompts and decodes: weights are read once for both."""
        whole = max(self.decode)
        contexts = self.decode_seconds(whole, requests) - self.decode_seconds(whole, 1)
        return self.prefill_seconds(max(self.prefill), tokens + requests) + max(0.0, contexts)

    @staticmethod
    def _below(measured: Mapping[int, object], sms: int) -> int:
        return max((n for n in measured if n <= sms), default=min(measured))


@dataclass(slots=True)
class Fit:
    """`a * u + b` from observations (u, value), newer ones weighing more: recursive least squares with forgetting. a
    never falls below LEAST_SLOPE, b never below 0.
    """

    a: float
    b: float
    forget: float = 0.98
    _matrix: list[list[float]] = field(default_factory=lambda: [[1e3, 0.0], [0.0, 1e3]])

    def observe(self, u: float, value: float) -> None:
        p = self._matrix
        gain = [p[0][0] * u + p[0][1], p[1][0] * u + p[1][1]]
        scale = self.forget + u * gain[0] + gain[1]
        error = value - (self.a * u + self.b)
        self.a = max(LEAST_SLOPE, self.a + gain[0] / scale * error)
        self.b = max(0.0, self.b + gain[1] / scale * error)
        row = [u * p[0][0] + p[1][0], u * p[0][1] + p[1][1]]
        self._matrix = [[(p[i][j] - gain[i] * row[j] / scale) / self.forget for j in (0, 1)] for i in (0, 1)]

    def at(self, u: float) -> float:
        return self.a * u + self.b


@dataclass(slots=True)
class Paper:
    """The paper's forms over shares of `total` SMs, learned from what is observed.

    At one share an observation cannot tell its three numbers of TTFT apart; so the load (SMs that arriving prompts keep
    busy) is measured, not fitted.
    """

    total: int
    ttft: Fit
    tpot: Fit

    @classmethod
    def seeded(cls, total: int, ttft: float, tpot: float) -> "Paper":
        """From times of both phases alone on the whole GPU, idle."""
        return cls(total, Fit(ttft * total, 0.0), Fit(0.62 * tpot * total, 0.38 * tpot))  # shares of the paper's fit

    def ttft_seconds(self, sms: int, load: float) -> float:
        """load: of SMs, see above; where it is not below `sms` the queue grows without end."""
        return float("inf") if sms <= load else self.ttft.at(1 / (sms - load))

    def tpot_seconds(self, sms: int) -> float:
        return self.tpot.at(1 / sms) if sms else float("inf")

    def observe(self, prefill: int, decode: int, load: float, ttft: float | None, tpot: float | None) -> None:
        """What requests saw while prefill and decode had so many SMs."""
        if ttft is not None and prefill > load:
            self.ttft.observe(1 / (prefill - load), ttft)
        if tpot is not None and decode:
            self.tpot.observe(1 / decode, tpot)
