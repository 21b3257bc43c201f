"""Turns of an engine whose prefills and decodes run side by side, each in a lane of its own.

A turn launches the next decode step, then some layers of the prefill under way, then reads what is there, and waits for
neither. A prefill's sequences take part in no decode before it was read; pages go from one to the other with their
owner, and nothing is copied. Where the controller says so, prompts ride in the steps of decodes instead, once the
prefill under way was read.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from tenfold.base.log import logger
from tenfold.engine.pace import POLL
from tenfold.engine.phases.controller import Controller, Learner, Observed, Split, Targets, percentile
from tenfold.engine.phases.latency import Stairs
from tenfold.engine.plan import StepPlan
from tenfold.engine.request import Output
from tenfold.engine.runner import Pending, Slices
from tenfold.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from tenfold.engine.core import Engine, Isolated
    from tenfold.engine.phases.lanes import Lanes

TICK = 0.005  # seconds between two decisions: one for most steps, for what arrives after one waits for the next
WINDOW = 2.0  # seconds of what is seen of late
SLICE = 65_536  # tokens times layers of a prefill that are launched at once
AHEAD = 2  # slices that are launched and not done


@dataclass(slots=True)
class Underway:
    """A prefill that was begun, when, and by which split: its slices still to be launched, then its tokens."""

    plan: StepPlan
    begun: float
    split: Split
    slices: Slices
    pending: Pending | Isolated | None = None
    queued: deque[torch.cuda.Event] = field(default_factory=deque)  # ends of slices that may run still

    def room(self) -> bool:
        """Whether a slice is left to be launched, and few of those that were are not done."""
        while self.queued and self.queued[0].query():
            self.queued.popleft()
        return self.pending is None and len(self.queued) < AHEAD


class Phases:
    """Both phases of an engine, in the lanes that it is given. slice: tokens times layers of a prefill that are
    launched from one decode to the next.
    """

    def __init__(
        self,
        engine: Engine,
        lanes: Lanes,
        controller: Controller | None = None,
        slice: int = SLICE,
        targets: Targets | None = None,
        stairs: Stairs | None = None,
        tick: float = TICK,
    ) -> None:
        """controller: moves the border between the lanes; None: it stays where it is. targets, stairs: to be told.
        tick: seconds between two decisions.
        """
        self.engine = engine
        self.lanes = lanes
        self.controller = controller
        self.slice = slice
        self.targets = targets
        self.stairs = stairs
        self.tick = tick
        self.underway: Underway | None = None
        self.chunk = 0  # tokens of prompts that steps of decodes take along; 0: prompts have a lane
        self.prefill = 0  # tokens of a prefill in a lane; 0: as many as a step may have
        self.begin()
        self.why = ""  # the border is where it is
        self.changes = 0
        self.decisions: Counter[str] = Counter()  # by border and chunk
        self._decide_at = 0.0
        self._busy = False, False  # whether somebody waited for a first token at the last decision, and decoded

    def begin(self) -> None:
        """Nothing of what was seen before counts."""
        self.watch = Watch(self.engine.clock, self._arrived)

    def _arrived(self) -> int:
        """Tokens of all prompts that came so far, less those that were found in the prefix cache."""
        return self.engine._prompts - self.engine.scheduler.prefix_hit_tokens

    def stats(self) -> dict[str, Any]:
        """Fields of `Stats`."""
        now = self.lanes.now
        return {
            "prefill_sms": now.prefill,
            "decode_sms": now.decode,
            "prompt_chunk": self.chunk,
            "border_changes": self.changes,
            "border_why": self.why,
        }

    @property
    def riding(self) -> bool:
        """Whether prompts are computed in steps of decodes, and in no lane of their own."""
        return self.chunk > 0 and self.underway is None

    def turn(self, outputs: list[Output]) -> None:
        if self.controller is not None:
            self._decide(self.controller)
        if self.riding:
            self._ride(outputs)
        else:
            self._side_by_side(outputs)

    def _ride(self, outputs: list[Output]) -> None:
        """Launch a step of decodes with tokens of prompts in it, and read the oldest one."""
        engine = self.engine
        waits = not engine._inflight
        plan = engine.scheduler.plan(most=self.chunk)
        launched = self._launch(plan, outputs)
        if len(engine._inflight) > engine.config.lookahead or (engine._inflight and not launched):
            engine._collect(outputs)
        elif not engine._inflight:
            self.watch.pause()
        if waits and not launched and engine.scheduler.unfinished:
            engine._stand_still(outputs)

    def _side_by_side(self, outputs: list[Output]) -> None:
        """Launch what either lane has room for, and read what is there: neither lane waits for the other, and what
        comes while both are busy for none of them.
        """
        engine = self.engine
        waits = self.underway is None and not engine._inflight
        full = len(engine._inflight) > engine.config.lookahead
        launched = not full and self._launch(engine.scheduler.plan_decodes(), outputs)
        moved = launched
        if self.underway is None:
            self._begin()
        if self.underway is not None and self.underway.room():
            self._advance(self.underway, outputs)
            moved = True
        if engine._inflight and (len(engine._inflight) > engine.config.lookahead or not launched):
            if engine._inflight[0][1].ready():
                engine._collect(outputs)
                moved = True
        elif not engine._inflight:
            self.watch.pause()
        if self.underway is not None and self.underway.pending is not None:
            if self.underway.pending.ready():
                self._end(self.underway, self.underway.pending, outputs)
                moved = True
        elif self.underway is None and waits and not launched and engine.scheduler.unfinished:
            engine._stand_still(outputs)
        if not moved and not outputs:
            time.sleep(POLL)

    def _launch(self, plan: StepPlan, outputs: list[Output]) -> bool:
        """A step in the lane of decodes, if there is anything in it."""
        engine = self.engine
        if plan.admitted:
            engine._start(plan.admitted)
        if not plan.entries:
            return False
        with self.lanes.decode() as runner:
            engine._queued(plan, engine._launch(plan, outputs, runner))
        return True

    def _begin(self) -> None:
        """Plan the next prefill, where one can be: not while prompts ride in a step that was not read yet."""
        engine = self.engine
        if any(plan.tokens > plan.decodes for plan, _ in engine._inflight):
            return
        plan = engine.scheduler.plan_prefills(self.prefill or None)
        if not plan.entries:
            return
        if plan.admitted:
            engine._start(plan.admitted)
        engine._steps += 1
        engine.masks.start(_held(plan))
        since = engine.clock(), self.lanes.now
        with self.lanes.prefill(None) as runner:
            try:
                runner.prepare(plan)
                self.underway = Underway(plan, *since, runner.begin(plan.entries))
            except Exception as error:
                self.underway = Underway(plan, *since, Slices((), None), engine._unprepared(plan, error, runner))

    def _advance(self, prefill: Underway, outputs: list[Output]) -> None:
        """Launch the next slice, or where no decode runs beside it all that are left."""
        engine = self.engine
        beside = bool(engine._inflight)
        layers = max(1, self.slice // prefill.plan.tokens)
        while prefill.pending is None:
            with self.lanes.prefill(prefill.slices) as runner:
                try:
                    forward = runner.advance(prefill.slices, layers)
                    if forward is not None:
                        prefill.pending = runner.sample(forward, engine._mask(_held(prefill.plan), outputs))
                except Exception as error:
                    logger.warning("%s failed: %s", prefill.plan, error, exc_info=error)
                    prefill.pending = engine._isolate(prefill.plan, error, outputs, runner)
                if engine.device.type == "cuda":
                    prefill.queued.append(torch.cuda.Event())
                    prefill.queued[-1].record()
            if beside:
                return

    def stepped(self, plan: StepPlan) -> None:
        """A step of decodes was read, in which prompts may have taken part."""
        riding = plan.tokens - plan.decodes
        if riding:
            self.watch.prefilled(plan)
        seconds = self.watch.step()
        if seconds is None or not plan.decodes or not isinstance(self.controller, Learner):
            return
        if riding or self.underway is not None:
            self.controller.observe(self.lanes.now, plan.decodes, seconds, riding)

    def _decide(self, controller: Controller) -> None:
        """Move the border, now and then and when the first prompt comes or the first answer begins, to where the
        controller wants it.
        """
        now, scheduler = self.engine.clock(), self.engine.scheduler
        busy = scheduler.backlog > 0, bool(scheduler.decoding)
        begins = any(after and not before for before, after in zip(self._busy, busy))
        if now < self._decide_at and not begins:
            return
        self._busy = busy
        self._decide_at = now + self.tick
        decision = controller.decide(self._observed(now, controller.targets.served), self.lanes.now)
        self.why = decision.why
        self.chunk, self.prefill = decision.chunk, decision.prefill
        self.decisions[f"{decision.split} {decision.chunk}"] += 1
        if decision.split != self.lanes.now:
            self.lanes.use(decision.split)
            self.changes += 1

    def _observed(self, now: float, share: float) -> Observed:
        scheduler = self.engine.scheduler
        left = sum(e.length for e in self.underway.plan.entries) if self.underway is not None else 0
        if self.underway is not None and self.underway.slices.done:
            left -= left * self.underway.slices.done // self.engine.model.config.layers
        waiting = [s.request.arrival for s in scheduler.prefilling if not s.generated]
        if scheduler.queue.oldest is not None:
            waiting.append(scheduler.queue.oldest)
        return Observed(
            *self.watch.percentiles(share),
            queued=left + scheduler.backlog,
            waited=max(0.0, now - min(waiting)) if waiting else 0.0,
            requests=len(scheduler.decoding),
            rate=self.watch.rate(),
            targets=self._wanted(),
        )

    def _wanted(self) -> Targets | None:
        """The strictest ttft of those who wait for a first token and tpot of those who decode; None: the engine's."""
        if self.targets is None:
            return None
        scheduler, own = self.engine.scheduler, self.targets
        firsts = [s.request.ttft or own.ttft for s in scheduler.prefilling if not s.generated]
        if (queued := scheduler.queue.strictest(own.ttft)) is not None:
            firsts.append(queued)
        others = [s.request.tpot or own.tpot for s in scheduler.decoding]
        ttft, tpot = min(firsts, default=own.ttft), min(others, default=own.tpot)
        return None if (ttft, tpot) == (own.ttft, own.tpot) else replace(own, ttft=ttft, tpot=tpot)

    def _end(self, prefill: Underway, pending: Pending | Isolated, outputs: list[Output]) -> None:
        self.underway = None
        self.watch.prefilled(prefill.plan)
        now = self.lanes.now
        divided = prefill.split == now and 0 < now.decode != now.prefill
        if divided and isinstance(self.controller, Learner):
            self.controller.prefilled(prefill.split, prefill.plan.tokens, self.engine.clock() - prefill.begun)
        self.engine._read(prefill.plan, pending, outputs)
        self.lanes.handed([e.sequence for e in prefill.plan.entries if e.sequence.status is Status.DECODE])


class Watch:
    """What requests saw of late: seconds to first tokens, seconds of decode steps; and prompt tokens that came."""

    def __init__(self, clock: Callable[[], float], arrived: Callable[[], int]) -> None:
        """arrived: tokens of all prompts that came so far."""
        self.clock, self.arrived = clock, arrived
        self._counted = arrived()
        self._firsts: deque[tuple[float, float]] = deque()
        self._steps: deque[tuple[float, float]] = deque()
        self._prompts: deque[tuple[float, int]] = deque()
        self._last: float | None = None  # when a decode step was read, where others followed at once

    def step(self) -> float | None:
        """A decode step was read: seconds since the one before; None for the first of a row."""
        now, before = self.clock(), self._last
        self._last = now
        if before is None:
            return None
        self._steps.append((now, now - before))
        return now - before

    def pause(self) -> None:
        """Nothing decodes."""
        self._last = None

    def prefilled(self, plan: StepPlan) -> None:
        """A plan was read in which prompts were computed, after its decodes."""
        now = self.clock()
        for entry in plan.entries[plan.decodes :]:
            if entry.sample:
                self._firsts.append((now, max(0.0, now - entry.sequence.request.arrival)))

    def percentiles(self, share: float) -> tuple[float | None, float | None]:
        """Seconds that this share of first tokens, and of tokens after them, kept to in the window."""
        self._forget()
        return percentile([s for _, s in self._firsts], share), percentile([s for _, s in self._steps], share)

    def rate(self) -> float:
        """Prompt tokens a second that came; to be asked at every decision, for what came since the last counts as come
        now.
        """
        self._forget()
        before, self._counted = self._counted, self.arrived()
        if self._counted != before:
            self._prompts.append((self.clock(), self._counted - before))
        return max(0.0, sum(tokens for _, tokens in self._prompts) / WINDOW)

    def _forget(self) -> None:
        oldest = self.clock() - WINDOW
        for seen in (self._firsts, self._steps, self._prompts):
            while seen and seen[0][0] < oldest:
                seen.popleft()


def _held(plan: StepPlan) -> list[Sequence]:
    """Sequences whose grammar decides what this step may sample."""
    return [e.sequence for e in plan.entries if e.sample and e.sequence.matcher is not None]
