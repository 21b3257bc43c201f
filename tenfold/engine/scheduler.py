"""The scheduler decides, before each step, who runs how many tokens, and owns the life of every sequence.

Invariants: pages held = pages counted in the pool, after every call; a plan never writes a page that has another
reference or that the prefix cache counts on; a sequence's whole known text has its pages from admission on, so only
decoding can run out of pages, and then the worst rank (priority, then arrival) gives its pages up and is queued again
with its own tokens kept. Every preemption follows a newly generated token, so the work left shrinks and nothing runs in
circles. Drafts get pages and tokens of a step only where nobody else needs them.

Where the cache has rooms (`cache.rooms`) a running sequence owns one, and shares pages only up to a place whose room is
kept. Such places are the ends of sequences, and where a prompt was found to part from cached pages that had none: it is
computed up to there in a chunk of its own, and its room copied.
"""

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tenfold.cache.pages import PagePool
from tenfold.cache.prefix import PrefixCache
from tenfold.cache.rooms import Rooms
from tenfold.engine.fair import ANSWER_WEIGHT, FairQueue
from tenfold.engine.plan import PROMPT_LOGPROBS, Entry, StepPlan
from tenfold.engine.sequence import Sequence, Status

WATERMARK = 0.01  # share of pages left for the growth of running sequences when a new one is admitted


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes the scheduler keeps to. A step never has more rows than tokens, so decodes always fit in one step.
    max_drawn: tokens a step may draw where it verifies drafts (0: as many as it has rows). overtake: times its
    own tokens, after which a prompt is due (`fair`).
    """

    max_batch: int
    max_step_tokens: int
    max_queue: int = 1024
    max_queue_tokens: int = 0
    max_drawn: int = 0
    watermark: float = WATERMARK
    overtake: float = 0.0

    @property
    def rows(self) -> int:
        return min(self.max_batch, self.max_step_tokens)


class Scheduler:
    """Continuous batching with chunked prefill over `pool`, `page_size` tokens a page; `prefix=None` turns the prefix
    cache off.

    Requests may be added before they can run, and are released later. Per step the owner calls `plan`, runs it, then
    `retire` for each of its entries, in the order in which plans were made. A plan with drafts takes pages that
    `reserve` gave, and is read before another has anything of the same sequences.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        limits: Limits,
        prefix: PrefixCache | None = None,
        rooms: Rooms | None = None,
    ) -> None:
        self.rooms = rooms
        self.pool = pool
        self.page_size = page_size
        self.limits = limits
        self.prefix = prefix
        self.queue = FairQueue()
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.unfinished = 0
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._held = 0  # answers 1..n-1 whose prompt is not computed yet
        self._blocked: dict[Sequence, None] = {}  # added, not to run yet
        self._leaving: set[Sequence] = set()  # finished, but a step in flight still uses their pages
        self._entering: set[Sequence] = set()  # have a row, and were in no plan yet
        self._parting: list[Sequence] = []  # were planned up to a place whose room is to be copied
        self._room_copies: list[tuple[int, int]] = []  # of the next plan
        self._free_rows = list(range(limits.rows - 1, -1, -1))
        self._inflight = 0
        self._number = 0
        self._deadlines: list[tuple[float, int, int, Sequence]] = []
        self._watermark = min(math.ceil(limits.watermark * pool.total), pool.total // 2)

    # Arrival and end

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def waiting(self) -> int:
        return len(self.queue) + self._held + len(self._blocked)

    def add(self, sequences: list[Sequence], blocked: bool = False) -> None:
        """The n sequences of one request; all but the first wait until the first has computed the prompt they share.
        blocked: none runs before `release`.
        """
        first, children = sequences[0], sequences[1:]
        first.children = children
        if len(self._deadlines) > 2 * self.unfinished + 64:
            self._deadlines = [d for d in self._deadlines if d[3].status is not Status.FINISHED]
            heapq.heapify(self._deadlines)
        for sequence in sequences:
            self.unfinished += 1
            self.queue.enter(sequence.request.user)
            if sequence.request.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.request.deadline, sequence.order, sequence.index, sequence))
        for child in children:
            child.parent = first
        self._held += len(children)
        if blocked:
            self._blocked[first] = None
        else:
            self._wait(first)

    def release(self, sequences: list[Sequence]) -> None:
        """Let those of a blocked request run that have not ended."""
        for sequence in sequences:
            if sequence in self._blocked:
                del self._blocked[sequence]
                self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """To be computed; what is cached of it need not be."""
        overtake = self.limits.overtake
        left = len(sequence.tokens) - self._shared_pages(sequence)[1] if overtake else 0
        self.queue.push(sequence, overtake * left)

    def expired(self, now: float) -> list[Sequence]:
        """Unfinished sequences whose deadline has passed, each named once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[3]
            if sequence.status is not Status.FINISHED:
                late.append(sequence)
        return late

    def finish(self, sequence: Sequence) -> None:
        """End a sequence in whatever phase it is. Its pages and row are free at once, or when the last step in
        flight that uses them is read.
        """
        status = sequence.status
        if status is Status.FINISHED:
            return
        sequence.status = Status.FINISHED
        self.unfinished -= 1
        if sequence.row >= 0:
            (self.decoding if status is Status.DECODE else self.prefilling).remove(sequence)
            if sequence.inflight:
                self._leaving.add(sequence)
            else:
                self._vacate(sequence)
        elif self._is_held(sequence):
            self._held -= 1
        elif sequence not in self._blocked:
            self.queue.remove(sequence)
        self._let_children_go(sequence)
        self._blocked.pop(sequence, None)
        self.queue.leave(sequence.request.user)

    def _is_held(self, sequence: Sequence) -> bool:
        return sequence.parent is not None and sequence in sequence.parent.children

    def _let_children_go(self, parent: Sequence) -> None:
        children, parent.children = parent.children, []
        for child in children:
            if child.status is Status.WAITING:
                self._held -= 1
                if parent in self._blocked:
                    self._blocked[child] = None
                else:
                    self.queue.push(child)

    def _vacate(self, sequence: Sequence) -> None:
        """Give row and pages back; the last page first, so that of a kept chain the end is given away before the
        beginning.
        """
        if self.rooms is not None:
            self._leave_room(sequence, self.rooms)
        self.pool.release(reversed(sequence.pages))
        self._entering.discard(sequence)
        self._free_rows.append(sequence.row)
        sequence.pages = []
        sequence.row = -1

    # Planning

    @property
    def backlog(self) -> int:
        """Tokens of text that is known and could be computed next."""
        prompts = sum(len(s.tokens) - s.computed for s in self.prefilling)
        return prompts + (self.queue.tokens if self._free_rows else 0)

    @property
    def draft_room(self) -> int:
        """Drafts that fit in the next step; where prompts wait at most half of what they would get."""
        most = min(self.limits.max_step_tokens, max(self.limits.max_drawn, self.limits.rows))
        return (most - len(self.decoding)) // (2 if self.prefilling or self.queue else 1)

    def reserve(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """How many drafts each of these decoding sequences may have of those it wants in the next step, with pages for
        them. Takes no page that a running sequence needs now. No step is in flight.
        """
        needed = sum(map(self._needs_page, self.decoding))
        if needed > self.pool.available:
            return {}
        spare = max(0, self.pool.available - self._watermark - needed)
        room = self.draft_room
        given = {}
        for sequence, count in wanted.items():
            held = len(sequence.pages) + self._needs_page(sequence)
            position = sequence.computed  # of its last token; drafts follow
            fits = (held + spare) * self.page_size - 1 - position
            count = min(count, room, fits, sequence.limit - 2 - position)
            if count > 0:
                pages = -(-(position + 1 + count) // self.page_size)
                spare -= max(0, pages - held)
                room -= count
                sequence.pages += self.pool.allocate(max(0, pages - len(sequence.pages)))
                given[sequence] = count
        return given

    def plan_decodes(self) -> StepPlan:
        """The next step of decodes alone. No entries while some could go on, or while a better priority waits for their
        pages or rows, means: read the steps in flight first. Rooms are copied where prompts are computed.
        """
        if not self._make_room() or (self.queue and not self._make_way()):
            return StepPlan(self._number, ())
        entries, _ = self._plan_decodes({})
        return self._planned(entries, len(entries))

    def plan_prefills(self, most: int | None = None) -> StepPlan:
        """The next step of chunks alone, of `most` tokens. Its sequences take part in no step before it was read. No
        entries while some wait for pages or rows, or for a better priority to get them: read the steps in flight first.
        """
        if self._parting:
            self._copy_rooms()
        if self.queue and not self._make_way():
            return StepPlan(self._number, ())
        entries: list[Entry] = []
        admitted: list[Sequence] = []
        copies: list[tuple[int, int]] = []
        self._plan_prefills(entries, admitted, copies, True, most)
        for entry in entries:
            entry.sequence.verifying = True
        return self._planned(entries, 0, admitted, copies, self._room_copies)

    def plan(self, drafts: Mapping[Sequence, tuple[int, ...]] | None = None, most: int | None = None) -> StepPlan:
        """The next step. No entries while work is left means: read the steps in flight first, then plan again.
        drafts: no longer than `reserve` allowed; no step is in flight where there are any. most: tokens of prompts.
        """
        if self._parting:
            self._copy_rooms()
        before = self.preemptions
        if not self._make_room():
            return StepPlan(self._number, ())
        crowded = self.preemptions != before  # then nobody is admitted now: what was freed is for those who run
        if self.queue and not crowded and not self._make_way():
            return StepPlan(self._number, ())
        entries, verified = self._plan_decodes(drafts or {})
        decodes = len(entries)
        entries += verified
        admitted: list[Sequence] = []
        copies: list[tuple[int, int]] = []
        if self.prefilling or (self.queue and not crowded):
            self._plan_prefills(entries, admitted, copies, not crowded, most)
        return self._planned(entries, decodes, admitted, copies, self._room_copies)

    def _planned(
        self,
        entries: list[Entry],
        decodes: int,
        admitted: Iterable[Sequence] = (),
        copies: Iterable[tuple[int, int]] = (),
        rooms: Collection[tuple[int, int]] = (),
    ) -> StepPlan:
        """A step that is now in flight, unless nothing is to be done."""
        if not entries:
            return StepPlan(self._number, ())
        self._number += 1
        self._inflight += 1
        plan = StepPlan(self._number, tuple(entries), decodes, tuple(admitted), tuple(copies), tuple(rooms))
        if rooms:
            self._room_copies = []
        return plan

    def _needs_page(self, sequence: Sequence) -> bool:
        """Whether a decoding sequence must get a page before its next token is computed. The page it writes to is its
        own since admission; one whose last token is in flight needs nothing.
        """
        position = sequence.computed
        return position == len(sequence.pages) * self.page_size and position < sequence.limit - 1

    def _make_room(self) -> bool:
        """Give a page to each decode that needs one, and preempt the worst ranks until there are enough; False if steps
        in flight must be read first.
        """
        short = [s for s in self.decoding if self._needs_page(s)]
        while len(short) > self.pool.available:
            if self._inflight:
                return False
            self._preempt(max(self.decoding + self.prefilling, key=lambda s: s.rank))
            short = [s for s in short if s.status is Status.DECODE]
        for sequence in short:
            sequence.pages += self.pool.allocate()
        return True

    def _make_way(self) -> bool:
        """Preempt sequences of lower priority for the one that runs next, as far as it needs; False if steps in
        flight must be read first.
        """
        head = self.queue.head()
        while head is not None:
            lower = [s for s in self.decoding + self.prefilling if s.rank[0] > head.rank[0]]
            if not lower or (self._free_rows and self._fits(head, *self._shared_pages(head))):
                return True
            pages = -(-len(head.tokens) // self.page_size) + self._watermark
            if self.pool.available + sum(len(s.pages) for s in lower) < pages:
                return True  # not even all of them together hold enough
            if self._inflight:
                return False
            self._preempt(max(lower, key=lambda s: s.rank))
        return True

    def _plan_decodes(self, drafts: Mapping[Sequence, tuple[int, ...]]) -> tuple[list[Entry], list[Entry]]:
        """Single tokens, and those with drafts."""
        entries, verified = [], []
        charge = self.queue.charge
        for sequence in self.decoding:
            start = sequence.computed
            if start < sequence.limit - 1 and not sequence.verifying:
                sequence.computed = start + 1
                sequence.pending += 1
                sequence.inflight += 1
                charge(sequence.request.user, ANSWER_WEIGHT)
                own = drafts.get(sequence, ()) if drafts else ()
                if own:
                    sequence.verifying = True
                    verified.append(Entry(sequence.row, sequence, start, 1 + len(own), True, own))
                else:
                    entries.append(Entry(sequence.row, sequence, start, 1, True))
        return entries, verified

    def _plan_prefills(
        self,
        entries: list[Entry],
        admitted: list[Sequence],
        copies: list[tuple[int, int]],
        admit: bool,
        most: int | None = None,
    ) -> None:
        budget = self.limits.max_step_tokens - sum([e.length for e in entries])
        budget = budget if most is None else min(budget, most)
        logged = PROMPT_LOGPROBS
        candidates = list(self.prefilling)
        while budget > 0:
            head = self.queue.head() if admit else None
            best = min(candidates, key=self.queue.key, default=None)
            if head is not None and (best is None or self.queue.key(head) < self.queue.key(best)):
                if not self._admit(head, copies):
                    admit = False  # nobody behind overtakes it: it gets the pages and rows that come free
                    continue
                best = head
            elif best is not None:
                candidates.remove(best)
            else:
                break
            if best.want_prompt_logprobs and not logged:
                candidates = [s for s in candidates if not s.want_prompt_logprobs]  # for later steps
                continue
            entry = self._chunk(best, min(budget, logged) if best.want_prompt_logprobs else budget)
            entries.append(entry)
            if best in self._entering:
                self._entering.remove(best)
                admitted.append(best)
            budget -= entry.length
            logged -= entry.length if best.want_prompt_logprobs else 0

    def _chunk(self, sequence: Sequence, budget: int) -> Entry:
        """The next piece of a sequence's known text, charged to its user unless it was before."""
        start = sequence.computed
        count = min(budget, len(sequence.tokens) - start)
        if start < sequence.parts_at <= start + count:
            count = sequence.parts_at - start
            self._parting.append(sequence)
        end = start + count
        last = end == len(sequence.tokens)
        sample = last and sequence.request.pool is None
        sequence.computed = end
        sequence.inflight += 1
        if last:
            self.prefilling.remove(sequence)
            self.decoding.append(sequence)
            sequence.status = Status.DECODE
        if end > sequence.charged:
            self.queue.computed(sequence.request.user, end - max(start, sequence.charged))
            sequence.charged = end
        if sample:
            sequence.pending += 1
            self.queue.charge(sequence.request.user, ANSWER_WEIGHT)
        return Entry(sequence.row, sequence, start, count, sample)

    # Admission and preemption

    def _admit(self, sequence: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Give a waiting sequence a row and pages for all its known text, if there are such."""
        if not self._free_rows:
            return False
        shared, start = self._shared_pages(sequence)
        if not self._fits(sequence, shared, start):
            if self.running or self._leaving or not shared or self.rooms is not None:
                return False
            # Alone with the whole cache, it lacks only a page to copy its last one to: compute that page anew instead.
            shared = shared[:-1]
            start = len(shared) * self.page_size
        self.queue.remove(sequence)
        self._start(sequence, shared, start, copies)
        return True

    def _shared_pages(self, sequence: Sequence) -> tuple[list[int], int]:
        """Pages others have computed for this text, and the first position left to compute: at least one, for its
        logits.
        """
        known = len(sequence.tokens) - 1
        source = self._sibling(sequence)
        if source is not None:
            start = min(sequence.prompt_length, known)
            return source.pages[: -(-start // self.page_size)], start
        pages = self._cached(sequence, (known + 1) // self.page_size)
        if self.rooms is not None:
            pages = pages[: self.rooms.match(sequence.keys.keys[: min(len(pages), known // self.page_size)])[0]]
        return pages, min(len(pages) * self.page_size, known)

    def _cached(self, sequence: Sequence, most: int) -> list[int]:
        """Pages others have computed for the first `most` full pages of its text."""
        if self.prefix is None or not sequence.reads_cache:
            return []
        return self.prefix.match(sequence.keys.extend(sequence.tokens, most)[:most])

    def _sibling(self, sequence: Sequence) -> Sequence | None:
        """A running answer to the same request that has the whole prompt in the cache."""
        if sequence.request.params.n == 1 or self.rooms is not None:
            return None
        for other in self.decoding:
            if other.request is sequence.request and other.done >= other.prompt_length:
                return other
        return None

    def _fits(self, sequence: Sequence, shared: list[int], start: int) -> bool:
        need = -(-len(sequence.tokens) // self.page_size) - len(shared) + (start < len(shared) * self.page_size)
        left = self.pool.available - sum(self.pool.is_idle(p) for p in shared) - need
        return left >= (self._watermark if self.running else 0)

    def _start(self, sequence: Sequence, shared: list[int], start: int, copies: list[tuple[int, int]]) -> None:
        self.pool.retain(shared)
        size = self.page_size
        sequence.pages = shared + self.pool.allocate(-(-len(sequence.tokens) // size) - len(shared))
        sequence.row = self._free_rows.pop()
        self._entering.add(sequence)
        sequence.status = Status.PREFILL
        sequence.synced = 0
        sequence.drafted = 0
        sequence.computed = sequence.done = start
        sequence.registered = start // size
        sequence.pooled = None
        if sequence.want_prompt_logprobs:
            sequence.prompt_logprobs = []
        if start < len(shared) * size:
            copies.append(self._own(sequence, start // size))
            sequence.done -= start % size  # what is copied cannot be shared before the copy was made
        if self.rooms is not None:
            self._enter_room(sequence, start, self.rooms)
        self.prefilling.append(sequence)
        if sequence.charged == 0:
            self._count_hit(sequence, start)

    def _enter_room(self, sequence: Sequence, start: int, rooms: Rooms) -> None:
        """A room for a sequence that goes on from `start`, and where its text parts from what others may share."""
        size = self.page_size
        _, source = rooms.match(sequence.keys.keys[: start // size]) if start else (0, -1)
        sequence.room = rooms.take()
        if source not in (-1, sequence.room):
            self._room_copies.append((source, sequence.room))
        parts_at = len(self._cached(sequence, (len(sequence.tokens) - 1) // size)) * size
        if sequence.children and self.prefix is not None:
            parts_at = max(parts_at, (sequence.prompt_length - 1) // size * size)
        sequence.parts_at = parts_at if parts_at > start else 0

    def _copy_rooms(self) -> None:
        """Rooms of sequences that stand where a text parts, before the next step moves them on: as long as every free
        row has a room.
        """
        parting, self._parting = self._parting, []
        for sequence in parting:
            rooms = self.rooms
            if rooms is None or rooms.available <= len(self._free_rows):
                continue
            if sequence.row >= 0 and sequence.computed == sequence.parts_at:
                sequence.parted = rooms.take()
                self._room_copies.append((sequence.room, sequence.parted))
                self._offer_room(sequence, rooms)

    def _offer_room(self, sequence: Sequence, rooms: Rooms) -> None:
        """Keep the copy of a sequence's room, once the step that brought it there was read."""
        if sequence.parted >= 0 and sequence.done >= sequence.parts_at:
            pages = sequence.parts_at // self.page_size
            rooms.give(sequence.parted, sequence.keys.extend(sequence.tokens, pages)[pages - 1])
            sequence.parted, sequence.parts_at = -1, 0

    def _leave_room(self, sequence: Sequence, rooms: Rooms) -> None:
        """Keep the room for those who go on from the sequence's last whole page, if it still shows what is before."""
        pages = sequence.registered
        kept = self.prefix is not None and pages > 0 and sequence.computed - pages * self.page_size <= rooms.slack
        rooms.give(sequence.room, sequence.keys.extend(sequence.tokens, pages)[pages - 1] if kept else None)
        if sequence.parted >= 0:
            rooms.give(sequence.parted)
        sequence.room = sequence.parted = -1
        sequence.parts_at = 0

    def _own(self, sequence: Sequence, index: int) -> tuple[int, int]:
        """Put a page of its own where a sequence will write into a shared one; (source, target) to copy."""
        source = sequence.pages[index]
        (target,) = self.pool.allocate()
        self.pool.release((source,))
        sequence.pages[index] = target
        return source, target

    def _count_hit(self, sequence: Sequence, start: int) -> None:
        """Account for the prompt tokens that a first admission found cached; they cost the user nothing."""
        sequence.charged = start
        if sequence.parent is not None:
            sequence.cached_tokens = sequence.parent.cached_tokens
            return
        sequence.cached_tokens = start
        self.prefix_hit_tokens += start

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue: pages and row go, tokens stay and are computed again later."""
        self.preemptions += 1
        (self.decoding if sequence.status is Status.DECODE else self.prefilling).remove(sequence)
        self._vacate(sequence)
        sequence.status = Status.WAITING
        sequence.computed = sequence.done = 0
        if sequence.generated:
            sequence.charged = len(sequence.tokens)
        self.queue.push(sequence)

    # After a step

    def retire(self, entry: Entry, computed: bool = True) -> bool:
        """Account for an entry whose step was read (its token, if any, not yet appended). False: its sequence had
        ended, drop the result. computed: whether it went well, so that its pages hold what they should. Drafts count
        only when they are accepted.
        """
        sequence = entry.sequence
        sequence.inflight -= 1
        sequence.verifying = False
        if entry.sample:
            sequence.pending -= 1
        if sequence.status is Status.FINISHED:
            if not sequence.inflight and sequence in self._leaving:
                self._leaving.remove(sequence)
                self._vacate(sequence)
            return False
        if not computed:
            return True
        sequence.done = entry.start + entry.length - len(entry.drafts)
        if sequence.done // self.page_size > sequence.registered:
            self._register(sequence)
        if sequence.children and sequence.done >= sequence.prompt_length:
            self._let_children_go(sequence)
        return True

    def accept(self, sequence: Sequence, count: int) -> None:
        """The first `count` drafts of a step that was read were right, and are appended by now."""
        sequence.computed += count
        sequence.done = sequence.computed
        self.queue.charge(sequence.request.user, ANSWER_WEIGHT * count)
        if sequence.done // self.page_size > sequence.registered:
            self._register(sequence)

    def retire_step(self) -> None:
        """A whole step was read: its entries follow through `retire`."""
        self._inflight -= 1

    def _register(self, sequence: Sequence) -> None:
        """Offer pages that are full and computed to the prefix cache."""
        full = sequence.done // self.page_size
        if self.prefix is not None:
            keys = sequence.keys.extend(sequence.tokens, full)
            for i in range(sequence.registered, full):
                self.prefix.insert(keys[i], sequence.pages[i])
        sequence.registered = full
        if self.rooms is not None:
            self._offer_room(sequence, self.rooms)

    def held_pages(self) -> Iterable[list[int]]:
        """The page lists of all sequences that hold references, for checks."""
        return [s.pages for s in [*self.decoding, *self.prefilling, *self._leaving]]

    def held_rooms(self) -> list[int]:
        """The rooms of all sequences, for checks."""
        every = [*self.decoding, *self.prefilling, *self._leaving]
        return [room for s in every for room in (s.room, s.parted) if room >= 0]
