"""What KV formats take and how fast they decode: the same model over caches of every format, in turn.

    python -m tenfold.bench.kv --model shape:llama-2-7b --formats dense,fp8,int4,k2v2g128,k2v1.5g128 \
        --points 1x32768,8x8192 --out FOLDER

Contexts are not computed: their pages are filled with numbers, and decoding goes on from there, in the ordinary engine.
A format that cannot hold a point's context is left out there, with what would have to change. Attention is timed by
itself too: one layer, from a step's queries, keys and values to its result, at the same points.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tenfold.base.config import EngineConfig
from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.command import again, portable, save, settings
from tenfold.bench.fit import Point, points_of
from tenfold.bench.floor import GB, best_seconds, copy_bandwidth, model_sizes
from tenfold.bench.hardware import machine
from tenfold.bench.one_model import OneModel
from tenfold.cache.store import KVStore
from tenfold.engine.core import Engine
from tenfold.engine.memory import DTYPES, LEAST_TOKENS, MemoryPlan, fill, free_memory, kv_spec, plan_memory, share_of
from tenfold.engine.request import Request, SamplingParams
from tenfold.engine.scheduler import WATERMARK
from tenfold.engine.sequence import Sequence as Answer
from tenfold.nn.rope import rope_table
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads
from tenfold.ops.kv.layer import PackedLayer
from tenfold.serve.cli.terminal import columns

FORMATS = "dense,fp8,int4,skvq"
GRAPH_CALLS = 8
BAR = 30  # characters of the longest bar of a chart in the terminal
WARM_UP = 4  # tokens, of which the first are computed before a graph of the step is captured


@dataclass(slots=True)
class Row:
    """A format at a point. read: bytes of keys and values that a step reads; steps: milliseconds of a decode step, one
    for each round; skipped: why there are none. layer_read, layer_us: bytes and microseconds of the attention of one
    layer, 0 where it was not timed; memory: the plan of the engine.
    """

    format: str
    batch: int
    context: int
    read: int
    steps: list[float] = field(default_factory=list)
    skipped: str = ""
    layer_read: int = 0
    layer_us: float = 0.0
    memory: str = ""

    @property
    def median(self) -> float:
        return Figure(tuple(self.steps)).median


@dataclass(slots=True)
class Result:
    """formats: of each its name, bytes a token, bytes of a room and how many tokens fit beside the weights, where one
    sequence runs; changes: fields of EngineConfig, as NAME=VALUE.
    """

    model: str
    machine: dict[str, str]
    command: str = ""
    tokens: int = 0
    weights: int = 0
    streamed: int = 0
    copy_gbs: float = 0.0
    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the model, and how it differs."""
        return ", ".join((self.model.partition("@")[0], *(change.replace("=", " ") for change in self.changes)))

    def plain(self) -> dict[str, Any]:
        return {"suite": "kv"} | asdict(self)

    def gains(self, row: Row) -> Figure | None:
        """A step's time with a cache as computed, over the row's, round by round."""
        base = self.row("dense", row.batch, row.context)
        rounds = 0 if base is None else min(len(base.steps), len(row.steps))
        return paired_ratio(base.steps[:rounds], row.steps[:rounds]) if base is not None and rounds else None

    def gain(self, row: Row) -> float | None:
        """The median of `gains`."""
        found = self.gains(row)
        return None if found is None else found.median

    def layer_gain(self, row: Row) -> float | None:
        """The same of one layer's attention."""
        same = [r for r in self.rows if (r.format, r.batch, r.context) == ("dense", row.batch, row.context)]
        return same[0].layer_us / row.layer_us if same and same[0].layer_us and row.layer_us else None

    def row(self, format: str, batch: int, context: int) -> Row | None:
        found = [r for r in self.rows if (r.format, r.batch, r.context) == (format, batch, context) and r.steps]
        return found[0] if found else None


class Bench(OneModel):
    """Engines over one model, each with a cache of its own format."""

    def planned(self, format: str, batch: int, context: int) -> tuple[EngineConfig, MemoryPlan]:
        """Settings and memory of an engine; context: of each sequence. Raises ValueError."""
        opened = self.opened
        pages = pages_for(batch, context, opened.config.page_size)
        longest = -(-pages // batch) * opened.config.page_size
        config = replace(opened.config, kv_cache=format, max_batch=batch, max_model_len=longest)
        config = replace(config, kv_memory=self.asked.kv_memory)
        free = free_memory(opened.device) + (opened.weights if opened.device.type == "cuda" else 0)
        plan = plan_memory(opened.shape, opened.weights, config, free)
        if pages > plan.pages or plan.max_batch < batch:
            plan = replace(plan, fits=False)
        return fill(config, plan), plan

    def capacity(self, format: str) -> dict[str, Any]:
        """Bytes of a token and of a room, and the tokens that fit beside one room."""
        config, plan = self.planned(format, 1, LEAST_TOKENS)
        spec = kv_spec(self.opened.shape, config)
        left = int(plan.free * share_of(config)) - plan.weights - plan.workspace - spec.bytes_per_room
        bits = spec.bytes_per_token * 8 / (2 * spec.layers * spec.kv_heads * spec.head_dim)
        return {
            "bytes_per_token": spec.bytes_per_token,
            "bytes_per_room": spec.bytes_per_room,
            "bits": bits,
            "tokens": max(0, left) // spec.bytes_per_token,
            "spec": plan.kv_dtype,
        }

    def engine(self, format: str, point: Point, tokens: int) -> Engine:
        """Raises ValueError where it does not fit."""
        self.release()
        config, plan = self.planned(format, point.batch, point.context + tokens)
        plan.require()
        pages = pages_for(point.batch, point.context + tokens, config.page_size)
        engine = self.engine_of(config, pages)
        engine.memory = plan
        stock(engine.kv)
        return engine

    def layer_us(self, format: str, point: Point) -> tuple[int, float]:
        """Bytes that attention of one layer reads, and its microseconds, the mean of as many layers as there is room
        for: what a model prepares once a step is prepared once for them. Raises RuntimeError where none fits.
        """
        self.release()
        opened, shape, device = self.opened, self.opened.shape, self.opened.device
        config = replace(opened.config, kv_cache=format)
        spec = replace(kv_spec(shape, config), layers=1, local=frozenset())
        each = -(-point.context // config.page_size)
        nbytes = point.batch * (each * spec.bytes_per_page + spec.bytes_per_room)
        layers = 1 if device.type == "cpu" else max(1, min(GRAPH_CALLS, int(free_memory(device) // (2 * nbytes))))
        spec = replace(spec, layers=layers)
        store = KVStore(spec, point.batch * each, device, point.batch)
        stock(store)
        dtype = DTYPES[config.dtype]
        attention = AttentionSpec(shape.heads, shape.kv_heads, shape.head_dim, shape.scale)
        attention = replace(attention, rotary_dim=shape.rope.rotary_dim, softcap=shape.attention_softcap)
        heads = Heads(attention, rope_table(shape.rope, point.context, device))
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv = torch.randn(point.batch, width, device=device).to(dtype)
        table = torch.randperm(point.batch * each, device=device).int().view(point.batch, each)
        lengths = torch.full((point.batch,), point.context, dtype=torch.int32, device=device)
        last = lengths - 1
        slots = table[:, -1] * config.page_size + last % config.page_size
        starts = torch.arange(point.batch + 1, dtype=torch.int32, device=device)
        rooms = torch.arange(point.batch, dtype=torch.int32, device=device)
        step = Contexts(last, slots, table, starts, lengths, 1, point.context, point.batch, rooms=rooms)

        def call(layer: PackedLayer | tuple[torch.Tensor, torch.Tensor]) -> object:
            if isinstance(layer, PackedLayer):
                return opened.kernels.attention_packed(qkv, heads, layer, step)
            keys, values = layer
            return opened.kernels.attention(qkv, heads, keys, values, step)

        with torch.inference_mode():
            calls = [partial(call, store.layers[i % layers]) for i in range(GRAPH_CALLS)]
            took = 1e6 * best_seconds(calls[0], "cpu", 5) if device.type == "cpu" else graph_us(calls)
        return point.batch * point.context * spec.bytes_per_token // layers, took


def pages_for(batch: int, context: int, page_size: int) -> int:
    """Pages of a cache in which so many sequences run at a time: the scheduler lets none in but the first where less
    than a share of the cache would stay free.
    """
    pages = batch * (-(-context // page_size) + 1)
    return pages if batch == 1 else math.ceil(pages / (1 - WATERMARK)) + 1


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    from tenfold.ops.attention.tune import time_graph  # Triton is there on GPU machines only

    return time_graph(calls)


def stock(store: KVStore) -> None:
    """Fill a store with numbers that attention can work on."""
    for layer in store.layers:
        if isinstance(layer, PackedLayer):
            for side in (layer.keys, layer.values):
                side.codes.random_(0, 243)  # a byte of five ternary codes is below; as float8 some are no numbers
                if side.bits == 8:
                    side.codes.random_(0, 120)
                number = torch.full((), 0.1, dtype=torch.float32).to(side.parameters.dtype)
                raw = side.parameters.view(torch.uint8 if side.kind == "e4m3" else torch.int16)
                raw.fill_(int(number.view(raw.dtype)))
            for exact in (layer.exact_keys, layer.exact_values):
                if exact is not None:
                    exact.normal_()
        else:
            for tensor in layer:
                tensor.normal_()


def run_on(engine: Engine, point: Point, tokens: int) -> float:
    """Milliseconds of a decode step of `batch` sequences whose contexts are taken as computed, mean over `tokens`, the
    last of which completes the contexts.
    """
    scheduler = engine.scheduler
    start = scheduler._start

    def pretend(sequence: Answer, *rest: Any) -> None:
        start(sequence, *rest)
        sequence.computed = sequence.done = len(sequence.tokens) - 1

    scheduler._start = pretend  # type: ignore[method-assign,assignment]
    prompt = (1,) * max(1, point.context - WARM_UP - tokens)
    params = SamplingParams(max_tokens=WARM_UP + tokens, temperature=0.0, ignore_eos=True)
    for i in range(point.batch):
        engine.add(Request(str(i), prompt, params))
    counts = [0] * point.batch
    begin = None
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            counts[int(output.request_id)] += len(output.tokens)
        if begin is None and min(counts) >= WARM_UP:
            begin, first = time.perf_counter(), min(counts)
            if max(counts) == WARM_UP + tokens:
                raise RuntimeError("Some sequences ended before others began: the cache does not hold all of them.")
    assert begin is not None
    scheduler._start = start  # type: ignore[method-assign]
    return (time.perf_counter() - begin) / (WARM_UP + tokens - first) * 1e3


def run(
    model: str,
    device: str,
    formats: Sequence[str],
    points: Sequence[Point],
    rounds: int,
    tokens: int,
    changes: dict[str, Any],
    say: Callable[[str], None] = print,
    done: Callable[[Result], None] = lambda result: None,
    deadline: float = float("inf"),
) -> Result:
    """Every format at every point, formats in turn and their order turned around every round. deadline:
    `time.monotonic()` after which no point is begun.
    """
    longest = max(p.context for p in points) + WARM_UP + tokens
    bench = Bench(model, device, math.ceil(longest / (1 - 2 * WATERMARK)) + LEAST_TOKENS, changes)
    place = str(bench.opened.device)
    sizes = model_sizes(model, place, {k: v for k, v in changes.items() if k in ("dtype", "kv_dtype", "weights")})
    result = Result(model, machine(place), tokens=tokens, weights=sizes.weights, streamed=sizes.streamed)
    result.copy_gbs = copy_bandwidth(place)
    for name in formats:
        result.formats[name] = bench.capacity(name)
    say(capacities(result))
    for point in points:
        if time.monotonic() > deadline:
            result.notes.append(f"{point}: the time was up")
            continue
        rows = [
            Row(name, point.batch, point.context, point.batch * point.context * own["bytes_per_token"])
            for name, own in result.formats.items()
        ]
        result.rows += rows
        for i in range(rounds):
            for row in rows if i % 2 == 0 else reversed(rows):
                if row.skipped:
                    continue
                try:
                    engine = bench.engine(row.format, point, WARM_UP + tokens + 1)
                    row.memory = str(engine.memory)
                    row.steps.append(run_on(engine, point, tokens))
                except (ValueError, RuntimeError) as error:
                    row.skipped = str(error).splitlines()[0][:200]
                finally:
                    engine = None  # type: ignore[assignment]
        for row in rows:
            try:
                row.layer_read, row.layer_us = bench.layer_us(row.format, point)
            except (ValueError, RuntimeError) as error:
                result.notes.append(f"attention of {row.format} at {point} was not timed: {str(error)[:120]}")
            say(line(row, result))
        done(result)
    return result


def line(row: Row, result: Result) -> str:
    head = f"{row.batch} x {row.context:<8} {row.format:14}"
    if row.layer_us:
        rate = row.layer_read / row.layer_us / 1e3
        head += f" attention {row.layer_us:9.1f} us a layer, {rate:6.0f} GB/s"
    if not row.steps:
        return f"{head} left out: {row.skipped}"
    floor = 1e3 * (result.streamed + row.read) / (result.copy_gbs * GB)
    gains = [
        f"  {name} {gain:.2f}x dense"
        for name, gain in (("step", result.gain(row)), ("attention", result.layer_gain(row)))
        if gain is not None and row.format != "dense"
    ]
    low, high = min(row.steps), max(row.steps)
    return f"{head} {row.median:9.3f} ms a step ({low:.3f} to {high:.3f})  floor {floor:.2f} ms{''.join(gains)}"


def capacities(result: Result) -> str:
    rows = [("format", "stored as", "bits a number", "bytes a token", "exact a sequence", "longest context")]
    for name, own in result.formats.items():
        room = f"{own['bytes_per_room'] / 2**20:.1f} MiB"
        sizes = (f"{own['bits']:.2f}", f"{own['bytes_per_token']:,}", room, f"{own['tokens']:,}")
        rows.append((name, own["spec"], *sizes))
    return columns(rows)


def bars(result: Result) -> str:
    """What the cache takes and how long a decode step lasts, as bars, the shortest contexts first."""
    measured = sorted((row for row in result.rows if row.steps), key=lambda row: row.batch * row.context)
    gib = [(row.batch * result.formats[row.format]["bytes_per_room"] + row.read) / 2**30 for row in measured]
    most, slowest = max(gib, default=0), max((row.median for row in measured), default=0)
    rows = [("contexts", "format", "GiB of cache", "", "ms a step", "")]
    for row, size in zip(measured, gib):
        bar, other = ("#" * math.ceil(BAR * part) for part in (size / most, row.median / slowest))
        rows.append((f"{row.batch} x {row.context}", row.format, f"{size:.3f}", bar, f"{row.median:.3f}", other))
    return columns(rows)


def loaded(data: Mapping[str, Any]) -> Result:
    """The result that `plain` made."""
    values = {k: v for k, v in data.items() if k != "suite"}
    return Result(**(values | {"rows": [Row(**row) for row in data["rows"]]}))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.kv", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--points", default="1x1024,1x8192,8x1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a run, after a few that warm it up")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no point is begun")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    points = points_of(given.points)
    if any(point.lengths for point in points):
        parser.error("contexts of a point are filled to one length here; write points such as 8x1024.")
    name = portable(given.model).removeprefix("shape:").replace("/", "-").replace("@", "-").replace("=", "")
    name = "-".join((name, *(portable(change).replace("=", "-") for change in given.set)))

    def keep(result: Result) -> None:
        result.command, result.changes = again(parser, given), given.set
        if given.out:
            save(given.out / f"kv-{name}.json", result.plain(), given.commit)

    keep(
        run(
            given.model,
            given.device,
            given.formats.split(","),
            points,
            given.rounds,
            given.tokens,
            settings(given.set),
            done=keep,
            deadline=time.monotonic() + given.seconds,
        )
    )


if __name__ == "__main__":
    main()
