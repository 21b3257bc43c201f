"""`Lane`: the short way of a token, from the message of an engine to the socket of a client, past the tasks and
generators between them, which take as long as all the rest.

Invariant: a lane changes nothing but the time an event takes. It is open only while whoever would write the event waits
for the next, and what is not as usual (an end, an error, a client that does not read) goes the long way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tenfold.engine.request import Output


class Line(Protocol):
    """The socket of a response."""

    @property
    def free(self) -> bool:
        """Whether its head is sent and more may be written at once."""
        ...

    def write(self, data: bytes) -> None: ...

    def together(self) -> AbstractContextManager[None]:
        """What is sent inside leaves as one: a head alone would wake the client up for nothing, on a busy machine
        before the first event can follow.
        """
        ...


class Lane:
    """Of one stream. Each part is set by the layer it belongs to: `count` by the one that observes outputs, `spell` by
    the route, which returns the events of an output (none: empty), the line by the response.
    """

    __slots__ = ("_line", "count", "spell")

    def __init__(self) -> None:
        self.count: Callable[[Output], None] | None = None
        self.spell: Callable[[Output], bytes] | None = None
        self._line: Line | None = None

    def open(self, line: Line | None) -> None:
        """From now on outputs may be written to `line`; None: they may not."""
        self._line = line

    def take(self, output: Output) -> bool:
        """Write what `output` means for the client, and True; False where it has to go the long way."""
        line = self._line
        if line is None or self.count is None or self.spell is None or not line.free:
            return False
        self.count(output)
        events = self.spell(output)
        if events:
            line.write(events)
        return True
