"""The pieces of an answer gathered into segments: runs of text, of reasoning, or of one tool call.

Items of /v1/responses and content blocks of /v1/messages are both made of these. Invariant: segments follow one
another, each begins and ends once, and what was told of it piece by piece joins to `Segment.text`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tenfold.engine.request import Logprob, Output
from tenfold.serve.parse.pieces import CallArguments, CallBegin, Piece, Reasoning, Text

Kind = Literal["text", "reasoning", "call"]
KINDS: dict[type[Piece], Kind] = {Text: "text", Reasoning: "reasoning", CallBegin: "call", CallArguments: "call"}


@dataclass(slots=True)
class Segment:
    """index: its place in the answer. call_id, name: of a tool call, whose arguments are the text. logprobs: of the
    tokens of text.
    """

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True, slots=True)
class Begin:
    segment: Segment


@dataclass(frozen=True, slots=True)
class More:
    segment: Segment
    text: str
    logprobs: Sequence[Logprob]


@dataclass(frozen=True, slots=True)
class End:
    segment: Segment


Change = Begin | More | End


class Segments:
    """One answer as it grows."""

    def __init__(self) -> None:
        self.all: list[Segment] = []
        self.open: Segment | None = None
        self._held: list[Logprob] = []  # of tokens whose text is not out yet, such as half a character

    def add(self, pieces: Sequence[Piece], output: Output) -> Iterator[Change]:
        """What an output of the engine changes. Calls come one after the other, as the text they are parsed from."""
        if output.logprobs:
            self._hold(pieces, output)
        for piece in pieces:
            if self._starts(piece):
                yield from self.end()
                yield Begin(self._begin(piece))
            if not isinstance(piece, CallBegin) and piece.text:
                yield self._more(piece.text)

    def end(self) -> Iterator[Change]:
        """Close the open segment, if there is one."""
        if self.open is not None:
            closed, self.open = self.open, None
            yield End(closed)

    def finish(self, blank: bool = False) -> Iterator[Change]:
        """The answer has ended. blank: one of nothing still has a text, which is empty."""
        if blank and not self.all:
            yield Begin(self._begin(Text("")))
        if self.open is not None and self.open.kind == "text" and self._held:
            yield self._more("")
        yield from self.end()

    def _starts(self, piece: Piece) -> bool:
        return isinstance(piece, CallBegin) or self.open is None or self.open.kind != KINDS[type(piece)]

    def _begin(self, piece: Piece) -> Segment:
        segment = Segment(len(self.all), KINDS[type(piece)])
        if isinstance(piece, CallBegin):
            segment.call_id, segment.name = piece.id, piece.name
        self.all.append(segment)
        self.open = segment
        return segment

    def _more(self, text: str) -> More:
        assert self.open is not None
        self.open.parts.append(text)
        logprobs: Sequence[Logprob] = ()
        if self._held and self.open.kind == "text":
            logprobs, self._held = self._held, []
            self.open.logprobs += logprobs
        return More(self.open, text, logprobs)

    def _hold(self, pieces: Sequence[Piece], output: Output) -> None:
        """Keep log-probabilities until the text they belong to is out. Tokens without a piece belong to what is open:
        they are markup, or text still held back.
        """
        kinds = {KINDS[type(piece)] for piece in pieces} or {self.open.kind if self.open else "text"}
        if "text" in kinds:
            self._held += output.logprobs
        else:
            self._held = []
