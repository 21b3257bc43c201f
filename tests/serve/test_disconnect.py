"""A client that leaves stops the work done for it, whatever state that is in."""

import asyncio
import json

import pytest

from tenfold.serve.app import create_app

CALLS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/completions", {"prompt": ["Hi", "Ho", "Ha"], "n": 2}),
]


class Connection:
    """One HTTP request to an ASGI app, whose client leaves when told."""

    def __init__(self, path, body):
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
        }
        self.body = json.dumps({"model": "tiny"} | body).encode()
        self.sent = []
        self.left = asyncio.Event()
        self.answered = asyncio.Event()
        self.read = False

    async def receive(self):
        if not self.read:
            self.read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.answered.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), CALLS)
def test_leaving_while_tokens_come(llm, path, body, stream):
    async def scenario():
        llm.gate = asyncio.Event()
        connection = Connection(path, body | {"stream": stream})
        served = asyncio.ensure_future(create_app({"tiny": llm})(connection.scope, connection.receive, connection.send))
        await asyncio.wait_for((connection.answered if stream else llm.started).wait(), 5)
        assert llm.cancelled == []
        connection.left.set()
        await asyncio.wait_for(served, 5)
        assert llm.finished == []
        assert sorted(llm.cancelled) == sorted(call["request_id"] for call in llm.calls)
        assert len(llm.calls) == (3 if isinstance(body.get("prompt"), list) else 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token(llm, stream):
    async def scenario():
        entered = asyncio.Event()

        async def stuck(prompt, params, **rest):
            entered.set()
            try:
                await asyncio.Event().wait()
                yield
            finally:
                llm.cancelled.append(rest["request_id"])

        llm.generate = stuck
        connection = Connection("/v1/completions", {"prompt": "Hi", "stream": stream})
        served = asyncio.ensure_future(create_app({"tiny": llm})(connection.scope, connection.receive, connection.send))
        await asyncio.wait_for(entered.wait(), 5)
        connection.left.set()
        await asyncio.wait_for(served, 5)
        assert len(llm.cancelled) == 1
        assert all(message.get("status", 499) == 499 for message in connection.sent)

    asyncio.run(scenario())


def test_a_broken_pipe_while_writing(llm):
    async def scenario():
        connection = Connection("/v1/completions", {"prompt": "Hi", "stream": True})

        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("broken pipe")

        await asyncio.wait_for(create_app({"tiny": llm})(connection.scope, connection.receive, send), 5)
        assert len(llm.cancelled) == 1

    asyncio.run(scenario())


def test_staying_gets_everything(llm):
    async def scenario():
        connection = Connection("/v1/completions", {"prompt": "Hi", "stream": True})
        await asyncio.wait_for(create_app({"tiny": llm})(connection.scope, connection.receive, connection.send), 5)
        assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert connection.sent[-2]["body"] == b"data: [DONE]\n\n"
        assert llm.cancelled == []

    asyncio.run(scenario())
