"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.engine.request import Logprob
from tenfold.serve.logprobs import chat_logprobs
from tenfold.serve.parse.pieces import Text
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.chat import ChatCompletion, ChatRequest
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, check_stream, events, head, usage, whole
from tenfold.serve.service import Served, service_of
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
        return await events(http, body, _chunks(turn, body))
    return await whole(http, body, _answer(turn))


def _ask(body: ChatRequest, served: Served) -> Ask:
    renamed = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    return Ask(
        [message.plain(i) for i, message in enumerate(body.messages)],
        body.params(served.llm.default_params(chat=True)),
        template=body.template_settings(),
        fields=type(body).model_fields,
        renamed=renamed,
    )


async def _answer(turn: Turn) -> dict[str, Any]:
    n = turn.job.params.n
    texts: list[list[str]] = [[] for _ in range(n)]
    places: list[list[Logprob]] = [[] for _ in range(n)]
    finish: list[str | None] = [None] * n
    async with aclosing(turn.pieces()) as found:
        async for i, pieces, output in found:
            texts[i] += [piece.text for piece in pieces if isinstance(piece, Text)]
            places[i].extend(output.logprobs)
            finish[i] = turn.finish(i, output)
    token_bytes = turn.served.llm.token_bytes
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
            "logprobs": None if turn.job.params.logprobs is None else chat_logprobs(places[i], token_bytes),
            "finish_reason": finish[i],
        }
        for i in range(n)
    ]
    return head(turn.job.id, "chat.completion", turn.served) | {"choices": choices, "usage": usage(turn.counts)}


async def _chunks(turn: Turn, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    common = head(turn.job.id, "chat.completion.chunk", turn.served)
    options = body.stream_options
    running = bool(options and options.continuous_usage_stats)
    with_usage = running or bool(options and options.include_usage)
    token_bytes = turn.served.llm.token_bytes
    begun: set[int] = set()
    async with aclosing(turn.pieces()) as found:
        async for i, pieces, output in found:
            if not (pieces or output.logprobs or output.finish):
                continue  # half a character, or what may become a stop string
            text = "".join([piece.text for piece in pieces if isinstance(piece, Text)])
            delta: dict[str, Any] = {}
            if i not in begun:
                begun.add(i)
                delta["role"] = "assistant"
            if text or "role" in delta:
                delta["content"] = text
            choice = {
                "index": i,
                "delta": delta,
                "logprobs": chat_logprobs(output.logprobs, token_bytes) if output.logprobs else None,
                "finish_reason": turn.finish(i, output),
            }
            chunk = common | {"choices": [choice]}
            if with_usage:
                chunk["usage"] = usage(turn.counts) if running else None
            yield chunk
    if with_usage:
        yield common | {"choices": [], "usage": usage(turn.counts)}
