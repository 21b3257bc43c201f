"""How many multiprocessors (SMs) prefill and decode get: pure decisions over what was observed.

Three controllers behind one method: the paper's Algorithm 1, one that looks times up in a measured staircase, and the
one that is the default, which lets prompts ride in the steps of decodes for as long as that serves the targets.

Algorithm 1 as printed has two faults. Its step counter is never advanced, so that a target out of reach loops for ever:
here tries are counted. And where both targets fail, its first branch takes that for a failing TTFT, though the text
says that nothing changes: here nothing does.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from tenfold.engine.phases.latency import Paper, Stairs

TRIES = 16  # steps of a search at most
LARGEST_GUARD, LEAST_GUARD = 0.6, -0.5  # of a phase's time, that the other may add, or that it may take less
USUAL_GUARD = 0.15  # of it, that the other adds from other SMs, where that was not seen yet
GUARD_WEIGHT = 0.1  # of an observation in what is remembered
GUARD_FADES = 0.0005  # of the way back to what is usual, that memory goes with each decision
LEAST_CHUNK = 128  # tokens of prompts in a step of decodes
NEARLY = 0.9  # of the prompt tokens a second of the largest steps in time, that smaller ones should compute
HASTE = 0.5  # of the target of first tokens, in which those who wait should be served by smaller steps
STRETCH = 2.0  # times the target, that steps may take while first tokens are late: most steps have no prompts
# Steps of decodes that a prefill in a lane takes at least: the last of them goes on in its part when that is done.
LEAST_STEPS = 3.0
GAIN = 0.05  # by which a target must be better served for a border to move


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds: to the first token, and per output token after it. served: share of requests that should meet them."""

    ttft: float
    tpot: float
    served: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a finite number of seconds above 0.")
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
    None where there were none; queued: prompt tokens not computed yet, waited: seconds that the oldest of those waits
    who have no token yet; requests: that decode; rate: prompt tokens a second that arrive and are not cached; targets:
    the strictest ttft of those who wait and tpot of those who decode, None where these are the engine's.
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
    prompts are computed in a lane of their own. prefill: tokens at a time there; 0: as many as a step may have.
    """

    split: Split
    why: str
    chunk: int = 0
    prefill: int = 0


class Controller(Protocol):
    @property
    def targets(self) -> Targets: ...

    def decide(self, seen: Observed, now: Split) -> Decision: ...


@runtime_checkable
class Learner(Controller, Protocol):
    """One that is told what phases took beside each other."""

    def observe(self, split: Split, requests: int, step: float, tokens: int = 0) -> None:
        """A decode step took so many seconds: with so many tokens of prompts in it, else beside a prefill."""
        ...

    def prefilled(self, split: Split, tokens: int, seconds: float) -> None:
        """A prefill of so many tokens took so long in its lane."""
        ...


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the values keep to."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def nearly(sizes: range, seconds: Callable[[int], float]) -> int:
    """The least of these numbers of tokens that computes nearly as many tokens a second as the largest."""
    enough = NEARLY * sizes[-1] / seconds(sizes[-1])
    return next(n for n in sizes if n >= enough * seconds(n))


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
    """What one phase adds to the other's time, on average of late; a share of that time, below 0 where contexts are
    shorter than those that were measured. usual: what is expected where nothing was seen for long. A mean, for targets
    are of means: one step of a graph that is captured, or of a longer context, says little of the next.
    """

    usual: float = 0.0
    share: float = field(init=False)

    def __post_init__(self) -> None:
        self.share = self.usual

    def observe(self, predicted: float, seen: float) -> None:
        added = min(LARGEST_GUARD, max(LEAST_GUARD, seen / predicted - 1)) if predicted > 0 else 0.0
        self.share += GUARD_WEIGHT * (added - self.share)

    def fade(self) -> None:
        self.share += GUARD_FADES * (self.usual - self.share)


@dataclass(frozen=True, slots=True)
class Promise:
    """What requests would see, as shares of the targets: to the first token (waited: of it so far) and per token after
    it.
    """

    waited: float
    work: float
    step: float

    @property
    def miss(self) -> float:
        """The worse of both, at most 1 where both are met."""
        return max(1.0, self.waited + self.work, self.step)


@dataclass(slots=True)
class Staircase:
    """The smallest part of the GPU that decodes in time, by measured times with guards for contention; prefill gets
    the rest. Where no split serves both targets, the one whose worse miss is smallest. guard: of decode steps; behind:
    of prefills.
    """

    targets: Targets
    splits: Sequence[Split]
    stairs: Stairs
    guard: Guard = field(default_factory=lambda: Guard(USUAL_GUARD))
    behind: Guard = field(default_factory=lambda: Guard(USUAL_GUARD))
    most: int = 0  # tokens of a prefill; 0: as many as a step may have
    _pieces: dict[int, int] = field(default_factory=dict, init=False)  # of a prefill, by its SMs

    def observe(self, split: Split, requests: int, step: float, tokens: int = 0) -> None:
        """A decode step beside a prefill took so many seconds; one with tokens of prompts in it does not count."""
        if not tokens:
            self.guard.observe(self.stairs.decode_seconds(split.decode, requests), step)

    def prefilled(self, split: Split, tokens: int, seconds: float) -> None:
        """A prefill of so many tokens took so long in its lane."""
        self.behind.observe(self.stairs.prefill_seconds(split.prefill, tokens), seconds)

    def fade(self) -> None:
        self.guard.fade()
        self.behind.fade()

    def decide(self, seen: Observed, now: Split) -> Decision:
        total = max(s.prefill + s.decode for s in self.splits)
        if not seen.queued:
            self.fade()
            return Decision(Split(0, total), "nobody waits for a first token")
        if not seen.requests:
            return self.decided(Split(total, 0), "nobody decodes")
        misses = {split: self.promise(split, seen).miss for split in self.splits}
        best = min(self.splits, key=lambda s: (misses[s], -s.prefill))
        if now in misses and misses[now] <= max(1.0, misses[best] * (1 + GAIN)) and misses[best] > 1 - GAIN:
            return self.decided(now, "no split is much better")
        why = (
            "the fewest SMs that decode in time" if misses[best] <= 1 else "no split serves both targets, this one best"
        )
        return self.decided(best, why)

    def decided(self, split: Split, why: str) -> Decision:
        """Prompts are computed in pieces that take hardly longer in all, for who comes meanwhile waits for one."""
        if self.most and split.prefill not in self._pieces:
            sizes = range(LEAST_CHUNK, max(LEAST_CHUNK, self.most) + 1, LEAST_CHUNK)
            self._pieces[split.prefill] = nearly(sizes, lambda n: self.stairs.prefill_seconds(split.prefill, n))
        return Decision(split, why, prefill=self._pieces.get(split.prefill, 0))

    def promise(self, split: Split, seen: Observed) -> Promise:
        """By measured times."""
        step = self.stairs.decode_seconds(split.decode, seen.requests) * (1 + self.guard.share)
        work = self.stairs.prefill_seconds(split.prefill, seen.queued) * (1 + self.behind.share)
        targets = seen.targets or self.targets
        return Promise(seen.waited / targets.ttft, work / targets.ttft, step / targets.tpot)


@dataclass(slots=True)
class Adaptive:
    """Prompts ride in the steps of decodes, as many tokens at a time as leave these in time, unless no such step does
    and decodes on a part of the GPU do.

    A step with both reads the weights once for both, and as long as reading them takes longer than computing, tokens of
    prompts are nearly free. A split reads them twice: in all measurements it computed less in the same time.
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
        self.inner.observe(split, requests, step, tokens)

    def prefilled(self, split: Split, tokens: int, seconds: float) -> None:
        self.inner.prefilled(split, tokens, seconds)

    def decide(self, seen: Observed, now: Split) -> Decision:
        if now == self.shared:
            self.inner.fade()
        if not seen.requests:
            return Decision(self.shared, "nobody decodes", self.most)
        if not seen.queued:
            return Decision(self.shared, "nobody waits for a first token", LEAST_CHUNK)
        divided = self._divided(seen, now)
        if divided:
            found = self.inner.decide(seen, now)
            if found.split not in divided:
                best = min(divided, key=lambda s: self.inner.promise(s, seen).miss)
                found = self.inner.decided(best, "")
            return replace(found, why="no step with tokens of prompts is in time: a part of the GPU decodes alone")
        chunk = self.chunk(seen, self.fitting(seen))
        return Decision(self.shared, f"steps of decodes take up to {chunk} tokens of prompts along", chunk)

    def _divided(self, seen: Observed, now: Split) -> list[Split]:
        """Splits that keep tokens in time where the smallest steps with prompts do not, for some steps at least."""
        if self.promise(LEAST_CHUNK, seen).step <= (1 + GAIN if now == self.shared else 1):
            return []
        targets = seen.targets or self.targets
        promises = {split: self.inner.promise(split, seen) for split in self.inner.splits}
        return [
            split
            for split, own in promises.items()
            if own.step <= 1 and own.work * targets.ttft >= LEAST_STEPS * own.step * targets.tpot
        ]

    def chunk(self, seen: Observed, in_time: range) -> int:
        """The fewest tokens of prompts that compute prompts nearly as fast as the most that leave a step in time; or in
        STRETCH times that, while first tokens would come too late. in_time: what `fitting` says.
        """
        found = self.nearly(in_time, seen)
        early = self.promise(found, seen)
        return found if early.waited + early.work <= HASTE else self.nearly(self.fitting(seen, STRETCH), seen)

    def nearly(self, sizes: range, seen: Observed) -> int:
        """Of these sizes, beside the decodes."""
        return nearly(sizes, lambda n: self.seconds(n, seen.requests))

    def fitting(self, seen: Observed, times: float = 1.0) -> range:
        """Tokens of prompts that leave a step in so many times the target; one size at least, and all where decodes
        alone are late.
        """
        sizes = range(LEAST_CHUNK, max(LEAST_CHUNK, self.most) + 1, LEAST_CHUNK)
        bound = times * (seen.targets or self.targets).tpot * (1 - self.margin)
        if self.inner.stairs.decode_seconds(self.shared.decode, seen.requests) * (1 + self.guard.share) > bound:
            return sizes
        return sizes[: max(1, bisect_right(sizes, bound, key=lambda n: self.seconds(n, seen.requests)))]

    def promise(self, chunk: int, seen: Observed) -> Promise:
        """Where steps take so many tokens of prompts along."""
        targets, step = seen.targets or self.targets, self.seconds(chunk, seen.requests)
        work = step * max(1.0, seen.queued / chunk)
        return Promise(seen.waited / targets.ttft, work / targets.ttft, step / targets.tpot)

    def seconds(self, tokens: int, requests: int) -> float:
        """Of a step with both."""
        return self.inner.stairs.mixed_seconds(tokens, requests) * (1 + self.guard.share)
