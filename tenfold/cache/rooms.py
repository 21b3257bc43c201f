"""Who has which room of a packed KV store: a running sequence, or nobody, with what stood exact at the end of a known
beginning of a text.

A sequence that goes on from cached pages needs the tokens before it as they were computed, which pages do not hold. So
a room whose sequence ends is kept under the key of its last whole page, until somebody needs the room; the longest
unused goes first. Knows nothing of requests or of what rooms hold.
"""

from collections import OrderedDict
from collections.abc import Sequence


class Rooms:
    """`total` rooms, numbered from 0; at least as many as sequences that run at once. slack: tokens that may be written
    to a room behind a place and leave it good to go on from there.
    """

    def __init__(self, total: int, slack: int) -> None:
        self.total = total
        self.slack = slack
        self._free = list(range(total - 1, -1, -1))
        self._kept: OrderedDict[bytes, int] = OrderedDict()

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._kept)

    def take(self) -> int:
        """A room, whose contents are lost. Raises IndexError where all are in use."""
        if self._free:
            return self._free.pop()
        if not self._kept:
            raise IndexError("every room is in use")
        return self._kept.popitem(last=False)[1]

    @property
    def available(self) -> int:
        """Rooms that `take` can hand out now."""
        return len(self._free) + len(self._kept)

    def give(self, room: int, key: bytes | None = None) -> None:
        """Give a room back; key: of the beginning at whose end it stands, None where it is of no more use."""
        if key is None:
            self._free.append(room)
            return
        if key in self._kept:
            self._free.append(self._kept.pop(key))
        self._kept[key] = room

    def match(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """The longest beginning of a chain of page keys that can be gone on from: pages and room; (0, -1): none."""
        for count in range(len(keys), 0, -1):
            room = self._kept.get(keys[count - 1])
            if room is not None:
                self._kept.move_to_end(keys[count - 1])
                return count, room
        return 0, -1

    def clear(self) -> None:
        """Forget all that is kept."""
        self._free.extend(self._kept.values())
        self._kept.clear()

    def check(self, used: Sequence[int]) -> None:
        """Raises AssertionError unless just these rooms are in use, and every room is in one state."""
        every = [*self._free, *self._kept.values(), *used]
        assert sorted(every) == list(range(self.total)), (
            f"rooms {sorted(every)} are not 0 to {self.total - 1} once each"
        )
