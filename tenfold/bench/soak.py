"""A soak of the engine in this process: `python -m tenfold.bench.soak --model shape:llama-3-8b --minutes 9 --out FILE`;
`--merge FILE FILE ...` says what several runs prove together.

Requests of every kind arrive at random (Poisson, at a rate that follows what the engine bears), share beginnings, are
cancelled at random, and meet so little KV memory that preemptions happen. Samples of pages and memory are taken all
along. At the end every request must have had exactly one end for each of its sequences, no page may be held, and no
memory may have grown. `--judged N`: so many greedy answers are held against what the model says of their tokens when
nothing else runs. `--wander SECONDS`, with `--set schedule=phases`: the border between prompts and answers moves to
where chance wants it, so often.
"""

import argparse
import faulthandler
import heapq
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from tenfold.base.config import EngineConfig
from tenfold.bench.case import slope
from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.command import again, save, settings
from tenfold.bench.engines import engine_config
from tenfold.bench.floor import model_sizes
from tenfold.bench.hardware import machine
from tenfold.bench.lengths import Lengths, parse
from tenfold.bench.serving import resident
from tenfold.bench.vocabulary import Bytes
from tenfold.engine.core import Engine
from tenfold.engine.grammar import Grammars
from tenfold.engine.phases.controller import Decision, Observed, Split, Targets
from tenfold.engine.phases.lanes import GreenLanes
from tenfold.engine.rehearsal import chunks, rehearse
from tenfold.engine.request import FinishReason, Grammar, Logprob, Output, QueueFull, Request, SamplingParams
from tenfold.ops.gpu import green, nvrtc
from tenfold.ops.gpu.graphs import MADE
from tenfold.weights.shapes import at_least_positions, is_shape

PATIENCE = 30.0  # seconds without a step until the engine hangs
CROWD = 8  # longest sequences that the KV memory holds, where nobody says otherwise
CANCELLED = 60  # turns after which a request is cancelled, on average
LEAST_MINUTES = 30.0  # of all runs of a model together
MOST_GROWTH = 32.0  # MiB in the second half of a run
# Nats that a greedy token may lie below the best: steps of other sizes round otherwise, in 16 bits by up to 0.41 among
# 129 answers of Llama-3-8B with random weights (H200, 2026-11-29). A wrong token lies several below.
LOOSE, LOOSE_32 = 1.0, 0.05
AT_ONCE = 8  # answers that are judged at one time
RIDING = 512  # tokens of prompts in a step of answers, where a wandering border lets them ride
PREFIXES = 12  # shared beginnings at a time
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """seconds: of arrivals, of `rate` requests a second at first. every: seconds between samples. settings: of
    EngineConfig. judged: greedy answers that are judged in the end, at most. wander: seconds between moves of the
    border between phases, 0 for none.
    """

    model: str
    device: str
    seconds: float
    rate: float
    prompt: Lengths
    answer: Lengths
    every: float = 2.0
    seed: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    judged: int = 0
    wander: float = 0.0

    @property
    def longest(self) -> int:
        return self.prompt.high + self.answer.high

    def config(self) -> EngineConfig:
        """With KV memory for CROWD of the longest sequences, unless the settings say how much."""
        model = at_least_positions(self.model, self.longest) if is_shape(self.model) else self.model
        sizes = {"max_batch": 64, "max_model_len": self.longest, "max_queue": 64}
        config = engine_config(self.settings, model=model, device=self.device, **sizes)
        if "kv_memory" in self.settings:
            return config
        token = model_sizes(model, self.device, self.settings).kv_token
        return replace(config, kv_memory=CROWD * (self.longest + config.page_size) * token)


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds since the begin; pages; bytes (allocated, reserved: of the GPU, 0 on a CPU); counts since the begin;
    graphs, modules: CUDA graphs captured by then, and compiled sources loaded.
    """

    seconds: float
    pages_used: int
    pages_cached: int
    allocated: int
    reserved: int
    resident: int
    steps: int
    preemptions: int
    running: int
    waiting: int
    tokens: int
    graphs: int = 0
    modules: int = 0


@dataclass(slots=True)
class Result:
    """What a run was and what came of it. ends: sequences by their finish reason. faults: what must not happen."""

    model: str
    machine: dict[str, str]
    command: str
    settings: dict[str, Any]
    minutes: float = 0.0
    pages: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    cancelled: int = 0
    pages_held: int = -1
    slopes: dict[str, float] = field(default_factory=dict)  # MiB an hour over the second half
    growth: dict[str, float] = field(default_factory=dict)  # MiB, last sample over the one in the middle
    prefix_hit_tokens: int = 0
    judged: int = 0  # greedy answers
    farthest: float = 0.0  # nats that a token of theirs was below the best
    border_changes: int = 0
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.kinds.values())

    @property
    def preemptions(self) -> int:
        return self.samples[-1].preemptions if self.samples else 0

    @property
    def steps(self) -> int:
        return self.samples[-1].steps if self.samples else 0

    @property
    def passed(self) -> bool:
        return not self.faults and self.pages_held == 0

    def line(self) -> str:
        slopes = ", ".join(
            f"{name} {self.growth.get(name, 0.0):+.1f} MiB ({value:+.1f} MiB/h)" for name, value in self.slopes.items()
        )
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        faults = "; ".join(self.faults[:5]) or "no fault"
        return (
            f"{'passed' if self.passed else 'FAILED'}: {self.minutes:.1f} min, {self.requests} requests ({ends}; "
            f"{self.refused} refused, {self.cancelled} cancelled), {self.steps} steps, {self.preemptions} preemptions, "
            f"{self.pages_held} pages held at the end; {self.also()}{slopes}; {faults}"
        )

    def also(self) -> str:
        """What only some runs look at."""
        judged = f"{self.judged} greedy answers judged, at most {self.farthest:.3f} nats below the best; "
        moved = f"{self.border_changes} moves of the border; "
        return judged * bool(self.judged) + moved * bool(self.border_changes)

    def plain(self) -> dict[str, Any]:
        return {"suite": "soak", "lines": [self.line()]} | asdict(self)


def loaded(data: Mapping[str, Any]) -> Result:
    """The result that `plain` made."""
    own = {f.name: data[f.name] for f in fields(Result) if f.name in data}  # older files have fewer
    return Result(**own | {"samples": [Sample(**sample) for sample in data["samples"]]})


class Crowd:
    """Requests as random people send them. The same seed sends the same."""

    def __init__(self, plan: Plan, vocabulary: int, grammars: bool) -> None:
        self.plan = plan
        self.vocabulary = vocabulary
        self.rng = random.Random(plan.seed)
        self.kinds = [kind for kind in KINDS if grammars or "grammar" not in kind]
        self.count = 0
        self._prefixes = [self._tokens(plan.prompt.high // 2) for _ in range(PREFIXES)]

    def _tokens(self, count: int) -> list[int]:
        return self.rng.choices(range(self.vocabulary), k=count)

    def next(self) -> tuple[str, Request]:
        """A kind and a request of it; the kinds take turns."""
        kind, rng = self.kinds[self.count % len(self.kinds)], self.rng
        self.count += 1
        length = self.plan.prompt.draw(rng)
        if rng.random() < 0.02:
            self._prefixes[rng.randrange(PREFIXES)] = self._tokens(self.plan.prompt.high // 2)
        prompt = rng.choice(self._prefixes)[: rng.randrange(length)] if rng.random() < 0.5 else []
        prompt = prompt + self._tokens(length - len(prompt))
        params = SamplingParams(max_tokens=self.plan.answer.draw(rng), temperature=0.0, ignore_eos=True)
        request = Request(f"{self.plan.seed}-{self.count}", tuple(prompt), params)
        return kind, KINDS[kind](request, rng, self.vocabulary)


def sampling(**own: Any) -> Callable[[Request, random.Random, int], Request]:
    """Requests with these parameters; a function among them is given the generator and the vocabulary."""

    def made(request: Request, rng: random.Random, vocabulary: int) -> Request:
        given = {name: value(rng, vocabulary) if callable(value) else value for name, value in own.items()}
        return replace(request, params=replace(request.params, **given))

    return made


def late(request: Request, rng: random.Random, vocabulary: int) -> Request:
    return replace(request, deadline=time.monotonic() + rng.random())


def pooled(request: Request, rng: random.Random, vocabulary: int) -> Request:
    return replace(request, pool="mean")


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}, "required": ["a"]}'
KINDS: dict[str, Callable[[Request, random.Random, int], Request]] = {
    "greedy": sampling(),
    "sampled": sampling(temperature=0.8, top_p=0.9, top_k=40, seed=lambda rng, _: rng.randrange(1 << 30)),
    "copies": sampling(temperature=1.0, n=lambda rng, _: rng.randint(2, 4)),
    "penalties": sampling(
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        logit_bias=lambda rng, vocabulary: {rng.randrange(vocabulary): -5.0},
    ),
    "stops": sampling(
        temperature=1.0, min_tokens=1, stop_token_ids=lambda rng, size: tuple(rng.sample(range(size), 8))
    ),
    "logprobs": sampling(logprobs=3, prompt_logprobs=1),
    "greedy again": sampling(),
    "late": late,
    "pooled": pooled,
    "copies, greedy": sampling(n=2),
    "grammar, schema": sampling(temperature=1.0, grammar=Grammar("json_schema", SCHEMA)),
    "grammar, pattern": sampling(temperature=1.0, n=2, grammar=Grammar("regex", "[a-f]{2,40}( [0-9]{1,9})*")),
}


class Watch:
    """Calls `hung` once when nobody called `beat` for `patience` seconds."""

    def __init__(self, patience: float, hung: Callable[[], None]) -> None:
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(patience, hung), daemon=True)
        self._thread.start()

    def beat(self) -> None:
        self._beat = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, patience: float, hung: Callable[[], None]) -> None:
        while not self._stop.wait(patience / 10):
            if time.monotonic() - self._beat > patience:
                hung()
                return


class Wandering:
    """A controller that moves the border to where chance wants it; in every third place prompts ride in the steps of
    answers.
    """

    def __init__(self, splits: Sequence[Split], seed: int) -> None:
        self.splits = list(splits)
        self.targets = Targets(1.0, 1.0)
        self._rng = random.Random(seed)

    def decide(self, seen: Observed, now: Split) -> Decision:
        split = self._rng.choice([one for one in self.splits if one != now] or [now])
        return Decision(split, "a soak lets it wander", RIDING if self._rng.random() < 1 / 3 else 0)


class Soak:
    """One run on one engine, whose only user it is."""

    def __init__(self, engine: Engine, plan: Plan, result: Result, watch: Watch, say: Callable[[str], None]) -> None:
        self.engine, self.plan, self.result, self.watch, self.say = engine, plan, result, watch, say
        self.crowd = Crowd(plan, engine.vocab_size, grammars_of(engine))
        self.rng = random.Random(plan.seed + 1)
        self.open: dict[str, set[int]] = {}  # sequences without an end, by request
        self.limits: dict[str, int] = {}  # most tokens of an answer, by request
        self.tokens: Counter[tuple[str, int]] = Counter()
        self.cancels: list[tuple[float, str]] = []  # heap of turns and requests
        self.greedy: dict[str, tuple[tuple[int, ...], list[int]]] = {}  # prompts and answers to judge
        self.turns = 0
        self.before = engine.stats()  # what the warm-up counted
        self.rate = plan.rate
        self.begin = time.monotonic()

    def run(self) -> None:
        """Arrivals for plan.seconds, then nothing until all have ended."""
        due, sampled = self.begin, self.begin
        end = self.begin + self.plan.seconds
        while (now := time.monotonic()) < end:
            while due <= now:
                self.arrive()
                due += self.rng.expovariate(self.rate)
            self.turn()
            if now - sampled >= self.plan.every:
                sampled = now
                self.sample()
                self.follow()
        while self.engine.has_work:
            self.turn()
        self.sample()
        self.close()
        self.judge()

    def follow(self) -> None:
        """More arrivals while hardly anybody waits, fewer once the queue is long: the engine stays crowded."""
        waiting, most = self.engine.stats().waiting, self.engine.config.max_queue
        self.rate *= 1.2 if waiting < most // 8 else 0.85 if waiting > most // 2 else 1.0

    def turn(self) -> None:
        """Cancel who is to be cancelled, and one step."""
        self.turns += 1
        while self.cancels and self.cancels[0][0] <= self.turns:
            _, name = heapq.heappop(self.cancels)
            self.result.cancelled += self.engine.abort(name)
        if self.engine.has_work:
            for output in self.engine.step():
                self.take(output)
        else:
            time.sleep(0.001)
        self.watch.beat()

    def arrive(self) -> None:
        kind, request = self.crowd.next()
        try:
            self.engine.add(request)
        except QueueFull:
            self.result.refused += 1
            return
        count = 1 if request.pool else request.params.n
        self.open[request.id] = set(range(count))
        self.limits[request.id] = request.params.max_tokens or 0
        self.result.kinds[kind] = self.result.kinds.get(kind, 0) + 1
        if kind in ("greedy", "greedy again") and len(self.greedy) < self.plan.judged:
            self.greedy[request.id] = request.prompt, []
        if self.rng.random() < 0.12:
            heapq.heappush(self.cancels, (self.turns + self.rng.expovariate(1 / CANCELLED), request.id))

    def take(self, output: Output) -> None:
        """Hold an output against what was asked."""
        name, index = output.request_id, output.index
        if index not in self.open.get(name, ()):
            self.result.faults.append(f"{name}[{index}] was told something that it did not wait for")
            return
        self.tokens[name, index] += len(output.tokens)
        if name in self.greedy:
            self.greedy[name][1].extend(output.tokens)
        if self.tokens[name, index] > self.limits[name]:
            self.result.faults.append(f"{name}[{index}] got more tokens than it asked for")
        if output.finish is None:
            return
        self.result.ends[output.finish] = self.result.ends.get(output.finish, 0) + 1
        if output.finish is FinishReason.ERROR:
            self.result.faults.append(f"{name}[{index}] failed: {output.error}")
        if output.finish is FinishReason.LENGTH and self.tokens[name, index] != self.limits[name]:
            self.result.faults.append(f"{name}[{index}] ended by length after {self.tokens[name, index]} tokens")
        del self.tokens[name, index]
        self.open[name].discard(index)
        if not self.open[name]:
            del self.open[name], self.limits[name]

    def sample(self) -> None:
        stats, gpu = self.engine.stats(), self.engine.device.type == "cuda"
        found = Sample(
            round(time.monotonic() - self.begin, 3),
            stats.pages_used,
            stats.pages_cached,
            torch.cuda.memory_allocated(self.engine.device) if gpu else 0,
            torch.cuda.memory_reserved(self.engine.device) if gpu else 0,
            resident(os.getpid()),
            stats.steps - self.before.steps,
            stats.preemptions - self.before.preemptions,
            stats.running,
            stats.waiting,
            stats.generated_tokens - self.before.generated_tokens,
            MADE.graphs,
            nvrtc.modules(),
        )
        self.result.samples.append(found)
        if len(self.result.samples) % 10 == 1:
            self.say(told(found, stats.pages))

    def close(self) -> None:
        """What is left when all is over."""
        result, stats = self.result, self.engine.stats()
        result.minutes = (time.monotonic() - self.begin) / 60
        result.pages, result.pages_held = stats.pages, stats.pages_used
        result.prefix_hit_tokens = stats.prefix_hit_tokens - self.before.prefix_hit_tokens
        result.faults += [f"{name} never ended" for name in self.open]
        if stats.running or stats.waiting:
            result.faults.append(f"{stats.running} run and {stats.waiting} wait after the end")
        if self.engine.prefix is not None:
            self.engine.prefix.clear()
        if (free := self.engine.stats().pages_free) != stats.pages:
            result.faults.append(f"{free} of {stats.pages} pages are free once the prefix cache is cleared")
        if not result.preemptions:
            result.faults.append("nobody was preempted: there was too much KV memory for this load")
        result.slopes, result.growth = slopes(result.samples), growth(result.samples)
        result.border_changes = 0 if self.engine.phases is None else self.engine.phases.changes

    def judge(self) -> None:
        """Hold greedy answers against what the model says of their tokens when it reads prompt and answer, nothing else
        under way and nothing cached. What is wrong then is read once more by itself, to tell who was: the answer or
        this.
        """
        asked = [name for name, (_, answer) in self.greedy.items() if answer]
        for at in range(0, len(asked), AT_ONCE):
            some = asked[at : at + AT_ONCE]
            for name, said in zip(some, self.said(some)):
                self.result.judged += 1
                wrong = self.hold(name, said)
                if wrong:
                    again = self.hold(name, *self.said([name]))
                    self.result.faults.append(f"{wrong}; read again: {again or 'nothing is wrong'}")

    def said(self, names: Sequence[str]) -> list[Sequence[Logprob | None]]:
        """What the model says of the tokens of these answers but their last, all read in the same steps."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
        for name in names:
            prompt, answer = self.greedy[name]
            self.engine.add(Request(f"judge {name}", (*prompt, *answer[:-1]), params))
        ends: dict[str, Output] = {}
        while self.engine.has_work:
            ends |= {output.request_id: output for output in self.engine.step() if output.finish is not None}
            self.watch.beat()
        return [(ends[f"judge {name}"].prompt_logprobs or ())[len(self.greedy[name][0]) :] for name in names]

    def hold(self, name: str, said: Sequence[Logprob | None]) -> str:
        """What is wrong with an answer of which that is said; nothing: the empty text."""
        answer, loose = self.greedy[name][1][:-1], LOOSE_32 if self.engine.config.dtype == "float32" else LOOSE
        if len(said) != len(answer):
            return f"{name} has {len(answer)} tokens to judge, of which {len(said)} were judged"
        for i, (token, one) in enumerate(zip(answer, said)):
            below = max((p for _, p in one.top), default=0.0) - one.logprob if one is not None else 0.0
            self.result.farthest = max(self.result.farthest, below)
            if one is None or one.token != token or below > loose:
                return f"{name} says token {token} at place {i}, {below:.2f} nats below the best"
        return ""


def wandering(engine: Engine, plan: Plan) -> None:
    """Let chance move the border of an engine. Raises ValueError where there is none to move."""
    phases = engine.phases
    if phases is None or not isinstance(phases.lanes, GreenLanes) or not phases.lanes.splits:
        raise ValueError(
            "--wander moves the border between prompts and answers, and this engine has none; give --set "
            "schedule=phases, on a GPU with green contexts."
        )
    phases.controller = Wandering([*phases.lanes.splits, phases.lanes.now], plan.seed)
    phases.tick = plan.wander
    for part, runner in phases.lanes.every_decode():  # where prompts ride only because chance wants it
        with green.on(part):
            rehearse(runner, chunks(RIDING + engine.config.max_batch), engine.config.graphs)


def grammars_of(engine: Engine) -> bool:
    """Whether requests may have grammars: llguidance is installed. An engine without a tokenizer gets `Bytes`."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    if engine.text is None:
        engine.grammars = Grammars(Bytes(), engine.vocab_size, engine.eos_ids)
    return True


def told(s: Sample, pages: int) -> str:
    return (
        f"{s.seconds:6.0f} s  {s.running:3} run {s.waiting:3} wait  {s.pages_used}+{s.pages_cached} of {pages} pages  "
        f"{s.steps} steps  {s.preemptions} preemptions  {s.tokens} tokens  GPU {s.allocated / MIB:.0f} of "
        f"{s.reserved / MIB:.0f} MiB  process {s.resident / MIB:.0f} MiB" + f"  {s.graphs} graphs" * bool(s.graphs)
    )


WHERE = {"allocated": "GPU memory allocated", "reserved": "GPU memory reserved", "resident": "process"}


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """MiB an hour by least squares over the second half, when caches are full."""
    later = samples[len(samples) // 2 :]
    hours = [s.seconds / 3600 for s in later]
    return {name: slope(hours, [getattr(s, field) / MIB for s in later]) for field, name in WHERE.items()}


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """MiB more at the end than in the middle."""
    middle = samples[len(samples) // 2]
    return {name: (getattr(samples[-1], field) - getattr(middle, field)) / MIB for field, name in WHERE.items()}


def later(samples: Sequence[Sample], of: str) -> int:
    """Graphs captured or modules loaded since the middle."""
    return getattr(samples[-1], of) - getattr(samples[len(samples) // 2], of)


def run(
    plan: Plan,
    say: Callable[[str], None] = print,
    command: str = "",
    patience: float = PATIENCE,
    hung: Callable[[Result], None] = lambda result: None,
) -> Result:
    """The soak of a freshly loaded engine. hung: called from a thread of its own, with what there is until then, when
    no step ended for `patience` seconds.
    """
    config = plan.config()
    engine = Engine.load(config, tokens_only=is_shape(config.model))
    result = Result(config.model, machine(plan.device), command, asdict(engine.config))

    def stuck() -> None:
        result.faults.append(f"hung: no step in {patience:.0f} s; {engine.describe()}")
        faulthandler.dump_traceback(sys.stderr)
        hung(result)

    if plan.wander:
        wandering(engine, plan)
    warm_up(engine, plan)
    watch = Watch(patience, stuck)
    try:
        Soak(engine, plan, result, watch, say).run()
    finally:
        watch.close()
    return result


def warm_up(engine: Engine, plan: Plan) -> None:
    """Run a few requests of each kind, and the longest ones, so that compiling kernels is no pause of the soak, and
    memory that the largest steps take is not taken for growth.
    """
    for lengths in (plan.prompt, Lengths("uniform", plan.prompt.high, plan.prompt.high)):
        own = replace(plan, seed=plan.seed + 1000, prompt=lengths)
        crowd = Crowd(own, engine.vocab_size, grammars_of(engine))
        for _ in range(2 * len(crowd.kinds)):
            engine.add(crowd.next()[1])
        while engine.has_work:
            engine.step()
    if engine.prefix is not None:
        engine.prefix.clear()


# Several runs


def claims_of(results: Sequence[Result]) -> list[Claim]:
    """What runs of one model prove together: minutes add up, faults and pages too, and the worst slopes count. A run
    that failed leaves the minutes unmet, however many the others have.
    """
    found = []
    for model in dict.fromkeys(name_of(result) for result in results):
        runs = [result for result in results if name_of(result) == model]
        command = "; ".join(dict.fromkeys(run.command for run in runs))
        of = f"{len(runs)} runs of {', '.join(f'{r.minutes:.1f}' for r in runs)} min, each an engine of its own: "
        of += f"{sum(r.requests for r in runs)} requests, {sum(r.steps for r in runs)} steps, "
        of += f"{sum(r.preemptions for r in runs)} preemptions, {sum(r.cancelled for r in runs)} cancelled, "
        of += f"{sum(r.pages_held for r in runs)} pages held, "
        faults = [fault for r in runs for fault in r.faults]
        if judged := sum(r.judged for r in runs):
            of += f"{judged} greedy answers judged, at most {max(r.farthest for r in runs):.2f} nats below the best, "
        if moves := sum(r.border_changes for r in runs):
            of += f"{moves} moves of the border, "
        note = of + (f"{len(faults)} faults: {faults[0]}" if faults else "no fault, no hang")
        what = f"minutes of soak without fault, {model}"
        good = sum(r.minutes for r in runs if r.passed)
        whole = claim("F9", what, good, "min", command, at_least=LEAST_MINUTES, kind="correctness", note=note)
        found.append(replace(whole, met=bool(whole.met) and all(r.passed for r in runs)))
        for where in WHERE.values():
            if where != WHERE["resident"] and not any(s.allocated for r in runs for s in r.samples):
                continue
            values = [r.growth[where] for r in runs if where in r.growth]
            if values:
                trends = ", ".join(f"{r.slopes[where]:+.1f}" for r in runs if where in r.slopes)
                note = f"each run's last sample less that of its middle; over that time {trends} MiB/h by least "
                note += "squares, which a run of minutes bounds only loosely"
                for of, made in (("graphs", "CUDA graphs were captured"), ("modules", "compiled kernels were loaded")):
                    if counts := [count for r in runs if (count := later(r.samples, of))]:
                        note += f"; {', '.join(map(str, counts))} {made} meanwhile"
                more: dict[str, Any] = {"at_most": MOST_GROWTH, "spread": (min(values), max(values)), "note": note}
                what = f"growth under soak, {where}, worst of {len(values)} runs, {model}"
                found.append(claim("F9", what, max(values), "MiB", command, **more))
    origin = results[0].machine if results else {}
    return [signed(made, origin) for made in found]


def name_of(result: Result) -> str:
    model, schedule = result.model.removeprefix("shape:").partition("@")[0], result.settings.get("schedule", "chunked")
    return model if schedule == "chunked" else f"{model}, {schedule}"


def files(paths: Sequence[str]) -> Iterator[Result]:
    for path in paths:
        yield loaded(json.loads(Path(path).read_text()))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.soak", description=__doc__)
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="say what these runs prove together, and end")
    parser.add_argument("--model", default="shape:llama-3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second at first")
    parser.add_argument("--prompts", default="16-1024", help="their lengths: N, A-B or lognormal:MEDIAN:SIGMA")
    parser.add_argument("--answers", default="1-384")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=1, help="another one for each piece of a long soak")
    parser.add_argument("--judged", type=int, default=0, help="greedy answers to judge in the end")
    parser.add_argument("--wander", type=float, default=0.0, help="seconds between moves of the border of phases")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds without a step until it hangs")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    parser.add_argument("--out", default="bench/results/gpu/soak.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.merge:
        for made in claims_of(list(files(given.merge))):
            print(f"{'met' if made.met else 'NOT met'}: {made.what}: {made.value:g} {made.unit}. {made.note}")
        return 0
    plan = Plan(
        *(given.model, given.device, 60 * given.minutes, given.rate, parse(given.prompts), parse(given.answers)),
        every=given.every,
        seed=given.seed,
        settings=settings(given.set),
        judged=given.judged,
        wander=given.wander,
    )
    out = Path(given.out)

    def hung(result: Result) -> None:
        save(out, result.plain(), given.commit)
        os._exit(3)  # whatever hangs would hold up a proper end too

    result = run(plan, lambda text: print(text, flush=True), again(parser, given), given.patience, hung)
    save(out, result.plain(), given.commit)
    print(result.line())
    return int(not result.passed)


if __name__ == "__main__":
    sys.exit(main())
