"""/v1/messages: the API of Anthropic's clients."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenfold.serve.messages.answer import Answer
from tenfold.serve.messages.conversation import ask_of
from tenfold.serve.protocol.body import Body, parse
from tenfold.serve.protocol.messages import (
    CountTokensRequest,
    MessageBody,
    MessagesError,
    MessagesRequest,
    TokensCount,
)
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, events, ignored_header
from tenfold.serve.service import Served, service_of
from tenfold.serve.stream import named_event, until_disconnect
from tenfold.serve.turn import count_prompt, open_turn

router = APIRouter()

ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": MessagesError} for status in ERROR_RESPONSES}


@router.post(
    "/v1/messages",
    response_model=None,
    responses={200: {"model": MessageBody}, **ERRORS},
    openapi_extra=body_schema(MessagesRequest),
)
async def create_message(http: Request) -> Response:
    """The assistant's next message."""
    body = parse(MessagesRequest, await http.body())
    served = service_of(http).served(body.model)
    answer = await _answer(http, body, served)
    if body.stream:
        response = await events(http, body, answer.events(_request_id(http)), named_event, b"")
        response.headers["request-id"] = _request_id(http)
        return response
    message = await until_disconnect(http.receive, answer.whole())
    return JSONResponse(message, headers=_headers(http, body))


async def _answer(http: Request, body: MessagesRequest, served: Served) -> Answer:
    ask = ask_of(body, served, body.params(served.llm.default_params(chat=True)))
    turn = await open_turn(http, served, ask, "msg", body.terms())
    shown = body.thinking is None or body.thinking.display != "omitted"
    return Answer(turn, _request_id(http).removeprefix("req-"), body.stop_sequences or (), shown)


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses={200: {"model": TokensCount}, **ERRORS},
    openapi_extra=body_schema(CountTokensRequest),
)
async def count_tokens(http: Request) -> Response:
    """How many tokens a request would have as its prompt."""
    body = parse(CountTokensRequest, await http.body())
    served = service_of(http).served(body.model)
    ask = ask_of(body, served, served.llm.default_params(chat=True))
    return JSONResponse({"input_tokens": await count_prompt(served, ask)}, headers=_headers(http, body))


def _request_id(http: Request) -> str:
    request_id: str = http.scope["state"]["request_id"]
    return request_id


def _headers(http: Request, body: Body) -> dict[str, str]:
    return ignored_header(body) | {"request-id": _request_id(http)}
