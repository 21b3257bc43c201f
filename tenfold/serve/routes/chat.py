"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.engine.request import Logprob, Output
from tenfold.serve.logprobs import chat_logprobs
from tenfold.serve.parse.pieces import CallBegin, Piece, Reasoning, Text
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.chat import ChatCompletion, ChatRequest
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, check_stream, events, head, usage, whole
from tenfold.serve.service import Counts, Served, service_of
from tenfold.serve.stream import event
from tenfold.serve.structured import FIELDS, asked_format
from tenfold.serve.turn import Ask, Turn, open_turn

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletion}, **ERROR_RESPONSES},
    openapi_extra=body_schema(ChatRequest),
)
async def create_chat_completion(http: Request) -> Response:
    """The assistant's next message."""
    body = parse(ChatRequest, await http.body())
    served = service_of(http).served(body.model)
    check_stream(body)
    turn = await open_turn(http, served, _ask(body, served), "chatcmpl", body.terms())
    if body.stream:
        return await events(http, body, _chunks(turn, body), lane=turn.job.lane)
    return await whole(http, body, _answer(turn, body))


def _ask(body: ChatRequest, served: Served) -> Ask:
    renamed = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    tools, choose = body.offered(served.settings)
    grammar, held_by = asked_format({name: getattr(body, name) for name in FIELDS}, served.settings)
    return Ask(
        body.plain_messages(served.settings),
        body.params(served.llm.default_params(chat=True)),
        tools=tools,
        choose=choose,
        grammar=grammar,
        held_by=held_by,
        reasoning=body.reasoning(),
        template=body.template_settings(),
        fields=type(body).model_fields,
        renamed=renamed,
    )


@dataclass(slots=True)
class _Whole:
    """One choice while its pieces are gathered."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    places: list[Logprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Text):
                self.texts.append(piece.text)
            elif isinstance(piece, Reasoning):
                self.reasoning.append(piece.text)
            elif isinstance(piece, CallBegin):
                self.calls[piece.number] = {"id": piece.id, "name": piece.name, "arguments": []}
            else:
                self.calls[piece.number]["arguments"].append(piece.text)

    def message(self, legacy: bool) -> dict[str, Any]:
        content = "".join(self.texts) or (None if self.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        functions = [
            (call["id"], {"name": call["name"], "arguments": "".join(call["arguments"])})
            for call in self.calls.values()
        ]
        if functions and legacy:
            message["function_call"] = functions[0][1]
        elif functions:
            message["tool_calls"] = [{"id": id, "type": "function", "function": f} for id, f in functions]
        return message


async def _answer(turn: Turn, body: ChatRequest) -> dict[str, Any]:
    wholes = [_Whole() for _ in range(turn.job.params.n)]
    async with aclosing(turn.pieces()) as found:
        async for i, pieces, output in found:
            wholes[i].add(pieces)
            wholes[i].places.extend(output.logprobs)
            wholes[i].finish = _finish(turn.finish(i, output), body)
    token_bytes = turn.served.llm.token_bytes
    choices = [
        {
            "index": i,
            "message": w.message(body.legacy),
            "logprobs": None if turn.job.params.logprobs is None else chat_logprobs(w.places, token_bytes),
            "finish_reason": w.finish,
        }
        for i, w in enumerate(wholes)
    ]
    return head(turn.job.id, "chat.completion", turn.served) | {"choices": choices, "usage": _usage(turn.counts)}


def _finish(reason: str | None, body: ChatRequest) -> str | None:
    return "function_call" if reason == "tool_calls" and body.legacy else reason


def _usage(counts: Counts) -> dict[str, Any]:
    return usage(counts) | {"completion_tokens_details": {"reasoning_tokens": counts.reasoning}}


async def _chunks(turn: Turn, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    common = head(turn.job.id, "chat.completion.chunk", turn.served)
    options = body.stream_options
    running = bool(options and options.continuous_usage_stats)
    with_usage = running or bool(options and options.include_usage)
    token_bytes = turn.served.llm.token_bytes
    legacy = body.legacy
    begun: set[int] = set()

    def chunk_of(i: int, pieces: Sequence[Piece], output: Output) -> dict[str, Any] | None:
        if not (pieces or output.logprobs or output.finish):
            return None  # half a character, or what may become a stop string or a tool call
        delta = _delta(pieces, legacy)
        if i not in begun:
            begun.add(i)
            delta = {"role": "assistant", "content": None if delta else ""} | delta
        choice = {
            "index": i,
            "delta": delta,
            "logprobs": chat_logprobs(output.logprobs, token_bytes) if output.logprobs else None,
            "finish_reason": _finish(turn.finish(i, output), body),
        }
        chunk = common | {"choices": [choice]}
        if with_usage:
            chunk["usage"] = _usage(turn.counts) if running else None
        return chunk

    def spell(output: Output) -> bytes:
        chunk = chunk_of(output.index, turn.read(output.index, output), output)
        return event(chunk) if chunk else b""

    turn.job.lane.spell = spell
    async with aclosing(turn.pieces()) as found:
        async for i, pieces, output in found:
            if chunk := chunk_of(i, pieces, output):
                yield chunk
    if with_usage:
        yield common | {"choices": [], "usage": _usage(turn.counts)}


def _delta(pieces: Sequence[Piece], legacy: bool) -> dict[str, Any]:
    """What pieces add, every field and every call in it once, since clients put deltas together by these."""
    if len(pieces) == 1 and type(pieces[0]) is Text:
        return {"content": pieces[0].text}
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, Text):
            delta["content"] = delta.get("content", "") + piece.text
        elif isinstance(piece, Reasoning):
            delta["reasoning_content"] = delta.get("reasoning_content", "") + piece.text
        elif isinstance(piece, CallBegin):
            function = {"name": piece.name, "arguments": ""}
            calls[piece.number] = {"index": piece.number, "id": piece.id, "type": "function", "function": function}
        else:
            call = calls.setdefault(piece.number, {"index": piece.number, "function": {"arguments": ""}})
            call["function"]["arguments"] += piece.text
    if calls and legacy:
        delta["function_call"] = calls[0]["function"]
    elif calls:
        delta["tool_calls"] = list(calls.values())
    return delta
