"""Serving under load: requests arrive at random moments (Poisson) at a given rate, against a running server or an
engine in this process, and a peer in turn with it; how long they wait for their first token and between tokens, and how
many are served well.

TTFT: from the request's planned arrival to its first token, so that a client that falls behind counts against the
server. TPOT: (last token - first token) / (tokens - 1). ITL: gaps between the pieces of a stream. Goodput: requests a
second that kept both limits of an `Objective`.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from tenfold.bench.engines import Answer, Job, Peer, engine_config
from tenfold.bench.peers import vllm
from tenfold.bench.throughput import Work
from tenfold.weights.shapes import at_least_positions, is_shape

PERCENTILES = (50, 90, 99)
OURS = "tenfold"


@dataclass(frozen=True, slots=True)
class Objective:
    """What users were promised, in milliseconds."""

    ttft: float = 1000.0
    tpot: float = 50.0


class Client(Protocol):
    """Something that answers."""

    def stream(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
        """The number of new tokens of each piece, as it comes. Raises for what fails."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one engine at one rate: requests a second, percentiles in ms by name, rates of what was served."""

    rate: float
    requests: int
    failed: int
    seconds: float
    output_tokens: int
    percentiles: dict[str, dict[str, float]]
    good: int
    engine: str = OURS

    @property
    def goodput(self) -> float:
        return self.good / self.seconds

    def line(self) -> str:
        ttft, tpot = self.percentiles["ttft"], self.percentiles["tpot"]
        return (
            f"{self.rate:7.2f} requests/s  {self.engine:7}  TTFT p50 {ttft['p50']:8.1f} p99 {ttft['p99']:8.1f} ms  "
            f"TPOT p50 {tpot['p50']:7.2f} p99 {tpot['p99']:7.2f} ms  "
            f"{self.output_tokens / self.seconds:8.0f} tokens/s  goodput {self.goodput:.2f}/s"
            + (f"  {self.failed} failed" if self.failed else "")
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent are at or below (nearest rank); NaN of nothing."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(len(values) * share / 100) - 1)]


def summary(rate: float, answers: Sequence[Answer], seconds: float, objective: Objective, engine: str = OURS) -> Run:
    fine = [a for a in answers if not a.error and a.times]
    tpots = [t for a in fine if (t := a.tpot) is not None]
    values = {"ttft": [a.ttft for a in fine], "tpot": tpots, "itl": [gap for a in fine for gap in a.gaps]}
    figures = {name: {f"p{p}": percentile(found, p) for p in PERCENTILES} for name, found in values.items()}
    good = sum(a.ttft <= objective.ttft and (a.tpot or 0.0) <= objective.tpot for a in fine)
    tokens = sum(a.tokens for a in fine)
    return Run(rate, len(answers), len(answers) - len(fine), seconds, tokens, figures, good, engine)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests of a Poisson process come; all at once where the rate is 0 (no limit)."""
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        found.append(now)
        now += rng.expovariate(rate) if rate > 0 else 0.0
    return found


async def measure(
    client: Client,
    work: Work,
    rates: Sequence[float],
    vocabulary: int,
    objective: Objective,
    say: Callable[[str], None],
    peers: Mapping[str, Peer] | None = None,
) -> list[Run]:
    """One run of all requests at each rate, after one request that is not counted; by the client and by each peer, in
    an order that turns around every rate.
    """
    peers = peers or {}
    async for _ in client.stream([1, 2, 3], 2):
        pass
    for peer in peers.values():
        await asyncio.to_thread(peer.serve, [Job(0.0, [1, 2, 3], 2)])
    runs = []
    for number, rate in enumerate(rates):
        due = arrivals(work.count, rate, number)
        jobs = [Job(*each) for each in zip(due, *work.requests(number, vocabulary))]
        for name in [OURS, *peers][:: 1 if number % 2 == 0 else -1]:
            begin = time.perf_counter()
            answers = await (asyncio.to_thread(peers[name].serve, jobs) if name in peers else _served(client, jobs))
            for job, answer in zip(jobs, answers):
                if not answer.error and answer.tokens != job.tokens:
                    answer.error = f"{answer.tokens} tokens came and {job.tokens} were asked for"
            spent = time.perf_counter() - begin  # with what it takes to send jobs to another process
            seconds = max((answer.times[-1] for answer in answers if answer.times), default=spent)
            runs.append(summary(rate, answers, seconds, objective, name))
            say(runs[-1].line())
    return runs


async def _served(client: Client, jobs: Sequence[Job]) -> list[Answer]:
    begin = time.perf_counter()
    return await asyncio.gather(*(_one(client, job, begin) for job in jobs))


async def _one(client: Client, job: Job, begin: float) -> Answer:
    await asyncio.sleep(max(0.0, begin + job.due - time.perf_counter()))
    answer = Answer(job.due)
    try:
        async with aclosing(client.stream(job.prompt, job.tokens)) as pieces:  # type: ignore[type-var]
            async for count in pieces:
                answer.times.append(time.perf_counter() - begin)
                answer.sizes.append(count)
    except (OSError, RuntimeError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def plain(runs: Sequence[Run], machine: dict[str, str], model: str, work: Work, objective: Objective) -> dict[str, Any]:
    return {
        "suite": "serving",
        "model": model,
        "machine": machine,
        "work": asdict(work),
        "objective": asdict(objective),
        "lines": [run.line() for run in runs],
        "runs": [asdict(run) | {"percentiles": _without_nan(run.percentiles)} for run in runs],
    }


def _without_nan(percentiles: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """JSON knows no NaN."""
    return {
        name: {p: None if math.isnan(value) else value for p, value in found.items()}
        for name, found in percentiles.items()
    }


class InProcess:
    """An `AsyncLLM` in this process, token ids in and out."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
        from tenfold.engine.request import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        async for output in self.llm.generate(list(prompt), params):
            if output.error:
                raise RuntimeError(output.error)
            if output.tokens:
                yield len(output.tokens)


class Server:
    """A running server's /v1/completions, each request on a connection of its own. url: without /v1."""

    def __init__(self, url: str, model: str = "default", key: str = "") -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname if parts.scheme == "http" else None, parts.port or 80
        except ValueError:  # no address, or no port
            host, port = None, 0
        if not host:
            raise ValueError(f"url is {url!r}; allowed: http://HOST:PORT of a running server, without /v1.")
        self.host, self.port, self.model, self.key = host, port, model, key

    async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        except OSError as error:
            raise ConnectionError(
                f"No server answers at http://{self.host}:{self.port} ({error.strerror or error}); start one with "
                "`tenfold serve`, or name another with --url."
            ) from error
        try:
            writer.write(self._request(json.dumps(body).encode()))
            await writer.drain()
            status = (await reader.readline()).split(b" ", 2)
            if len(status) < 2 or status[1] != b"200":
                raise RuntimeError(f"the server answered {b' '.join(status).decode(errors='replace').strip()}")
            told = 0
            async for line in reader:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    pieces, total = read_event(line[6:])
                    count = pieces if total is None else total - told  # several tokens may have come as one piece
                    told += count
                    if count:
                        yield count
            raise RuntimeError("the stream broke off")
        finally:
            writer.close()

    def _request(self, body: bytes) -> bytes:
        lines = ["POST /v1/completions HTTP/1.1", f"host: {self.host}", "connection: close"]
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"authorization: Bearer {self.key}"] if self.key else []
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_event(event: bytes) -> tuple[int, int | None]:
    """Pieces of text in an event of a stream, and tokens of the whole answer where it has the usage."""
    data = json.loads(event)
    if data.get("error"):
        raise RuntimeError(str(data["error"]))
    pieces = sum(1 for choice in data.get("choices", ()) if choice.get("text"))
    usage = data.get("usage")
    return pieces, usage["completion_tokens"] if usage else None


def against_server(
    server: Server,
    work: Work,
    rates: Sequence[float],
    vocabulary: int,
    objective: Objective,
    say: Callable[[str], None] = print,
) -> list[Run]:
    return asyncio.run(measure(server, work, rates, vocabulary, objective, say))


def in_process(
    model: str,
    device: str,
    settings: Mapping[str, Any],
    work: Work,
    rates: Sequence[float],
    objective: Objective,
    say: Callable[[str], None] = print,
    against: Sequence[str] = (),
    peer_path: str = "",
) -> list[Run]:
    """Load the engine here and measure it; a shape gets the contexts it needs. settings: fields of EngineConfig.
    against: "vllm", in a process beside this one, where either has about half the GPU; peer_path: folder of its
    packages. Raises NotInstalled where it is not, before anything is measured.
    """
    from tenfold.engine.core import Engine
    from tenfold.engine.llm import AsyncLLM

    if is_shape(model):
        model = at_least_positions(model, work.longest)
    own: dict[str, Any] = {"model": model, "device": device, "max_model_len": work.longest, "prefix_cache": False}
    own["max_queue"] = work.count
    if against:
        own["gpu_memory_utilization"] = vllm.BESIDE / (1 - vllm.BESIDE)  # of what is free when they have theirs
    config = engine_config(settings, **own)
    peers = {name: vllm.beside_ours(model, work.longest, peer_path) for name in against}

    async def run() -> list[Run]:
        llm = AsyncLLM(engine=Engine.load(config, tokens_only=is_shape(model)))
        try:
            return await measure(InProcess(llm), work, rates, llm.vocab_size, objective, say, peers)
        finally:
            llm.close()

    try:
        return asyncio.run(run())
    finally:
        for peer in peers.values():
            peer.close()
