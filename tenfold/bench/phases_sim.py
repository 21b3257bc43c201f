"""A discrete-event simulator of a GPU that serves both phases: policies and controllers compared on recorded times.

Nothing here runs a model. Times of prefill and decode on some of the SMs come from a `Stairs` table; what they cost
each other is a share of the time. Every result is a simulation and is to be called one.
"""

import heapq
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tenfold.engine.fair import due
from tenfold.engine.phases.controller import Controller, Learner, Observed, Split, Targets, percentile
from tenfold.engine.phases.latency import Stairs

TICK = 0.005  # seconds between decisions, as in an engine
WINDOW = 2.0  # seconds of what a controller sees


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: seconds of its arrival, tokens of its prompt and of its answer."""

    arrival: float
    prompt: int
    answer: int


@dataclass(slots=True, eq=False)
class Served:
    """A request under way. left: share of its prefill that is not done; first, last: seconds of its tokens."""

    ask: Ask
    left: float = 1.0
    made: int = 0
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    turn: tuple[float, int] = (0.0, 0)

    @property
    def ttft(self) -> float:
        return self.first - self.ask.arrival

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.made - 1) if self.made > 1 else 0.0


class Line:
    """Prompts that wait, in the order in which `engine.fair` has them."""

    def __init__(self, overtake: float) -> None:
        self.overtake = overtake
        self.computed = 0.0  # tokens of prompts
        self._came = 0
        self._heap: list[tuple[tuple[float, int], Served]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Served]:
        return (served for _, served in self._heap)

    def join(self, served: Served) -> None:
        self._came += 1
        served.turn = (due(self.computed, self.overtake * served.ask.prompt), self._came)
        self.back(served)

    def back(self, served: Served) -> None:
        """Whoever was taken and is not done."""
        heapq.heappush(self._heap, (served.turn, served))

    def take(self) -> Served:
        return heapq.heappop(self._heap)[1]

    def share(self, tokens: int) -> list[tuple[Served, float]]:
        """Those whose prompts fill so many tokens, and the share of each; they are taken."""
        found = []
        while self._heap and tokens > 0:
            served = self.take()
            own = min(tokens, max(1, round(served.left * served.ask.prompt)))
            tokens -= own
            self.computed += own
            found.append((served, min(served.left, own / served.ask.prompt)))
        return found


@dataclass(frozen=True, slots=True)
class Costs:
    """What phases cost each other. beside: what prefill on other SMs adds to a decode step; together: how many times
    longer a decode step takes where both have all SMs, and shared: a prefill.
    """

    beside: float = 0.15
    together: float = 3.0
    shared: float = 1.15


@dataclass(slots=True)
class Result:
    """served: requests in the order of their ends; splits: (second, split) of every change."""

    served: list[Served]
    splits: list[tuple[float, Split]]
    seconds: float

    def attained(self, targets: Targets) -> float:
        """Share of requests that met both targets."""
        good = [s for s in self.served if s.ttft <= targets.ttft and s.tpot <= targets.tpot]
        return len(good) / max(1, len(self.served))

    @property
    def latency(self) -> float:
        """Mean seconds from arrival to the last token."""
        return sum(s.last - s.ask.arrival for s in self.served) / max(1, len(self.served))

    def gap(self, share: float) -> float:
        """Seconds between two tokens that `share` of all keep to."""
        return percentile([g for s in self.served for g in s.gaps], share) or 0.0


def poisson(rate: float, seconds: float, prompt: Sequence[int], answer: Sequence[int], seed: int = 0) -> list[Ask]:
    """Requests that arrive at random, their lengths drawn from the given ones."""
    draw, now, found = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(rate)) < seconds:
        found.append(Ask(now, draw.choice(prompt), draw.choice(answer)))
    return found


class Gpu:
    """The state of a simulation of two lanes under a controller."""

    def __init__(
        self,
        stairs: Stairs,
        total: int,
        costs: Costs,
        controller: Controller,
        batch: int = 256,
        start: Split | None = None,
        overtake: float = 0.0,
    ) -> None:
        """start: the split at first; all for prefill where none is named. overtake: as `EngineConfig` has it."""
        self.stairs, self.total, self.costs, self.controller = stairs, total, costs, controller
        self.batch = batch
        self.split = start or Split(total, 0)
        self.now = 0.0
        self.waiting = Line(overtake)
        self.lane: Served | None = None  # whose prompt is computed in a lane of its own
        self.decoding: list[Served] = []
        self.stepping: list[Served] = []  # in the decode step under way
        self.step_left = 0.0  # share of it
        self.chunk = 0  # tokens of prompts that steps take along
        self.riding: list[tuple[Served, float]] = []  # prompts in the step under way, and the share of each
        self.step_began = 0.0
        self.done: list[Served] = []
        self.changes: list[tuple[float, Split]] = []
        self.seen_ttft: deque[tuple[float, float]] = deque()
        self.seen_tpot: deque[tuple[float, float]] = deque()
        self.arrived: deque[tuple[float, int]] = deque()

    def run(self, asks: Sequence[Ask], most: float = 3600.0) -> Result:
        events = [(ask.arrival, i) for i, ask in enumerate(asks)]
        heapq.heapify(events)
        tick = 0.0
        while (
            events or self.waiting or self.lane or self.riding or self.decoding or self.stepping
        ) and self.now < most:
            until = min(tick, events[0][0] if events else float("inf"), *self._ends())
            self._pass(until - self.now)
            self.now = until
            while events and events[0][0] <= self.now:
                ask = asks[heapq.heappop(events)[1]]
                self.waiting.join(Served(ask))
                self.arrived.append((self.now, ask.prompt))
            self._finish()
            if self.now >= tick:
                self._decide()
                tick = self.now + TICK
            if not self.stepping and not self.riding and self.split.decode:
                self._begin_step()
        return Result(self.done, self.changes, self.now)

    def _begin_step(self) -> None:
        self.stepping, self.step_left, self.step_began = self.decoding[: self.batch], 1.0, self.now
        self.riding = self.waiting.share(self.chunk) if self.lane is None else []

    # How fast things go

    @property
    def laned(self) -> bool:
        """Whether a prompt is computed in a lane of its own."""
        return bool(self.lane and self.split.prefill)

    @property
    def both(self) -> bool:
        return self.laned and bool(self.stepping and self.split.decode)

    def _prefill_seconds(self) -> float:
        assert self.lane is not None
        seconds = self.stairs.prefill_seconds(self.split.prefill, self.lane.ask.prompt)
        return seconds * (self.costs.shared if self.both and self._sharing() else 1.0)

    def _step_seconds(self) -> float:
        seconds = self.stairs.decode_seconds(self.split.decode, len(self.stepping))
        if self.riding:
            return self.stairs.mixed_seconds(self._tokens(), len(self.stepping))
        if not self.both:
            return seconds
        return seconds * (self.costs.together if self._sharing() else 1 + self.costs.beside)

    def _tokens(self) -> int:
        """Of prompts in the step under way."""
        return max(1, round(sum(share * served.ask.prompt for served, share in self.riding)))

    def _sharing(self) -> bool:
        return self.split.prefill + self.split.decode > self.total

    def _ends(self) -> list[float]:
        found = []
        if self.lane is not None and self.laned:
            found.append(self.now + self.lane.left * self._prefill_seconds())
        if (self.stepping or self.riding) and self.split.decode:
            found.append(self.now + self.step_left * self._step_seconds())
        return found or [float("inf")]

    def _pass(self, seconds: float) -> None:
        prefill = seconds / self._prefill_seconds() if self.laned else 0.0
        step = seconds / self._step_seconds() if (self.stepping or self.riding) and self.split.decode else 0.0
        if self.lane is not None:
            self.lane.left -= prefill
        self.step_left -= step

    def _finish(self) -> None:
        if self.lane is not None and self.lane.left <= 1e-9:
            self._first(self.lane)
            self.lane = None
        if self.lane is None and self.waiting and not self.chunk:
            self.lane = self.waiting.take()
            self.waiting.computed += self.lane.ask.prompt
        if (self.stepping or self.riding) and self.step_left <= 1e-9:
            took = self.now - self.step_began
            if isinstance(self.controller, Learner) and self.stepping and (self.riding or self.laned):
                tokens = self._tokens() if self.riding else 0
                self.controller.observe(self.split, len(self.stepping), took, tokens)
            riding, self.riding = self.riding, []
            for served, share in reversed(riding):
                served.left -= share
                if served.left <= 1e-9:
                    self._first(served)
                else:
                    self.waiting.back(served)
            for served in self.stepping:
                self._token(served)
                self.seen_tpot.append((self.now, took))
                if served.made >= served.ask.answer:
                    self.decoding.remove(served)
            self.stepping = []

    def _first(self, served: Served) -> None:
        """A prompt is computed."""
        self._token(served)
        self.seen_ttft.append((self.now, served.ttft))
        if served.made < served.ask.answer:
            self.decoding.append(served)

    def _token(self, served: Served) -> None:
        if served.made:
            served.gaps.append(self.now - served.last)
        else:
            served.first = self.now
        served.made += 1
        served.last = self.now
        if served.made >= served.ask.answer:
            self.done.append(served)

    def _decide(self) -> None:
        for seen in (self.seen_ttft, self.seen_tpot, self.arrived):
            while seen and seen[0][0] < self.now - WINDOW:
                seen.popleft()
        waiting = [*self.waiting, *(served for served, _ in self.riding), *([self.lane] if self.lane else [])]
        observed = Observed(
            percentile([v for _, v in self.seen_ttft], 0.9),
            percentile([v for _, v in self.seen_tpot], 0.9),
            int(sum(s.left * s.ask.prompt for s in waiting)),
            self.now - min((s.ask.arrival for s in waiting), default=self.now),
            len(self.decoding),
            sum(tokens for _, tokens in self.arrived) / WINDOW,
        )
        decision = self.controller.decide(observed, self.split)
        split, self.chunk = decision.split, decision.chunk
        if split != self.split:
            self.split = split
            self.changes.append((self.now, split))


def chunked(
    stairs: Stairs, total: int, asks: Sequence[Ask], chunk: int, batch: int = 256, overtake: float = 0.0
) -> Result:
    """Chunked prefill with mixed batches: every step decodes all and computes up to `chunk` tokens of prompts. A chunk
    as large as any prompt is prefill first.
    """
    waiting = Line(overtake)
    decoding: list[Served] = []
    done: list[Served] = []
    now, place = 0.0, 0
    while place < len(asks) or waiting or decoding:
        if not waiting and not decoding:
            now = max(now, asks[place].arrival)
        while place < len(asks) and asks[place].arrival <= now:
            waiting.join(Served(asks[place]))
            place += 1
        running, finished, tokens = decoding[:batch], [], 0
        for served, share in waiting.share(chunk - len(running)):
            tokens += max(1, round(share * served.ask.prompt))
            served.left -= share
            if served.left <= 1e-9:
                finished.append(served)
            else:
                waiting.back(served)
        now += stairs.mixed_seconds(tokens, len(running)) if tokens else stairs.decode_seconds(total, len(running))
        for served in [*running, *finished]:
            if served.made:
                served.gaps.append(now - served.last)
            else:
                served.first = now
                decoding.append(served)
            served.made, served.last = served.made + 1, now
            if served.made >= served.ask.answer:
                decoding.remove(served)
                done.append(served)
    return Result(done, [], now)
