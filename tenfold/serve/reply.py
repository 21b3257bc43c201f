"""How an endpoint answers: whole or as events, with the headers every answer has, and an error of the engine at any
point.
"""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenfold.engine.request import FinishReason, SamplingParams
from tenfold.serve.errors import ApiError, from_value_error, invalid
from tenfold.serve.lane import Lane
from tenfold.serve.protocol.body import Body, ErrorBody
from tenfold.serve.protocol.sampling import Sampling, Usage, check_caps
from tenfold.serve.service import Counts, Served
from tenfold.serve.stream import DONE, EventStream, event, until_disconnect

FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 421, 429, 431, 500, 503, 504)
}


def body_schema(model: type[Body]) -> dict[str, Any]:
    """The OpenAPI entry of a request body that the route reads itself; `app.describe` adds the schema it points to."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def checked(
    params: SamplingParams, body: Sampling, served: Served, renamed: dict[str, str] | None = None
) -> SamplingParams:
    """`params` if the engine can do them and the server allows them. Raises ApiError (400) that names the request's
    field.
    """
    try:
        check_caps(params, served.settings)
        params.check(served.llm.vocab_size)
    except ValueError as error:
        raise from_value_error(error, type(body).model_fields, renamed) from None
    return params


def check_stream(body: Sampling) -> None:
    """Raises ApiError (400) for stream options of an answer that is no stream."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream to be true.", "stream_options")


def check_prompt(ids: Any, served: Served, param: str, answer: bool = True) -> None:
    """Raises ApiError (400) for a prompt that is empty, too long, or leaves no room where an `answer` is wanted."""
    limit = served.llm.max_model_len - answer
    if not ids:
        raise invalid(f"{param} is empty; give at least one token.", param)
    if len(ids) > limit:
        why = f", since prompt and answer together have {limit + 1}" if answer else ""
        message = (
            f"{param} has {len(ids)} tokens; this server takes prompts of up to {limit} tokens{why}. Send less, or "
            "start the server with a larger --max-model-len."
        )
        raise invalid(message, param, "context_length_exceeded")


def ignored_header(body: Body) -> dict[str, str]:
    names = body.ignored()
    return {"x-tenfold-ignored": ", ".join(names)} if names else {}


async def whole(http: Request, body: Body, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """A JSON response, unless the client leaves first."""
    return JSONResponse(await until_disconnect(http.receive, work), headers=ignored_header(body))


async def events(
    http: Request,
    body: Body,
    chunks: AsyncGenerator[dict[str, Any], None],
    encode: Callable[[dict[str, Any]], bytes] = event,
    end: bytes = DONE,
    lane: Lane | None = None,
) -> Response:
    """A stream of events. The first is awaited before the status is sent, so that a refusal still has its own
    status. lane: of the job that `chunks` come from.
    """
    first = await until_disconnect(http.receive, anext(chunks))
    return EventStream(encode(first), _rest(chunks, encode, end), ignored_header(body), lane)


async def _rest(
    chunks: AsyncGenerator[dict[str, Any], None], encode: Callable[[dict[str, Any]], bytes], end: bytes
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield encode(chunk)
    except ApiError as error:
        yield event(error.payload())
    yield end


def usage(counts: Counts) -> dict[str, Any]:
    return Usage.of(counts.prompt, counts.completion, counts.cached).model_dump()


def head(id: str, kind: str, served: Served) -> dict[str, Any]:
    """The fields with which every answer and every event of it begins."""
    return {
        "id": id,
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": served.fingerprint,
    }
