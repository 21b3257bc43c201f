"""How a sentiment classifier serves: posts a second and latencies at batches of 1 to 64, alone and beside a language
model, against an encoder loop of Hugging Face and torchvision.

Posts are token ids and pictures that were read already; what is timed is the pool, from `submit` to the last result,
and for the peer the same posts through `transformers.BertModel` and `torchvision.models`, pooled and projected to the
labels: one by one as a loop does (`loop`), and as one batch in the type of ours (`batch`) and in float32
(`batch fp32`). Weights are random but for the packaged model: speed only. Rounds of all take turns.
"""

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.bench.command import portable
from tenfold.bench.cpu import Case, prompts_of
from tenfold.bench.engines import Setup
from tenfold.bench.hardware import machine
from tenfold.bench.load import arrivals, percentile
from tenfold.bench.single import device_of
from tenfold.bench.worker import Worker
from tenfold.engine.pool import Pool, PoolConfig
from tenfold.models.sentiment.config import ImageShape, SentimentConfig, TextShape
from tenfold.models.sentiment.folder import Classifier, open_folder, place, placed
from tenfold.models.sentiment.image import Normal
from tenfold.models.sentiment.model import SentimentModel
from tenfold.models.sentiment.prepare import Item, Reader
from tenfold.weights.shapes import at_least_positions, is_shape

BATCHES = "1,2,4,8,16,32,64"
LENGTHS = (8, 64)  # tokens of a text, both ends included
LABELS = ("negative", "neutral", "positive")
SIZES: dict[str, tuple[TextShape, ImageShape]] = {
    "base": (TextShape(30522, 768, 12, 12, 3072), ImageShape("resnet50", 224)),
    "minilm": (TextShape(30522, 384, 6, 12, 1536), ImageShape("resnet18", 224)),
    "tiny": (TextShape(1000, 32, 1, 2, 64), ImageShape("small", 24)),
}
GENERATION = Case("generation", 16, 128, 129, "decode")
Say = Callable[[str], None]


class NoTokenizer:
    """A reader's tokenizer where posts are token ids already."""

    def no_padding(self) -> None: ...

    def enable_truncation(self, length: int) -> None: ...


def made(size: str, device: str, dtype: torch.dtype) -> Classifier:
    """A classifier of a size, random, or the one that comes with Tenfold ("packaged"). Raises ValueError."""
    if size == "packaged":
        return open_folder(place("default"), device, dtype)
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; allowed: packaged, {', '.join(SIZES)}.")
    torch.manual_seed(0)
    config = SentimentConfig(LABELS, *SIZES[size])
    with torch.device(device):
        model = SentimentModel(config)
    return Classifier(placed(model, device, dtype), Reader(config, NoTokenizer()))


def posts(config: SentimentConfig, count: int, seed: int = 0) -> list[Item]:
    """Random texts of random length with a random picture each."""
    draw = torch.Generator().manual_seed(seed)
    size = config.image.size
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (count,), generator=draw).tolist()
    return [
        Item(
            torch.randint(5, config.text.vocab, (length,), generator=draw).tolist(),
            torch.randint(0, 256, (3, size, size), generator=draw, dtype=torch.uint8),
        )
        for length in lengths
    ]


class Peer:
    """Hugging Face's BERT and torchvision's ResNet of the same shapes, pooled, joined and projected. Raises ImportError
    where one of them is not installed.
    """

    def __init__(self, config: SentimentConfig, device: str, dtype: torch.dtype) -> None:
        from torchvision import models
        from transformers import BertConfig, BertModel

        text = config.text
        told = BertConfig(
            vocab_size=text.vocab,
            hidden_size=text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            intermediate_size=text.inner,
        )
        text_model: Any = BertModel(told)
        self.text = text_model.to(device, dtype).eval()
        image = getattr(models, config.image.kind)(weights=None)
        channels = image.fc.in_features
        image.fc = nn.Identity()
        self.image = image.to(device, dtype).eval()
        self.head = nn.Linear(text.width + channels, len(config.labels), device=device, dtype=dtype)
        self.device, self.normal = device, Normal().to(device, dtype)

    @torch.inference_mode()
    def classify(self, ids: Tensor, real: Tensor, pictures: Tensor) -> list[list[float]]:
        out = self.text(ids.to(self.device), attention_mask=real.to(self.device)).pooler_output
        seen = self.image(self.normal(pictures.to(self.device)))
        told: list[list[float]] = self.head(torch.cat([out, seen], 1)).float().softmax(-1).tolist()
        return told

    def all(self, reader: Reader, items: Sequence[Item], at_once: int) -> list[float]:
        """A `Round`."""
        ends: list[float] = []
        begun = time.perf_counter()
        for start in range(0, len(items), at_once):
            batch = reader.batch(items[start : start + at_once])
            real = torch.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]
            found = self.classify(batch.ids, real.long(), batch.pictures)
            ends += [time.perf_counter() - begun] * len(found)
        return ends


@dataclass(slots=True)
class Row:
    """batch: posts that arrive together. seconds: of each round until the last result; p50, p99: ms until the result of
    a post, of all rounds.
    """

    engine: str
    batch: int
    beside: bool = False
    seconds: list[float] = field(default_factory=list)
    p50: float = 0.0
    p99: float = 0.0

    @property
    def rate(self) -> float:
        """Posts a second, median of rounds."""
        return self.batch / statistics.median(self.seconds)

    def line(self) -> str:
        beside = " beside generation" if self.beside else ""
        told = f"{self.engine:12} batch {self.batch:3}{beside}: {self.rate:9.1f} posts/s"
        return f"{told}, p50 {self.p50:.2f} p99 {self.p99:.2f} ms"


Round = Callable[[], list[float]]
"""Seconds from its begin until each post has its result."""


def in_turn(runs: Mapping[str, Round], batch: int, rounds: int, beside: bool = False) -> list[Row]:
    """A row for each engine. Rounds of all take turns, in an order that changes; the first two do not count."""
    rows = {name: Row(name, batch, beside) for name in runs}
    latencies: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-2, rounds):
        for name in runs if i % 2 == 0 else reversed(list(runs)):
            ends = runs[name]()
            if i >= 0:
                rows[name].seconds.append(max(ends))
                latencies[name] += [1e3 * end for end in ends]
    for name, row in rows.items():
        row.p50, row.p99 = percentile(latencies[name], 50), percentile(latencies[name], 99)
    return list(rows.values())


def pooled(pool: Pool, items: Sequence[Item]) -> list[float]:
    """A round of ours: all posts at once."""
    ends: list[float] = []
    begun = time.perf_counter()
    for entry in (entries := pool.submit_all(items)):
        entry.future.add_done_callback(lambda _: ends.append(time.perf_counter() - begun))
    for entry in entries:
        entry.future.result()
    while len(ends) < len(items):  # waiters are woken before callbacks run
        time.sleep(0)
    return ends


def peer_rounds(
    config: SentimentConfig, reader: Reader, device: str, items: Sequence[Item], dtype: torch.dtype
) -> dict[str, Round]:
    """loop, batch and batch fp32. Raises ImportError."""
    kinds = {"loop": (1, dtype), "batch": (len(items), dtype), "batch fp32": (len(items), torch.float32)}
    return {
        name: partial(Peer(config, device, kind).all, reader, items, at_once) for name, (at_once, kind) in kinds.items()
    }


@contextmanager
def generating(worker: Worker, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Generation without a pause in another process, as a server has it. Raises what ended it before its time."""
    stop = threading.Event()

    def go() -> None:
        while not stop.is_set():
            speed(worker, prompts)

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(go)
        try:
            yield
        finally:
            stop.set()
        running.result()


def speed(worker: Worker, prompts: Sequence[Sequence[int]]) -> float:
    timing = worker.generate(prompts, GENERATION.tokens)
    return sum(map(len, timing.tokens)) / timing.total


async def steadily(pool: Pool, items: Sequence[Item], rate: float, done: asyncio.Event) -> list[float]:
    """Single posts at random moments until `done`; latencies in ms."""
    found: list[float] = []

    async def ask(item: Item) -> None:
        begun = time.perf_counter()
        await asyncio.wrap_future(pool.submit(item).future)
        found.append(1e3 * (time.perf_counter() - begun))

    begun, tasks = time.perf_counter(), []
    for i, due in enumerate(arrivals(100_000, rate, 0)):
        wait = begun + due - time.perf_counter()
        if wait > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), wait)
        if done.is_set():
            break
        tasks.append(asyncio.ensure_future(ask(items[i % len(items)])))
    await asyncio.gather(*tasks)
    return found


async def beside(
    pool: Pool, worker: Worker, items: Sequence[Item], rate: float, rounds: int, say: Say
) -> dict[str, Any]:
    """What generation loses to `rate` classifications a second: runs with and without them in turn."""
    found: dict[str, Any] = {"rate": rate, "without": [], "with": [], "latencies": []}
    prompts = prompts_of(GENERATION, 1, 1000)
    for i in range(rounds):
        for name in ("without", "with") if i % 2 == 0 else ("with", "without"):
            done = asyncio.Event()
            load = asyncio.ensure_future(steadily(pool, items, rate, done)) if name == "with" else None
            found[name].append(await asyncio.to_thread(speed, worker, prompts))
            done.set()
            if load is not None:
                found["latencies"] += await load
        say(f"round {i + 1} of {rounds}: {found['without'][-1]:.1f} tokens/s without, {found['with'][-1]:.1f} with")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="packaged", help=f"packaged, {', '.join(SIZES)}")
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--against", action="store_true", help="measure transformers and torchvision too")
    parser.add_argument("--model", default="", help="language model that generates beside it; empty: none")
    parser.add_argument("--rate", type=float, default=10.0, help="classifications a second beside it")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, for the classifier")
    parser.add_argument("--exact", default="auto", choices=("auto", "on", "off"), help="as --classifier-exact")


def measure(given: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Raises ValueError for a size that is unknown."""
    device = device_of(given.device)
    config = PoolConfig(device, threads=given.threads if device == "cpu" else 0, exact=given.exact)
    classifier = made(given.size, device, config.type_on(torch.device(device)))
    batches = [int(n) for n in given.batches.split(",")]
    pool = Pool(classifier, config)
    result: dict[str, Any] = {
        "suite": "sentiment-serving",
        "size": given.size if given.exact == "auto" else f"{given.size} exact {given.exact}",
        "machine": machine(device),
        "rows": [],
    }
    rows: list[Row] = []
    try:
        for batch in batches:
            items = posts(classifier.config, batch)
            runs: dict[str, Round] = {"tenfold": partial(pooled, pool, items)}
            if given.against and batch == max(batches):
                runs |= _peers(classifier, device, items, pool.dtype, say)
            rows += _told(in_turn(runs, batch, given.rounds), say)
        if given.model:
            result["generation"] = _beside(rows, pool, given, device, batches, say)
    finally:
        pool.close()
    result["rows"] = [asdict(row) for row in rows]
    return result


def _peers(
    classifier: Classifier, device: str, items: Sequence[Item], dtype: torch.dtype, say: Say
) -> dict[str, Round]:
    """None where they are not installed or have no such picture encoder."""
    lacking = [name for name in ("transformers", "torchvision") if find_spec(name) is None]
    if lacking or classifier.config.image.kind not in ("resnet18", "resnet50"):
        say(f"no peer: {', '.join(lacking) or 'torchvision has no such picture encoder'}")
        return {}
    return peer_rounds(classifier.config, classifier.reader, device, items, dtype)


def _told(rows: list[Row], say: Say) -> list[Row]:
    for row in rows:
        say(row.line())
    return rows


def _beside(
    rows: list[Row], pool: Pool, given: argparse.Namespace, device: str, batches: Sequence[int], say: Say
) -> dict[str, Any]:
    context = GENERATION.prompt + GENERATION.tokens
    settings = {"gpu_memory_utilization": 0.8} if device.startswith("cuda") else {}
    model = at_least_positions(given.model, context) if is_shape(given.model) else given.model
    threads = max(1, torch.get_num_threads() - 1) if device == "cpu" else 0
    worker = Worker("tenfold", Setup(model, threads, GENERATION.batch, context, device, settings=settings))
    prompts, items = prompts_of(GENERATION, 0, 1000), posts(pool.classifier.config, max(64, *batches))
    try:
        speed(worker, prompts)
        found = asyncio.run(beside(pool, worker, items, given.rate, max(4, given.rounds // 2), say))
        with generating(worker, prompts):
            for batch in batches:
                runs: dict[str, Round] = {"tenfold": partial(pooled, pool, items[:batch])}
                rows += _told(in_turn(runs, batch, given.rounds, beside=True), say)
    finally:
        worker.close()
    return found | {"model": portable(given.model), "streams": GENERATION.batch}
