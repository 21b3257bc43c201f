"""Throughput and serving under load: what is sent, when, and the arithmetic of what came back."""

import asyncio
import itertools
import json
import math
import random
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tenfold.bench import cli, load, phases, throughput
from tenfold.bench.engines import Answer, Job, NotInstalled, Setup, Timing
from tenfold.bench.lengths import Lengths, parse
from tenfold.bench.load import Objective
from tenfold.bench.peers import vllm
from tenfold.bench.throughput import Work

WORK = Work(6, parse("3-9"), parse("2-4"))


@pytest.mark.parametrize("text", ["512", "128-1024", "lognormal:220:0.9"])
def test_lengths_stay_in_their_bounds(text: str) -> None:
    lengths, rng = parse(text), random.Random(1)
    drawn = [lengths.draw(rng) for _ in range(2000)]
    assert 1 <= min(drawn) <= max(drawn) <= lengths.high
    middle = {"512": 512, "128-1024": 576, "lognormal:220:0.9": 220}[text]
    assert sorted(drawn)[1000] == pytest.approx(middle, rel=0.1)


@pytest.mark.parametrize("text", ["", "0", "9-3", "a", "lognormal:5", "lognormal:0:1", "1-2-3", "lognormal:9:9"])
def test_what_is_no_length_says_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="lognormal:MEDIAN:SIGMA"):
        parse(text)


def test_throughput_counts_tokens_over_seconds() -> None:
    class Fake:
        capacity = None

        def generate(self, prompts: Sequence[Sequence[int]], tokens: int | Sequence[int]) -> Timing:
            assert not isinstance(tokens, int)
            return Timing(1.0, 1.0, [[0] * n for n in tokens])

    result = throughput.Result("m", {}, WORK)
    throughput.measure({"tenfold": Fake(), "vllm": Fake()}, result, 3, 50, lambda _: None)
    totals = sorted(result.answer_tokens)
    assert result.output_rate("tenfold") == totals[1] / 2
    assert result.total_rate("vllm") > result.output_rate("vllm")
    assert len(set(map(str, (WORK.requests(i, 50) for i in range(3))))) == 3
    assert json.loads(json.dumps(result.plain()))["seconds"]["vllm"] == [2.0] * 3


def test_an_engine_that_answers_short_is_not_counted() -> None:
    class Short:
        capacity = None

        def generate(self, prompts: Sequence[Sequence[int]], tokens: int | Sequence[int]) -> Timing:
            return Timing(1.0, 1.0, [[0] for _ in prompts])

    with pytest.raises(RuntimeError, match="was asked for"):
        throughput.measure({"x": Short()}, throughput.Result("m", {}, WORK), 1, 50, lambda _: None)


def test_throughput_of_our_engine_from_a_name() -> None:
    result = throughput.run("shape:tiny@layers=1", ["tenfold"], WORK, 1, "cpu", 4, threads=1, say=lambda _: None)
    assert result.output_rate("tenfold") > 0
    with pytest.raises(ValueError, match="different lengths"):
        throughput.peers_of(["hf"])


def answer(due: float, *pieces: tuple[float, int], error: str = "") -> Answer:
    return Answer(due, [t for t, _ in pieces], [n for _, n in pieces], error)


def test_figures_of_known_answers() -> None:
    answers = [
        answer(0.0, (0.1, 1), (0.2, 1), (0.3, 1)),  # TTFT 100, TPOT 100
        answer(1.0, (1.3, 1), (1.4, 4)),  # TTFT 300, TPOT 25: four tokens in one piece
        answer(2.0, (2.05, 1)),  # one token only
        answer(3.0, error="broken"),
    ]
    run = load.summary(2.0, answers, 4.0, Objective(ttft=200, tpot=60))
    assert (run.requests, run.failed, run.output_tokens, run.good) == (4, 1, 9, 1)
    assert run.goodput == 0.25
    assert run.percentiles["ttft"] == pytest.approx({"p50": 100, "p90": 300, "p99": 300})
    assert run.percentiles["tpot"] == pytest.approx({"p50": 25, "p90": 100, "p99": 100})
    assert run.percentiles["itl"]["p99"] == pytest.approx(100)
    assert "1 failed" in run.line()


def test_percentiles_are_samples() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [load.percentile(values, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert load.percentile([7.0], 50) == 7
    assert math.isnan(load.percentile([], 50))
    empty = load.plain([load.summary(1.0, [], 1.0, Objective())], {}, "m", WORK, Objective())
    assert json.loads(json.dumps(empty, allow_nan=False))["runs"][0]["percentiles"]["ttft"]["p50"] is None


def test_arrivals_come_at_the_rate_asked_for() -> None:
    due = load.arrivals(4000, 20.0, seed=3)
    assert due == sorted(due)
    assert due[-1] == pytest.approx(200, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert sum(g > 0.05 for g in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)  # exponential, not even
    assert load.arrivals(3, 0, seed=1) == [0, 0, 0]


def test_a_request_that_fails_is_counted_and_stops_nothing() -> None:
    class Flaky:
        async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
            yield 1
            if len(prompt) % 2 and len(prompt) > 3:
                raise RuntimeError("gone")
            for _ in range(tokens - 1):
                yield 1

    runs = asyncio.run(load.measure(Flaky(), WORK, [0, 1000.0], 50, Objective(), lambda _: None))
    odd = [sum(len(p) in (5, 7, 9) for p in WORK.requests(i, 50)[0]) for i in range(2)]
    assert [run.failed for run in runs] == odd


class Elsewhere:
    """Stands in for vLLM in a process of its own: an answer's tokens come together, a second after the request."""

    def __init__(self, *_: object, short: int = 0) -> None:
        self.short, self.runs, self.closed = short, list[list[Job]](), False

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        self.runs.append(list(jobs))
        return [Answer(job.due, [job.due + 1.0], [job.tokens - self.short]) for job in jobs]

    def close(self) -> None:
        self.closed = True


def test_a_peer_takes_turns_at_every_rate_with_the_same_requests() -> None:
    asked: list[tuple[list[int], int]] = []

    class Ours:
        async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
            asked.append((list(prompt), tokens))
            yield tokens

    peer, lines = Elsewhere(), list[str]()
    rates = [500.0, 1000.0]
    runs = asyncio.run(load.measure(Ours(), WORK, rates, 50, Objective(), lines.append, {"vllm": peer}))
    assert [(run.engine, run.rate) for run in runs] == [
        *(("tenfold", 500.0), ("vllm", 500.0)),
        *(("vllm", 1000.0), ("tenfold", 1000.0)),
    ]
    warm_up, *served = peer.runs
    assert len(warm_up) == 1
    for number, (rate, jobs) in enumerate(zip(rates, served)):
        assert [job.due for job in jobs] == load.arrivals(WORK.count, rate, number)
        ours = sorted(asked[1 + WORK.count * number :][: WORK.count])
        assert sorted((list(job.prompt), job.tokens) for job in jobs) == ours
    theirs = [run for run in runs if run.engine == "vllm"]
    assert all(run.percentiles["ttft"]["p50"] == pytest.approx(1000.0) for run in theirs)
    assert theirs[0].seconds == pytest.approx(1.0 + served[0][-1].due)
    assert "vllm" in lines[1]


def test_a_peer_that_answers_short_has_failed() -> None:
    class Ours:
        async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
            yield tokens

    runs = asyncio.run(load.measure(Ours(), WORK, [0.0], 50, Objective(), str, {"vllm": Elsewhere(short=1)}))
    assert [(run.engine, run.failed) for run in runs] == [("tenfold", 0), ("vllm", WORK.count)]


def test_our_engine_and_a_peer_from_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given, peer = list[tuple[object, ...]](), Elsewhere()
    monkeypatch.setattr(vllm, "beside_ours", lambda *asked: given.append(asked) or peer)
    runs = load.in_process("shape:tiny@layers=1", "cpu", {"threads": 1}, WORK, [0], Objective(), str, ["vllm"], "there")
    assert given == [("shape:tiny@layers=1", WORK.longest, "there")]
    assert {run.engine: run.failed for run in runs} == {"tenfold": 0, "vllm": 0}
    assert len({run.output_tokens for run in runs}) == 1
    assert peer.closed


def test_a_peer_that_is_not_installed_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotInstalled("vllm is not installed here.")

    monkeypatch.setattr(vllm, "beside_ours", missing)
    monkeypatch.setattr(load, "measure", None)
    with pytest.raises(NotInstalled, match="not installed here"):
        load.in_process("shape:tiny@layers=1", "cpu", {"threads": 1}, WORK, [0], Objective(), str, ["vllm"])


def test_what_stands_beside_ours_leaves_room_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[tuple[str, Setup, str]]()
    monkeypatch.setattr(vllm, "Worker", lambda *given: made.append(given))
    vllm.beside_ours("shape:tiny@layers=1", 4000, "there", 512)
    ((name, setup, packages),) = made
    assert (name, setup.model, setup.context, packages) == ("vllm", "shape:tiny@layers=1,positions=4000", 4000, "there")
    assert setup.settings["gpu_memory_utilization"] < 0.5
    assert setup.settings["max_num_batched_tokens"] == 512


def test_an_engine_in_this_process_under_load() -> None:
    runs = load.in_process("shape:tiny@layers=1", "cpu", {"threads": 1}, WORK, [0], Objective(), lambda _: None)
    assert (runs[0].failed, runs[0].requests) == (0, 6)
    assert runs[0].output_tokens == sum(WORK.requests(0, 512)[1])


EVENTS = (
    b'data: {"choices": [{"text": "a"}]}\n\n',
    b'data: {"choices": [{"text": "bc"}]}\n\n',
    b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n',
    b"data: [DONE]\n\n",
)


@pytest.mark.parametrize(
    ("status", "events", "wanted"),
    [
        (b"200 OK", EVENTS, [1, 1, 1]),
        (b"200 OK", EVENTS[:2], "broke off"),
        (b"429 Too Many Requests", (), "429"),
        (b"200 OK", (b'data: {"error": {"message": "full"}}\n\n',), "full"),
    ],
)
def test_a_server_over_a_socket(status: bytes, events: Sequence[bytes], wanted: list[int] | str) -> None:
    asked: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(await reader.readexactly(size))
        writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(events))
        await writer.drain()
        writer.close()

    async def run() -> list[int]:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            client = load.Server(f"http://127.0.0.1:{port}", "m", "key")
            return [count async for count in client.stream([5, 6], 3)]
        finally:
            server.close()

    if isinstance(wanted, str):
        with pytest.raises(RuntimeError, match=wanted):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == wanted
        assert json.loads(asked[0])["prompt"] == [5, 6]


@pytest.mark.parametrize("url", ["https://host:1", "host:1", "http://", "http://host:x", "http://[::1"])
def test_a_url_that_cannot_be_one(url: str) -> None:
    with pytest.raises(ValueError, match="without /v1"):
        load.Server(url)


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = load.Server(f"http://127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match=f"No server answers at http://127.0.0.1:{port} .*tenfold serve"):
        load.against_server(server, Work(1, parse("4"), parse("4")), [0.0], 100, load.Objective())


SERVING = ["serving", "--model", "shape:tiny@layers=1", "--device", "cpu", "--set", "threads=1", "--rates", "0,200"]
SERVING += ["--requests", "3", "--prompts", "4", "--answers", "3"]


def test_a_folder_gets_the_result_as_json_table_and_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(cli.app, [*SERVING, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    stem = "serving-tiny-layers-1-threads-1"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.json", "tables.md", f"{stem}.png"}
    data = json.loads((tmp_path / f"{stem}.json").read_text())
    for line in data["lines"]:
        assert line in (tmp_path / "tables.md").read_text()
    assert sorted(data["command"].split()) == sorted(["tenfold", "bench", *SERVING])
    assert (tmp_path / f"{stem}.png").stat().st_size > 10_000


def test_without_matplotlib_a_folder_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = load.plain([load.summary(1.0, [answer(0.0, (0.1, 1))], 1.0, Objective())], {}, "m", WORK, Objective())
    (tmp_path / "a.json").write_text(json.dumps(data))
    monkeypatch.setattr(phases, "main", lambda words: tmp_path / "a.json")
    done = CliRunner().invoke(cli.app, ["phases", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "pip install 'tenfold[bench]'" in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "tables.md"}


@pytest.mark.parametrize("rates", ["junk", "-1", "", "nan", "inf", "1,x"])
def test_rates_that_there_are_not(rates: str) -> None:
    with pytest.raises(typer.BadParameter, match="such as 1,2,4"):
        cli.rates_of(rates)
    assert cli.rates_of("0, 2.5") == [0.0, 2.5]


def test_lengths_are_plain_data() -> None:
    assert parse("7") == Lengths("uniform", 7, 7)
