"""Bad days for a real server, one after another: what was done to it, what became of requests, how long recovery took
(S4).

Each scenario starts from a healthy server and says in a row what happened; it failed when anything hung, leaked or was
answered with what it should not be. Linux only: it reads /proc and sends signals.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenfold.bench.case import slope
from tenfold.bench.claims import Claim, claim, ending
from tenfold.bench.malformed import throw
from tenfold.bench.serving import (
    ServerProcess,
    StreamResult,
    call,
    http_request,
    kill,
    resident,
    run_streams,
    serving,
)

OPTIONS = ("--max-batch", "8", "--max-model-len", "1024", "--watchdog", "5", "--drain-timeout", "5")
CHAT = "/v1/chat/completions"
PATIENCE = 120.0  # seconds until something counts as hanging


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. recovery: seconds until the server served again; None where it never stopped."""

    scenario: str
    passed: bool
    recovery: float | None
    what: str


def ask(tokens: int, text: str = "Tell me a long story.", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "default", "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True} | fields


def status(server: ServerProcess) -> dict[str, Any]:
    """The numbers of the first model's engine."""
    code, body = call(server.address, "/status")
    if code != 200:
        raise RuntimeError(f"/status answered {code}: {body}")
    stats: dict[str, Any] = body["models"][0]["stats"]
    return stats


def ready(server: ServerProcess) -> bool:
    try:
        return call(server.address, "/ready", timeout=5)[0] == 200
    except OSError:
        return False


def until(holds: Callable[[], bool], patience: float = PATIENCE) -> float:
    """Seconds until `holds`. Raises TimeoutError."""
    begin = time.perf_counter()
    while not holds():
        if time.perf_counter() - begin > patience:
            raise TimeoutError
        time.sleep(0.02)
    return time.perf_counter() - begin


def works(server: ServerProcess) -> bool:
    """Whether a request is answered as it should be."""
    code, body = call(server.address, CHAT, ask(4, stream=False))
    return code == 200 and bool(body["choices"][0]["message"]["content"])


def idle(server: ServerProcess) -> bool:
    """Whether nothing runs or waits and no page is held."""
    stats = status(server)
    return not (stats["running"] or stats["waiting"] or stats["pages_used"])


class Load:
    """Streams in the background."""

    def __init__(self, server: ServerProcess, bodies: Sequence[Any]) -> None:
        self.results: list[StreamResult] = []
        self._thread = threading.Thread(target=self._run, args=(server, bodies), daemon=True)
        self._thread.start()

    def _run(self, server: ServerProcess, bodies: Sequence[Any]) -> None:
        self.results = run_streams(server.address, CHAT, bodies, PATIENCE)

    def wait(self) -> list[StreamResult]:
        self._thread.join(PATIENCE + 10)
        if self._thread.is_alive():
            raise TimeoutError
        return self.results


def failed(result: StreamResult) -> bool:
    return result.status != 200 or b'"error"' in result.tail


def lost_engine(server: ServerProcess, number: signal.Signals) -> Row:
    """8 requests run and 16 wait when the engine process gets a signal."""
    load = Load(server, [ask(200, f"Story number {i}") for i in range(24)])
    until(lambda: status(server)["running"] == 8 and status(server)["waiting"] == 16)
    (engine,) = server.engines
    kill(engine, number)
    begin = time.perf_counter()
    gone = until(lambda: not ready(server))
    back = gone + until(lambda: ready(server))
    results = load.wait()
    ended = [r for r in results if failed(r)]
    served = [r for r in results if not failed(r) and r.ended]
    told = max((r.last or begin) for r in ended) - begin if ended else 0.0
    what = f"{len(ended)} in flight ended with an error, the last after {told:.2f} s; {len(served)} that waited served"
    fine = len(ended) == 8 and len(served) == 16 and works(server) and engine not in server.engines
    until(lambda: idle(server))
    return Row(f"engine gets {number.name} under load", fine, back, what)


def idle_clients(server: ServerProcess, count: int = 1000) -> Row:
    """Clients that ask for a stream and never read."""
    before = resident(server.process.pid)
    request = http_request(CHAT, json.dumps(ask(4, "Hi")).encode())
    connections = []
    for _ in range(count):
        connection = socket.create_connection(server.address, 30)
        connection.sendall(request)
        connections.append(connection)
    slowest = 0.0
    for _ in range(10):
        slowest = max(slowest, until(lambda: call(server.address, "/health")[0] == 200))
    served = works(server)
    for connection in connections:
        connection.close()
    until(lambda: idle(server))
    grown = (resident(server.process.pid) - before) / 2**20
    what = f"/health in at most {1e3 * slowest:.0f} ms meanwhile, another client served: {served}; {grown:.0f} MiB more"
    return Row(f"{count} clients that never read", served and slowest < 5, None, what)


def slow_readers(server: ServerProcess) -> Row:
    """Readers of a few bytes a time hold up nobody else."""
    request = http_request(CHAT, json.dumps(ask(100)).encode())
    stop = threading.Event()

    def dribble() -> None:
        with socket.create_connection(server.address, 30) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request)
            while not stop.wait(0.05) and connection.recv(16):
                pass

    threads = [threading.Thread(target=dribble, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    others = run_streams(server.address, CHAT, [ask(50) for _ in range(8)], PATIENCE)
    stop.set()
    for thread in threads:
        thread.join(10)
    until(lambda: idle(server))
    good = sum(r.ended and not failed(r) for r in others)
    return Row("8 slow readers", good == 8, None, f"{good} of 8 other streams whole")


def half_closed(server: ServerProcess, count: int = 50) -> Row:
    """Clients that close their sending half after the request: answered or closed, never left hanging."""
    connections = []
    for i in range(count):
        connection = socket.create_connection(server.address, 30)
        connection.sendall(http_request(CHAT, json.dumps(ask(8, f"Hi {i}")).encode(), headers=("connection: close",)))
        connection.shutdown(socket.SHUT_WR)
        connections.append(connection)
    ended = 0
    for connection in connections:
        connection.settimeout(PATIENCE)
        while connection.recv(65536):
            pass
        connection.close()
        ended += 1
    until(lambda: idle(server))
    return Row(f"{count} half-closed connections", works(server), None, f"{ended} came to an end")


def malformed(server: ServerProcess, count: int = 10_000) -> Row:
    """Random bodies, wrong in every way."""
    tally = throw(server.url, count, timeout=PATIENCE)
    until(lambda: idle(server))
    fine = not (tally.wrong or tally.lost) and works(server)
    return Row(f"{count} malformed requests", fine, None, str(tally))


def disconnects(server: ServerProcess, count: int = 200) -> Row:
    """Clients that leave in the queue, in prefill and in decode."""
    rng = random.Random(5)
    threads = []

    def leave(i: int) -> None:
        text = "word " * rng.choice((5, 400, 900))
        with socket.create_connection(server.address, 30) as connection:
            body = ask(300, f"{i} {text}", stream=rng.random() < 0.5)
            connection.sendall(http_request(CHAT, json.dumps(body).encode()))
            time.sleep(rng.random())

    for i in range(count):
        threads.append(threading.Thread(target=leave, args=(i,), daemon=True))
        threads[-1].start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(30)
    seconds = until(lambda: idle(server))
    return Row(f"{count} disconnects at random moments", works(server), None, f"no page held {seconds:.2f} s after")


def disk_full(model: str) -> Row:
    """Standard error, where the log goes, has no space left."""
    port = _free_port()
    command = [sys.executable, "-m", "tenfold.serve.cli", "serve", "--model", model, "--port", str(port)]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([*command, *OPTIONS, "--access-log"], stderr=full, stdout=full)
    address = ("127.0.0.1", port)
    try:
        until(lambda: process.poll() is not None or _answers(address))
        codes = [call(address, CHAT, ask(2, stream=False))[0] for _ in range(20)]
        codes += [call(address, CHAT, b"{")[0] for _ in range(20)]
    finally:
        process.terminate()
        left = process.wait(60)
    good = codes == [200] * 20 + [400] * 20 and left == 0
    return Row("disk full for the log", good, None, f"20 requests answered, 20 refused; exit status {left}")


def _answers(address: tuple[str, int]) -> bool:
    try:
        return call(address, "/ready", timeout=5)[0] == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Loaded before the C library: the wall clock reads as many seconds off as the file TENFOLD_CLOCK says; nothing else is
# changed, as when somebody sets the clock.
CLOCK = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
  long seconds = 0;
  FILE *file = fopen(getenv("TENFOLD_CLOCK"), "r");
  if (file) {
    if (fscanf(file, "%ld", &seconds) != 1) seconds = 0;
    fclose(file);
  }
  return seconds;
}
int clock_gettime(clockid_t id, struct timespec *now) {
  int status = syscall(SYS_clock_gettime, id, now);
  if (!status && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
  return status;
}
int gettimeofday(struct timeval *now, void *zone) {
  struct timespec precise;
  int status = clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return status;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""
DAY = 86400


def clock_jumps(model: str) -> Row:
    """The wall clock jumps by days, forward and back, under load. Needs a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        offset, library = Path(folder, "offset"), Path(folder, "clock.so")
        offset.write_text("0")
        compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-x", "c", "-o", str(library), "-"]
        subprocess.run(compiler, input=CLOCK, text=True, check=True)
        environment = {"LD_PRELOAD": str(library), "TENFOLD_CLOCK": str(offset)}
        with serving("--model", model, *OPTIONS, "--request-timeout", "60", **environment) as server:
            load = Load(server, [ask(150, f"Story {i}") for i in range(16)])
            for days in (2, -3, 365, 0):
                time.sleep(0.5)
                offset.write_text(str(days * DAY))
            good = sum(r.ended and not failed(r) for r in load.wait())
            offset.write_text(str(1000 * DAY))
            moved = call(server.address, CHAT, ask(2, stream=False))[1]["created"] - time.time()
            fine = good == 16 and ready(server) and moved > 900 * DAY
    return Row("wall clock jumps by days", fine, None, f"{good} of 16 streams whole")


def drain(model: str) -> Row:
    """SIGTERM under load: what runs is finished, what comes is told to come back."""
    with serving("--model", model, *OPTIONS) as server:
        load = Load(server, [ask(60, f"Story {i}") for i in range(8)])
        until(lambda: status(server)["running"] == 8)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not ready(server), 5)
        late = call(server.address, CHAT, ask(4, stream=False))[0]
        good = sum(r.ended and not failed(r) for r in load.wait())
        left = server.process.wait(60)
    what = f"{good} of 8 streams whole, a late request got {late}, exit status {left}"
    return Row("SIGTERM under load", good == 8 and late == 503 and left == 0, None, what)


@dataclass(frozen=True, slots=True)
class Slope:
    """Memory over time. MiB an hour by least squares over the second half, when caches are full."""

    server: float
    engine: float
    requests: int
    pages: int
    series: list[tuple[float, int, int]]  # seconds, bytes of the server, bytes of the engine; about 200 of them


def soak(server: ServerProcess, seconds: float) -> Slope:
    """Mixed load: whole and streamed, short and long, valid and not, read to the end and left early."""
    rng = random.Random(9)
    times: list[tuple[float, int, int]] = []
    end = time.perf_counter() + seconds
    requests = 0
    while time.perf_counter() < end:
        bodies = [ask(rng.randrange(1, 40), f"{rng.random()} " + "word " * rng.randrange(300)) for _ in range(8)]
        run_streams(server.address, CHAT, bodies, PATIENCE)
        call(server.address, CHAT, b'{"model": 5}')
        call(server.address, CHAT, ask(8, stream=False, n=2, logprobs=True, top_logprobs=3))
        with socket.create_connection(server.address, 30) as connection:
            connection.sendall(http_request(CHAT, json.dumps(ask(200)).encode()))
            time.sleep(0.1 * rng.random())
        requests += 11
        engine = sum(resident(pid) for pid in server.engines)
        times.append((time.perf_counter(), resident(server.process.pid), engine))
    until(lambda: idle(server))
    later = times[len(times) // 2 :]
    hours = [t / 3600 for t, _, _ in later]
    return Slope(
        slope(hours, [s / 2**20 for _, s, _ in later]),
        slope(hours, [e / 2**20 for _, _, e in later]),
        requests,
        status(server)["pages_used"],
        times[:: max(1, len(times) // 200)],
    )


def attempt(name: str, scenario: Callable[[], Row]) -> Row:
    """The row of a scenario; one that hangs or breaks is a row too."""
    try:
        return scenario()
    except TimeoutError:
        return Row(name, False, None, f"hung for {PATIENCE:.0f} s")
    except Exception as error:
        return Row(name, False, None, f"{type(error).__name__}: {error}")


SHARED: dict[str, Callable[[ServerProcess], Row]] = {
    "kill": lambda server: lost_engine(server, signal.SIGKILL),
    "stop": lambda server: lost_engine(server, signal.SIGSTOP),
    "idle": idle_clients,
    "slow": slow_readers,
    "half-closed": half_closed,
    "malformed": malformed,
    "disconnects": disconnects,
}
ALONE: dict[str, Callable[[str], Row]] = {"disk": disk_full, "clock": clock_jumps, "drain": drain}


NONE = "none"


def chosen(only: Sequence[str]) -> list[str]:
    """The names of scenarios, in their order: all where `only` is empty, none for NONE. Raises ValueError."""
    known = [*SHARED, *ALONE]
    if list(only) == [NONE]:
        return []
    if unknown := sorted(set(only) - set(known)):
        raise ValueError(f"scenario is {unknown[0]!r}; allowed: {', '.join(known)}; {NONE} alone for no scenario.")
    return [name for name in known if not only or name in only]


def run(
    model: str, only: Sequence[str], soak_seconds: float, say: Callable[[Row], None]
) -> tuple[list[Row], Slope | None]:
    """The scenarios that are `chosen`, each row told as it comes; then the soak on a server of its own."""
    rows: list[Row] = []
    wanted = chosen(only)

    def take(name: str, scenario: Callable[[], Row]) -> None:
        rows.append(attempt(name, scenario))
        say(rows[-1])

    if any(name in SHARED for name in wanted):
        with serving("--model", model, *OPTIONS) as server:
            for name in wanted:
                if name in SHARED:
                    take(name, partial(SHARED[name], server))
    for name in wanted:
        if name in ALONE:
            take(name, partial(ALONE[name], model))
    if not soak_seconds:
        return rows, None
    with serving("--model", model, *OPTIONS) as server:
        return rows, soak(server, soak_seconds)


def line(row: Row) -> str:
    recovery = "" if row.recovery is None else f"  back after {row.recovery:.2f} s"
    return f"{'passed' if row.passed else 'FAILED'}  {row.scenario}: {row.what}{recovery}"


def soak_line(slope: Slope, minutes: float) -> str:
    return (
        f"soak of {minutes:g} min, {slope.requests} requests: server {slope.server:+.1f} MiB/h, engine "
        f"{slope.engine:+.1f} MiB/h, {slope.pages} pages held at the end"
    )


def beside(before: Mapping[str, Any], rows: Sequence[Row], slope: Slope | None, origin: str) -> dict[str, Any]:
    """What is kept of a run: its scenarios and its soak; where it had only one of them, the other is still that of
    `before`, what was kept until now. origin: what a part was measured with.
    """
    kept: dict[str, Any] = {"rows": [], "soak": None, "origin": {}} | dict(before)
    kept["origin"] = dict(kept["origin"])
    new: dict[str, Any] = {"rows": [asdict(row) for row in rows], "soak": asdict(slope) if slope else None}
    for part, found in new.items():
        if found:
            kept[part], kept["origin"][part] = found, origin
    return kept


def whole(rows: Sequence[Row]) -> bool:
    """Whether every scenario ran."""
    return len(rows) == len(SHARED) + len(ALONE)


def claims_of(rows: Sequence[Row], slope: Slope | None, minutes: float, model: str, command: str) -> list[Claim]:
    """How many bad days were survived counts where all were tried."""
    found = survived(rows, model, command) if whole(rows) else []
    found += recoveries(rows, model, command)
    return found + (memory(slope, minutes, model, command) if slope else [])


def survived(rows: Sequence[Row], model: str, command: str) -> list[Claim]:
    note, count = "; ".join(line(row) for row in rows), len(rows)
    passed = sum(row.passed for row in rows)
    what = f"bad days a server survives: nothing hangs, nothing leaks{ending(model)}"
    return [claim("S4", what, passed, f"of {count}", command, at_least=count, kind="correctness", note=note)]


def recoveries(rows: Sequence[Row], model: str, command: str) -> list[Claim]:
    return [
        claim("S4", f"recovery, {row.scenario}{ending(model)}", row.recovery, "s", command, at_most=30.0, note=row.what)
        for row in rows
        if row.recovery is not None
    ]


def memory(slope: Slope, minutes: float, model: str, command: str) -> list[Claim]:
    what = f"memory slope under {minutes:g} minutes of mixed load, server and engine process together{ending(model)}"
    both = slope.server + slope.engine
    return [claim("S4", what, both, "MiB/h", command, at_most=20.0, note=soak_line(slope, minutes))]
