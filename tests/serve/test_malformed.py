"""Thousands of requests that no client should send get a 4xx in the shape of the API's errors, or an answer."""

import asyncio
import json
import logging

import pytest

from tenfold.bench.malformed import BODIES, Malformed, Tally, malformed, wrong_answer
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig
from tests.tiny import Tiny, make_checkpoint


async def send(app, request):
    """(status, body) of a request, without the cost of a client."""
    sent = []
    parts = [request.body]

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        await asyncio.Event().wait()

    async def take(message):
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in request.headers.items()],
    }
    await app(scope, receive, take)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_checkpoint(Tiny("Llama", {"max_position_embeddings": 2048}), tmp_path_factory.mktemp("wide") / "llama")
    llm = AsyncLLM(str(path), kernels="torch", threads=1, max_model_len=2048)
    yield llm
    llm.close()


def test_malformed_requests(llm, caplog):
    caplog.set_level(logging.ERROR)
    app = create_app({"tiny": llm}, ServeConfig())
    tally = Tally()

    async def run():
        for request in malformed(seed=0, count=4000):
            tally.add(request, *await asyncio.wait_for(send(app, request), 60))

    asyncio.run(run())
    assert [(why, request.path, request.body[:300]) for why, request in tally.wrong[:5]] == []
    assert tally.statuses[400] > 2000
    assert tally.statuses[200] > 200, "the requests are near enough to right ones to get past the parser"
    assert set(tally.statuses) <= {200, 400, 404, 413, 422}, tally
    assert not caplog.records
    assert llm.stats().running == llm.stats().waiting == 0


def test_every_endpoint_that_reads_a_body_is_covered(llm):
    described = create_app({"tiny": llm}, ServeConfig()).openapi()["paths"].items()
    reading = {path for path, methods in described if "requestBody" in methods.get("post", {})}
    assert reading == {path for path, _ in BODIES}


def test_the_bodies_are_right_before_they_are_made_wrong(llm):
    app = create_app({"tiny": llm}, ServeConfig())

    async def run():
        for path, body in BODIES:
            request = Malformed(path, {}, json.dumps({"model": "tiny"} | body).encode())
            status, answer = await send(app, request)
            assert status == 200, (path, answer)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "status", "body", "right"),
    [
        ("/v1/completions", 200, b"", True),
        ("/v1/completions", 503, b"", True),
        ("/v1/completions", 500, b"{}", False),
        ("/v1/completions", 400, b"Bad Request", False),
        ("/v1/completions", 400, b'{"error": {"message": "a", "type": "b", "param": null, "code": null}}', True),
        ("/v1/messages", 400, b'{"error": {"message": "a", "type": "b", "param": null, "code": null}}', False),
        ("/v1/messages", 400, b'{"type": "error", "error": {"message": "a", "type": "b"}}', True),
    ],
)
def test_the_judge(path, status, body, right):
    assert (wrong_answer(path, status, body) == "") == right
