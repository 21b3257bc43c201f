"""The real clients of OpenAI and Anthropic around an app in this process, and answers with thoughts and tool calls."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import anthropic
import httpx2
import msgspec
import openai

from tenfold.serve.parse.pieces import CallArguments, CallBegin, Piece, Reasoning, Text
from tenfold.serve.service import answers
from tenfold.serve.turn import Ask, Turn

HOST = "http://localhost"
KEY = "k" * 20

# A thought, a text, and two calls, cut as a model's tokens cut them. One entry an output of the engine.
FULL: list[list[Piece]] = [
    [Reasoning("Let ")],
    [Reasoning("me see.")],
    [],  # the marker that ends a thought
    [Text("I look")],
    [Text(" it up."), CallBegin(0, "call_1", "find")],
    [CallArguments(0, '{"q": ')],
    [CallArguments(0, '"ä"}')],
    [CallBegin(1, "call_2", "stop"), CallArguments(1, "{}")],
]


def with_openai(app: Any, scenario: Callable[[openai.AsyncOpenAI], Awaitable[Any]], key: str = KEY) -> Any:
    """Run `scenario` with an OpenAI client of the app."""

    async def run() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with openai.AsyncOpenAI(base_url=f"{HOST}/v1", api_key=key, max_retries=0, http_client=http) as client:
            return await asyncio.wait_for(scenario(client), 20)

    return asyncio.run(run())


def with_anthropic(app: Any, scenario: Callable[[anthropic.AsyncAnthropic], Awaitable[Any]], key: str = KEY) -> Any:
    """Run `scenario` with an Anthropic client of the app."""

    async def run() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with anthropic.AsyncAnthropic(base_url=HOST, api_key=key, max_retries=0, http_client=http) as client:
            return await asyncio.wait_for(scenario(client), 20)

    return asyncio.run(run())


def scripted(monkeypatch: Any, script: Sequence[Sequence[Piece]]) -> None:
    """Make every answer of the fake engine, which has 8 outputs, be parsed as `script`; more outputs have no pieces."""
    called = any(isinstance(piece, CallBegin) for pieces in script for piece in pieces)

    async def pieces(turn: Turn) -> Any:
        at = 0
        async with aclosing(answers(turn.job, turn.counts)) as outputs:
            async for i, output in outputs:
                found = list(script[at]) if at < len(script) else []
                at += 1
                turn.counts.reasoning += len(output.tokens) if any(isinstance(p, Reasoning) for p in found) else 0
                yield i, found, msgspec.structs.replace(output, text="")

    def finish(turn: Turn, choice: int, output: Any) -> str | None:
        if output.finish is None or output.finish == "length":
            return output.finish and "length"
        return "tool_calls" if called else "stop"

    monkeypatch.setattr(Turn, "pieces", pieces)
    monkeypatch.setattr(Turn, "finish", finish)


def asked(monkeypatch: Any) -> list[Ask]:
    """The list to which every turn from now on adds what it was asked."""
    asks: list[Ask] = []
    made = Turn.__init__

    def watched(turn: Turn, served: Any, ask: Ask, *rest: Any) -> None:
        asks.append(ask)
        made(turn, served, ask, *rest)

    monkeypatch.setattr(Turn, "__init__", watched)
    return asks
