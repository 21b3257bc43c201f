"""How many multiprocessors (SMs) prefill and decode get: pure decisions over what was observed.

Three controllers behind one method: the paper's Algorithm 1, one that looks times up in a measured staircase, and the
one that is the default, which lets prompts ride in the steps of decodes for as long as that serves the targets.

Algorithm 1 as printed has two faults. Its step counter is never advanced, so that a target out of reach loops for ever:
here tries are counted. And where both targets fail, its first branch takes that for a failing TTFT, though the text
says that nothing changes: here nothing does.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tenfold.engine.phases.latency import Paper, Stairs

TRIES = 16  # steps of a search at most
LARGEST_GUARD = 0.6  # of a decode step's time, that prefill on the other SMs may add
GUARD_DECAY = 0.99  # of what was added at worst, for each observation
LEAST_CHUNK = 128  # tokens of prompts in a step of decodes
GAIN = 0.05  # by which the worse of both targets must be better served for a border to move


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds: to the first token, and per output token after it. served: share of requests that should meet them."""

    ttft: float
    tpot: float
    served: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: seconds above 0.")
        if not 0 < self.served < 1:
            raise ValueError(f"served is {self.served}; allowed: a share above 0 and below 1.")


@dataclass(frozen=True, slots=True)
class Split:
    """SMs of each phase. Both may have all of them: then they share."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill}+{self.decode}"


@dataclass(frozen=True, slots=True)
class Observed:
    """What a decision is made of. ttft, tpot: seconds that the targets' share of requests in the last window kept to,
    None where there were none; queued: prompt tokens not computed yet, waited: seconds that the oldest of their
    requests waits; requests: that decode; rate: prompt tokens a second that arrive; targets: of the requests there are,
    None where these are the engine's.
    """

    ttft: float | None
    tpot: float | None
    queued: int
    waited: float
    requests: int
    rate: float
    targets: Targets | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """why: for people, in metrics and on the status page. chunk: tokens of prompts that steps of decodes take along; 0:
    prompts are computed in a lane of their own.
    """

    split: Split
    why: str
    chunk: int = 0


class Controller(Protocol):
    @property
    def targets(self) -> Targets: ...

    def decide(self, seen: Observed, now: Split) -> Decision: ...


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the values keep to."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Algorithm1:
    """The paper's controller. splits: what can be had, by ascending SMs of prefill; seconds_token: of a prompt token on
    the whole GPU; every: decisions from one look at the targets to the next, so that each sees what the last one did.
    """

    targets: Targets
    splits: Sequence[Split]
    model: Paper
    seconds_token: float
    every: int = 40
    _waits: int = 0

    def decide(self, seen: Observed, now: Split) -> Decision:
        if self._waits:
            self._waits -= 1
            return Decision(now, "what the last change brought is still to be seen")
        self._waits = self.every
        load = seen.rate * self.seconds_token * self.model.total
        self.model.observe(now.prefill, now.decode, load, seen.ttft, seen.tpot)
        targets = seen.targets or self.targets
        late = seen.ttft is not None and seen.ttft > targets.ttft
        slow = seen.tpot is not None and seen.tpot > targets.tpot
        if late == slow:
            return Decision(now, "both targets fail, nothing changes" if late else "both targets are met")
        place = min(range(len(self.splits)), key=lambda i: abs(self.splits[i].prefill - now.prefill))
        for _ in range(TRIES):
            following = place + (1 if late else -1)
            if not 0 <= following < len(self.splits):
                break
            place = following
            split = self.splits[place]
            if late and self.model.ttft_seconds(split.prefill, load) <= targets.ttft:
                break
            if slow and self.model.tpot_seconds(split.decode) <= targets.tpot:
                break
        return Decision(self.splits[place], "first tokens are late" if late else "tokens come too slowly")


@dataclass(slots=True)
class Guard:
    """What prefill next door adds to a decode step, at worst of late; a share of the step's time."""

    share: float = 0.0

    def observe(self, predicted: float, seen: float) -> None:
        added = min(LARGEST_GUARD, max(0.0, seen / predicted - 1)) if predicted > 0 else 0.0
        self.share = max(added, self.share * GUARD_DECAY)


@dataclass(slots=True)
class Staircase:
    """The smallest part of the GPU that decodes in time, by measured times with a guard for contention; prefill gets
    the rest. Where no split serves both targets, the one whose worse miss is smallest.
    """

    targets: Targets
    splits: Sequence[Split]
    stairs: Stairs
    guard: Guard = field(default_factory=Guard)

    def decide(self, seen: Observed, now: Split) -> Decision:
        total = max(s.prefill + s.decode for s in self.splits)
        if not seen.queued:
            return Decision(Split(0, total), "nobody waits for a first token")
        if not seen.requests:
            return Decision(Split(total, 0), "nobody decodes")
        misses = {split: self.miss(split, seen) for split in self.splits}
        best = min(self.splits, key=lambda s: (misses[s], -s.prefill))
        if now in misses and misses[now] <= max(1.0, misses[best] * (1 + GAIN)) and misses[best] > 1 - GAIN:
            return Decision(now, "no split is much better")
        why = (
            "the fewest SMs that decode in time" if misses[best] <= 1 else "no split serves both targets, this one best"
        )
        return Decision(best, why)

    def miss(self, split: Split, seen: Observed) -> float:
        """The worse of both phases: predicted time over target, at most 1 where both are met."""
        tpot = self.stairs.decode_seconds(split.decode, seen.requests) * (1 + self.guard.share)
        ttft = seen.waited + self.stairs.prefill_seconds(split.prefill, seen.queued)
        targets = seen.targets or self.targets
        return max(1.0, tpot / targets.tpot, ttft / targets.ttft)


@dataclass(slots=True)
class Adaptive:
    """Prompts ride in the steps of decodes, as many tokens at a time as leave these in time, unless a split of the GPU
    serves the targets better: then the staircase's.

    Steps with both read the weights once for both, so that with room between targets and times they are hard to beat.
    Where tokens have to come fast they hold few tokens of prompts, and a part of the GPU for prompts alone does more.
    most: tokens of prompts in a step; guard: of what such steps took longer than expected.
    """

    inner: Staircase
    most: int
    guard: Guard = field(default_factory=Guard)
    margin: float = 0.1

    @property
    def targets(self) -> Targets:
        return self.inner.targets

    @property
    def shared(self) -> Split:
        total = max(s.prefill + s.decode for s in self.inner.splits)
        return Split(total, total)

    def observe(self, split: Split, requests: int, step: float, tokens: int = 0) -> None:
        """A decode step took so many seconds: with so many tokens of prompts in it, else beside a prefill."""
        if tokens:
            self.guard.observe(self.inner.stairs.mixed_seconds(tokens, requests), step)
        else:
            self.inner.guard.observe(self.inner.stairs.decode_seconds(split.decode, requests), step)

    def decide(self, seen: Observed, now: Split) -> Decision:
        targets = seen.targets or self.targets
        chunk = self.chunk(seen.requests, targets.tpot) if seen.requests else self.most
        if not seen.queued or not seen.requests:
            idle = "nobody waits for a first token" if seen.requests else "nobody decodes"
            return Decision(self.shared, idle, chunk)
        split = self.inner.decide(seen, now).split
        better = 1 + GAIN if now == self.shared else 1 / (1 + GAIN)
        step = self.seconds(chunk, seen.requests)
        wait = seen.waited + seen.queued * step / chunk
        misses = max(1.0, step / targets.tpot, wait / targets.ttft), self.inner.miss(split, seen)
        if max(misses) > 1:
            apart = misses[0] > misses[1] * better
        else:
            seconds = self.inner.stairs.prefill_seconds(split.prefill, self.most)
            apart = self.most / seconds > chunk / step * better
        if apart:
            return Decision(split, "steps in time hold few tokens of prompts: a part of the GPU computes more")
        return Decision(self.shared, f"steps of decodes take up to {chunk} tokens of prompts along", chunk)

    def chunk(self, requests: int, tpot: float) -> int:
        """The most tokens of prompts that a step takes along in time; at least LEAST_CHUNK."""
        sizes = range(LEAST_CHUNK, self.most + 1, LEAST_CHUNK)
        bound = tpot * (1 - self.margin)
        fitting = bisect_right(sizes, bound, key=lambda tokens: self.seconds(tokens, requests))
        return sizes[max(0, fitting - 1)] if sizes else self.most

    def seconds(self, tokens: int, requests: int) -> float:
        """Of a step with both, at worst of late."""
        return self.inner.stairs.mixed_seconds(tokens, requests) * (1 + self.guard.share)
