"""What the server costs over the bare engine: throughput of 1 and 32 streams, time to first token at idle (S3).

Both sides are processes that stay loaded, and take turns on the same token ids, greedy, without an end: a bare engine
(`Engine.step` in a loop) and `tenfold serve` with streaming clients on the same machine. Counted is all the server
does, from the moment the clients begin to send until the last event has arrived in the last of their sockets, and what
it costs the clients to send their requests, to read the first event at once, and to empty their sockets seldom
(`serving.run_streams`, quiet); not counted is what a client would do with each token. A first token of the server is
the first event read by the client, one of the bare engine what `step` returned, text included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.claims import Claim, claim
from tenfold.bench.cpu import Case, prompts_of
from tenfold.bench.engines import Setup
from tenfold.bench.serving import ServerProcess, run_streams, serving
from tenfold.bench.worker import Worker

# Long enough that beginning and end, when not all streams run, are a small part.
CASES = (Case("1 stream", 1, 32, 513, "decode"), Case("32 streams", 32, 32, 257, "decode"))
TTFT = Case("first token at idle", 1, 32, 2, "prefill")
CONTEXT = 1024
PATH = "/v1/completions"


@dataclass(slots=True)
class Samples:
    """One sample a round. Throughput in tokens/s from the first request sent to the last token; TTFT in ms."""

    bare: dict[str, list[float]] = field(default_factory=dict)
    served: dict[str, list[float]] = field(default_factory=dict)

    def add(self, case: str, bare: float, served: float) -> None:
        self.bare.setdefault(case, []).append(bare)
        self.served.setdefault(case, []).append(served)


def bodies(prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, object]]:
    common = {"model": "default", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return [common | {"prompt": list(prompt)} for prompt in prompts]


def served_run(server: ServerProcess, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and until the last of all. Raises RuntimeError where a stream did not end."""
    results = run_streams(server.address, PATH, bodies(prompts, tokens), quiet=True)
    if not all(r.ended and r.first and r.last for r in results):
        raise RuntimeError(f"a stream did not end: {[bytes(r.tail[-200:]) for r in results if not r.ended][:1]}")
    begin = min(r.sent for r in results)
    return min(r.first or 0.0 for r in results) - begin, max(r.last or 0.0 for r in results) - begin


def measure(model: str, threads: int, rounds: int, say: Callable[[str], None], *arguments: str) -> Samples:
    samples = Samples()
    batch = max(case.batch for case in CASES)
    worker = Worker("tenfold", Setup(model, threads, batch, CONTEXT))
    options = ["--threads", str(threads), "--max-batch", str(batch), "--max-model-len", str(CONTEXT)]
    try:
        with serving("--model", model, *options, "--no-prefix-cache", *arguments) as server:
            for case in (*CASES, TTFT):
                worker.generate(prompts_of(case, 0), 8)
                served_run(server, prompts_of(case, 0), 8)
            for i in range(rounds):
                for case in CASES:
                    _throughput(samples, case, i, worker, server)
                for k in range(8):
                    _first_token(samples, i * 8 + k, worker, server)
                say(f"round {i + 1} of {rounds}: " + ", ".join(_latest(samples, c.name) for c in (*CASES, TTFT)))
    finally:
        worker.close()
    return samples


def _throughput(samples: Samples, case: Case, round: int, worker: Worker, server: ServerProcess) -> None:
    prompts = prompts_of(case, round + 1)

    def bare() -> float:
        timing = worker.generate(prompts, case.tokens)
        return timing.prefill + timing.decode

    def served() -> float:
        return served_run(server, prompts, case.tokens)[1]

    tokens = case.batch * case.tokens
    if round % 2:
        b = tokens / bare()
        s = tokens / served()
    else:
        s = tokens / served()
        b = tokens / bare()
    samples.add(case.name, b, s)


def _first_token(samples: Samples, round: int, worker: Worker, server: ServerProcess) -> None:
    prompts = prompts_of(TTFT, 1000 + round)
    bare = worker.generate(prompts, TTFT.tokens).prefill
    served = served_run(server, prompts, TTFT.tokens)[0]
    samples.add(TTFT.name, 1e3 * bare, 1e3 * served)


def _latest(samples: Samples, case: str) -> str:
    return f"{case}: {samples.bare[case][-1]:.1f} / {samples.served[case][-1]:.1f}"


def claims_of(samples: Samples, label: str, command: str) -> list[Claim]:
    claims = []
    for case in CASES:
        bare, served = samples.bare[case.name], samples.served[case.name]
        ratio = paired_ratio(bare, served)
        lost = 100 * (ratio.median - 1)
        spread = (100 * (ratio.spread[0] - 1), 100 * (ratio.spread[1] - 1))
        note = f"bare {Figure(tuple(bare)).median:.1f} tokens/s, served {Figure(tuple(served)).median:.1f}, "
        note += f"medians of {len(bare)} interleaved rounds; the clients run on the same cores"
        what = f"throughput that serving costs, {case.name}, {label}"
        claims.append(claim("S3", what, lost, "%", command, at_most=5.0, spread=spread, note=note))
    bare, served = samples.bare[TTFT.name], samples.served[TTFT.name]
    added = Figure(tuple(s - b for b, s in zip(bare, served)))
    note = f"bare {Figure(tuple(bare)).median:.2f} ms, served {Figure(tuple(served)).median:.2f} ms, "
    note += f"{TTFT.prompt} tokens of prompt, {len(bare)} pairs"
    what = f"time added to the first token at idle, {label}"
    claims.append(claim("S3", what, added.median, "ms", command, at_most=3.0, spread=added.spread, note=note))
    return claims
