"""How many drafts pay: tokens a step is expected to bring, over the seconds it is expected to take.

Both are measured while the engine runs: how often drafts were right (`Rates`) and what steps took (`Costs`). Drafts are
added to a step in the order of their odds for as long as that raises tokens per second, of the whole step. Zero drafts
is the usual answer where a step is bound by arithmetic (many rows, a long prompt beside) or drafts are seldom right.
The goal is that of Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", 2024.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass

GAIN = 1.02  # what drafts must promise over none: below, the estimates are no better than noise
MEMORY_OF_ALL = 0.995  # weight that an observation keeps when another is made, of all sequences
MEMORY_OF_ONE = 0.9  # of one
PRIOR = 2.0  # tokens that the rate of all counts for in that of one
SMOOTH = 0.1  # weight of a step's time in its estimate
OUTLIER = 3.0  # a step counts for at most this multiple of its estimate


class Rates:
    """How often drafts were right, by strength of what they were taken from: 0 to `classes - 1`."""

    __slots__ = ("right", "tried")

    def __init__(self, classes: int) -> None:
        self.tried = [0.0] * classes
        self.right = [0.0] * classes

    def add(self, strength: int, tried: int, right: int, memory: float) -> None:
        keep = memory**tried
        self.tried[strength] = self.tried[strength] * keep + tried
        self.right[strength] = self.right[strength] * keep + right

    def fade(self, memory: float) -> None:
        """Count all of it a little less."""
        self.tried = [n * memory for n in self.tried]
        self.right = [n * memory for n in self.right]

    def odds(self, strength: int, prior: float) -> float:
        """How likely the next draft is right, where one that nothing is known of is with probability `prior`."""
        return (self.right[strength] + PRIOR * prior) / (self.tried[strength] + PRIOR)


class Costs:
    """Seconds a step of n tokens takes: smoothed measurements, straight lines between them, level outside.

    The first step of a size is left out: it may compile, record or allocate.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._sizes: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._known: list[tuple[float, float]] = []  # (tokens, seconds), ascending

    def add(self, tokens: int, seconds: float) -> None:
        size = tokens if tokens <= 16 else int(16 + 8 * math.log2(tokens / 16))
        if size not in self._seen:
            self._seen.add(size)
            return
        count = self._counts.get(size, 0) + 1
        weight = max(1 / count, SMOOTH)
        before = self._seconds.get(size, seconds)
        self._counts[size] = count
        self._seconds[size] = before + weight * (min(seconds, OUTLIER * before) - before)
        mean = self._sizes.get(size, float(tokens))
        self._sizes[size] = mean + weight * (tokens - mean)
        self._known = sorted(zip(self._sizes.values(), self._seconds.values()))

    def seconds(self, tokens: int) -> float | None:
        """None: nothing was measured."""
        known = self._known
        if not known:
            return None
        i = bisect_left(known, (tokens, 0.0))
        if i == len(known) or i == 0:
            return known[min(i, len(known) - 1)][1]
        (left, low), (right, high) = known[i - 1], known[i]
        return low + (high - low) * (tokens - left) / (right - left)


@dataclass(frozen=True, slots=True)
class Offer:
    """Up to `length` drafts of a sequence, each right with probability `odds` if those before it are."""

    length: int
    odds: float


@dataclass(frozen=True, slots=True)
class Load:
    """What the step has anyway: rows that decode, and all tokens. behind: a step in flight would have to be read
    before drafts can be verified, so that the device waits for the host.
    """

    rows: int
    tokens: int
    behind: bool = False


class Policy:
    """steps: of the model where the device waits for the host in between, as it does with drafts; ahead: where it does
    not; draft: one pass of a draft model over n rows.
    """

    def __init__(self) -> None:
        self.steps = Costs()
        self.ahead = Costs()
        self.draft = Costs()

    def choose(self, offers: Seq[Offer], load: Load, most: int) -> list[int]:
        """How many drafts of each offer to verify, at most `most` together."""
        counts = [0] * len(offers)
        plain = (self.ahead.seconds(load.tokens) if load.behind else None) or self._step(load.tokens)
        best = load.rows / plain * GAIN
        expected, widths, drafting = float(load.rows), [0], 0.0
        candidates = sorted(
            (-(offer.odds**depth), depth, i) for i, offer in enumerate(offers) for depth in range(1, offer.length + 1)
        )
        chosen = 0
        for number, (negative, depth, _) in enumerate(candidates[:most], 1):
            expected -= negative
            if depth == len(widths):
                widths.append(0)
            drafting += self._pass(widths[depth] + 1) - self._pass(widths[depth])
            widths[depth] += 1
            value = expected / (self._step(load.tokens + number) + drafting)
            if value > best:
                best, chosen = value, number
        for _, _, i in candidates[:chosen]:
            counts[i] += 1
        return counts

    def _step(self, tokens: int) -> float:
        """Where nothing is known every step is as long: then drafts are tried, and it will be known."""
        return self.steps.seconds(tokens) or self.ahead.seconds(tokens) or 1.0

    def _pass(self, rows: int) -> float:
        return (self.draft.seconds(rows) or 0.0) if rows else 0.0
