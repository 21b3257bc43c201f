"""One batch at a time over a grid of batch sizes and contexts: time per output token (TPOT) and prefill.

TPOT = (time of a run of n tokens - time of a run of 1 token) / (n - 1); greedy, end tokens ignored, prompts of random
ids that never repeat, no prefix cache; medians over rounds. The 1-token run is the prefill. Engines that can be in
memory together take turns round by round; the others are measured one after the other, and the result says so.
"""

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tenfold.bench.command import portable
from tenfold.bench.engines import Engine, NotInstalled, Setup, make_engine
from tenfold.bench.fit import Point, Session, sessions
from tenfold.bench.floor import Sizes, copy_bandwidth, floor_ms, matmul_ceiling, model_sizes
from tenfold.bench.hardware import machine
from tenfold.bench.worker import Worker
from tenfold.weights.shapes import at_least_positions, is_shape

TOKENS = 129
WARM_UP = 9  # tokens of a first run at a point, which is not counted
Say = Callable[[str], None]

# What `--against` takes, and the engines it means: of transformers what a user gets from `generate`, and its best.
PEERS = {
    "hf": ("hf-generate", "hf-compiled"),
    "hf-generate": ("hf-generate",),
    "hf-loop": ("hf",),
    "hf-compiled": ("hf-compiled",),
    "vllm": ("vllm",),
    "llama.cpp": ("llama.cpp",),
}
ALONE = ("vllm", "llama.cpp")  # cannot share a GPU with others
# Eager steps of transformers are bound by launches and take the same time each: fewer of them say as much.
FEWER_TOKENS = {"hf-generate": 33, "hf": 33}
# A minute of compilation for every point: measured where issue and literature quote it.
COMPILED_CONTEXT = 1024


@dataclass(slots=True)
class Row:
    """What one engine took at one point: seconds of whole runs, a sample a round. first: seconds to the first token in
    the long runs, where the engine tells. beside: engines that took turns with it. lengths: of prompts that differ.
    """

    engine: str
    batch: int
    context: int
    tokens: int
    long: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def point(self) -> Point:
        return Point(self.batch, self.context, self.tokens, tuple(self.lengths))

    @property
    def tpot_samples(self) -> list[float]:
        """Milliseconds per output token, one a round; empty for a prefill alone."""
        return [1e3 * (a - b) / (self.tokens - 1) for a, b in zip(self.long, self.short)]

    @property
    def prefill_samples(self) -> list[float]:
        """Milliseconds of the prefill, one a round."""
        return [1e3 * s for s in self.short]

    @property
    def inside(self) -> float | None:
        """Milliseconds per output token after the first inside the long runs: a check of `tpot` that does without the
        short runs, for engines that tell when their first token came.
        """
        if not self.first or len(self.first) != len(self.long):
            return None
        return statistics.median(1e3 * (a - b) / (self.tokens - 1) for a, b in zip(self.long, self.first))

    @property
    def tpot(self) -> float | None:
        samples = self.tpot_samples
        return statistics.median(samples) if samples else None

    @property
    def prefill(self) -> float:
        return statistics.median(self.prefill_samples)


@dataclass(frozen=True, slots=True)
class Skip:
    engine: str
    batch: int
    context: int
    why: str


@dataclass(slots=True)
class Result:
    """Rows of one model on one machine. copy_gbs, matmul_tflops: this device's own limits, measured in the same run.
    floors: milliseconds of a decode step at [batch, context].
    """

    model: str
    machine: dict[str, str] = field(default_factory=dict)
    command: str = ""
    copy_gbs: float = 0.0
    matmul_tflops: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    floors: list[tuple[int, int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> str:
        """What our weights were quantised to, empty where they were as the model has them."""
        mode = str(self.settings.get("tenfold", {}).get("weights", "auto"))
        return "" if mode == "auto" else mode

    def row(self, engine: str, batch: int, context: int, decode: bool = True) -> Row | None:
        """The row of an engine at a point: of a decode, or whichever has the prefill."""
        found = [r for r in self.rows if (r.engine, r.batch, r.context) == (engine, batch, context)]
        return next((r for r in found if r.long or not decode), None)

    def floor(self, batch: int, context: int) -> float | None:
        return next((ms for b, c, ms in self.floors if (b, c) == (batch, context)), None)

    def skip(self, engine: str, point: Point, why: str, say: Say) -> None:
        self.skipped.append(Skip(engine, point.batch, point.context, why))
        say(f"{point} {engine}: skipped, {why}")

    def plain(self) -> dict[str, Any]:
        return {"suite": "single"} | asdict(self)


def loaded(data: Mapping[str, Any]) -> Result:
    """The result that `plain` made."""
    values = {k: v for k, v in data.items() if k != "suite"}
    values["sizes"] = Sizes(**data["sizes"]) if data.get("sizes") else None
    values["rows"] = [Row(**row) for row in data["rows"]]
    values["skipped"] = [Skip(**skip) for skip in data["skipped"]]
    values["floors"] = [(row[0], row[1], row[2]) for row in data["floors"]]
    return Result(**values)


def grid(batches: Sequence[int], contexts: Sequence[int], prefills: Sequence[int], tokens: int) -> list[Point]:
    """Decode points, then prefills of one prompt that no decode point has anyway."""
    points = [Point(b, c, tokens) for c in contexts for b in batches]
    return points + [Point(1, p) for p in prefills if Point(1, p, tokens) not in points]


def measure(
    engines: Mapping[str, Engine],
    points: Sequence[Point],
    rounds: int,
    result: Result,
    say: Say = print,
    *,
    vocabulary: int = 32_000,
    deadline: float = float("inf"),
    patience: float = float("inf"),
    done: Callable[[], None] = lambda: None,
) -> None:
    """Add a row for each engine and point to `result`, the engines in turn and their order turned around every round.
    What fails is skipped with its reason. deadline: `time.monotonic()` after which no point is begun. patience:
    seconds of one point after which it gets no further round. done: called after each point.
    """
    for number, point in enumerate(points):
        if time.monotonic() > deadline:
            for name in engines:
                result.skip(name, point, "the time was up", say)
            continue
        rows = {}
        for name, engine in engines.items():
            own = replace(point, tokens=min(point.tokens, FEWER_TOKENS.get(name, point.tokens)))
            why = obstacle(name, engine, own)
            if not why and (row := warmed(engine, name, own, number, vocabulary, result, say)):
                rows[name] = row
            elif why:
                result.skip(name, point, why, say)
        begin = time.monotonic()
        for i in range(rounds):
            if i and time.monotonic() - begin > patience:
                say(f"{point}: {i} of {rounds} rounds, which took {time.monotonic() - begin:.0f} s")
                break
            order = list(rows) if i % 2 == 0 else list(reversed(rows))
            for name in order:
                try:
                    sample(engines[name], rows[name], 1000 * (number + 1) + 2 * i, vocabulary)
                except Exception as error:
                    result.skip(name, point, brief(error), say)
                    del rows[name]
        for name, row in rows.items():
            row.beside = [other for other in rows if other != name]
            result.rows.append(row)
            say(line(row, result))
        done()


def obstacle(name: str, engine: Engine, point: Point) -> str:
    """Why an engine cannot be measured at a point, "" where it can."""
    if name == "hf-compiled" and (point.context > COMPILED_CONTEXT or point.tokens == 1):
        return f"it compiles anew for every shape; measured up to context {COMPILED_CONTEXT} only"
    if engine.capacity is not None and sum(point.prompts) + point.batch * point.tokens > engine.capacity:
        return f"its KV cache holds {engine.capacity} tokens"
    return ""


def warmed(
    engine: Engine, name: str, point: Point, number: int, vocabulary: int, result: Result, say: Say
) -> Row | None:
    """An empty row after a run that is not counted; None, and a skip, where it fails."""
    try:
        engine.generate(prompts_of(point, 1000 * (number + 1) - 1, vocabulary), min(point.tokens, WARM_UP))
    except Exception as error:
        result.skip(name, point, brief(error), say)
        return None
    return Row(name, point.batch, point.context, point.tokens, lengths=list(point.lengths))


def sample(engine: Engine, row: Row, seed: int, vocabulary: int) -> None:
    """One long and one short run."""
    point = row.point
    if row.tokens > 1:
        timing = engine.generate(prompts_of(point, seed, vocabulary), row.tokens)
        row.long.append(timing.total)
        if timing.decode:
            row.first.append(timing.prefill)
    row.short.append(engine.generate(prompts_of(point, seed + 1, vocabulary), 1).total)


def prompts_of(point: Point, seed: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, other ones for each seed."""
    rng = random.Random(f"{seed} {point.batch} {point.context}")
    return [rng.choices(range(vocabulary), k=length) for length in point.prompts]


def brief(error: Exception) -> str:
    """An error in a line. Of a long one both ends: messages begin with the reason, logs end with it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else f'{text[:250]} ... {text[-140:]}'}"


def line(row: Row, result: Result) -> str:
    parts = [f"{row.point!s:<11} {row.engine:12}"]
    if row.tpot is not None:
        low, high = min(row.tpot_samples), max(row.tpot_samples)
        parts.append(f"TPOT {row.tpot:8.3f} ms ({low:.3f} to {high:.3f})")
        if floor := result.floor(row.batch, row.context):
            parts.append(f"floor {floor:.2f} ms ({100 * floor / row.tpot:.0f} %)")
    if row.inside is not None:
        parts.append(f"inside {row.inside:.3f} ms")
    parts.append(f"prefill {row.prefill:.1f} ms")
    return "  ".join(parts)


# From a model's name to a result


def engines_of(peers: Sequence[str]) -> list[str]:
    """Ours and those that peers' names mean, each once. Raises ValueError."""
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"against is {peer!r}; allowed: {', '.join(PEERS)}.")
    return list(dict.fromkeys(["tenfold", *(engine for peer in peers for engine in PEERS[peer])]))


def device_of(name: str) -> str:
    """The device a setting names, "auto" resolved. Raises ValueError."""
    from tenfold.engine.opened import pick_device

    return str(pick_device(name))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. engines: of `engines_of`. tuning: by engine, fields of EngineConfig for ours,
    arguments of the constructor for peers. peer_path: folders where a peer's packages lie, for its process alone.
    """

    model: str
    engines: tuple[str, ...]
    points: tuple[Point, ...]
    rounds: int = 3
    device: str = "cpu"
    threads: int = 0
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    peer_path: str = ""
    deadline: float = float("inf")
    patience: float = float("inf")

    @property
    def context(self) -> int:
        return max(p.context + p.tokens for p in self.points)


def run(
    plan: Plan, say: Say = print, done: Callable[[Result], None] = lambda result: None, command: str = ""
) -> Result:
    """Measure a plan. done: called with the result so far after each point. command: that would do it again. A shape
    whose contexts are too short gets longer ones.
    """
    if is_shape(plan.model):
        plan = replace(plan, model=at_least_positions(plan.model, plan.context))
    result = Result(portable(plan.model), machine(plan.device), command)
    result.settings = {name: dict(own) for name, own in plan.tuning.items()}
    sizes = result.sizes = model_sizes(plan.model, plan.device, plan.tuning.get("tenfold"))
    result.copy_gbs = copy_bandwidth(plan.device)
    result.matmul_tflops = matmul_ceiling(plan.device, 8192 if plan.device != "cpu" else 1024)
    decodes = [p for p in plan.points if p.tokens > 1]
    result.floors = [
        (p.batch, p.context, floor_ms(sizes, p.batch, sum(p.prompts) / p.batch, result.copy_gbs)) for p in decodes
    ]
    say(f"{plan.model}: copies at {result.copy_gbs:.0f} GB/s, matrix products at {result.matmul_tflops:.1f} TFLOP/s")
    gpu = plan.device.startswith("cuda")
    if gpu:
        _on_gpu(plan, sizes, result, say, done)
    else:
        _side_by_side(plan, Session(plan.engines, plan.points), result, say, done)
    fewer = {r.engine: r.tokens for r in result.rows if r.long and r.tokens < max(p.tokens for p in plan.points)}
    result.notes += [
        f"{name} made {count} tokens a run, its steps taking the same time" for name, count in fewer.items()
    ]
    return result


def _on_gpu(plan: Plan, sizes: Sizes, result: Result, say: Say, done: Callable[[Result], None]) -> None:
    import torch

    together = [name for name in plan.engines if name not in ALONE]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(plan.device)[0]
    parts, missing = sessions(together, plan.points, sizes, free) if together else ([], [])
    for name, point in missing:
        result.skip(name, point, f"it needs more than the {free / 1e9:.0f} GB that are free", say)
    for part in parts:
        with _in_process(plan, part, result, say) as engines:
            if engines:
                _measure(plan, engines, part.points, result, say, done)
    for name in (n for n in plan.engines if n in ALONE):
        result.notes.append(f"{name} ran in a process of its own with {plan.rounds} rounds, after the others")
        _side_by_side(plan, Session((name,), plan.points), result, say, done)


@contextmanager
def _in_process(plan: Plan, part: Session, result: Result, say: Say) -> Iterator[dict[str, Engine]]:
    """The engines of a session in this process, without those that do not start; their memory is free afterwards."""
    import torch

    engines: dict[str, Engine] = {}
    try:
        for name in part.engines:
            say(f"loading {name} for {len(part.points)} points, {part.cached} tokens of KV cache")
            try:
                engines[name] = make_engine(name, _setup(plan, name, part))
            except RuntimeError as error:
                _without(name, part, error, result, say)
        yield engines
    finally:
        engines.clear()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _side_by_side(plan: Plan, part: Session, result: Result, say: Say, done: Callable[[Result], None]) -> None:
    """The engines of a session, each in a process of its own."""
    workers: dict[str, Worker] = {}
    try:
        for name in part.engines:
            say(f"starting {name}")
            try:
                workers[name] = Worker(name, _setup(plan, name, part), plan.peer_path if name in ALONE else "")
            except RuntimeError as error:
                _without(name, part, error, result, say)
        told = [note for worker in workers.values() for note in worker.told()]
        result.notes += [note for note in told if note not in result.notes]
        if workers:
            _measure(plan, workers, part.points, result, say, done)
    finally:
        for worker in workers.values():
            worker.close()


def _without(name: str, part: Session, error: RuntimeError, result: Result, say: Say) -> None:
    """Skip an engine that did not start at every point of a session, and say why once."""
    for note in getattr(error, "__notes__", ()):
        say(note)  # a peer's message may do no more than point to its log
    why = str(error) if isinstance(error, NotInstalled) else brief(error)
    say(f"{name}: skipped, {why}")
    for point in part.points:
        result.skip(name, point, why, lambda text: None)


def _setup(plan: Plan, name: str, part: Session) -> Setup:
    cached = part.cached if plan.device != "cpu" and name == "tenfold" else 0
    return Setup(
        plan.model, plan.threads, part.batch, part.context, plan.device, cached, dict(plan.tuning.get(name, {}))
    )


def _measure(
    plan: Plan,
    engines: Mapping[str, Engine],
    points: Sequence[Point],
    result: Result,
    say: Say,
    done: Callable[[Result], None],
) -> None:
    measure(
        engines,
        points,
        plan.rounds,
        result,
        say,
        vocabulary=result.sizes.vocab if result.sizes else 2,
        deadline=plan.deadline,
        patience=plan.patience,
        done=lambda: done(result),
    )
