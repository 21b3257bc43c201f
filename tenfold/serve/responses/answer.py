"""An answer of /v1/responses: the response as far as it has come, and the events that tell of it.

Invariant: the items in the events of a stream are those of the whole response, since both are made by `item`.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from tenfold.engine.request import Logprob, Output
from tenfold.serve.errors import ApiError
from tenfold.serve.logprobs import chat_logprobs
from tenfold.serve.parse.pieces import Piece
from tenfold.serve.segments import Begin, Change, More, Segment, Segments
from tenfold.serve.turn import Turn

Event = dict[str, Any]

# Of the events about a segment: its delta, its end, and the name of its whole text in the latter.
TOLD = {
    "text": ("response.output_text.delta", "response.output_text.done", "text"),
    "reasoning": ("response.reasoning_text.delta", "response.reasoning_text.done", "text"),
    "call": ("response.function_call_arguments.delta", "response.function_call_arguments.done", "arguments"),
}
PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
FINISHED = {"length": "incomplete"}  # by finish reason; others: completed
CUT = frozenset({"incomplete", "failed", "cancelled"})
ERROR_CODES = {429: "rate_limit_exceeded"}  # by HTTP status; others: server_error


class Answer:
    """The answer of a turn. `status` is the response's."""

    def __init__(self, turn: Turn, mark: str, base: dict[str, Any], status: str = "in_progress") -> None:
        """mark: hex digits that its id and those of its items are made of. base: fields of the response that do not
        change.
        """
        self.turn = turn
        self.id = f"resp_{mark}"
        self.status = status
        self._mark = mark
        self._base = {"id": self.id, "object": "response", "created_at": int(time.time())} | base
        self._segments = Segments()
        self._error: dict[str, Any] | None = None
        self._completed_at: int | None = None
        self._numbered = 0

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        running = self.status in ("queued", "in_progress")
        return self._base | {
            "completed_at": self._completed_at,
            "status": self.status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "output": [self.item(segment) for segment in self._segments.all],
            "usage": None if running else self._usage(),
        }

    async def whole(self) -> dict[str, Any]:
        """The finished response. Raises ApiError."""
        async with aclosing(self.turn.pieces()) as found:
            async for i, pieces, output in found:
                for _ in self._changes(i, pieces, output):
                    pass
        return self.response()

    async def events(self, refusable: bool) -> AsyncGenerator[Event, None]:
        """The answer as it is made. An error before the first event is raised where it is refusable; any other is an
        event.
        """
        waiting = True
        if not refusable:
            yield self._about_all("response.created")
            yield self._about_all("response.queued")
        try:
            async with aclosing(self.turn.pieces()) as found:
                async for i, pieces, output in found:
                    if waiting:
                        waiting = False
                        self.status = "in_progress"
                        if refusable:
                            yield self._about_all("response.created")
                        yield self._about_all("response.in_progress")
                    for change in self._changes(i, pieces, output):
                        for event in self._told(change):
                            yield event
        except ApiError as error:
            if waiting and refusable:
                raise
            self.fail(error)
        yield self._about_all(f"response.{self.status}")

    def fail(self, error: ApiError) -> None:
        self.end("failed")
        self._error = {"code": ERROR_CODES.get(error.status, "server_error"), "message": error.message}

    def end(self, status: str) -> None:
        """Nothing more comes."""
        self.status = status
        for _ in self._segments.end():
            pass

    def _changes(self, choice: int, pieces: Sequence[Piece], output: Output) -> Iterator[Change]:
        yield from self._segments.add(pieces, output)
        if output.finish is not None:
            reason = self.turn.finish(choice, output) or "stop"
            self.status = FINISHED.get(reason, "completed")
            self._completed_at = int(time.time()) if self.status == "completed" else None
            yield from self._segments.finish(blank=True)

    def item(self, segment: Segment) -> dict[str, Any]:
        """A segment as an item of the output."""
        body = {"id": self._item_id(segment), "status": self._item_status(segment)}
        return body | ITEMS[segment.kind](self, segment)

    def _item_id(self, segment: Segment) -> str:
        return f"{PREFIXES[segment.kind]}_{self._mark}_{segment.index}"

    def _item_status(self, segment: Segment) -> str:
        if segment is self._segments.open:
            return "in_progress"
        return "incomplete" if self.status in CUT and segment is self._segments.all[-1] else "completed"

    def _told(self, change: Change) -> Iterator[Event]:
        """The events about a change."""
        segment = change.segment
        delta, done, whole = TOLD[segment.kind]
        if isinstance(change, More):
            extra = {"logprobs": self.logprobs(change.logprobs)} if segment.kind == "text" else {}
            yield self._about(segment, delta, delta=change.text, **extra)
            return
        if isinstance(change, Begin):
            yield self._event("response.output_item.added", output_index=segment.index, item=self._empty(segment))
            if segment.kind != "call":
                yield self._about(segment, "response.content_part.added", part=PARTS[segment.kind](self, "", ()))
            return
        text = segment.text
        extra = {"logprobs": self.logprobs(segment.logprobs)} if segment.kind == "text" else {}
        yield self._about(segment, done, **{whole: text}, **extra)
        if segment.kind != "call":
            part = PARTS[segment.kind](self, text, segment.logprobs)
            yield self._about(segment, "response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=segment.index, item=self.item(segment))

    def _empty(self, segment: Segment) -> dict[str, Any]:
        """The item before its content: a client puts the parts there when it is told of them."""
        item = self.item(segment)
        return item | ({} if segment.kind == "call" else {"content": []})

    def _about(self, segment: Segment, kind: str, **fields: Any) -> Event:
        place = {} if segment.kind == "call" else {"content_index": 0}
        return self._event(kind, item_id=self._item_id(segment), output_index=segment.index, **place, **fields)

    def _about_all(self, kind: str) -> Event:
        return self._event(kind, response=self.response())

    def _event(self, kind: str, **fields: Any) -> Event:
        number = self._numbered
        self._numbered += 1
        return {"type": kind, "sequence_number": number, **fields}

    def logprobs(self, logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
        if not logprobs:
            return []
        shaped: list[dict[str, Any]] = chat_logprobs(logprobs, self.turn.served.llm.token_bytes)["content"]
        return shaped

    def _usage(self) -> dict[str, Any]:
        counts = self.turn.counts
        return {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning},
            "total_tokens": counts.prompt + counts.completion,
        }


def _text_part(answer: Answer, text: str, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": answer.logprobs(logprobs)}


def _reasoning_part(answer: Answer, text: str, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _message(answer: Answer, segment: Segment) -> dict[str, Any]:
    part = _text_part(answer, segment.text, segment.logprobs)
    return {"type": "message", "role": "assistant", "content": [part]}


def _reasoning(answer: Answer, segment: Segment) -> dict[str, Any]:
    part = _reasoning_part(answer, segment.text, ())
    return {"type": "reasoning", "summary": [], "content": [part], "encrypted_content": None}


def _call(answer: Answer, segment: Segment) -> dict[str, Any]:
    return {
        "type": "function_call",
        "call_id": segment.call_id,
        "name": segment.name,
        "arguments": segment.text,
    }


PARTS: dict[str, Callable[[Answer, str, Sequence[Logprob]], dict[str, Any]]] = {
    "text": _text_part,
    "reasoning": _reasoning_part,
}
ITEMS: dict[str, Callable[[Answer, Segment], dict[str, Any]]] = {
    "text": _message,
    "reasoning": _reasoning,
    "call": _call,
}
