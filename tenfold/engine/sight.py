"""What an engine sees: where the pictures of a request stand in its prompt, and what the model's tower made of them.

Invariant: what a token sees depends on the tokens and pictures before it alone, never on who else is served, on chunks,
or on what is cached. The tower looks at one picture at a time.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.engine.plan import Entry
from tenfold.models.picture import Picture
from tenfold.models.tower import Tower
from tenfold.nn.step import Seen
from tenfold.ops.host import sent


class Layout:
    """Pictures in one prompt. places [M] int64: of their tokens, ascending; starts: how many of these come before each
    picture, and at the end how many there are.

    turns [3, prompt length] int32: time, row and column of each token, for a model whose positions have such, else
    None; later tokens stand at their place in the sequence plus `shift`.
    """

    __slots__ = ("pictures", "places", "shift", "starts", "turns")

    def __init__(self, prompt: tuple[int, ...], pictures: tuple[Picture, ...], token_id: int, turned: bool) -> None:
        """Raises ValueError where tokens and pictures do not match."""
        tokens = np.asarray(prompt, dtype=np.int64)
        self.pictures = pictures
        self.places = np.flatnonzero(tokens == token_id)
        self.starts = np.concatenate([[0], np.cumsum([p.tokens for p in pictures], dtype=np.int64)])
        if len(self.places) != self.starts[-1]:
            raise ValueError(
                f"prompt has {len(self.places)} tokens for parts of pictures, and its {len(pictures)} pictures need "
                f"{self.starts[-1]}; give each picture its tokens, and write the model's mark for one nowhere else."
            )
        self.turns = self._turns(len(tokens)) if turned else None
        self.shift = int(self.turns.max()) + 1 - len(tokens) if self.turns is not None else 0

    def _turns(self, length: int) -> np.ndarray:
        """Text counts on; a picture's tokens share the time of its first, and rows and columns count from there; after
        it text goes on past the larger of the two (Qwen2-VL, section 2.1).
        """
        found = np.empty((3, length), dtype=np.int32)
        at = position = 0
        for picture, first in zip(self.pictures, self.starts[:-1]):
            begin = int(self.places[first])
            if self.places[first + picture.tokens - 1] != begin + picture.tokens - 1:
                raise ValueError("prompt has other tokens between those of a picture, whose rows must lie together.")
            found[:, at:begin] = position + np.arange(begin - at)
            position += begin - at
            rows, columns = picture.axes
            row, column = np.divmod(np.arange(picture.tokens), columns)
            at = begin + picture.tokens
            found[:, begin:at] = position + np.stack([np.zeros_like(row), row, column])
            position += max(rows, columns)
        found[:, at:] = position + np.arange(length - at)
        return found

    def marks(self, page_size: int) -> dict[int, bytes]:
        """What full pages hold beside their tokens: the keys of the pictures that each shows a part of."""
        found: dict[int, bytes] = {}
        for picture, first, end in zip(self.pictures, self.starts[:-1], self.starts[1:]):
            for page in np.unique(self.places[first:end] // page_size).tolist():
                found[page] = found.get(page, b"") + picture.key
        return found

    def positions(self, start: int, end: int) -> np.ndarray:
        """What tokens start..end-1 turn by, for those of text [end - start]."""
        assert self.turns is not None
        later = np.arange(start, end) + self.shift
        known = self.turns[0, start:end]
        later[: len(known)] = known
        return later

    def parts(self, start: int, end: int) -> "tuple[np.ndarray, list[Part]]":
        """Of tokens start..end-1 those of pictures, counted from start, and what they show."""
        first, last = np.searchsorted(self.places, [start, end])
        found = []
        for i, picture in enumerate(self.pictures):
            low, high = max(first, self.starts[i]), min(last, self.starts[i + 1])
            if low < high:
                found.append(Part(picture, int(low - self.starts[i]), int(high - self.starts[i])))
        return self.places[first:last] - start, found


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens start..end-1 of a picture."""

    picture: Picture
    start: int
    end: int


class Sight:
    """A tower, and what it made of the pictures it saw last: up to `limit` bytes, and always those of the step."""

    def __init__(self, tower: Tower, limit: int, device: torch.device) -> None:
        self.tower = tower
        self.limit = limit
        self.device = device
        self.looked = 0  # pictures that were not in the cache
        self.bytes = 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def seen(self, entries: Iterable[Entry]) -> Seen | None:
        """What a step of these entries sees, None where none has a token of a picture."""
        rows, features, places, at = [], [], [], 0
        for entry in entries:
            layout: Layout | None = entry.sequence.layout
            if layout is not None and entry.start < entry.sequence.prompt_length:
                own, parts = layout.parts(entry.start, entry.start + entry.length)
                rows.append(own + at)
                features += [self.features(part.picture)[part.start : part.end] for part in parts]
                if layout.turns is not None:
                    places.append(layout.turns[:, own + entry.start].T)
            at += entry.length
        if not features:
            return None
        self._forget()
        return Seen(
            sent(np.concatenate(rows), self.device),
            torch.cat(features),
            sent(np.concatenate(places), self.device, torch.int64) if places else None,
        )

    def features(self, picture: Picture) -> Tensor:
        """[picture.tokens, hidden size of the text]."""
        known = self._known.get(picture.key)
        if known is None:
            known = self.tower.encode(picture)
            if len(known) != picture.tokens:
                raise ValueError(
                    f"The tower made {len(known)} vectors of a picture of {picture.tokens} tokens; it was prepared for "
                    "another model."
                )
            self.looked += 1
            self._known[picture.key] = known
            self.bytes += known.nbytes
        self._known.move_to_end(picture.key)
        return known

    def clear(self) -> None:
        self._known.clear()
        self.bytes = 0

    def _forget(self) -> None:
        """What was not looked at for longest, down to the limit."""
        while self.bytes > self.limit:
            _, features = self._known.popitem(last=False)
            self.bytes -= features.nbytes
