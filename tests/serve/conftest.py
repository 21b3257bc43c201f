"""A server around an engine made of a few lines, so that the tests of HTTP need no model."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest

from tenfold.engine.request import FinishReason, Grammar, Logprob, Output, Pictured, SamplingParams
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig

ANSWER = "Hä, ok."


class FakeLLM:
    """Answers ANSWER, byte by byte as a byte-level tokenizer would; text of choice i ends in i. What it did is in
    `calls`,
    what was left early in `cancelled`. `gate`, where set, holds every answer back after its first token."""

    answer = ANSWER
    vocab_size = 256
    max_model_len = 128

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.finished: list[str] = []
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.fail: Exception | None = None
        self.fail_after = 0
        self.finish = FinishReason.STOP
        self.alive = True
        self.rendered: list[tuple[Any, dict[str, Any]]] = []
        self.checked: list[Grammar] = []
        self.refused_grammar = ""  # why the next grammars are refused

    def default_params(self, chat: bool = False) -> SamplingParams:
        return SamplingParams(top_k=50) if chat else SamplingParams(top_k=50, max_tokens=16)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def check_grammar(self, grammar: Grammar) -> None:
        self.checked.append(grammar)
        if self.refused_grammar and self.refused_grammar in grammar.source:
            raise ValueError(f"The grammar has {self.refused_grammar}.")

    sees = False

    def pictured_chat(self, messages: Sequence[dict[str, Any]], limits: Any = None, **kwargs: Any) -> Pictured:
        self.rendered.append((messages, kwargs))
        return Pictured(tuple(range(1, 9)))

    def chat_prompt(self, messages: Sequence[dict[str, Any]], **kwargs: Any) -> list[int]:
        self.rendered.append((messages, kwargs))
        if messages[0]["content"] == "bad":
            raise ValueError("The chat template does not like this.")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, **rest: Any
    ) -> AsyncIterator[Output]:
        self.calls.append({"prompt": tuple(prompt), "params": params, "request_id": request_id} | rest)
        try:
            for step, output in enumerate(self._outputs(tuple(prompt), params, request_id)):
                if self.fail is not None and step == self.fail_after:
                    raise self.fail
                if self.gate is not None and step == 1:
                    await self.gate.wait()
                yield output
                self.started.set()
                await asyncio.sleep(0)
            self.finished.append(request_id)
        finally:
            if request_id not in self.finished:
                self.cancelled.append(request_id)

    def _outputs(self, prompt: tuple[int, ...], params: SamplingParams, request_id: str) -> list[Output]:
        outputs = []
        for index in range(params.n):
            tokens = list((self.answer + (str(index) if params.n > 1 else "")).encode())[: params.max_tokens]
            held = b""
            for i, token in enumerate(tokens):
                held += bytes([token])
                try:
                    text, held = held.decode(), b""
                except UnicodeDecodeError:
                    text = ""
                last = i == len(tokens) - 1
                outputs.append(
                    Output(
                        request_id,
                        index,
                        (token,),
                        text,
                        () if params.logprobs is None else (place(token, params.logprobs),),
                        prompt_places(prompt, params.prompt_logprobs) if index == i == 0 else None,
                        self.finish if last else None,
                        cached_tokens=16 if i == 0 and len(prompt) > 16 else 0,
                    )
                )
        return outputs


def place(token: int, top: int) -> Logprob:
    return Logprob(token, -0.5, tuple((ord("a") + k, -1.0 - k) for k in range(top)))


def prompt_places(prompt: tuple[int, ...], top: int | None) -> tuple[Logprob | None, ...] | None:
    return None if top is None else (None, *(place(token, top) for token in prompt[1:]))


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


class Client:
    """Sends requests to an app, each in an event loop of its own."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None) -> None:
        self.app = app
        self.headers = headers or {}

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=self.headers
            ) as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(send())

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.request("POST", path, json={"model": "tiny"} | body)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]} | fields)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Hi"} | fields)


@pytest.fixture
def make_client(llm: FakeLLM) -> Callable[..., Client]:
    def make(headers: dict[str, str] | None = None, **settings: Any) -> Client:
        return Client(create_app({"tiny": llm}, ServeConfig(**settings)), headers)  # type: ignore[arg-type]

    return make


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    return make_client()


@pytest.fixture
def read_events() -> Callable[[httpx.Response], list[dict[str, Any]]]:
    return events_of


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of each event of a stream that ended properly."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
