"""Turns of an engine whose prefills and decodes run side by side, each in a lane of its own.

A turn launches the next decode step, then some layers of the prefill under way, then reads what is there. A prefill's
sequences take part in no decode before it was read, so neither lane ever waits for the other; pages go from one to the
other with their owner, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenfold.base.log import logger
from tenfold.engine.plan import StepPlan
from tenfold.engine.request import Output
from tenfold.engine.runner import Forward, Pending, Runner

if TYPE_CHECKING:
    from tenfold.engine.core import Engine, Isolated

SLICE_TOKENS = 65_536  # times layers of a slice of a prefill


@dataclass(slots=True)
class Underway:
    """A prefill that was begun: its slices still to be launched, then its tokens."""

    plan: StepPlan
    slices: Iterator[Forward | None]
    pending: Pending | Isolated | None = None


class Phases:
    """Both lanes of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prefilling: Runner = engine.runner.twin(engine.model)
        self.underway: Underway | None = None

    def turn(self, outputs: list[Output]) -> None:
        engine = self.engine
        waits = self.underway is None and not engine._inflight
        plan = engine.scheduler.plan_decodes()
        if plan.entries:
            engine._inflight.append((plan, engine._launch(plan, outputs)))
        if self.underway is None:
            self._begin(outputs)
        if self.underway is not None:
            self._advance(self.underway, bool(plan.entries), outputs)
        if len(engine._inflight) > engine.config.lookahead or (engine._inflight and not plan.entries):
            engine._collect(outputs)
        idle = not engine._inflight
        if self.underway is not None and self.underway.pending is not None:
            if self.underway.pending.ready() or idle:
                self._end(self.underway, self.underway.pending, outputs)
        elif self.underway is None and waits and not plan.entries and engine.scheduler.unfinished:
            engine._stand_still(outputs)

    def _begin(self, outputs: list[Output]) -> None:
        """Plan the next prefill, where one can be."""
        engine = self.engine
        plan = engine.scheduler.plan_prefills()
        if not plan.entries:
            return
        if plan.admitted:
            engine._start(plan.admitted)
        engine._steps += 1
        layers = max(1, SLICE_TOKENS // plan.tokens)
        try:
            self.prefilling.prepare(plan)
            slices = self.prefilling.gradually(plan.entries, layers)
        except Exception as error:
            self.underway = Underway(plan, iter(()), engine._unprepared(plan, error))
            return
        held = [e.sequence for e in plan.entries if e.sample and e.sequence.matcher is not None]
        engine.masks.start(held)
        self.underway = Underway(plan, slices)

    def _advance(self, prefill: Underway, beside: bool, outputs: list[Output]) -> None:
        """Launch the next slice, or where no decode runs beside it all that are left."""
        engine = self.engine
        while prefill.pending is None:
            try:
                forward = next(prefill.slices)
                if forward is not None:
                    held = [e.sequence for e in prefill.plan.entries if e.sample and e.sequence.matcher is not None]
                    prefill.pending = self.prefilling.sample(forward, engine._mask(held, outputs))
            except Exception as error:
                logger.warning("%s failed: %s", prefill.plan, error)
                prefill.pending = engine._isolate(prefill.plan, error, outputs, self.prefilling)
            if beside:
                return

    def _end(self, prefill: Underway, pending: Pending | Isolated, outputs: list[Output]) -> None:
        self.underway = None
        self.engine._read(prefill.plan, pending, outputs)
