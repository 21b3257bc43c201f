"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.engine.request import Logprob
from tenfold.serve.errors import invalid
from tenfold.serve.logprobs import chat_logprobs
from tenfold.serve.protocol import ChatCompletion, ChatRequest, parse
from tenfold.serve.reply import (
    ERROR_RESPONSES,
    FINISH,
    body_schema,
    check_prompt,
    checked,
    events,
    head,
    new_id,
    usage,
    whole,
)
from tenfold.serve.service import Counts, Job, Service, answers, service_of

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
    service = service_of(http)
    service.check_model(body.model)
    renamed = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    params = checked(body.params(service.llm.default_params(chat=True)), body, service, renamed)
    prompt = await asyncio.to_thread(_prompt, body, service)  # long texts must not hold up the other streams
    job = Job.of(new_id("chatcmpl", http), body, body.payer(), [prompt], params, http)
    if body.stream:
        return await events(http, body, _chunks(service, job, body))
    return await whole(http, body, _answer(service, job))


def _prompt(body: ChatRequest, service: Service) -> list[int]:
    messages = [message.plain(i) for i, message in enumerate(body.messages)]
    settings = body.template_settings()
    try:
        ids = service.llm.chat_prompt(messages, **settings)
    except ValueError as error:
        raise invalid(str(error), "messages") from None
    check_prompt(ids, service, "messages")
    return ids


async def _answer(service: Service, job: Job) -> dict[str, Any]:
    counts = Counts(len(job.prompts[0]))
    n = job.params.n
    texts: list[list[str]] = [[] for _ in range(n)]
    places: list[list[Logprob]] = [[] for _ in range(n)]
    finish: list[str | None] = [None] * n
    async with aclosing(answers(service, job, counts)) as outputs:
        async for i, output in outputs:
            texts[i].append(output.text)
            places[i].extend(output.logprobs)
            if output.finish is not None:
                finish[i] = FINISH[output.finish]
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
            "logprobs": None if job.params.logprobs is None else chat_logprobs(places[i], service.llm.token_bytes),
            "finish_reason": finish[i],
        }
        for i in range(n)
    ]
    return head(job.id, "chat.completion", service) | {"choices": choices, "usage": usage(counts)}


async def _chunks(service: Service, job: Job, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    counts = Counts(len(job.prompts[0]))
    common = head(job.id, "chat.completion.chunk", service)
    options = body.stream_options
    running = bool(options and options.continuous_usage_stats)
    with_usage = running or bool(options and options.include_usage)
    begun: set[int] = set()
    async with aclosing(answers(service, job, counts)) as outputs:
        async for i, output in outputs:
            if not (output.text or output.logprobs or output.finish):
                continue  # half a character, or what may become a stop string
            delta: dict[str, Any] = {}
            if i not in begun:
                begun.add(i)
                delta["role"] = "assistant"
            if output.text or "role" in delta:
                delta["content"] = output.text
            choice = {
                "index": i,
                "delta": delta,
                "logprobs": chat_logprobs(output.logprobs, service.llm.token_bytes) if output.logprobs else None,
                "finish_reason": FINISH[output.finish] if output.finish else None,
            }
            chunk = common | {"choices": [choice]}
            if with_usage:
                chunk["usage"] = usage(counts) if running else None
            yield chunk
    if with_usage:
        yield common | {"choices": [], "usage": usage(counts)}
