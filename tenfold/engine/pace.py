"""When to plan a step: just before the one under way ends.

A step is launched while the one before it runs, so that a GPU never waits. Planned as soon as that one began, it leaves
out whoever comes while it runs: they wait for what is left of it, for a step that was planned without them and for
their own. Planned just before it ends, they wait for a step less.
"""

import time
from collections import deque
from collections.abc import Callable

KEPT = 16  # steps by which the next one is judged
POLL = 0.0002  # seconds, after which is looked whether the step under way ended before it was expected to
HEADROOM = 1.5  # times the longest that planning and launching took of late, that they are given
SLACK = 0.0003  # seconds more


class Pace:
    """Sleeps between steps. The step under way is taken to last as long as the shortest of late, and the host's part of
    the next one as long as its longest: so the device waits for nothing, but for the rare step that is shorter still.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._steps: deque[float] = deque(maxlen=KEPT)
        self._hosts: deque[float] = deque(maxlen=KEPT)
        self._began: float | None = None  # the step under way, as far as that was seen
        self._woke: float | None = None

    def rest(self, ended: Callable[[], bool]) -> float:
        """As long as planning can wait; the seconds that this was. ended: whether the last step that was launched is
        done.
        """
        begin = now = self._clock()
        if self._began is not None and self._steps and self._hosts:
            until = self._began + min(self._steps) - HEADROOM * max(self._hosts) - SLACK
            while now < until and not ended():
                self._sleep(min(POLL, until - now))
                now = self._clock()
        self._woke = now
        return now - begin

    def launched(self) -> None:
        """What was planned since `rest` is with the device."""
        if self._woke is not None:
            self._hosts.append(self._clock() - self._woke)
            self._woke = None

    def read(self, followed: bool) -> None:
        """A step was read. followed: the next one was launched already, and runs since."""
        now = self._clock()
        if self._began is not None:
            self._steps.append(now - self._began)
        self._began = now if followed else None
