"""How soon a disconnect frees KV pages: in prefill and in decode, streaming or not, while others are served (S5).

A server runs in this process, so that its engine's numbers can be read between any two steps; clients are real
connections that are closed.
"""

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from tenfold.bench.claims import Claim, claim, ending
from tenfold.bench.serving import http_request, run_streams
from tenfold.engine import pump
from tenfold.engine.facts import Stats
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig

COMPLETIONS = "/v1/completions"
OTHERS = 3  # streams that go on meanwhile
LENGTHS = {"prefill": 900, "decode": 64}  # tokens of the prompt: one spans several steps, the other is over at once


@dataclass(frozen=True, slots=True)
class Cancelled:
    """One disconnect. milliseconds until its pages were free; steps the engine began meanwhile."""

    phase: str
    stream: bool
    milliseconds: float
    steps: int


@contextmanager
def local_server(model: str, isolate: bool) -> Iterator[tuple[AsyncLLM, tuple[str, int]]]:
    """A model behind HTTP in this process."""
    settings = {"max_model_len": 1024, "max_batch": 8, "max_step_tokens": 128, "prefix_cache": False}
    llm = AsyncLLM(model, isolate=isolate, **settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        app = create_app({"model": llm}, ServeConfig())
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield llm, address
        finally:
            server.should_exit = True
            thread.join(30)
            llm.close()


def measure(model: str, rounds: int, isolate: bool) -> list[Cancelled]:
    """`rounds` disconnects in each phase, of streams and of whole answers."""
    rng = random.Random(3)
    pump.GATHER = 0.0  # so that the engine's numbers are here when its step ends; what is sent to it never waits
    found = []
    with local_server(model, isolate) as (llm, address):
        for _ in range(rounds):
            for phase, length in LENGTHS.items():
                for stream in (True, False):
                    prompt = [rng.randrange(1000, 40_000) for _ in range(length)]
                    found.append(_one(llm, address, prompt, phase, stream))
    return found


def _one(llm: AsyncLLM, address: tuple[str, int], prompt: list[int], phase: str, stream: bool) -> Cancelled:
    common = {"model": "model", "temperature": 0, "ignore_eos": True}
    long = common | {"max_tokens": 120, "stream": True}
    bodies = [long | {"prompt": [1000 + i] * 8} for i in range(OTHERS)]
    others = threading.Thread(target=run_streams, args=(address, COMPLETIONS, bodies), daemon=True)
    others.start()
    _wait(lambda: _now(llm).running == OTHERS and _now(llm).generated_tokens > 0)
    body = common | {"prompt": prompt, "max_tokens": 100, "stream": stream}
    before = _now(llm).computed_tokens
    with socket.create_connection(address) as connection:
        connection.sendall(http_request(COMPLETIONS, json.dumps(body).encode()))
        seen = len(prompt) // 4 if phase == "prefill" else len(prompt) + 8
        _wait(lambda: _now(llm).running == OTHERS + 1 and _now(llm).computed_tokens - before > seen)
        held = _now(llm).pages_used
        begin, steps = time.perf_counter(), _now(llm).steps
    own = len(prompt) // 16 // 2  # the others grow by a page now and then meanwhile
    _wait(lambda: _now(llm).running == OTHERS and _now(llm).pages_used <= held - own, pause=1e-4)
    # Numbers of an engine elsewhere are those of its latest whole step; the next was under way at the disconnect.
    begun = _now(llm).steps - steps - (getattr(llm._loop, "engine", None) is None)
    cancelled = Cancelled(phase, stream, 1e3 * (time.perf_counter() - begin), begun)
    others.join()
    _wait(lambda: not _now(llm).pages_used)
    return cancelled


def _now(llm: AsyncLLM) -> Stats:
    """Numbers of this moment where the engine is in this process; else those after its latest step."""
    engine = getattr(llm._loop, "engine", None)
    stats = llm.stats() if engine is None else engine.stats()
    if stats is None:
        raise RuntimeError("the engine has ended")
    return stats


def _wait(holds: Callable[[], bool], pause: float = 5e-4, patience: float = 30.0) -> None:
    end = time.perf_counter() + patience
    while not holds():
        if time.perf_counter() > end:
            raise TimeoutError("the engine did not get there in time")
        time.sleep(pause)


def claims_of(found: Mapping[bool, Sequence[Cancelled]], model: str, command: str) -> list[Claim]:
    """Steps between a disconnect and free pages; the step under way when it comes is not counted."""
    claims = []
    for isolate, cases in found.items():
        where = "engine in a process of its own" if isolate else "engine in the server's process"
        for phase in LENGTHS:
            of = [c for c in cases if c.phase == phase]
            steps = sorted(c.steps for c in of)
            times = sorted(c.milliseconds for c in of)
            note = f"{len(of)} disconnects, half of streams; median {times[len(times) // 2]:.1f} ms, "
            note += f"longest {times[-1]:.1f} ms; most steps {steps[-1]}; {OTHERS} other streams go on"
            what = f"steps begun until pages are free after a disconnect in {phase}, {where}{ending(model)}"
            median = steps[len(steps) // 2]
            claims.append(
                claim("S5", what, median, "steps", command, at_most=1, spread=(steps[0], steps[-1]), note=note)
            )
    return claims
