"""Prompts and answers on one GPU, by every schedule in turn: who keeps both targets, and up to which load.

    python -m tenfold.bench.phases --model shape:llama-3-8b --lengths PAIRS.json --rates 10,16,22,28,34 --out FOLDER

Requests arrive at random moments (Poisson); their lengths are drawn from a file of [prompt, answer] pairs, tokens are
random. All arms run in one engine, over one KV store, one after the other at every rate, in an order that turns around:

    chunked[:N]      chunks of prompts in the steps of decodes (N tokens a step)
    prefill-first    decodes wait for prompts
    shared           two streams without a split
    N                prompts have N multiprocessors, answers the others
    staircase, paper, adaptive    a controller moves the border
    disaggregated    prompts on another GPU
    ARM@arrival      the same, but that prompts go in the order they came; others overtake as the engine does by default
    ARM@early        the same, but that a step is planned as soon as the one before it begins (--no-late-planning)
    vllm[:N]         vLLM where it can be imported (--peer-path), with N tokens a step, in a process beside this one

Targets are multiples of the mean time that such requests take alone: 7.5 (tight) and 10 (loose), as in the paper, where
each set of requests has its own. Controllers aim at the tight ones unless --ttft and --tpot say otherwise. An arm that
was hopeless at a rate is left out of higher ones.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tenfold.bench.command import again, save, settings, unlike
from tenfold.bench.engines import Answer, Job, Peer, engine_config
from tenfold.bench.hardware import machine
from tenfold.bench.load import percentile
from tenfold.bench.peers.vllm import STEP_TOKENS, beside_ours
from tenfold.bench.phases_sim import Ask
from tenfold.bench.worker import Worker
from tenfold.engine.core import Engine
from tenfold.engine.memory import GIB, GPU_BATCH, usual_step
from tenfold.engine.phases import table
from tenfold.engine.phases.controller import Split, Targets
from tenfold.engine.phases.lanes import Lanes, OneStream
from tenfold.engine.phases.latency import Stairs
from tenfold.engine.phases.loop import Phases
from tenfold.engine.phases.start import apart, rehearse_lanes, said, stairs_of
from tenfold.engine.request import Request, SamplingParams
from tenfold.weights.shapes import at_least_positions, is_shape

ARMS = "chunked,chunked:1024,prefill-first,shared,96,staircase,paper,adaptive"
ARRIVAL, EARLY = "@arrival", "@early"
PEER = "vllm"
SHARE = 0.8  # of what is free, for our weights and cache: the streams of a dozen lanes each keep memory of their own
TIGHT, LOOSE = 7.5, 10.0  # times what a request takes alone
HOPELESS = 0.6  # share of requests that keep the loose targets
FULL = ("chunked", "adaptive")  # arms whose throughput without contention is compared
ALONE, ALONE_LONG = 16, 4  # requests by which is measured what they take alone
FLIPS = 400  # changes of the split that are timed
MARGIN = 64  # tokens beside the longest request


def bare(arm: str) -> str:
    """An arm without the order in which it takes prompts, and without when it plans steps."""
    return arm.partition("@")[0]


def is_peer(arm: str) -> bool:
    return arm.partition(":")[0] == PEER


@dataclass(slots=True)
class Row:
    """An arm at a rate. tight, loose: share of requests that kept both targets; latency: mean seconds to the last
    token; percentiles of TTFT, TPOT and gaps between tokens, in ms, and in beside of those gaps in which a long prompt
    waited for its first token; moved: times the border moved; decisions: how often each split and size of chunks was
    decided on.
    """

    arm: str
    rate: float
    requests: int
    failed: int
    seconds: float
    tokens: int
    tight: float
    loose: float
    latency: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    itl: dict[str, float]
    beside: dict[str, float] = field(default_factory=dict)
    moved: int = 0
    decisions: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        return (
            f"{self.rate:6.2f}/s {self.arm:14} tight {self.tight:4.0%} loose {self.loose:4.0%}  "
            f"TTFT p90 {self.ttft['p90']:7.0f} p99 {self.ttft['p99']:7.0f}  TPOT p90 {self.tpot['p90']:6.1f}  "
            f"ITL p99 {self.itl['p99']:6.1f} ms  "
            + (f"beside long prompts {self.beside['p99']:6.1f} ms  " if self.beside else "")
            + f"latency {self.latency:6.2f} s  {self.tokens / self.seconds:6.0f} tok/s"
            + (f"  moved {self.moved}" if self.moved else "")
            + (f"  {self.failed} failed" if self.failed else "")
        )


@dataclass(slots=True)
class Result:
    """alone: milliseconds of a request by itself, to the first token and per token; flip_us: of a change of the split
    on the host; full: tokens a second of each arm where all requests are there at once; long: share of prompts of
    long_tokens.
    """

    model: str
    machine: dict[str, str]
    command: str = ""
    arms: list[str] = field(default_factory=list)
    alone: dict[str, float] = field(default_factory=dict)
    stairs: str = ""
    long: float = 0.0
    long_tokens: int = 0
    flip_us: float | None = None
    full: dict[str, list[float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return {"suite": "phases"} | asdict(self)

    def row(self, arm: str, rate: float) -> Row | None:
        return next((row for row in self.rows if (row.arm, row.rate) == (arm, rate)), None)


def loaded(data: Mapping[str, Any]) -> Result:
    """The result that `plain` made."""
    values = {k: v for k, v in data.items() if k != "suite"}
    return Result(**(values | {"rows": [Row(**row) for row in data["rows"]]}))


class Arms:
    """One engine under every schedule; peer: another engine, of the arm of that name."""

    def __init__(self, engine: Engine, names: Sequence[str], peer: Peer | None = None) -> None:
        """Raises ValueError for a name that is no arm."""
        self.engine = engine
        self.peer = peer
        self.moved, self.decisions = 0, dict[str, int]()
        self.names = list(names)
        self.limits, self.pace = engine.scheduler.limits, engine.pace
        gpu, experts = engine.device.type != "cpu", engine.model.config.experts is not None
        usual = usual_step(table.CHUNKED, engine.config.max_batch, gpu, experts)
        self.usual = min(self.limits.max_step_tokens, usual)  # tokens of a step
        self.stairs: Stairs | None = None
        self.lanes: Any = None
        self.total = getattr(engine.kernels, "sms", 1)
        self.apart = apart(engine) if table.DISAGGREGATED in map(bare, names) else None
        borders = [border for name in names if (border := self._border(name))]
        if borders and engine.device.type == "cuda":
            self._divide(borders)
        elif borders:
            self.lanes = OneStream(engine.runner)
        self._known = {name: self._make(name) for name in names if not is_peer(name)}

    @staticmethod
    def _border(name: str) -> str:
        """What `EngineConfig.border` is in an arm of phases; "" in others."""
        name = bare(name)
        return name if name in table.BORDERS or name.isdigit() else ""

    def runs_as(self, name: str) -> str:
        """What arms have in common that run the same captured steps: those on streams of their own are not warm when
        others are.
        """
        if is_peer(name) or bare(name) == table.DISAGGREGATED:
            return bare(name)
        border = self._border(name)
        return border if border not in (table.ADAPTIVE, table.SHARED) else table.SHARED

    def _divide(self, borders: Sequence[str]) -> None:
        from tenfold.engine.phases.lanes import GreenLanes

        kernels: Any = self.engine.kernels
        sizes = sorted({size for border in borders for size in table.splits_of(border, self.total)})
        self.lanes = GreenLanes(self.engine.runner, kernels, sizes)
        self.stairs = stairs_of(self.engine, self.lanes)
        rehearse_lanes(self.engine, self.lanes)

    def _make(self, name: str) -> tuple[str, int, Phases | None]:
        """Schedule, tokens of a step, phases."""
        kind, _, wanted = bare(name).partition(":")
        if border := self._border(name):
            tokens = min(self.limits.max_step_tokens, table.PREFILL_TOKENS + self.engine.config.max_batch)
            return table.PHASES, tokens, self._phases(border, self.lanes)
        if kind == table.DISAGGREGATED:
            if self.apart is None:
                raise ValueError("disaggregated cannot run here; the log says why. Leave it out.")
            return kind, self.usual, self.apart
        if kind not in (table.CHUNKED, table.PREFILL_FIRST) or (wanted and not wanted.isdigit()):
            raise ValueError(f"{name!r} is no arm; allowed: {ARMS}, chunked:TOKENS, or a number of multiprocessors.")
        return kind, int(wanted or self.usual), None

    def _phases(self, border: str, lanes: Lanes) -> Phases:
        controller = targets = None
        splits: list[Split] = getattr(lanes, "splits", [])
        if self.stairs is not None:
            targets = table.targets_of(self.engine.config, self.stairs, self.total)
            controller = table.make_controller(border, targets, splits, self.stairs)
        return Phases(self.engine, lanes, controller, targets=targets, stairs=self.stairs)

    def aim(self, targets: Targets) -> None:
        """What controllers aim at from now on."""
        self.engine.config = replace(self.engine.config, ttft=targets.ttft, tpot=targets.tpot)
        self._known = {name: self._make(name) for name in self._known}

    def serve(self, name: str, asks: Sequence[Ask], seed: int, one_by_one: bool = False) -> tuple[list[Answer], float]:
        """By this arm: what became of each request, and the seconds all took. `moved` and `decisions` tell of it."""
        self.moved, self.decisions = 0, {}
        if is_peer(name):
            return self._serve_elsewhere(name, asks, seed)
        phases = self.use(name)
        before = (phases.changes, phases.decisions.copy()) if phases is not None else None
        found = serve(self.engine, asks, seed, one_by_one)
        if phases is not None and before is not None:
            self.moved, self.decisions = phases.changes - before[0], dict(phases.decisions - before[1])
        return found

    def _serve_elsewhere(self, name: str, asks: Sequence[Ask], seed: int) -> tuple[list[Answer], float]:
        if self.peer is None:
            raise ValueError(f"{name} is an arm where vLLM can be imported: give --peer-path. Or leave it out.")
        prompts = prompts_of(self.engine.vocab_size, asks, seed)
        answers = self.peer.serve([Job(ask.arrival, prompt, ask.answer) for ask, prompt in zip(asks, prompts)])
        return answers, max((a.times[-1] for a in answers if a.times), default=0.0)

    def use(self, name: str) -> Phases | None:
        """The engine, with nothing to do, runs by this arm from now on."""
        engine = self.engine
        assert not engine.has_work
        schedule, tokens, phases = self._known[name]
        engine.config = replace(engine.config, schedule=schedule)
        overtake = 0.0 if ARRIVAL in name else self.limits.overtake
        engine.pace = None if EARLY in name else self.pace
        engine.scheduler.limits = replace(self.limits, max_step_tokens=tokens, overtake=overtake)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        engine.phases = phases
        if phases is not None:
            phases.begin()
        if phases is not None and phases is not self.apart:
            border = self._border(name)
            self.lanes.use(Split(int(border), self.total - int(border)) if border.isdigit() else self._begin())
        return phases

    def _begin(self) -> Split:
        return getattr(self.lanes, "shared", Split(1, 1))

    def flip_us(self) -> float | None:
        """Median microseconds of a change of the split."""
        splits = [*getattr(self.lanes, "splits", []), self._begin()]
        if len(splits) < 2:
            return None
        found = []
        for i in range(FLIPS):
            begin = time.perf_counter()
            self.lanes.use(splits[i % len(splits)])
            found.append(time.perf_counter() - begin)
        return 1e6 * statistics.median(found)


def drawn(
    pairs: Sequence[Sequence[int]], rate: float, seconds: float, seed: int, long: float = 0.0, long_tokens: int = 0
) -> list[Ask]:
    """Requests that arrive at random; a share of them has prompts of long_tokens."""
    draw, now, found = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(rate)) < seconds:
        prompt, answer = draw.choice(pairs)
        found.append(Ask(now, long_tokens if draw.random() < long else prompt, max(2, answer)))
    return found


def prompts_of(vocab_size: int, asks: Sequence[Ask], seed: int) -> list[tuple[int, ...]]:
    """Random tokens, a piece of one row for each request."""
    draw = random.Random(seed)
    tokens = draw.choices(range(min(vocab_size, 30_000)), k=max((a.prompt for a in asks), default=0) + len(asks))
    return [tuple(tokens[i : i + ask.prompt]) for i, ask in enumerate(asks)]


def serve(engine: Engine, asks: Sequence[Ask], seed: int, one_by_one: bool = False) -> tuple[list[Answer], float]:
    """What became of each, and the seconds all took. one_by_one: each comes when the one before is done."""
    prompts = prompts_of(engine.vocab_size, asks, seed)
    answers = [Answer(ask.arrival) for ask in asks]
    begin, coming, done = engine.clock(), 0, 0
    while done < len(asks):
        engine.rest()
        now = engine.clock() - begin
        while coming < len(asks) and (done == coming if one_by_one else asks[coming].arrival <= now):
            ask = asks[coming]
            if one_by_one:
                answers[coming].due = now
            params = SamplingParams(max_tokens=ask.answer, temperature=0.0, ignore_eos=True)
            engine.add(Request(str(coming), prompts[coming], params, arrival=begin + answers[coming].due))
            coming += 1
        if not engine.has_work:
            time.sleep(min(0.001, max(0.0, asks[coming].arrival - now)))
            continue
        for output in engine.step():
            answer = answers[int(output.request_id)]
            if output.tokens:
                answer.times.append(engine.clock() - begin)
                answer.sizes.append(len(output.tokens))
            if output.finish is not None:
                done += 1
                answer.error = output.error or ""
    return answers, engine.clock() - begin


def beside(asks: Sequence[Ask], answers: Sequence[Answer], tokens: int) -> list[float]:
    """Milliseconds between tokens of other answers while a prompt of so many tokens waited for its first one."""
    waits = [(a.due, a.times[0]) for ask, a in zip(asks, answers) if ask.prompt >= tokens > 0 and a.times]
    others = [a.times for ask, a in zip(asks, answers) if ask.prompt < tokens]
    gaps = [gap for times in others for gap in pairwise(times)]
    return [1e3 * (b - a) for a, b in gaps if any(a < end and begin < b for begin, end in waits)]


def row_of(
    arm: str,
    rate: float,
    answers: Sequence[Answer],
    seconds: float,
    alone: Mapping[str, float],
    long: Sequence[float] = (),
) -> Row:
    """long: gaps beside long prompts."""
    fine = [a for a in answers if not a.error and a.times]

    def kept(times: float) -> float:
        good = [a for a in fine if a.ttft <= times * alone["ttft"] and (a.tpot or 0.0) <= times * alone["tpot"]]
        return len(good) / len(answers)

    def shares(values: Sequence[float]) -> dict[str, float]:
        return {f"p{p}": percentile(values, p) for p in (50, 90, 99)}

    return Row(
        *(arm, rate, len(answers), len(answers) - len(fine), seconds, sum(a.tokens for a in fine)),
        *(kept(TIGHT), kept(LOOSE), statistics.fmean([a.times[-1] - a.due for a in fine]) if fine else float("inf")),
        *(shares([a.ttft for a in fine]), shares([a.tpot for a in fine if a.tpot is not None])),
        shares([gap for a in fine for gap in a.gaps]),
        shares(long) if long else {},
    )


def by_itself(
    engine: Engine, pairs: Sequence[Sequence[int]], long: float = 0.0, long_tokens: int = 0
) -> dict[str, float]:
    """Mean milliseconds to the first token and per token of requests that come one by one, of a mix in which a share
    has prompts of long_tokens.
    """
    asks = drawn(pairs, 1.0, 4.0 * ALONE, 1)[:ALONE]
    usual = _one_by_one(engine, asks)
    if not long:
        return usual
    few = [replace(ask, prompt=long_tokens) for ask in asks[:ALONE_LONG]]
    return {name: (1 - long) * usual[name] + long * value for name, value in _one_by_one(engine, few).items()}


def _one_by_one(engine: Engine, asks: Sequence[Ask]) -> dict[str, float]:
    for _ in range(2):  # a length runs plainly once and is recorded at its second time
        serve(engine, [replace(ask, answer=2) for ask in asks], 1, one_by_one=True)
    answers, _ = serve(engine, asks, 1, one_by_one=True)
    tpots = [t for a in answers if (t := a.tpot) is not None]
    return {"ttft": statistics.fmean(a.ttft for a in answers), "tpot": statistics.fmean(tpots)}


def run(
    engine: Engine,
    result: Result,
    pairs: Sequence[Sequence[int]],
    rates: Sequence[float],
    seconds: float,
    warm: float,
    full: int,
    rounds: int = 1,
    say: Callable[[str], None] = print,
    done: Callable[[Result], None] = lambda result: None,
    deadline: float = float("inf"),
    ttft: float = 0.0,
    tpot: float = 0.0,
    hopeless: float = 0.0,
    peer: Peer | None = None,
) -> Result:
    """seconds: of arrivals at each rate; warm: of a load before them that is not counted; full: requests that are there
    at once, for throughput. deadline: `time.monotonic()` after which no rate is begun. ttft, tpot: seconds that
    controllers aim at (0: the tight targets). hopeless: share of requests that keep the loose targets, below which an
    arm is left out of higher rates. What result holds already is not measured again.
    """
    arms = Arms(engine, result.arms, peer)
    if arms.stairs is not None:
        result.stairs = said(arms.stairs)
        say(result.stairs)
    result.flip_us = arms.flip_us() if result.flip_us is None else result.flip_us
    arms.use(next(name for name in result.arms if not is_peer(name)))
    result.alone = result.alone or by_itself(engine, pairs, result.long, result.long_tokens)
    say(f"alone: {result.alone['ttft']:.1f} ms to the first token, {result.alone['tpot']:.2f} ms a token")
    arms.aim(Targets(ttft or TIGHT * result.alone["ttft"] / 1e3, tpot or TIGHT * result.alone["tpot"] / 1e3))
    for name in {arms.runs_as(name): name for name in result.arms}.values():
        arms.serve(name, drawn(pairs, max(rates), warm, 99, result.long, result.long_tokens), 99)
    together = [Ask(0.0, ask.prompt, ask.answer) for ask in drawn(pairs, 1.0, 4.0 * full, 5)[:full]]
    off_on = [name for name in FULL if name in result.arms]
    for i in range(2 if full and not result.full else 0):
        for name in off_on if i % 2 == 0 else reversed(off_on):
            answers, took = arms.serve(name, together, 5)
            result.full.setdefault(name, []).append(sum(a.tokens for a in answers) / took)
    known = {(row.arm, row.rate) for row in result.rows}
    for turn, rate in enumerate(rate for _ in range(rounds) for rate in rates):
        left = [name for name in result.arms if (name, rate) not in known]
        if not left:
            continue
        if time.monotonic() > deadline:
            result.notes.append(f"{rate} requests a second: the time was up")
            continue
        asks = drawn(pairs, rate, seconds, turn, result.long, result.long_tokens)
        for name in left if turn % 2 == 0 else reversed(left):
            if any(row.arm == name and row.rate < rate and row.loose < hopeless for row in result.rows):
                result.notes.append(f"{name}: left out at {rate} requests a second, hopeless at fewer")
                continue
            answers, took = arms.serve(name, asks, turn)
            long = beside(asks, answers, result.long_tokens if result.long else 0)
            row = row_of(name, rate, answers, took, result.alone, long)
            row.moved, row.decisions = arms.moved, arms.decisions
            result.rows.append(row)
            say(row.line())
        done(result)
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        result.notes.append(f"{free / GIB:.1f} of {total / GIB:.1f} GiB of GPU memory were free at the end")
    return result


def load(model: str, device: str, longest: int, changes: Mapping[str, Any], arms: Sequence[str] = ()) -> Engine:
    """With room for the largest steps that an arm wants."""
    model = at_least_positions(model, longest) if is_shape(model) else model
    own: dict[str, Any] = {"max_model_len": longest, "prefix_cache": False, "max_queue": 1 << 20}
    named = (bare(arm).partition(":")[2] for arm in arms if not is_peer(arm))
    lane = table.PREFILL_TOKENS + batch_of(changes)
    most = max((int(tokens) for tokens in named if tokens.isdigit()), default=0)
    if most > lane or (torch.cuda.is_available() and device != "cpu"):
        own["max_step_tokens"] = max(most, lane)
    own["gpu_memory_utilization"] = SHARE
    return Engine.load(engine_config(changes, model=model, device=device, **own), tokens_only=True)


def batch_of(changes: Mapping[str, Any]) -> int:
    """Requests that a GPU computes together."""
    return engine_config(changes, model="").max_batch or GPU_BATCH


def start_peer(model: str, longest: int, arms: Sequence[str], packages: str, batch: int = GPU_BATCH) -> Worker | None:
    """vLLM, where it is one of the arms."""
    name = next((arm for arm in arms if is_peer(arm)), None)
    if name is None:
        return None
    return beside_ours(model, longest, packages, int(name.partition(":")[2] or STEP_TOKENS), batch)


def resumed(path: Path, begun: Result, say: Callable[[str], None] = print) -> Result:
    """What a file holds of the same measurement, `begun` where that was of another commit or torch. Raises ValueError
    where it is of another one.
    """
    found = loaded(json.loads(path.read_text()))
    for what, one, other in (
        ("command", found.command, begun.command),
        ("hardware", found.machine["hardware"], begun.machine["hardware"]),
    ):
        if one != other:
            raise ValueError(
                f"{path} was measured by another {what} ({one}, now {other}): --resume goes on with the same alone. "
                "Name another file with --name, or leave --resume out to write this one anew."
            )
    if changed := unlike(found.machine, begun.machine):
        say(f"{path} is measured anew: it was with {changed}")
        return begun
    found.notes = []  # of what is measured now there will be others
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tenfold.bench.phases", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lengths", type=Path, required=True, help="JSON: a list of [prompt, answer] in tokens")
    parser.add_argument("--arms", default=ARMS)
    parser.add_argument("--rates", default="10,16,22,28,34", help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals at each rate")
    parser.add_argument("--warm", type=float, default=4.0, help="seconds of load before, for arms of each kind")
    parser.add_argument("--full", type=int, default=128, help="requests that come at once, for throughput")
    parser.add_argument("--long", type=float, default=0.0, help="share of requests with long prompts")
    parser.add_argument("--long-tokens", type=int, default=8192)
    parser.add_argument("--ttft", type=float, default=0.0, help="seconds that controllers aim at; 0: the tight target")
    parser.add_argument("--tpot", type=float, default=0.0, help="likewise, per token after the first")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig")
    parser.add_argument("--peer-path", default="", help="folder with the packages of vLLM, for its process alone")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no rate is begun")
    parser.add_argument("--out", type=Path, help="folder for the JSON; `tenfold bench phases` adds tables and charts")
    parser.add_argument("--name", default="phases", help="of the file")
    parser.add_argument("--resume", action="store_true", help="go on with the rates that this file lacks")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    return parser


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Measure as a command line says; the file of the result, if it asks for one."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    began = time.monotonic()
    pairs = json.loads(given.lengths.read_text())
    most = max(sum(pair) for pair in pairs)
    if given.long:
        most = max(most, given.long_tokens + max(answer for _, answer in pairs))
    arms = given.arms.split(",")
    changes = settings(given.set)
    peer = start_peer(given.model, most + MARGIN, arms, given.peer_path, batch_of(changes))
    engine = load(given.model, given.device, most + MARGIN, changes, arms)
    where = machine(str(engine.device)) | ({"commit": given.commit} if given.commit else {})
    result = Result(given.model, where, again(parser, given), arms)
    result.long, result.long_tokens = given.long, given.long_tokens if given.long else 0
    path: Path | None = given.out and given.out / f"{given.name}.json"
    if given.resume and path and path.exists():
        result = resumed(path, result)

    def keep(result: Result) -> None:
        if path:
            save(path, result.plain(), given.commit)

    rates = [float(rate) for rate in given.rates.split(",")]
    run(
        *(engine, result, pairs, rates, given.seconds, given.warm, given.full),
        ttft=given.ttft,
        tpot=given.tpot,
        hopeless=HOPELESS,
        done=keep,
        deadline=began + given.limit,
        peer=peer,
    )
    keep(result)
    if peer is not None:
        peer.close()
    return path


if __name__ == "__main__":
    main()
