"""How many drafts pay: tokens a step is expected to bring, over the seconds it is expected to take.

Both are measured while the engine runs: how often drafts were right (`Rates`) and what steps took (`Costs`). Drafts are
added to a step in the order of their odds for as long as that raises tokens per second, of the whole step. Zero drafts
is the usual answer where a step is bound by arithmetic (many rows, a long prompt beside) or drafts are seldom right.
The goal is that of Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", 2024.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

GAIN = 1.05  # what drafts must promise over none: below, the estimates are no better than noise
TRUST = 0.8  # share of the promised tokens that is believed at first: estimates that err upwards are those followed
PROMISES = 8.0  # tokens promised that this first belief counts for
MEMORY_OF_PROMISES = 0.98  # weight they keep when a step makes others
MEMORY_OF_ALL = 0.995  # weight that an observation keeps when another is made, of all sequences
MEMORY_OF_ONE = 0.97  # of one
PRIOR = 4.0  # tokens that the rate of all counts for in that of one
SMOOTH = 0.1  # weight of a step's time in its estimate
UNCOUNTED = 2  # the CPU kernels record a step of a new shape when it comes for the second time
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

    The first UNCOUNTED steps of a size are left out: they may compile, record or allocate. A longer step takes no less
    time, so measurements that say otherwise are pooled (isotonic regression).
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._known: list[tuple[float, float]] | None = []  # (tokens, seconds), ascending; None: to be made anew

    def add(self, tokens: int, seconds: float) -> None:
        key = tokens if tokens <= 16 else int(16 + 8 * math.log2(tokens / 16))
        size = self._sizes.get(key)
        if size is None:
            size = self._sizes[key] = _Size()
        size.add(tokens, seconds)
        self._known = None

    def seconds(self, tokens: int) -> float | None:
        """None: nothing was measured."""
        known = self._known
        if known is None:
            known = self._known = _ascending([s for _, s in sorted(self._sizes.items()) if s.count > 0])
        if not known:
            return None
        i = bisect_left(known, (tokens, 0.0))
        if i == len(known) or i == 0:
            return known[min(i, len(known) - 1)][1]
        (left, low), (right, high) = known[i - 1], known[i]
        return low + (high - low) * (tokens - left) / (right - left)


class _Size:
    """Steps of about one size: how many were counted, and their mean tokens and seconds lately."""

    __slots__ = ("count", "seconds", "tokens")

    def __init__(self) -> None:
        self.count = -UNCOUNTED
        self.tokens = self.seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.count += 1
        if self.count <= 0:
            return
        if self.count > 1:
            seconds = min(seconds, OUTLIER * self.seconds)
        weight = max(1 / self.count, SMOOTH)
        self.seconds += weight * (seconds - self.seconds)
        self.tokens += weight * (tokens - self.tokens)


def _ascending(sizes: list[_Size]) -> list[tuple[float, float]]:
    """The closest (tokens, seconds) whose seconds never fall: neighbours that do share a mean (Ayer et al. 1955)."""
    pools: list[tuple[float, float, list[float]]] = []  # seconds, weight, tokens
    for size in sizes:
        seconds, weight, tokens = size.seconds, min(size.count, 1 / SMOOTH), [size.tokens]
        while pools and pools[-1][0] >= seconds:
            other, heft, before = pools.pop()
            seconds = (seconds * weight + other * heft) / (weight + heft)
            weight, tokens = weight + heft, before + tokens
        pools.append((seconds, weight, tokens))
    return [(n, seconds) for seconds, _, tokens in pools for n in tokens]


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
        self._promised = self._kept = 0.0

    @property
    def trust(self) -> float:
        """Share of the tokens promised by odds that came."""
        return (self._kept + PROMISES * TRUST) / (self._promised + PROMISES)

    def promise(self, drafts: Iterable[tuple[float, int]]) -> None:
        """A step verifies these: odds and number of drafts of each row."""
        tokens = sum(odds**depth for odds, count in drafts for depth in range(1, count + 1))
        self._promised = self._promised * MEMORY_OF_PROMISES + tokens
        self._kept *= MEMORY_OF_PROMISES

    def keep(self, accepted: int) -> None:
        """So many drafts of the step were right."""
        self._kept += accepted

    def choose(self, offers: Seq[Offer], load: Load, most: int) -> list[int]:
        """How many drafts of each offer to verify, at most `most` together."""
        counts = [0] * len(offers)
        plain = (self.ahead.seconds(load.tokens) if load.behind else None) or self._step(load.tokens)
        best = load.rows / plain * GAIN
        expected, widths, drafting = float(load.rows), [0], 0.0
        trust = self.trust
        candidates = sorted(
            (-(offer.odds**depth), depth, i) for i, offer in enumerate(offers) for depth in range(1, offer.length + 1)
        )
        chosen = 0
        for number, (negative, depth, _) in enumerate(candidates[:most], 1):
            expected -= trust * negative
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
