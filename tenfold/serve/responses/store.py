"""The answers of /v1/responses that are kept for a while.

Invariant: at most `most` answers and `most_bytes` bytes are kept, the least recently used are forgotten first, none is
kept longer than `ttl`, and a key finds only its own. What is kept is JSON, so its size is what it is counted as; items
that a conversation shares with an earlier one are counted for each. An answer still being made is not forgotten.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenfold.serve.errors import ApiError
from tenfold.serve.responses.run import Run
from tenfold.serve.settings import ServeConfig

OVERHEAD = 200  # bytes of memory of one more entry, about


def packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


@dataclass(slots=True)
class Stored:
    """key: whose it is. before, inputs, outputs: items of the conversation, those of this request apart, each as JSON.
    response: as JSON, empty while `run` is still making it. events: those of a stream that can be read again.
    """

    id: str
    key: str
    before: tuple[bytes, ...]
    inputs: tuple[bytes, ...] = ()
    outputs: tuple[bytes, ...] = ()
    response: bytes = b""
    events: tuple[bytes, ...] = ()
    run: Run | None = None
    made: float = 0.0
    size: int = 0

    @property
    def history(self) -> tuple[bytes, ...]:
        """The whole conversation."""
        return self.before + self.inputs + self.outputs

    def finish(self, response: dict[str, Any]) -> None:
        """Nothing more comes: keep only what is read again."""
        self.outputs = tuple(packed(item) for item in response["output"])
        self.response = packed(response)
        self.events = tuple(self.run.events) if self.run else ()
        self.run = None

    def count(self) -> int:
        """Bytes it takes."""
        return OVERHEAD + len(self.response) + sum(len(part) + OVERHEAD for part in (*self.history, *self.events))


class Store:
    """clock: seconds, never set back."""

    def __init__(self, most: int, most_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.most_bytes = most_bytes
        self.ttl = ttl
        self.bytes = 0
        self._clock = clock
        self._kept: OrderedDict[str, Stored] = OrderedDict()  # least recently used first

    @classmethod
    def of(cls, settings: ServeConfig) -> "Store":
        return cls(settings.max_stored_responses, settings.stored_response_bytes, settings.stored_response_ttl)

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, stored: Stored) -> bool:
        """Keep it, or count it anew if it is kept. False where it does not fit, however much else is forgotten."""
        self._drop(stored.id)
        stored.made, stored.size = self._clock(), stored.count()
        if not self.most or stored.size > self.most_bytes:
            return False
        self._kept[stored.id] = stored
        self.bytes += stored.size
        self._forget()
        return stored.id in self._kept

    def get(self, id: str, key: str, param: str | None = None) -> Stored:
        """The answer of that id. Raises ApiError (404) where there is none, or it is another key's."""
        stored = self.find(id, key)
        if stored is None:
            message = (
                f"There is no response {id[:128]!r} here. Responses are kept for {self.ttl:g} s, fewer where there are "
                "many, and not at all with store: false."
            )
            code = "not_found" if param is None else "previous_response_not_found"
            raise ApiError(404, message, param=param, code=code)
        self._kept.move_to_end(id)
        return stored

    def find(self, id: str, key: str) -> Stored | None:
        self._forget()
        stored = self._kept.get(id)
        return stored if stored is not None and stored.key == key else None

    def item(self, id: str, key: str) -> dict[str, Any] | None:
        """The item of that id; its middle says in which answer it is."""
        parts = id.split("_")
        stored = self.find(f"resp_{parts[1]}", key) if len(parts) == 3 else None
        for one in (*stored.inputs, *stored.outputs) if stored else ():
            item: dict[str, Any] = json.loads(one)
            if item["id"] == id:
                return item
        return None

    def delete(self, stored: Stored) -> None:
        self._drop(stored.id)

    def running(self) -> list[Stored]:
        """Those still being made."""
        return [stored for stored in self._kept.values() if stored.run is not None]

    def _drop(self, id: str) -> None:
        stored = self._kept.pop(id, None)
        if stored is not None:
            self.bytes -= stored.size

    def _forget(self) -> None:
        """What is too old, and what is too much."""
        oldest = self._clock() - self.ttl
        for stored in [s for s in self._kept.values() if s.made < oldest and s.run is None]:
            self._drop(stored.id)
        if len(self._kept) <= self.most and self.bytes <= self.most_bytes:
            return
        for stored in [s for s in self._kept.values() if s.run is None]:
            if len(self._kept) <= self.most and self.bytes <= self.most_bytes:
                return
            self._drop(stored.id)
