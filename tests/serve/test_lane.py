"""The short way of a token: what a client reads is the same by either way."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tenfold.engine.request import Output
from tenfold.serve.lane import Lane
from tests.serve.conftest import FakeLLM
from tests.serve.live import Live, read_all


class Line:
    def __init__(self) -> None:
        self.free = True
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def opened(line: Line, spelt: bytes = b"event") -> tuple[Lane, list[Output]]:
    lane = Lane()
    counted: list[Output] = []
    lane.count, lane.spell = counted.append, lambda output: spelt
    lane.open(line)
    return lane, counted


OUTPUT = Output("r", 0, (1,), "a")


def test_an_output_is_counted_and_written():
    line = Line()
    lane, counted = opened(line)
    assert lane.take(OUTPUT)
    assert (line.written, counted) == ([b"event"], [OUTPUT])


def test_an_output_without_an_event_is_taken_all_the_same():
    line = Line()
    lane, counted = opened(line, b"")
    assert lane.take(OUTPUT)
    assert (line.written, counted) == ([], [OUTPUT])


@pytest.mark.parametrize("why", ["not open", "closed", "client does not read", "nobody spells"])
def test_what_has_to_go_the_long_way_is_not_touched(why):
    line = Line()
    lane, counted = opened(line)
    if why == "client does not read":
        line.free = False
    elif why == "nobody spells":
        lane.spell = None
    elif why == "closed":
        lane.open(None)
    else:
        lane = Lane()
        lane.count = counted.append
    assert not lane.take(OUTPUT)
    assert not line.written
    assert not counted


class Roomy(FakeLLM):
    max_model_len = 4096


class Tapping(Roomy):
    """Offers what it makes to the tap first, as an engine does; `taken` are the outputs that went there. fault: at
    which of them the tap gets something it cannot use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Output] = []
        self.fault = -1

    async def generate(self, prompt: Any, params: Any, *, tap: Any = None, **rest: Any) -> Any:
        async for output in super().generate(prompt, params, **rest):
            if tap is not None and output.finish is None:
                if len(self.taken) == self.fault:
                    tap(None)
                if tap(output):
                    self.taken.append(output)
                    continue
            yield output


@pytest.fixture(scope="module")
def ways() -> Iterator[tuple[Live, Live]]:
    """A server whose engine knows of taps, and one whose does not."""
    servers = Live(Tapping()), Live(Roomy())
    yield servers
    for server in servers:
        server.close()


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
RUNNING = {"stream_options": {"continuous_usage_stats": True, "include_usage": True}}
REQUESTS = {
    "completions": ("/v1/completions", {"prompt": "Hi"}),
    "several answers": ("/v1/completions", {"prompt": "Hi", "n": 3}),
    "several prompts": ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
    "log-probabilities": ("/v1/completions", {"prompt": "Hi", "logprobs": 2, "echo": True}),
    "usage": ("/v1/completions", {"prompt": "Hi"} | RUNNING),
    "chat": ("/v1/chat/completions", CHAT),
    "chat with everything": ("/v1/chat/completions", CHAT | RUNNING | {"logprobs": True, "top_logprobs": 1, "n": 2}),
    "tools": ("/v1/chat/completions", CHAT | TOOLS),
    "responses": ("/v1/responses", {"input": "Hi"}),
    "messages": ("/v1/messages", CHAT | {"max_tokens": 20}),
}


def request(path: str, fields: dict[str, Any], version: bytes = b"1.1") -> bytes:
    body = json.dumps({"model": "tiny", "stream": True} | fields).encode()
    head = b"POST %b HTTP/%b\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), version, len(body)) + body


def events(answer: bytes) -> list[str]:
    """Of a response in chunks, each of them whole."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    chunks, at, length = [], 0, 1
    while length:
        end = rest.index(b"\r\n", at)
        length = int(rest[at:end], 16)
        at = end + 2 + length
        chunks.append(rest[end + 2 : at])
        assert rest[at : at + 2] == b"\r\n"
        at += 2
    assert at == len(rest)
    found = b"".join(chunks)
    assert found.endswith(b"\n\n")
    return found.decode().split("\n\n")


def alike(event: str) -> str:
    """Without what differs from request to request."""
    return re.sub(r'(_|-)[0-9a-f]{24,}|"(created|created_at|completed_at)":[0-9.]+', "", event)


@pytest.mark.parametrize("what", REQUESTS)
def test_both_ways_lead_to_the_same_events(ways, what):
    short, _ = ways
    short.llm.taken.clear()
    path, fields = REQUESTS[what]
    found, expected = ([alike(e) for e in events(way.send(request(path, fields)))] for way in ways)
    assert found == expected
    assert len(found) > 5
    tapped = path.endswith("completions") and what != "several prompts"
    assert bool(short.llm.taken) == tapped


def test_both_ways_count_the_same(ways):
    path, fields = REQUESTS["several answers"]
    counts = []
    for way in ways:
        way.send(request(path, fields))
        metrics = way.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").decode()
        wanted = (
            r'^(tenfold_generated_tokens_total|tenfold_inter_token_latency_seconds_count){[^}]*completions"[^}]*} \S+'
        )
        counts.append(sorted(re.findall(wanted + "$", metrics, re.MULTILINE)))
    assert counts[0] == counts[1]
    assert counts[0]


def test_a_fault_on_the_short_way_ends_the_answer_as_any_other(ways):
    """The events that were sent stay; the client is told."""
    short, _ = ways
    short.llm.taken.clear()
    short.llm.fault = 2
    try:
        found = events(short.send(request(*REQUESTS["completions"])))
    finally:
        short.llm.fault = -1
    assert len(short.llm.taken) == 2
    assert json.loads(found[-3].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert found[-2] == "data: [DONE]"


def test_head_and_first_event_come_together(ways):
    short, _ = ways
    short.llm.gate = asyncio.Event()
    try:
        with short.connect() as client:
            client.sendall(request(*REQUESTS["completions"]))
            arrived = client.recv(65536)
    finally:
        short.llm.gate = None
    head, _, rest = arrived.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"data: " in rest
    assert rest.endswith(b"\n\n\r\n")


def test_an_old_client_gets_no_chunks_it_did_not_before(ways):
    """HTTP/1.0."""
    answers = [way.send(request(*REQUESTS["completions"], version=b"1.0")) for way in ways]
    bodies = [re.sub(rb"-[0-9a-f]{24,}|\"created\":\d+", b"", a.partition(b"\r\n\r\n")[2]) for a in answers]
    assert bodies[0].count(b"data: ") == bodies[1].count(b"data: ")
    assert [b.endswith(b"\r\n0\r\n\r\n") for b in bodies] in ([True, True], [False, False])


class Flood(Tapping):
    """Far more than any buffer on the way holds."""

    def _outputs(self, prompt: Any, params: Any, request_id: str) -> list[Output]:
        outputs = [Output(request_id, 0, (1,), f"{i:08d}" * 1000) for i in range(2000)]
        return [*outputs, Output(request_id, 0, (1,), "", finish=self.finish)]

    async def generate(self, prompt: Any, params: Any, **rest: Any) -> Any:
        async for output in super().generate(prompt, params, **rest):
            self.calls[-1]["long"] = self.calls[-1].get("long", 0) + 1
            yield output


def test_a_client_that_does_not_read_is_waited_for():
    """Nothing is kept for it beyond what the connection's buffers hold, and all comes once it reads."""
    server = Live(Flood())
    try:
        with server.connect() as client:
            client.sendall(request("/v1/completions", {"prompt": "Hi"}))
            end = time.monotonic() + 20
            while time.monotonic() < end and not (server.llm.calls and server.llm.calls[0].get("long", 0) > 1):
                time.sleep(0.005)
            assert 0 < len(server.llm.taken) < 1500
            found = events(read_all(client))
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in found[:-2]]
        assert "".join(texts) == "".join(f"{i:08d}" * 1000 for i in range(2000))
    finally:
        server.close()
