"""Log-probabilities in the two shapes that OpenAI's endpoints have."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold.engine.request import Logprob

Bytes = Callable[[int], bytes]  # the bytes of a token; some hold a part of a character only


def chat_logprobs(logprobs: Iterable[Logprob], token_bytes: Bytes) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion: every token with its bytes and its rivals."""
    return {
        "content": [_entry(p.token, p.logprob, token_bytes) | {"top_logprobs": _top(p, token_bytes)} for p in logprobs],
        "refusal": None,
    }


def _top(place: Logprob, token_bytes: Bytes) -> list[dict[str, Any]]:
    return [_entry(token, logprob, token_bytes) for token, logprob in place.top]


def _entry(token: int, logprob: float, token_bytes: Bytes) -> dict[str, Any]:
    raw = token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


@dataclass(slots=True)
class TextLogprobs:
    """`choices[].logprobs` of a text completion: parallel lists. `offset` counts the whole characters of the tokens
    so far.
    """

    token_bytes: Bytes
    offset: int = 0
    columns: dict[str, list[Any]] = field(default_factory=dict)
    _characters: codecs.IncrementalDecoder = field(init=False)

    def __post_init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.take()

    def take(self) -> dict[str, list[Any]]:
        """What was gathered since the last call."""
        columns, self.columns = (
            self.columns,
            {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []},
        )
        return columns

    def add(self, place: Logprob) -> None:
        top = {self._name(token): logprob for token, logprob in place.top}
        top.setdefault(self._name(place.token), place.logprob)
        self._append(place.token, place.logprob, top)

    def add_prompt(self, tokens: Sequence[int], places: Sequence[Logprob | None] | None) -> None:
        """The prompt's tokens; the first has no probability, since nothing stands before it."""
        for i, token in enumerate(tokens):
            place = places[i] if places else None
            if place is None:
                self._append(token, None, None)
            else:
                self.add(place)

    def _append(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        name = self._name(token)
        for column, value in zip(self.columns.values(), (name, logprob, top, self.offset), strict=True):
            column.append(value)
        self.offset += len(self._characters.decode(self.token_bytes(token)))

    def _name(self, token: int) -> str:
        """The token's text; one that is no whole character is named by its bytes, so that two of them stay apart."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
