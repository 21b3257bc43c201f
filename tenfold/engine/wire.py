"""What an API process and its engine process say to each other, and how it is written: MessagePack, checked against
the types below when it is read.

Invariant: one message a step and direction, however many requests it is about; nothing that is read is ever run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import IO, Any

import msgspec

from tenfold.base.config import EngineConfig
from tenfold.engine.facts import Facts, Stats
from tenfold.engine.request import Output, Request

LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Base of all messages: an array of the type's name and its fields."""


class Start(Message):
    """The one message on the engine process's standard input. factory: "module:class" whose `load` makes the engine.
    channel: file descriptor of the socket for everything else. begun: that of a datagram socket for Started. beat:
    seconds between heartbeats. level: of the log.
    """

    factory: str
    config: EngineConfig
    channel: int
    begun: int
    beat: float
    level: int


# Commands: from the API process


class Submit(Message):
    """request: a `Request`, checked only when it is taken, so that a wrong one can be refused by its id."""

    id: str
    request: msgspec.Raw


class Abort(Message):
    id: str


class Dump(Message):
    """Write stacks and the scheduler's state to the log."""


class Stop(Message):
    """End after the step under way; open requests are aborted."""


Command = Submit | Abort | Dump | Stop


# Events: from the engine process


class Ready(Message):
    """The engine is loaded."""

    facts: Facts
    stats: Stats


class Failed(Message):
    """The engine could not be loaded, or failed; the process ends. kind: a key of FAILURES."""

    kind: str
    message: str


class Started(Message):
    """These requests are in the next step. Goes by a way of its own that wakes nobody up: the step that begins wants
    every core, and until it ends or the process dies nobody need know.
    """

    ids: list[str]


class Outputs(Message):
    """What one step brought, and the numbers after it."""

    outputs: list[Output]
    stats: Stats


class Refused(Message):
    """A request the engine does not take. kind: a key of REFUSALS."""

    id: str
    kind: str
    message: str
    retry_after: int = 0


class Beat(Message):
    """The process lives. turns: steps that got something done; it stands still while `busy` when something hangs.
    state: who runs and who waits.
    """

    stats: Stats
    busy: bool
    turns: int
    age: float  # seconds since the latest of `turns`, or since there was work again
    state: str


class Log(Message):
    """A log record, with its traceback in the message."""

    name: str
    level: int
    message: str


Event = Ready | Failed | Started | Outputs | Refused | Beat | Log


def _plain(value: Any) -> Any:
    """Scalars of NumPy and PyTorch as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be sent to the engine")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_start = msgspec.msgpack.Decoder(Start)
_request = msgspec.msgpack.Decoder(Request)

encode: Callable[[Message], bytes] = _encoder.encode
decode_command: Callable[[bytes], Command] = _commands.decode
decode_event: Callable[[bytes], Event] = _events.decode


def submit(request: Request) -> bytes:
    """The command that submits a request. Raises ValueError for one that holds what no message can: half a surrogate
    pair, a number beyond 64 bits, an object.
    """
    return encode(_command(request))


def _command(request: Request) -> Submit:
    """Raises ValueError, in the engine's words where its own check finds what is wrong, too."""
    try:
        return Submit(request.id, msgspec.Raw(_encoder.encode(request)))
    except (ValueError, TypeError, OverflowError) as error:
        why = str(error)
    with suppress(TypeError):
        request.params.check()
    raise ValueError(f"The request cannot be sent to the engine: {why}.")


def request_of(command: Submit) -> Request:
    """Raises ValueError with the field that has the wrong type."""
    try:
        return _request.decode(command.request)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")  # `$.params.stop[...]`
        name = where.rpartition("$.")[2].rstrip("`")
        raise ValueError(f"{name or 'The request'} has the wrong type: {what}.") from None


def as_sent(request: Request) -> Request:
    """A request as it would arrive, for an engine in this process; its prompt and pictures stay as they are. Raises
    ValueError for what could not be sent, or with the field that has the wrong type.
    """
    bare = replace(request, prompt=(), pictures=())
    return replace(request_of(_command(bare)), prompt=request.prompt, pictures=request.pictures)


def write_start(file: IO[bytes], start: Start) -> None:
    body = encode(start)
    file.write(LENGTH.pack(len(body)) + body)
    file.flush()


def read_start(read: Callable[[int], bytes]) -> Start:
    """read: as `file.read`, unbuffered, so that nothing after the message is taken. Raises EOFError."""
    (length,) = LENGTH.unpack(_exactly(read, LENGTH.size))
    return _start.decode(_exactly(read, length))


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = read(count)
        if not part:
            raise EOFError("the message ends early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
