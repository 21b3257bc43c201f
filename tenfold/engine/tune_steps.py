"""Choose arms by what whole decode steps take with them.

Alone, a kernel is measured among copies of itself. In a step it follows others and overlaps with them: one that keeps
most of an SM's shared memory leaves the next no room to begin early, and little L1 cache. Kernels that were fastest
alone made steps of Llama-3-8B of 5.2 ms where others made 3.9 (H200, 2026-11-29). So the few fastest arms of each
operation are tried in steps of the model, one operation after the other, and the table remembers how long steps took.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tenfold.base.config import EngineConfig
from tenfold.base.log import logger
from tenfold.engine.core import Engine
from tenfold.engine.phases.table import CHUNKED
from tenfold.engine.rehearsal import made_up
from tenfold.engine.runner import Runner
from tenfold.ops.choose import STEP_NOISE, Key, Table, best
from tenfold.ops.gpu import green
from tenfold.ops.gpu.green import Part
from tenfold.ops.gpu.timing import sample

if TYPE_CHECKING:  # Triton is there on GPU machines only
    from tenfold.models.table import Model
    from tenfold.ops.gpu.native import Gpu

REQUESTS = (1, 2, 4, 8, 16, 32, 64)
# Tokens of the longest request: three quarters of the longest context that a choice serves (`attending.LONGEST`), every
# third of which is measured and serves its neighbours. After the first, attention alone is chosen for.
CONTEXTS = (1536, 192, 12288, 49152)
TRIED = 5  # arms of an operation
UNTIMED = 18  # arms of one whose times alone are not known
NEAR = 1.3  # times the fastest alone, that an arm may take to be tried
ROUNDS = 7
SAMPLE = 20_000.0  # microseconds of one sample, at least

Picks = Mapping[Key, str]
Measure = Callable[[Sequence[Picks]], list[float]]  # microseconds of a step with each; infinite where it cannot run


@dataclass(frozen=True, slots=True)
class Place:
    """An operation of a step. names: the arms to try, the rule's first; alone: the fastest by itself."""

    key: Key
    names: tuple[str, ...]
    alone: str


def place(key: Key, rule: str, times: Mapping[str, float], others: Sequence[str] = ()) -> Place:
    """The rule's arm, the fastest of each kind that is near the fastest of all, and the next fastest; others: to try
    where no times are known.
    """
    if not times:
        return Place(key, tuple(dict.fromkeys((rule, *others)))[:UNTIMED], rule)
    order = sorted(times, key=times.__getitem__)
    near = [name for name in order if times[name] <= NEAR * times[order[0]]]
    kinds = {name.partition(":")[0]: name for name in reversed(near)}
    names = dict.fromkeys([rule, *sorted(kinds.values(), key=near.index), *near])
    return Place(key, tuple(names)[:TRIED], order[0])


def descend(places: Sequence[Place], measure: Measure) -> dict[Key, dict[str, float]]:
    """Microseconds of a step with each arm of each place. Begins with the best of: all rules, all that are fastest
    alone, and each kind of arm wherever it may run; then one place after the other takes the arm that is best there.
    """
    kinds = dict.fromkeys(name.partition(":")[0] for place in places for name in place.names)
    starts: list[Picks] = [{p.key: p.names[0] for p in places}, {p.key: p.alone for p in places}]
    starts += [
        {p.key: next((n for n in p.names if n.partition(":")[0] == kind), p.names[0]) for p in places} for kind in kinds
    ]
    different = [one for i, one in enumerate(starts) if one not in starts[:i]]
    taken = measure(different)
    picks = dict(different[taken.index(min(taken))])
    found: dict[Key, dict[str, float]] = {}
    for one in places:
        taken = measure([{**picks, one.key: name} for name in one.names])
        times = {name: took for name, took in zip(one.names, taken) if math.isfinite(took)}
        if times:
            found[one.key] = times
            picks[one.key], _ = best(times, one.names[0], STEP_NOISE)
    return found


def tune(
    config: EngineConfig,
    table: Table | None = None,
    requests: Sequence[int] = REQUESTS,
    contexts: Sequence[int] = CONTEXTS,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    parts: Sequence[Part] = (),
) -> int:
    """Load a model, try arms in steps of so many requests with contexts of up to so many tokens, and save the table:
    that of its GPU unless another is given. What has times of steps is left as it is, unless forced. Linear operations
    whose times alone are not known keep their rules: `ops/gpu/tune.py` measures those. parts: of the GPU's
    multiprocessors, on which steps are measured after those on all. Returns how many sizes of steps were measured.
    Raises what `Engine.load` raises.
    """
    torch.cuda.empty_cache()  # an engine counts what is free
    free = replace(config, softmax="auto", gemm="auto", merge="auto")  # or all arms would be the one that a user fixed
    engine = Engine.load(replace(free, rehearse=False, schedule=CHUNKED), tokens_only=True)
    if not engine.kv.spec.packing:
        engine.kv.fill(0.0)  # what is no number would send all tokens to the same experts
    kernels: Any = engine.kernels
    table, done = kernels.arms.table if table is None else table, 0
    sizes = sizes_of(engine.max_model_len, engine.kv.tokens, requests, contexts)
    todo = [(part, count, context) for part in (None, *parts) for count, context in sizes]
    known: set[Key] = set()
    for at, (part, count, context) in enumerate(todo):
        with green.on(part) if part else nullcontext():
            sms = part.sms if part else kernels.sms
            steps = Steps(engine.runner, kernels.on(sms, table), count, context)
            asked = [place(key, rule, table.times(key), others) for key, rule, others in steps.asked()]
            places = [one for one in asked if len(one.names) > 1 and one.key not in known]
            known.update(one.key for one in places)
            if not force and all(table.steps(one.key) for one in places):
                continue
            if progress:
                what = f"steps of {count} requests of {context} tokens on {sms} SMs, {len(places)} operations"
                progress(at, len(todo), what)
            places.sort(key=lambda one: -table.times(one.key).get(one.alone, 0.0))
            found = descend(places, steps.measure)
        for key, times in found.items():
            table.record_steps(key, {name: round(took, 2) for name, took in times.items()})
        table.save()
        done += 1
    return done


def sizes_of(
    longest: int, held: float, requests: Sequence[int] = REQUESTS, contexts: Sequence[int] = CONTEXTS
) -> list[tuple[int, int]]:
    """The steps that `tune` measures, requests and tokens of each. longest: tokens of a request; held: of the cache."""
    lengths = dict.fromkeys(min(context, longest) for context in contexts)
    return [(count, context) for count in requests for context in lengths if count * context <= held]


class Steps:
    """Decode steps of a model, of so many requests with contexts of up to so many tokens (`attending.spread`)."""

    def __init__(self, runner: Runner, kernels: "Gpu", requests: int, context: int) -> None:
        self.runner = runner
        self.kernels = kernels
        from tenfold.ops.gpu.attending import spread

        self.step = made_up(runner, requests, 1, context, spread(context, requests))
        self.requests = requests

    def asked(self) -> Iterator[tuple[Key, str, Sequence[str]]]:
        """Where the table has each operation of a step, its rule, and arms to try though they were not timed alone."""
        from tenfold.ops.gpu import arms, attending, expert_arms

        kernels, sms = self.kernels.on(self.kernels.sms), self.kernels.sms
        with torch.inference_mode():
            self.runner.model.on(kernels).forward(self.step)
        for work in kernels.arms.seen:
            one = replace(work, tokens=self.requests)
            yield arms.key(one, sms), arms.rule(one, sms), ()
        stand = map(attending.at, kernels.attending.asked())
        readings = [one for one in dict.fromkeys(stand) if one is not None]
        for reading in attending.alike(readings):
            yield attending.key(reading, sms), attending.rule(reading, sms), attending.candidates(reading, sms)
        for reading in readings:
            legal = attending.softmaxes(reading)
            yield attending.softmax_key(reading, sms), legal[0], legal
        for experts in kernels.expert_arms.seen:
            own = replace(experts, tokens=self.requests)
            others = [str(plan) for plan in expert_arms.candidates(own)]
            yield expert_arms.key(own, sms), str(expert_arms.rule(own)), others

    def measure(self, tried: Sequence[Picks]) -> list[float]:
        """Samples of each in turn, their median."""
        table = self.kernels.arms.table
        with torch.inference_mode():
            models = [self._model(table.but(picks)) for picks in tried]
            times: list[list[float]] = [[] for _ in tried]
            for _ in range(ROUNDS):
                for model, taken in zip(models, times):
                    if model is not None:
                        taken.append(self._step_microseconds(model))
        return [statistics.median(taken) if taken else math.inf for taken in times]

    def _model(self, table: Table) -> "Model | None":
        """The model with the choices of a table, its step captured; None where an arm cannot run."""
        model = self.runner.model.on(self.kernels.on(self.kernels.sms, table))
        self.step.memo.clear()  # of the arms of the model before
        try:
            for _ in range(3):  # compiled, captured, replayed
                model.forward(self.step)
            torch.cuda.synchronize()
        except Exception as error:  # a compiler's complaint may be of any class
            reason = (str(error) or repr(error)).splitlines()[0][:300]
            logger.warning("tune: steps with some arms are left out: %s", reason)
            return None
        return model

    def _step_microseconds(self, model: "Model") -> float:
        def run() -> object:
            return model.forward(self.step)

        count = max(1, math.ceil(SAMPLE / sample(run, 1)))
        return sample(run, count) / count
