"""Turns of an engine whose prefills and decodes run side by side, each in a lane of its own.

A turn launches the next decode step, then some layers of the prefill under way, then reads what is there. A prefill's
sequences take part in no decode before it was read, so neither lane ever waits for the other; pages go from one to the
other with their owner, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenfold.base.log import logger
from tenfold.engine.plan import StepPlan
from tenfold.engine.request import Output
from tenfold.engine.runner import Pending, Slices
from tenfold.engine.sequence import Sequence

if TYPE_CHECKING:
    from tenfold.engine.core import Engine, Isolated
    from tenfold.engine.phases.lanes import Lanes

SLICE = 65_536  # tokens times layers that are launched before the next decode


@dataclass(slots=True)
class Underway:
    """A prefill that was begun: its slices still to be launched, then its tokens."""

    plan: StepPlan
    slices: Slices
    pending: Pending | Isolated | None = None


class Phases:
    """Both phases of an engine, in the lanes that it is given. slice: tokens times layers of a prefill that are
    launched from one decode to the next.
    """

    def __init__(self, engine: Engine, lanes: Lanes, slice: int = SLICE) -> None:
        self.engine = engine
        self.lanes = lanes
        self.slice = slice
        self.underway: Underway | None = None

    def turn(self, outputs: list[Output]) -> None:
        engine = self.engine
        waits = self.underway is None and not engine._inflight
        plan = engine.scheduler.plan_decodes()
        if plan.entries:
            with self.lanes.decode() as runner:
                engine._inflight.append((plan, engine._launch(plan, outputs, runner)))
        if self.underway is None:
            self._begin()
        if self.underway is not None:
            self._advance(self.underway, bool(plan.entries), outputs)
        if len(engine._inflight) > engine.config.lookahead or (engine._inflight and not plan.entries):
            engine._collect(outputs)
        if self.underway is not None and self.underway.pending is not None:
            if self.underway.pending.ready() or not engine._inflight:
                self._end(self.underway, self.underway.pending, outputs)
        elif self.underway is None and waits and not plan.entries and engine.scheduler.unfinished:
            engine._stand_still(outputs)

    def _begin(self) -> None:
        """Plan the next prefill, where one can be."""
        engine = self.engine
        plan = engine.scheduler.plan_prefills()
        if not plan.entries:
            return
        if plan.admitted:
            engine._start(plan.admitted)
        engine._steps += 1
        engine.masks.start(_held(plan))
        try:
            with self.lanes.prefill(None) as runner:
                runner.prepare(plan)
                self.underway = Underway(plan, runner.begin(plan.entries))
        except Exception as error:
            self.underway = Underway(plan, Slices((), None), engine._unprepared(plan, error))

    def _advance(self, prefill: Underway, beside: bool, outputs: list[Output]) -> None:
        """Launch the next slice, or where no decode runs beside it all that are left."""
        engine = self.engine
        layers = max(1, self.slice // prefill.plan.tokens)
        while prefill.pending is None:
            with self.lanes.prefill(prefill.slices) as runner:
                try:
                    forward = runner.advance(prefill.slices, layers)
                    if forward is not None:
                        prefill.pending = runner.sample(forward, engine._mask(_held(prefill.plan), outputs))
                except Exception as error:
                    logger.warning("%s failed: %s", prefill.plan, error)
                    prefill.pending = engine._isolate(prefill.plan, error, outputs, runner)
            if beside:
                return

    def _end(self, prefill: Underway, pending: Pending | Isolated, outputs: list[Output]) -> None:
        self.underway = None
        self.engine._read(prefill.plan, pending, outputs)


def _held(plan: StepPlan) -> list[Sequence]:
    """Sequences whose grammar decides what this step may sample."""
    return [e.sequence for e in plan.entries if e.sample and e.sequence.matcher is not None]
