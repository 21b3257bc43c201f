"""Waiting sequences, handed out fairly between users.

Virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each user has a counter of
weighted tokens served; the next sequence is that of the best priority, then of the user served least, then the first
that is due. A user who was idle is lifted to the least counter among active users, so that time away earns no credit,
and between two users who always have work waiting the difference stays below a bound that does not grow with time.

A prompt is due when `overtake` times as many tokens of prompts were computed since it came as it has itself: shorter
ones that come soon after it go first, later ones do not, and nobody waits for ever. Deadlines in proportion to the work
keep the worst ratio of time taken to time needed small (Bender, Chakrabarti, Muthukrishnan, "Flow and Stretch Metrics
for Scheduling Continuous Job Streams", SODA 1998); counted in tokens they need no clock and no estimate.
"""

from heapq import heapify, heappop, heappush
from math import inf

from tenfold.engine.sequence import Sequence, Status, Turn

PROMPT_WEIGHT = 1
ANSWER_WEIGHT = 2  # a decoded token costs about twice a prompt token, as in the paper and in common price lists

Key = tuple[int, float, Turn]  # priority, what the user was served


def due(computed: float, grace: float) -> float:
    """How many tokens of prompts are computed when one is due that comes after so many. grace: tokens of others until
    then, in proportion to its own; 0: all are due at once, and go in the order they came.
    """
    return computed + grace if grace else 0.0


class Least:
    """The least number of sequences that wait for a first token. An entry of one that does so no longer stays until it
    is the least, or until most are such: a number costs the logarithm of how many wait, not a look at each.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Sequence]] = []

    def push(self, number: float, sequence: Sequence) -> None:
        heappush(self._heap, (number, sequence.order, sequence.index, sequence))

    def tidy(self, most: int) -> None:
        """Forget who waits no longer where there are more than `most` entries."""
        if len(self._heap) > most:
            self._heap = [entry for entry in self._heap if self._counts(entry[3])]
            heapify(self._heap)

    def least(self) -> float | None:
        while self._heap and not self._counts(self._heap[0][3]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    @staticmethod
    def _counts(sequence: Sequence) -> bool:
        return sequence.status is Status.WAITING and not sequence.generated


class FairQueue:
    """The queue and the counters. `enter` and `leave` frame a sequence's life; `push` and `pop` its waits within it."""

    def __init__(self) -> None:
        self.tokens = 0  # sum of the lengths of waiting sequences
        self._computed = 0  # tokens of prompts
        self._size = 0
        self._heaps: dict[str, list[tuple[Turn, Sequence]]] = {}
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._floor = 0.0  # least counter among active users, never falling
        # Of those who have no token yet: all, and seconds to the first that they have of their own, and who has none.
        self._arrivals, self._own, self._others = Least(), Least(), Least()

    def __len__(self) -> int:
        return self._size

    def served(self, user: str) -> float:
        """Weighted tokens on the user's counter."""
        return self._served.get(user, self._floor)

    def key(self, sequence: Sequence) -> Key:
        """Order in which prompts are computed: least first."""
        return sequence.rank[0], self._served[sequence.request.user], sequence.turn

    def computed(self, user: str, tokens: int) -> None:
        """So many tokens of one of the user's prompts."""
        self._computed += tokens
        self.charge(user, PROMPT_WEIGHT * tokens)

    def charge(self, user: str, weighted: float) -> None:
        self._served[user] += weighted

    def enter(self, user: str) -> None:
        """One more unfinished sequence of this user."""
        if user not in self._active:
            self._raise_floor()
            self._served[user] = max(self._served.get(user, 0.0), self._floor)
            self._active[user] = 0
        self._active[user] += 1

    def leave(self, user: str) -> None:
        """One unfinished sequence less."""
        self._active[user] -= 1
        if not self._active[user]:
            del self._active[user]
            if not self._active:
                self._floor = max(self._floor, self._served[user])
            self._raise_floor()
            if len(self._served) > 2 * len(self._active) + 1024:
                self._prune()

    def push(self, sequence: Sequence, grace: float = 0.0) -> None:
        """grace: as in `due`, which is settled at a sequence's first time."""
        if sequence.turn[1] == inf:
            when = due(self._computed, grace) if sequence.parent is None else sequence.parent.turn[1]
            sequence.turn = (sequence.rank[0], when, sequence.rank)
        heappush(self._heaps.setdefault(sequence.request.user, []), (sequence.turn, sequence))
        self._size += 1
        self.tokens += len(sequence.tokens)
        if not sequence.generated:
            self._arrivals.push(sequence.request.arrival, sequence)
            (self._own if sequence.request.ttft else self._others).push(sequence.request.ttft, sequence)
        for numbers in (self._arrivals, self._own, self._others):
            numbers.tidy(2 * self._size + 64)

    @property
    def oldest(self) -> float | None:
        """When the first of those arrived who have no token yet; None where nobody waits for one."""
        return self._arrivals.least()

    def strictest(self, usual: float) -> float | None:
        """The least seconds to a first token that one of them aims at: `usual` where it has none of its own."""
        own = self._own.least()
        if self._others.least() is None:
            return own
        return usual if own is None else min(own, usual)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out. Inside a heap it stays as a stale entry, known by its status, which the
        caller changes for good.
        """
        self._size -= 1
        self.tokens -= len(sequence.tokens)
        heap = self._heaps[sequence.request.user]
        if heap[0][1] is sequence:
            heappop(heap)

    def head(self) -> Sequence | None:
        """The sequence to run next, left in the queue."""
        best: Sequence | None = None
        best_key: Key | None = None
        for user in list(self._heaps):
            heap = self._heaps[user]
            while heap and heap[0][1].status is not Status.WAITING:
                heappop(heap)
            if not heap:
                del self._heaps[user]
                continue
            key = self.key(heap[0][1])
            if best_key is None or key < best_key:
                best, best_key = heap[0][1], key
        return best

    def _raise_floor(self) -> None:
        if self._active:
            self._floor = max(self._floor, min(self._served[user] for user in self._active))

    def _prune(self) -> None:
        """Forget users who would be lifted to the floor anyway."""
        self._served = {u: c for u, c in self._served.items() if u in self._active or c > self._floor}
