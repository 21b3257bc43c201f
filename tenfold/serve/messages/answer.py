"""An answer of /v1/messages: the message as far as it has come, and the events that tell of it.

Invariant: a stream's events add up to the whole message.
"""

import hashlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic_core import from_json

from tenfold.engine.request import Output
from tenfold.serve.errors import ApiError, anthropic_payload
from tenfold.serve.parse.pieces import Piece
from tenfold.serve.segments import Begin, Change, More, Segment, Segments
from tenfold.serve.turn import Turn

Event = dict[str, Any]

STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}
# Of a segment's events: the type of its delta, and the name of the text in it.
DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class Answer:
    """The answer of a turn. stop_sequences: of the request. show_thinking: whether thinking comes with its text."""

    def __init__(self, turn: Turn, mark: str, stop_sequences: Sequence[str], show_thinking: bool) -> None:
        """mark: hex digits that its id is made of."""
        self.turn = turn
        self.id = f"msg_{mark}"
        self._stop_sequences = stop_sequences
        self._show_thinking = show_thinking
        self._segments = Segments()
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def message(self) -> dict[str, Any]:
        """The message as it is now."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.turn.served.name,
            "content": [self._block(segment) for segment in self._segments.all],
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage() | {"service_tier": "standard"},
        }

    async def whole(self) -> dict[str, Any]:
        """The finished message. Raises ApiError."""
        async with aclosing(self.turn.pieces()) as found:
            async for i, pieces, output in found:
                for _ in self._changes(i, pieces, output):
                    pass
        return self.message()

    async def events(self, request_id: str) -> AsyncGenerator[Event, None]:
        """The message as it is made. An error before the first event is raised; any other is an event."""
        begun = False
        try:
            async with aclosing(self.turn.pieces()) as found:
                async for i, pieces, output in found:
                    if not begun:
                        begun = True
                        yield {"type": "message_start", "message": self.message()}
                    for change in self._changes(i, pieces, output):
                        for event in self._told(change):
                            yield event
        except ApiError as error:
            if not begun:
                raise
            yield anthropic_payload(error, request_id)
            return
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield {"type": "message_stop"}

    def _changes(self, choice: int, pieces: Sequence[Piece], output: Output) -> Iterator[Change]:
        yield from self._segments.add(pieces, output)
        if output.finish is not None:
            self._stop(self.turn.finish(choice, output) or "stop", output.stop)
            yield from self._segments.finish()

    def _stop(self, finish: str, stop: str | int | None) -> None:
        if finish == "length":
            full = self.turn.counts.completion >= (self.turn.job.params.max_tokens or 0)
            self._stop_reason = "max_tokens" if full else "model_context_window_exceeded"
        elif finish == "stop" and isinstance(stop, str) and stop in self._stop_sequences:
            self._stop_reason, self._stop_sequence = "stop_sequence", stop
        else:
            self._stop_reason = STOP_REASONS[finish]

    def _told(self, change: Change) -> Iterator[Event]:
        """The events about a change."""
        segment = change.segment
        if isinstance(change, Begin):
            block = self._empty(segment)
            yield {"type": "content_block_start", "index": segment.index, "content_block": block}
        elif isinstance(change, More):
            if self._shown(segment):
                kind, name = DELTAS[segment.kind]
                yield self._delta(segment, {"type": kind, name: change.text})
        else:
            if segment.kind == "reasoning":
                yield self._delta(segment, {"type": "signature_delta", "signature": signature(segment.text)})
            yield {"type": "content_block_stop", "index": segment.index}

    def _delta(self, segment: Segment, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": segment.index, "delta": delta}

    def _shown(self, segment: Segment) -> bool:
        return segment.kind != "reasoning" or self._show_thinking

    def _empty(self, segment: Segment) -> dict[str, Any]:
        """The block before its content."""
        if segment.kind == "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        if segment.kind == "text":
            return {"type": "text", "text": ""}
        return {"type": "tool_use", "id": segment.call_id, "name": segment.name, "input": {}}

    def _block(self, segment: Segment) -> dict[str, Any]:
        text = segment.text
        if segment.kind == "reasoning":
            shown = text if self._show_thinking else ""
            return self._empty(segment) | {"thinking": shown, "signature": signature(text)}
        return self._empty(segment) | ({"text": text} if segment.kind == "text" else {"input": arguments(text)})

    def _usage(self) -> dict[str, Any]:
        counts = self.turn.counts
        return {
            "input_tokens": counts.prompt - counts.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached,
            "output_tokens": counts.completion,
            "output_tokens_details": {"thinking_tokens": counts.reasoning},
        }


def signature(thinking: str) -> str:
    """Clients want one, and drop thinking that has none. This one proves nothing."""
    return "sha256-" + hashlib.sha256(thinking.encode("utf-8", "surrogatepass")).hexdigest()


def arguments(text: str) -> dict[str, Any]:
    """The input of a tool; of one that was cut off, as much of it as there is."""
    try:
        found = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
