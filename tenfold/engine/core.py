"""`Engine`: requests in, tokens out, one `step` at a time.

Single-threaded by contract: whoever owns the engine calls every method. A step launches at most one plan and reads at
most one launched before; with lookahead 1 the device is already at work on the next when the tokens of one are read. A
fault of one request ends that request with FinishReason.ERROR and leaves the others alone.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tenfold.base.config import EngineConfig
from tenfold.base.log import Timeline, logger
from tenfold.cache.pages import PagePool
from tenfold.cache.prefix import PrefixCache
from tenfold.cache.rooms import Rooms
from tenfold.cache.store import Groupings, KVStore
from tenfold.engine import inspect
from tenfold.engine.facts import Facts, Stats
from tenfold.engine.grammar import Grammars, Matcher
from tenfold.engine.masks import Held, Mask, Masks, ahead
from tenfold.engine.memory import DTYPES, MemoryPlan, kv_spec, logits_rows, rooms_for, unfused
from tenfold.engine.opened import Opened
from tenfold.engine.pace import Pace
from tenfold.engine.phases import table as schedules
from tenfold.engine.phases.loop import Phases
from tenfold.engine.phases.start import start as start_phases
from tenfold.engine.plan import Entry, StepPlan
from tenfold.engine.rehearsal import capture, chunks, decodes, rehearse, shapes
from tenfold.engine.request import FinishReason, Output, QueueFull, Request, SamplingParams, check_targets
from tenfold.engine.runner import Forward, Pending, Runner, Tokens
from tenfold.engine.scheduler import Limits, Scheduler
from tenfold.engine.sequence import Sequence, Status
from tenfold.engine.sight import Layout, Sight
from tenfold.engine.speculate.speculator import Speculator
from tenfold.engine.speculate.table import make_speculator
from tenfold.engine.text import Text
from tenfold.models.table import Model, build_model
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Matrix
from tenfold.weights.load import Weights

POOLS = ("mean", "last")
MOST_PICTURES = 1 << 30  # bytes of pixels that requests under way may hold together
COMPILE_WAIT = 0.005  # seconds a step with nothing else to do waits for a grammar


class Detokenizes(Protocol):
    """What the engine needs of the text layer."""

    def detokenizer(self, request: Request) -> Any:
        """An object for one sequence: `feed(token) -> (new text, stop string or None)`, `flush() -> text`."""
        ...


class Engine:
    """A model that serves requests.

    config: settings with every size filled in (`Engine.load` sees to that; `memory.resolve` and `memory.fill` do it by
    hand). pages: of the KV cache. eos_ids: tokens that end an answer unless its request says otherwise. text: gives
    answers as text too; without it, tokens only. draft: the model that `config.speculate` names, where it names one.
    groupings: of a packed KV cache, where they were measured.
    """

    def __init__(
        self,
        model: Model,
        kernels: Kernels,
        config: EngineConfig,
        text: Detokenizes | None = None,
        *,
        pages: int,
        eos_ids: tuple[int, ...] = (),
        draft: Model | None = None,
        groupings: Groupings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.kernels = kernels
        self.config = config
        self.text = text
        self.eos_ids = tuple(token for token in eos_ids if token < model.config.vocab_size)
        self.clock = clock
        self.device = torch.device(config.device)
        self.memory: MemoryPlan | None = None
        self.timeline: Timeline | None = None
        self.path: Path | None = None  # of the checkpoint
        self.matrices: tuple[Matrix, ...] = ()  # of the model, as the kernels hold them
        self.replica: Callable[[torch.device], tuple[Model, Kernels]] | None = None  # the model on another device
        self.elsewhere: list[Kernels] = []  # of the devices where it was put
        self.on_start: Callable[[list[str]], None] | None = None  # told request ids before their first step
        self.vocab_size = model.config.vocab_size
        spec = kv_spec(model.config, config)
        rooms = rooms_for(min(config.max_batch, config.max_step_tokens), spec, config)
        self.kv = KVStore(spec, pages, self.device, rooms, groupings)
        self.max_model_len = min(config.max_model_len or model.config.max_positions, pages * config.page_size)
        self.pool = PagePool(pages)
        self.prefix = PrefixCache(self.pool) if config.prefix_cache else None
        limits = Limits(
            *(config.max_batch, config.max_step_tokens, config.max_queue, config.max_queue_tokens),
            max_drawn=logits_rows(config),
            overtake=config.overtake,
        )
        self.rooms = Rooms(rooms, spec.room_slack) if rooms else None
        self.scheduler = Scheduler(self.pool, config.page_size, limits, self.prefix, self.rooms)
        tower = getattr(model, "tower", None)
        self.sight = Sight(tower, config.picture_cache, self.device) if tower is not None else None
        self.runner = Runner(
            *(model, self.kv, limits.rows, self.max_model_len, self.device, config.lookahead, kernels.bucket),
            sight=self.sight,
        )
        self.speculator: Speculator | None = make_speculator(config, draft, self.runner, self.kv, self.max_model_len)
        self.grammars: Grammars | None = None  # made when a request first asks for one
        self.masks = Masks(self.vocab_size)
        self._compiling: dict[str, Compiling] = {}  # by request id
        self._inflight: deque[tuple[StepPlan, Pending | Isolated]] = deque()
        self._ready: list[Output] = []  # ends that no step brings: aborts, deadlines
        self._requests: dict[str, list[Sequence]] = {}
        self._order = 0
        self._pictures = 0  # bytes of pixels of requests under way
        self.phases: Phases | None = None  # where prefills and decodes run side by side
        self.pace = Pace() if config.late_planning and config.lookahead > 0 else None
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._steps = self._errors = self._computed = self._generated = self._prompts = 0
        self._seconds = self._last_seconds = self._rested = 0.0
        self._drafted = self._accepted = 0  # by a drafter that was given up
        if self.speculator is not None:
            self.speculator.drafted = self.speculator.accepted = 0
        if self.sight is not None:
            self.sight.looked = 0

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        timeline: Timeline | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        tokens_only: bool = False,
    ) -> "Engine":
        """Find, check and load the model `config` names, and run one token through it.

        timeline: receives the phases. progress(done, total) is called while weights load. tokens_only: leave out the
        tokenizer; requests and answers are token ids. Raises ValueError, and of its kind CheckpointError, ConfigError
        and DoesNotFit, each with what to do.
        """
        timeline = timeline or Timeline()
        with timeline.phase("open"):
            opened = Opened(config)
        with timeline.phase("kernels"):
            opened.choose()
        opened.memory.require()
        config, plan, stored = opened.config, opened.memory, opened.groupings()
        logger.info("memory for %s:\n%s", config.model, plan)
        if (cache := kv_spec(opened.shape, config)).packed is not None:
            logger.info("KV cache of %s: %s", config.model, cache)
            if opened.kernels.name == "gpu" and (slow := unfused(opened.shape, config)):
                logger.warning("KV cache of %s: %s", config.model, slow)
        with timeline.phase("tokenizer"):
            text = None if tokens_only else Text(opened.checkpoint)
            if text is not None:
                opened.check_vocabulary(text)
        with timeline.phase("weights"):
            dtype = DTYPES[config.dtype]
            weights = Weights(opened.checkpoint, opened.kernels, opened.device, dtype, config.weights, progress)
            model = build_model(opened.checkpoint.config, weights, plan.max_model_len)
            draft = opened.load_draft()
        with timeline.phase("warm-up"):
            eos_ids = opened.checkpoint.eos_ids
            engine = cls(
                model, opened.kernels, config, text, pages=plan.pages, eos_ids=eos_ids, draft=draft, groupings=stored
            )
            engine.memory, engine.timeline = plan, timeline
            engine.path, engine.matrices = opened.checkpoint.path, tuple(weights.matrices)
            engine.replica = opened.replica
            engine.warm_up()
        if config.schedule not in (schedules.CHUNKED, schedules.PREFILL_FIRST):
            with timeline.phase("lanes"):
                engine.phases = start_phases(engine)
        on_lanes = engine.phases is not None and config.schedule != schedules.DISAGGREGATED  # which rehearsed theirs
        if config.rehearse and opened.kernels.name == "gpu" and not on_lanes:
            with timeline.phase("rehearsal"):
                engine.rehearse()
        return engine

    def rehearse(self) -> None:
        """Compile what steps of every size want of a GPU, and capture them, before somebody waits for it."""
        config, runner = self.config, self.runner
        if not (config.graphs and capture(runner, config.max_step_tokens, shapes(runner, config.max_batch))):
            rehearse(runner, decodes(config.max_batch, self.max_model_len, self.kv.tokens))
        rehearse(runner, chunks(min(config.max_step_tokens, self.max_model_len)), config.graphs)

    def warm_up(self) -> None:
        """Run one token, and drafts of a few, so that first-use costs are paid before the first request. Raises
        RuntimeError where the model, or the one that drafts, cannot run.
        """
        speculates = self.speculator is not None
        count = 1 if self.speculator is None else 2 + self.speculator.most
        self.add(Request("warm-up", (0,), SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)))
        outputs: list[Output] = []
        while self.has_work:
            outputs += self.step()
        if outputs[-1].error:
            raise RuntimeError(f"The model cannot run: {outputs[-1].error}")
        if speculates and self.speculator is None:
            raise RuntimeError(f"The draft model {self.config.speculate} cannot run; the log says why.")
        if self.device.type != "cpu":  # where it would take seconds, and compile nothing
            self._look_once()
        if self.prefix is not None:
            self.prefix.clear()
        if self.rooms is not None:
            self.rooms.clear()
        self._reset_counts()

    def _look_once(self) -> None:
        """Let the tower see a small picture, where there is somebody to prepare one."""
        if self.sight is None or not isinstance(self.text, Text):
            return
        for picture in self.text.sample_pictures():
            with torch.inference_mode():
                self.sight.features(picture)
        self.sight.clear()

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for one that can never run, QueueFull for one too many."""
        self.check(request)
        self._check_queue(request)
        layout = self._layout(request)
        compiling = self._compile(request)
        params, prompt = request.params, len(request.prompt)
        limit = self.max_model_len
        if request.pool is not None:
            limit = prompt
        elif params.max_tokens is not None:
            limit = min(limit, prompt + params.max_tokens)
        stops = frozenset(params.stop_token_ids)
        if compiling is not None or not params.ignore_eos:  # where a grammar allows an end token, it means the end
            stops |= frozenset(self.eos_ids)
        count = 1 if request.pool is not None else params.n
        sequences = []
        for index in range(count):
            seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed + index
            sequence = Sequence(request, index, self._order, limit, self.config.page_size, seed, stops, layout)
            if self.text is not None and request.pool is None:
                sequence.detokenizer = self.text.detokenizer(request)
            sequences.append(sequence)
        self._order += 1
        self._requests[request.id] = sequences
        self._pictures += pixels_of(request)
        self._prompts += prompt
        self.scheduler.add(sequences, blocked=compiling is not None)
        if compiling is not None:
            self._compiling[request.id] = compiling
            self._release_compiled()

    def _layout(self, request: Request) -> Layout | None:
        """Where a request's pictures stand. Raises ValueError where they cannot be seen."""
        if self.sight is None:
            if request.pictures:
                raise ValueError(f"pictures has {len(request.pictures)} entries, and this model reads text only.")
            return None
        token_id = self.sight.tower.token_id
        if not request.pictures and token_id not in request.prompt:
            return None
        for picture in request.pictures:
            picture.check()
        turned = bool(self.model.config.rope_sections)
        if turned and not all(picture.axes[0] for picture in request.pictures):
            raise ValueError("pictures has one without rows and columns; allowed: what this model's preparation makes.")
        return Layout(request.prompt, request.pictures, token_id, turned)

    def _compile(self, request: Request) -> "Compiling | None":
        """Begin to compile a request's grammar. Raises ValueError for one that is over the limits."""
        grammar = request.params.grammar
        if grammar is None or request.pool is not None:
            return None
        if self.grammars is None:
            vocabulary: Any = self.text
            if vocabulary is None:
                raise ValueError("grammar is set, but this engine has no tokenizer; give it one, or leave it out.")
            self.grammars = Grammars(vocabulary, self.vocab_size, self.eos_ids)
        until = self.clock() + self.grammars.limits.compile_seconds
        return Compiling(self.grammars.prepare(grammar), until, self.grammars.too_slow(grammar))

    def _release_compiled(self) -> None:
        """Let requests run whose grammar is compiled, and end those whose grammar cannot be."""
        now = self.clock()
        for id, compiling in list(self._compiling.items()):
            if compiling.matcher.done() or now >= compiling.until:
                del self._compiling[id]
                self._begin_grammar(self._requests[id], compiling)

    def _begin_grammar(self, sequences: list[Sequence], compiling: "Compiling") -> None:
        reason = compiling.failure
        for sequence in list(sequences):
            if reason is None:
                sequence.matcher = compiling.matcher.result().copy()
            elif sequence.status is not Status.FINISHED:
                self._ready.append(self._end(sequence, FinishReason.ERROR, reason))
        self.scheduler.release(sequences)

    def check(self, request: Request) -> None:
        """Raises ValueError, naming the field, for a request that can never run here."""
        if request.id in self._requests:
            raise ValueError(f"id is {request.id!r}, which a request in progress has already; use another.")
        if not request.prompt:
            raise ValueError("prompt is empty; give at least one token.")
        request.params.check(self.vocab_size)
        check_targets(request.ttft, request.tpot)
        if request.pool is not None and request.pool not in POOLS:
            raise ValueError(f"pool is {request.pool!r}; allowed: {', '.join(POOLS)}, or none to generate.")
        longest = self.max_model_len - (request.pool is None)
        if len(request.prompt) > longest:
            raise ValueError(
                f"prompt is {len(request.prompt)} tokens long; allowed: up to {longest} "
                f"(a context of {self.max_model_len} tokens, prompt and answer together). "
                "Shorten it, or start the engine with a larger max_model_len or kv_memory."
            )
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"prompt has token id {wrong}; allowed: 0 to {self.vocab_size - 1}. "
                "Was it made by another model's tokenizer?"
            )

    def _check_queue(self, request: Request) -> None:
        limits, waiting = self.scheduler.limits, self.scheduler.waiting
        tokens = self.scheduler.queue.tokens
        vacant = limits.rows - self.scheduler.running
        if waiting - vacant >= limits.max_queue:
            raise self._queue_full(f"{waiting} requests wait, {limits.max_queue} may")
        pixels = pixels_of(request)
        if pixels and self._pictures and self._pictures + pixels > MOST_PICTURES:
            raise self._queue_full(f"pictures of {self._pictures} bytes are held, and {MOST_PICTURES} may be")
        if limits.max_queue_tokens and waiting and tokens + len(request.prompt) > limits.max_queue_tokens:
            raise self._queue_full(
                f"{tokens} prompt tokens wait, {limits.max_queue_tokens} may, and this prompt has {len(request.prompt)}"
            )

    def _queue_full(self, why: str) -> QueueFull:
        """Another try is worthwhile when the tokens that wait could be computed at the speed so far: in 1 to 60 s."""
        speed = self._computed / self._seconds if self._seconds else 0.0
        seconds = max(1, min(60, math.ceil(self.scheduler.queue.tokens / speed))) if speed else 1
        return QueueFull(f"The queue is full: {why}. Try again in {seconds} s.", seconds)

    def abort(self, request_id: str) -> bool:
        """End a request in whatever phase it is; its last outputs come with the next step. False: there is no such
        request.
        """
        sequences = self._requests.get(request_id)
        if sequences is None:
            return False
        for sequence in list(sequences):
            if sequence.status is not Status.FINISHED:
                self._ready.append(self._end(sequence, FinishReason.ABORT))
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        going = self._inflight or (self.phases is not None and self.phases.underway is not None)
        return bool(self.scheduler.unfinished or going or self._ready)

    def stats(self) -> Stats:
        return Stats(
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
            pages=self.pool.total,
            pages_used=self.pool.used,
            pages_cached=self.pool.idle,
            pages_free=self.pool.free,
            steps=self._steps,
            step_seconds=self._seconds,
            last_step_seconds=self._last_seconds,
            preemptions=self.scheduler.preemptions,
            errors=self._errors,
            prompt_tokens=self._prompts,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            drafted_tokens=self._drafted + (self.speculator.drafted if self.speculator is not None else 0),
            accepted_tokens=self._accepted + (self.speculator.accepted if self.speculator is not None else 0),
            recomputed_rows=sum(kernels.recomputed for kernels in (self.kernels, *self.elsewhere)),
            pictures=self.sight.looked if self.sight is not None else 0,
            **(self.phases.stats() if self.phases is not None else {}),
        )

    def facts(self) -> Facts:
        return inspect.facts(self)

    def describe(self) -> str:
        """Who runs and who waits, for people who look for a fault; may be called from any thread."""
        return inspect.describe(self)

    # Steps

    def rest(self) -> None:
        """To be called before what came is given to `add`, by who has requests come while others run: waits where the
        next step can be planned later without a device that waits.
        """
        if self.pace is None or not self._inflight or self.speculator is not None:
            return
        if self.phases is None or self.phases.riding:
            self._rested = self.pace.rest(self._inflight[-1][1].ready)

    def step(self) -> list[Output]:
        """Launch the next step, and return what the oldest one not yet read brought (with lookahead 1, the one
        before).
        """
        begin, self._rested = time.perf_counter() - self._rested, 0.0
        for sequence in self.scheduler.expired(self.clock()):
            self._ready.append(self._end(sequence, FinishReason.ABORT, "Its deadline has passed."))
        if self._compiling:
            self._release_compiled()
        outputs, self._ready = self._ready, []
        if self.phases is not None:
            self.phases.turn(outputs)
            self._took(begin)
            return outputs
        drafts = self._draft(outputs) if self.speculator is not None else None
        drafting, ahead = time.perf_counter() - begin, bool(self._inflight)
        plan = self._plan(drafts)
        if plan.admitted:
            self._start(plan.admitted)
        if plan.entries:
            self._queued(plan, self._launch(plan, outputs))
        elif not self._inflight and self.scheduler.unfinished:
            self._stand_still(outputs)
        lookahead = 0 if plan.drafts else self.config.lookahead
        if len(self._inflight) > lookahead or (self._inflight and not plan.entries):
            self._collect(outputs)
        if self.speculator is not None and plan.entries and ahead == bool(self._inflight):
            self.speculator.took(plan.tokens, time.perf_counter() - begin - drafting, not ahead)
        if not self._inflight:
            self.masks.start([s for s in self.scheduler.decoding if s.matcher is not None])
        self._took(begin)
        return outputs

    def _plan(self, drafts: dict[Sequence, tuple[int, ...]] | None) -> StepPlan:
        """The next step; prompts first, and by themselves, where the schedule says so."""
        if self.config.schedule != schedules.PREFILL_FIRST:
            return self.scheduler.plan(drafts)
        plan = self.scheduler.plan_prefills()
        return plan if plan.entries else self.scheduler.plan_decodes()

    def _took(self, begin: float) -> None:
        self._last_seconds = time.perf_counter() - begin
        self._seconds += self._last_seconds

    def _draft(self, outputs: list[Output]) -> dict[Sequence, tuple[int, ...]]:
        """Guesses for the next plan, after the steps in flight were read if need be. A drafter that fails is given
        up: answers do not depend on it.
        """
        assert self.speculator is not None
        try:
            if self._inflight and not self.speculator.worthwhile(self.scheduler):
                return {}
            while self._inflight:
                self._collect(outputs)
            return self.speculator.draft(self.scheduler, self.masks.settle)
        except Exception:
            logger.exception("drafting failed; the engine goes on without speculation")
            self._drafted, self._accepted = self.speculator.drafted, self.speculator.accepted
            self.speculator = None
            return {}

    def _start(self, admitted: tuple[Sequence, ...]) -> None:
        """Sequences got their row; those that had one before, until they were preempted, have started already."""
        now = self.clock()
        new = [s for s in admitted if not s.started]
        for sequence in new:
            sequence.started = now
        if new and self.on_start is not None:
            self.on_start(list(dict.fromkeys(s.request.id for s in new)))

    def _launch(self, plan: StepPlan, outputs: list[Output], runner: Runner | None = None) -> "Pending | Isolated":
        """Queue a step. Where grammars decide what may be sampled, the steps before it are read in between: after its
        model was launched, before its tokens are drawn. runner: of a lane, where there are lanes.
        """
        self._steps += 1
        runner = runner or self.runner
        try:
            runner.prepare(plan)
        except Exception as error:
            return self._unprepared(plan, error, runner)
        held = [e.sequence for e in plan.entries if e.sample and e.sequence.matcher is not None]
        if held and not self._inflight:
            further: list[Held] = [
                a for e in plan.entries if e.drafts and e.sequence.matcher is not None for a in ahead(e)
            ]
            self.masks.start([*held, *further])
        forward: Forward | Exception
        try:
            forward = runner.forward(plan.entries, plan.decodes)
        except Exception as error:
            forward = error
        while held and self._inflight:
            self._collect(outputs)
        try:
            if isinstance(forward, Exception):
                raise forward
            return runner.sample(forward, self._mask(held, outputs))
        except Exception as error:
            logger.warning("%s failed: %s", plan, error, exc_info=error)
            return self._isolate(plan, error, outputs, runner)

    def _queued(self, plan: StepPlan, launched: "Pending | Isolated") -> None:
        """A step is in flight."""
        self._inflight.append((plan, launched))
        if self.pace is not None:
            self.pace.launched()

    def _unprepared(self, plan: StepPlan, error: Exception, runner: Runner) -> "Isolated":
        logger.exception("%s could not be prepared", plan)
        runner.settle()
        return failed(plan, error)

    def _mask(self, held: list[Sequence], outputs: list[Output]) -> Mask | None:
        """What these sequences may sample next; those whose grammar broke down end."""
        if not held:
            return None
        going = [s for s in held if s.status is not Status.FINISHED]
        mask = self.masks.result(going)
        for sequence in going:
            if (sequence, 0) in mask.errors:
                reason = f"The grammar cannot be followed further: {mask.errors[sequence, 0]}"
                outputs.append(self._end(sequence, FinishReason.ERROR, reason))
        return mask

    def _isolate(self, plan: StepPlan, error: Exception, outputs: list[Output], runner: Runner) -> "Isolated":
        """Run the entries of a failed step one by one, so that only those at fault end."""
        runner.settle()
        if len(plan.entries) == 1 and not plan.drafts:
            return Isolated(plan, [error])
        results: list[Pending | Exception] = []
        for i, entry in enumerate(e.undrafted() for e in plan.entries):  # a wrong guess is nobody's fault
            held = [entry.sequence] if entry.sample and entry.sequence.matcher is not None else []
            try:
                for before in self._lost(entry):
                    runner.forward((before,), 0)
                    runner.settle()
                forward = runner.forward((entry,), int(i < plan.decodes))
                pending = runner.sample(forward, self._mask(held, outputs))
                pending.wait()  # there are buffers for the inputs of few steps in flight
                results.append(pending)
            except Exception as own:
                runner.settle()
                results.append(own)
        return Isolated(plan, results)

    def _lost(self, entry: Entry) -> Iterator[Entry]:
        """What must be computed anew before an entry is run again: nothing, or where its chunk may have taken the
        places in its room of the tokens before it, all of its text up to there.
        """
        if self.rooms is None or entry.length <= self.rooms.slack:
            return
        for start in range(0, entry.start, entry.length):
            yield entry._replace(start=start, length=min(entry.length, entry.start - start), sample=False)

    def _collect(self, outputs: list[Output]) -> None:
        """Read the oldest step in flight."""
        plan, pending = self._inflight.popleft()
        tokens = tokens_of(plan, pending)
        if self.pace is not None:
            self.pace.read(bool(self._inflight))
        self._retire(plan, tokens, outputs)
        if self.phases is not None:
            self.phases.stepped(plan)

    def _read(self, plan: StepPlan, pending: "Pending | Isolated", outputs: list[Output]) -> None:
        """Read a step that is none of those in flight."""
        self._retire(plan, tokens_of(plan, pending), outputs)

    def _retire(self, plan: StepPlan, tokens: Tokens, outputs: list[Output]) -> None:
        """A step brought this: its sequences go on, or end."""
        self.scheduler.retire_step()
        for place, entry in enumerate(plan.entries):
            self._computed += entry.length
            if not self.scheduler.retire(entry, computed=place not in tokens.errors):
                continue
            try:
                output = self._advance(entry, place, tokens)
            except Exception as error:
                logger.exception("request %s failed", entry.sequence.request.id)
                output = self._end(entry.sequence, FinishReason.ERROR, f"{type(error).__name__}: {error}")
            if output is not None:
                outputs.append(output)

    def _advance(self, entry: Entry, place: int, tokens: Tokens) -> Output | None:
        """Take an entry's results into its sequence; an output where it brought a token or the end."""
        sequence = entry.sequence
        if place in tokens.errors:
            return self._end(sequence, FinishReason.ERROR, tokens.errors[place])
        if sequence.want_prompt_logprobs:
            sequence.prompt_logprobs += tokens.prompt_logprobs.get(place, ())
        if not entry.sample:
            return self._pooled(entry, tokens.pooled[place]) if place in tokens.pooled else None
        before = len(sequence.tokens)
        text = ""
        more = tokens.more.get(place, ())
        for token in (tokens.ids[place], *more):
            new, finish, stop = self._append(sequence, token)
            text += new
            if finish is not None:
                break
        brought = len(sequence.tokens) - before
        self._generated += brought
        if brought > 1:
            self.scheduler.accept(sequence, brought - 1)
        if self.speculator is not None:
            self.speculator.read(sequence, before, len(entry.drafts), len(more))
        if finish is FinishReason.ERROR:
            return self._end(sequence, finish, f"The grammar cannot be followed further: {sequence.matcher.error}")
        if finish is not None:
            self._finish(sequence)
        first = before == sequence.prompt_length
        return Output(
            sequence.request.id,
            sequence.index,
            tuple(sequence.tokens[before:]),
            text,
            tuple(tokens.logprobs[place][:brought]) if place in tokens.logprobs else (),
            self._prompt_logprobs(sequence) if sequence.want_prompt_logprobs else None,
            finish,
            stop,
            queue_seconds=max(0.0, sequence.started - sequence.request.arrival) if first else 0.0,
            cached_tokens=sequence.cached_tokens if first else 0,
        )

    def _append(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Give a sequence its next token: new text, and the reason and what stopped it where it ends; ERROR where
        its grammar cannot go on.
        """
        sequence.tokens.append(token)
        finish: FinishReason | None = None
        stop: str | int | None = None
        if token in sequence.stops:
            finish, stop = FinishReason.STOP, token
        elif sequence.matcher is not None and not sequence.matcher.advance(token):
            finish = FinishReason.ERROR
        elif sequence.matcher is not None and sequence.matcher.stopped:
            finish = FinishReason.STOP
        elif len(sequence.tokens) >= sequence.limit:
            finish = FinishReason.LENGTH
        text = ""
        if sequence.detokenizer is not None:
            if stop is None or sequence.request.params.include_stop:
                text, found = sequence.detokenizer.feed(token)
                if found is not None:
                    finish, stop = FinishReason.STOP, found
            if finish is not None:
                text += sequence.detokenizer.flush()
        return text, finish, stop

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[Any, ...]:
        sequence.want_prompt_logprobs = False
        return (None, *sequence.prompt_logprobs)

    def _pooled(self, entry: Entry, part: torch.Tensor) -> Output | None:
        """Add one chunk's hidden state; the embedding once all of the prompt is in."""
        sequence = entry.sequence
        mean = sequence.request.pool == "mean"
        sequence.pooled = sequence.pooled + part if mean and sequence.pooled is not None else part
        if sequence.done < sequence.prompt_length:
            return None
        state = sequence.pooled / sequence.prompt_length if mean else sequence.pooled
        self._finish(sequence)
        return Output(
            sequence.request.id,
            sequence.index,
            finish=FinishReason.STOP,
            cached_tokens=sequence.cached_tokens,
            embedding=tuple(state.tolist()),
        )

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        siblings = self._requests[sequence.request.id]
        if all(s.status is Status.FINISHED for s in siblings):
            del self._requests[sequence.request.id]
            self._pictures -= pixels_of(sequence.request)
            self._compiling.pop(sequence.request.id, None)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Output:
        """Finish a sequence from outside; text withheld so far is given out."""
        self._errors += reason is FinishReason.ERROR
        self._finish(sequence)
        text = ""
        if sequence.detokenizer is not None and reason is not FinishReason.ERROR:
            text = sequence.detokenizer.flush()
        return Output(sequence.request.id, sequence.index, text=text, finish=reason, error=error)

    def _stand_still(self, outputs: list[Output]) -> None:
        """Nothing runs though something is to be done: wait for a grammar, or give up."""
        outputs += self._give_up()
        if self._compiling and not outputs:
            wait([c.matcher for c in self._compiling.values()], COMPILE_WAIT, "FIRST_COMPLETED")

    def _give_up(self) -> list[Output]:
        """Nothing can be planned though nothing runs: the scheduler's invariants exclude it, but better one error
        than a standstill.
        """
        head = self.scheduler.queue.head()
        if head is None:
            return []
        logger.error("%r cannot be scheduled: %s", head, self.stats())
        return [self._end(head, FinishReason.ERROR, "The request could not be scheduled; please report this.")]


@dataclass(frozen=True, slots=True)
class Compiling:
    """A request that waits for its grammar until the clock shows `until`."""

    matcher: "Future[Matcher]"
    until: float
    too_slow: str

    @property
    def failure(self) -> str | None:
        """Why there is no matcher."""
        if not self.matcher.done():
            return self.too_slow
        error = self.matcher.exception()
        return None if error is None else str(error)


def pixels_of(request: Request) -> int:
    """Bytes that its pictures hold."""
    return sum([len(picture.pixels) for picture in request.pictures])


class Isolated:
    """A step whose entries were run one by one, or not at all: a `Pending` that knows which failed."""

    def __init__(self, plan: StepPlan, results: "list[Pending | Exception]") -> None:
        self.plan = plan
        self.results = results

    def ready(self) -> bool:
        return True

    def result(self) -> Tokens:
        tokens = Tokens([-1] * len(self.results))
        for place, outcome in enumerate(self.results):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                tokens.take(place, outcome.result())
            except Exception as error:
                tokens.errors[place] = f"{type(error).__name__}: {error}"
        return tokens


def tokens_of(plan: StepPlan, pending: Pending | Isolated) -> Tokens:
    """What a step brought, once the device is done with it."""
    try:
        return pending.result()
    except Exception as error:
        return failed(plan, error).result()


def failed(plan: StepPlan, error: Exception) -> Isolated:
    """A step of which nothing could be run."""
    return Isolated(plan, [error] * len(plan.entries))
