"""/v1/responses: an answer to a conversation, kept for a while so that the conversation can go on from it."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenfold.serve.errors import ApiError, invalid, logger, overloaded
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.responses import (
    Deleted,
    InputTokens,
    InputTokensRequest,
    ItemList,
    ResponseBody,
    ResponsesRequest,
)
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, events, ignored_header
from tenfold.serve.responses.answer import Answer
from tenfold.serve.responses.asking import ask_of, open_fitting
from tenfold.serve.responses.echo import echo
from tenfold.serve.responses.items import Item, read_input
from tenfold.serve.responses.run import Run
from tenfold.serve.responses.store import Store, Stored, packed
from tenfold.serve.service import Served, service_of
from tenfold.serve.stream import DONE, EventStream, named_event, until_disconnect
from tenfold.serve.turn import count_prompt

router = APIRouter()

KEPT = frozenset({"response.completed", "response.incomplete"})
MOST_ITEMS = 100  # on one page of input items
NO_COMPACTION = "Conversations are not compacted here; shorten them yourself, or use truncation: auto."


def described(model: type, **extra: Any) -> dict[str, Any]:
    """How OpenAPI describes a route."""
    return {"response_model": None, "responses": {200: {"model": model}, **ERROR_RESPONSES}, "openapi_extra": extra}


def query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


@dataclass(slots=True)
class Asked:
    """A conversation that a request goes on with, and where its answer is kept. before, items: those of earlier
    requests, and its own.
    """

    store: Store
    stored: Stored
    before: list[Item]
    items: list[Item]

    @classmethod
    def of(cls, http: Request, given: str | list[Item], previous: str | None, most: int) -> "Asked":
        """Raises ApiError: 400 for input that cannot be understood, 404 for a previous response that is not there."""
        store, key = store_of(http), http.scope["state"]["key"]
        if isinstance(given, list) and len(given) > most:
            raise invalid(f"input has {len(given)} items; allowed: up to {most} (--max-messages).", "input")
        mark = http.scope["state"]["request_id"].removeprefix("req-")
        items = read_input(given, mark, lambda id: store.item(id, key))
        before = _history(store, previous, key)
        stored = Stored(f"resp_{mark}", key, before)
        return cls(store, stored, [json.loads(item) for item in before], items)

    def keep(self, response: dict[str, Any]) -> dict[str, Any]:
        """The response, which says whether it is kept."""
        if response["store"]:
            self.stored.finish(response)
            response["store"] = self.put()
        return response

    def put(self) -> bool:
        """Whether there was room for it."""
        self.stored.inputs = tuple(packed(item) for item in self.items)
        return self.store.put(self.stored)


def _history(store: Store, previous: str | None, key: str) -> tuple[bytes, ...]:
    if previous is None:
        return ()
    stored = store.get(previous, key, "previous_response_id")
    if stored.run is not None:
        raise invalid(f"The response {previous!r} is still being made; wait for its end.", "previous_response_id")
    if json.loads(stored.response)["status"] not in ("completed", "incomplete"):
        raise invalid(f"The response {previous!r} has no answer to go on from.", "previous_response_id")
    return stored.history


@router.post("/v1/responses", **described(ResponseBody, **body_schema(ResponsesRequest)))
async def create_response(http: Request) -> Response:
    """An answer to a conversation: whole, as events, or made in the background."""
    body = parse(ResponsesRequest, await http.body())
    body.check_together()
    served = service_of(http).served(body.model)
    asked = Asked.of(http, body.input, body.previous_response_id, served.settings.max_messages)
    if body.background:
        check_background(asked.store, served.settings.max_background)
    answer = await _answer(http, body, served, asked)
    if body.background:
        return await _in_background(body, asked, answer, served.settings.max_background)
    if body.stream:
        return await events(http, body, _streamed(asked, answer), named_event)
    response = await until_disconnect(http.receive, answer.whole())
    return JSONResponse(asked.keep(response), headers=ignored_header(body))


async def _answer(http: Request, body: ResponsesRequest, served: Served, asked: Asked) -> Answer:
    params = body.params(served.llm.default_params(chat=True))
    ask = ask_of(body, served, asked.before + asked.items, params)
    turn = await open_fitting(http, served, ask, "resp", body.terms(), body.truncation == "auto")
    store = body.store is not False and asked.store.most > 0
    base = echo(body, served, params, store)
    return Answer(turn, asked.stored.id.removeprefix("resp_"), base, "queued" if body.background else "in_progress")


async def _streamed(asked: Asked, answer: Answer) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(answer.events(refusable=True)) as found:
        async for event in found:
            if event["type"] in KEPT:  # before the client reads it, since it may go on from it at once
                asked.keep(event["response"])
            yield event


def check_background(store: Store, most: int) -> None:
    """Raises ApiError: 400 where nothing can be made in the background, 503 where too much is."""
    most = min(most, store.most)
    if not most:
        raise invalid("background is off in this server (--max-background, --max-stored-responses).", "background")
    if len(store.running()) >= most:
        raise overloaded(f"{most} responses are being made in the background, as many as may be (--max-background).")


async def _in_background(body: ResponsesRequest, asked: Asked, answer: Answer, most: int) -> Response:
    store, stored, ticket = asked.store, asked.stored, answer.turn.job.ticket

    def ended() -> None:
        if ticket:
            ticket.close()
        if store.find(stored.id, stored.key) is stored:
            stored.finish(answer.response())
            if not store.put(stored):
                logger.warning("response %s is larger than what may be kept (--stored-response-bytes)", stored.id)

    check_background(store, most)  # again, for others may have begun meanwhile
    if ticket:
        ticket.hold()  # it counts as a request of its key until it ends
    stored.run = Run(answer, bool(body.stream), ended)
    if not asked.put():
        await stored.run.cancel()
        raise invalid("input is larger than what this server keeps (--stored-response-bytes).", "input")
    if body.stream:
        return EventStream(b"", _replay(stored), ignored_header(body))
    return JSONResponse(answer.response(), headers=ignored_header(body))


async def _replay(stored: Stored, after: int = -1) -> AsyncGenerator[bytes, None]:
    """The events of a response that was made in the background, or still is."""
    if stored.run is None:
        for event in stored.events[after + 1 :]:
            yield event
    else:
        async with aclosing(stored.run.follow(after)) as found:
            async for event in found:
                yield event
    yield DONE


@router.post("/v1/responses/input_tokens", **described(InputTokens, **body_schema(InputTokensRequest)))
async def count_input_tokens(http: Request) -> Response:
    """How many tokens a request would have as its prompt."""
    body = parse(InputTokensRequest, await http.body())
    body.check_nested()
    served = service_of(http).served(body.model)
    asked = Asked.of(http, body.input or "", body.previous_response_id, served.settings.max_messages)
    ask = ask_of(body, served, asked.before + asked.items, served.llm.default_params(chat=True))
    counted = {"object": "response.input_tokens", "input_tokens": await count_prompt(served, ask)}
    return JSONResponse(counted, headers=ignored_header(body))


@router.post("/v1/responses/compact", response_model=None, responses=ERROR_RESPONSES)
async def compact(http: Request) -> Response:
    """Not offered."""
    raise ApiError(400, NO_COMPACTION, code="unsupported_operation")


STREAM_QUERY = [query("stream", type="boolean"), query("starting_after", type="integer", minimum=0)]


@router.get("/v1/responses/{id}", **described(ResponseBody, parameters=STREAM_QUERY))
async def retrieve_response(http: Request, id: str) -> Response:
    """A stored response; one that is made in the background as far as it has come."""
    stored = _find(http, id)
    after = _number(http, "starting_after", -1, 0, 2**31)
    if not _flag(http, "stream"):
        return Response(_json(stored), media_type="application/json")
    if not (stored.events or (stored.run is not None and stored.run.replayable)):
        raise invalid("Only a response made with background and stream can be streamed again.", "stream")
    return EventStream(b"", _replay(stored, after))


PAGE_QUERY = [
    query("limit", type="integer", minimum=1, maximum=MOST_ITEMS),
    query("order", type="string", enum=["asc", "desc"]),
    query("after", type="string"),
]


@router.get("/v1/responses/{id}/input_items", **described(ItemList, parameters=PAGE_QUERY))
async def list_input_items(http: Request, id: str) -> Response:
    """The items that a request came with, newest first unless told otherwise."""
    items = [json.loads(item) for item in _find(http, id).inputs]
    order = http.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid(f"order is {order[:64]!r}; allowed: asc, desc.", "order")
    if order == "desc":
        items.reverse()
    limit = _number(http, "limit", 20, 1, MOST_ITEMS)
    after = http.query_params.get("after")
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise invalid(f"after is {after[:64]!r}, which is not the id of an item of this response.", "after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(items) > start + limit
    return JSONResponse({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


@router.post("/v1/responses/{id}/cancel", **described(ResponseBody))
async def cancel_response(http: Request, id: str) -> Response:
    """End a response that is made in the background. One that has ended stays as it is."""
    stored = _find(http, id)
    if stored.run is not None:
        await stored.run.cancel()
    elif not json.loads(stored.response)["background"]:
        raise invalid("Only a response made in the background can be cancelled; to end others, disconnect.", "id")
    return Response(_json(stored), media_type="application/json")


@router.delete("/v1/responses/{id}", **described(Deleted))
async def delete_response(http: Request, id: str) -> Response:
    """Forget a response; what is being made of it ends."""
    stored = _find(http, id)
    store_of(http).delete(stored)
    if stored.run is not None:
        await stored.run.cancel()
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def store_of(http: Request) -> Store:
    store: Store = http.app.state.responses
    return store


def _find(http: Request, id: str) -> Stored:
    return store_of(http).get(id, http.scope["state"]["key"])


def _json(stored: Stored) -> bytes:
    return stored.response if stored.run is None else packed(stored.run.answer.response())


def _flag(http: Request, name: str) -> bool:
    given = http.query_params.get(name, "false").lower()
    if given not in ("true", "false"):
        raise invalid(f"{name} is {given[:64]!r}; allowed: true, false.", name)
    return given == "true"


def _number(http: Request, name: str, default: int, low: int, high: int) -> int:
    given = http.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 12 and low <= int(given) <= high):
        raise invalid(f"{name} is {given[:64]!r}; allowed: {low} to {high}.", name)
    return int(given)
