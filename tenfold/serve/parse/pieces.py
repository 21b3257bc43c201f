"""What a streaming parser finds in an answer: the vocabulary between it and the routes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. number: 0 for the first call of an answer; id: unique, made by the parser."""

    number: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: all of them joined are one JSON object."""

    number: int
    text: str


Piece = Text | Reasoning | CallBegin | CallArguments
