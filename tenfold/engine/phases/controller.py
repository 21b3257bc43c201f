"""How many multiprocessors (SMs) prefill and decode get: pure decisions over what was observed.

Three controllers behind one method: the paper's Algorithm 1, one that looks times up in a measured staircase, and the
one that is the default, which lets both phases share the whole GPU for as long as that serves the targets.

Algorithm 1 as printed has two faults. Its step counter is never advanced, so that a target out of reach loops for ever:
here tries are counted. And where both targets fail, its first branch takes that for a failing TTFT, though the text
says that nothing changes: here nothing does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tenfold.engine.phases.latency import Paper, Stairs

TRIES = 16  # steps of a search at most
LARGEST_GUARD = 0.6  # of a decode step's time, that prefill on the other SMs may add
GUARD_DECAY = 0.99  # of what was added at worst, for each observation
FORGOTTEN = 0.999  # of what sharing was seen to cost, for each decision while it is not tried
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
    """why: for people, in metrics and on the status page."""

    split: Split
    why: str


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
    """Both phases on all SMs while that keeps tokens coming in time; a split by the staircase when it does not.

    together: seconds of a decode step beside a prefill on all SMs, observed; None until it was.
    """

    inner: Staircase
    together: float | None = None
    margin: float = 0.1

    @property
    def targets(self) -> Targets:
        return self.inner.targets

    @property
    def shared(self) -> Split:
        total = max(s.prefill + s.decode for s in self.inner.splits)
        return Split(total, total)

    def observe(self, split: Split, requests: int, step: float) -> None:
        """A decode step beside a prefill took so many seconds."""
        if split == self.shared:
            self.together = step if self.together is None else max(step, 0.8 * self.together + 0.2 * step)
        else:
            self.inner.guard.observe(self.inner.stairs.decode_seconds(split.decode, requests), step)

    def decide(self, seen: Observed, now: Split) -> Decision:
        targets = seen.targets or self.targets
        if not seen.queued or not seen.requests:
            return self.inner.decide(seen, now)
        if self.together is None:
            return Decision(self.shared, "how both share the GPU is to be seen")
        bound = targets.tpot * (1 - self.margin if now != self.shared else 1.0)
        if self.together <= bound:
            return Decision(self.shared, "both phases share the GPU and serve both targets")
        if now != self.shared:
            self.together *= FORGOTTEN  # it was another load then: sharing is tried again some time
        found = self.inner.decide(seen, now)
        if self.inner.miss(found.split, seen) >= self.together / targets.tpot:
            return Decision(self.shared, "sharing misses the targets least")
        return found
