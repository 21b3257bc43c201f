"""Who runs when: plans as data, priorities, chunks, preemption, forks. Fairness is in test_fair.py, random lives in
test_schedules.py.
"""

from typing import Any

import pytest

from tenfold.cache.pages import PagePool
from tenfold.cache.prefix import PrefixCache
from tenfold.engine.plan import StepPlan
from tenfold.engine.request import Request, SamplingParams
from tenfold.engine.scheduler import Limits, Scheduler
from tenfold.engine.sequence import Sequence, Status

PAGE = 4


class Host:
    """Drives a scheduler as the engine does, with a model that says 1 to everything."""

    def __init__(self, pages: int = 32, prefix: bool = False, **limits: Any) -> None:
        self.pool = PagePool(pages)
        sizes = {"max_batch": 4, "max_step_tokens": 16, "watermark": 0.0} | limits
        self.scheduler = Scheduler(self.pool, PAGE, Limits(**sizes), PrefixCache(self.pool) if prefix else None)
        self.order = 0

    def add(self, name: str, prompt: int, answer: int = 4, n: int = 1, **values: Any) -> list[Sequence]:
        request = Request(name, tuple(range(prompt)), SamplingParams(n=n), arrival=float(self.order), **values)
        sequences = [Sequence(request, i, self.order, prompt + answer, PAGE, 0, frozenset()) for i in range(n)]
        self.order += 1
        self.scheduler.add(sequences)
        return sequences

    def finish(self, plan: StepPlan) -> None:
        """The plan was run: take its tokens."""
        self.scheduler.retire_step()
        for entry in plan.entries:
            if self.scheduler.retire(entry) and entry.sample:
                entry.sequence.tokens.append(1)
                if len(entry.sequence.tokens) >= entry.sequence.limit:
                    self.scheduler.finish(entry.sequence)
        self.pool.check()

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        if plan.entries:
            self.finish(plan)
        return plan

    def steps(self, count: int) -> list[StepPlan]:
        return [self.step() for _ in range(count)]


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(request, first token, how many) of each entry."""
    return [(e.sequence.request.id, e.start, e.length) for e in plan.entries]


def test_a_plan_says_what_it_is() -> None:
    host = Host()
    host.add("a", 3)
    host.add("b", 20)
    plan = host.scheduler.plan()
    assert shape(plan) == [("a", 0, 3), ("b", 0, 13)]
    assert plan.tokens == 16
    assert str(plan) == "step 1: 0:a/0[0:3]*, 1:b/0[0:13]"
    host.finish(plan)
    assert str(host.scheduler.plan()) == "step 2: 0:a/0[3:4]*, 1:b/0[13:20]*"


def test_decodes_come_first_and_chunks_fill_the_rest() -> None:
    host = Host(max_step_tokens=6)
    host.add("a", 3, answer=20)
    host.add("b", 14)
    assert shape(host.step()) == [("a", 0, 3), ("b", 0, 3)]
    plan = host.step()
    assert shape(plan) == [("a", 3, 1), ("b", 3, 5)]
    assert plan.decodes == 1
    assert shape(host.step()) == [("a", 4, 1), ("b", 8, 5)]
    assert shape(host.step()) == [("a", 5, 1), ("b", 13, 1)]
    assert shape(host.step()) == [("a", 6, 1), ("b", 14, 1)]


def test_only_the_last_chunk_is_sampled() -> None:
    host = Host(max_step_tokens=4)
    host.add("a", 10)
    assert [[e.sample for e in p.entries] for p in host.steps(3)] == [[False], [False], [True]]


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    host = Host(max_step_tokens=2, max_batch=8)
    for i in range(4):
        host.add(str(i), 5)
    while host.scheduler.unfinished:
        assert 0 < host.step().tokens <= 2


def test_rows_limit_how_many_run() -> None:
    host = Host(max_batch=2)
    for name in "abc":
        host.add(name, 2)
    assert [e.row for e in host.step().entries] == [0, 1]
    assert host.scheduler.waiting == 1
    host.steps(3)
    assert shape(host.step()) == [("c", 0, 2)]


def test_smaller_priorities_run_first() -> None:
    host = Host(max_batch=1)
    host.add("late", 2, priority=1)
    host.add("soon", 2, priority=-1)
    host.add("normal", 2)
    order = [p.entries[0].sequence.request.id for p in host.steps(12)]
    assert list(dict.fromkeys(order)) == ["soon", "normal", "late"]


def test_a_better_priority_takes_the_row_of_a_worse_one() -> None:
    host = Host(max_batch=1)
    (low,) = host.add("low", 2, priority=1)
    host.steps(2)
    host.add("high", 2)
    assert shape(host.step()) == [("high", 0, 2)]
    assert low.status is Status.WAITING
    assert len(low.tokens) == 4
    host.steps(3)
    assert shape(host.step()) == [("low", 0, 4)]


def test_equal_priorities_take_nothing_from_each_other() -> None:
    host = Host(max_batch=1)
    host.add("a", 2)
    host.step()
    host.add("b", 2)
    assert shape(host.step()) == [("a", 2, 1)]
    assert host.scheduler.preemptions == 0


def test_a_better_priority_takes_pages_but_not_for_nothing() -> None:
    host = Host(pages=4)
    host.add("low", 5, priority=1)  # two pages
    host.add("normal", 5)  # two pages
    host.step()
    host.add("huge", 13)  # four pages, and the low one has two: no use in taking them
    assert host.step().tokens == 2
    assert host.scheduler.preemptions == 0
    host.add("high", 5, priority=-1)
    assert ("high", 0, 5) in shape(host.step())
    assert host.scheduler.preemptions == 1


def test_the_latest_gives_way_when_pages_run_out_and_keeps_its_tokens() -> None:
    host = Host(pages=4)
    (old,) = host.add("old", 4, answer=9)
    (new,) = host.add("new", 4, answer=9)
    host.steps(5)  # both have 8 tokens computed in two pages each
    assert (old.status, new.status) == (Status.DECODE, Status.DECODE)
    assert shape(host.step()) == [("old", 8, 1)]
    assert new.status is Status.WAITING
    assert (len(new.pages), new.row, len(new.tokens)) == (0, -1, 9)
    host.steps(3)
    assert shape(host.step()) == [("new", 0, 9)]
    host.steps(3)
    assert not host.scheduler.unfinished
    assert host.scheduler.preemptions == 1


def test_the_oldest_progresses_in_every_step_without_pages() -> None:
    host = Host(pages=5, max_batch=4)
    sequences = [host.add(str(i), 4, answer=12)[0] for i in range(4)]
    while host.scheduler.unfinished:
        oldest = next(s for s in sequences if s.status is not Status.FINISHED)
        before = oldest.computed, len(oldest.tokens)
        host.step()
        assert (oldest.computed, len(oldest.tokens)) > before or oldest.status is Status.FINISHED
    assert host.scheduler.preemptions > 0


def test_a_large_prompt_at_the_head_is_not_overtaken_for_ever() -> None:
    host = Host(pages=8)
    host.add("small", 4, answer=8)
    host.step()
    host.add("large", 29, answer=1)
    host.add("behind", 4, answer=1)
    plans = host.steps(12)
    order = [name for p in plans for name, start, _ in shape(p) if start == 0]
    assert order == ["large", "behind"]


def test_pages_for_growth_are_left_when_a_sequence_is_admitted() -> None:
    host = Host(pages=8, watermark=0.25)
    host.add("a", 20)
    host.step()
    host.add("b", 8)  # would leave one page of eight
    assert shape(host.step()) == [("a", 16, 4)]


def test_answers_wait_for_the_prompt_then_share_its_pages() -> None:
    host = Host(max_step_tokens=8)
    first, second, third = host.add("a", 10, n=3)
    assert shape(host.step()) == [("a", 0, 8)]
    assert host.scheduler.waiting == 2
    assert shape(host.step()) == [("a", 8, 2)]
    assert host.scheduler.waiting == 2
    plan = host.scheduler.plan()
    assert shape(plan) == [("a", 10, 1), ("a", 9, 1), ("a", 9, 1)]
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    assert len({first.pages[2], second.pages[2], third.pages[2]}) == 3
    assert plan.copies == ((first.pages[2], second.pages[2]), (first.pages[2], third.pages[2]))


def test_a_page_made_by_a_copy_is_not_copied_on_in_the_same_plan() -> None:
    host = Host(prefix=True)
    first, second, third = host.add("a", 6, n=3, answer=6)
    host.steps(3)
    for sequence in (first, second, third):
        host.scheduler._preempt(sequence)
    host.scheduler.finish(first)
    plan = host.scheduler.plan()  # the second finds two pages cached, and must make the last its own
    assert [(e.sequence, e.start) for e in plan.entries] == [(second, 7), (third, 7)]
    assert [source for source, _ in plan.copies] == [plan.copies[0][0]] * 2
    assert not {s for s, _ in plan.copies} & {t for _, t in plan.copies}


def test_answers_are_released_when_their_first_ends_early() -> None:
    host = Host(max_step_tokens=4)
    first, second = host.add("a", 10, n=2)
    host.step()
    host.scheduler.finish(first)
    assert host.scheduler.waiting == 1
    host.steps(8)
    assert second.status is Status.FINISHED
    assert len(second.tokens) == 14
    assert host.pool.free == host.pool.total


def test_a_held_answer_can_end_before_it_begins() -> None:
    host = Host()
    first, second = host.add("a", 4, n=2)
    host.scheduler.finish(second)
    assert host.scheduler.waiting == 1
    while host.scheduler.unfinished:
        host.step()
    assert first.status is Status.FINISHED
    assert second.pages == []


def test_pages_of_a_finished_sequence_wait_for_the_step_in_flight() -> None:
    host = Host()
    (a,) = host.add("a", 4)
    flying = host.scheduler.plan()
    host.scheduler.finish(a)
    assert host.pool.used == 1
    host.finish(flying)
    assert host.pool.used == 0


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    host = Host(pages=2)
    host.add("old", 3, answer=5)
    host.add("new", 3, answer=5)
    host.steps(1)
    flying = host.scheduler.plan()
    assert flying.tokens == 2
    assert host.scheduler.plan().entries == ()  # position 4 of both needs a page: read first
    assert host.scheduler.preemptions == 0
    host.finish(flying)
    assert shape(host.step()) == [("old", 4, 1)]


def test_the_next_step_is_planned_before_the_token_of_the_last_is_known() -> None:
    host = Host()
    (a,) = host.add("a", 3, answer=3)
    first = host.scheduler.plan()
    second = host.scheduler.plan()
    assert shape(second) == [("a", 3, 1)]
    third = host.scheduler.plan()
    assert shape(third) == [("a", 4, 1)]
    assert host.scheduler.plan().entries == ()  # its last token is in flight
    for plan in (first, second, third):
        host.finish(plan)
    assert a.status is Status.FINISHED
    assert len(a.tokens) == 6


def test_a_page_is_shared_only_when_its_step_was_read() -> None:
    host = Host(prefix=True)
    host.add("a", 9)
    flying = host.scheduler.plan()
    host.add("b", 9)
    second = host.scheduler.plan()
    assert shape(second) == [("a", 9, 1), ("b", 0, 9)]
    host.finish(flying)
    host.finish(second)
    host.add("c", 9)
    assert ("c", 8, 1) in shape(host.step())


def test_a_sequence_that_failed_shares_nothing() -> None:
    host = Host(prefix=True)
    (a,) = host.add("a", 9)
    plan = host.scheduler.plan()
    host.scheduler.retire_step()
    assert host.scheduler.retire(plan.entries[0], computed=False)
    host.scheduler.finish(a)
    host.add("b", 9)
    assert shape(host.step()) == [("b", 0, 9)]


@pytest.mark.parametrize("prefix", [False, True])
def test_repeated_work_after_preemption_uses_what_is_still_cached(prefix: bool) -> None:
    host = Host(pages=5, prefix=prefix)
    host.add("old", 8, answer=9)
    (new,) = host.add("new", 6, answer=9)
    while new.row >= 0 or new.status is Status.WAITING:
        host.step()
        if host.scheduler.preemptions:
            break
    computed = []
    while host.scheduler.unfinished:
        computed += [e.start for e in host.step().entries if e.sequence is new]
    assert (min(computed) > 0) == prefix


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    host = Host()
    for i in range(500):
        (sequence,) = host.add(str(i), 2, deadline=1e9)
        host.scheduler.finish(sequence)
    assert len(host.scheduler._deadlines) < 100


def test_guesses_are_planned_behind_single_tokens_with_pages_of_their_own() -> None:
    host = Host(max_drawn=16)
    (a,) = host.add("a", 3, answer=20)
    (b,) = host.add("b", 3, answer=20)
    host.step()
    assert host.scheduler.reserve({a: 6}) == {a: 6}
    assert (len(a.pages), len(b.pages)) == (3, 1)  # positions 3 to 9
    plan = host.scheduler.plan({a: (7, 8, 9)})
    assert shape(plan) == [("b", 3, 1), ("a", 3, 4)]
    assert (plan.decodes, plan.drafts, plan.tokens) == (1, 3, 5)
    assert str(plan) == "step 2: 1:b/0[3:4]*, 0:a/0[3:7]*?3"
    assert shape(host.scheduler.plan()) == [("b", 4, 1)]  # how far a has come is not known
    host.scheduler.retire_step()
    for entry in plan.entries:
        host.scheduler.retire(entry)
        entry.sequence.tokens.append(1)
    assert (a.computed, a.done) == (4, 4)
    a.tokens.append(2)
    host.scheduler.accept(a, 1)
    assert (a.computed, a.done) == (5, 5)
    assert host.scheduler.queue.served("") == 2 * 3 + 2 * 2 + 2 * 2 + 2 + 2


def test_guesses_get_only_what_nobody_else_needs() -> None:
    host = Host(pages=4, max_drawn=16)
    (a,) = host.add("a", 4, answer=12)
    (b,) = host.add("b", 4, answer=12)
    host.step()  # both need another page for their next token
    assert host.scheduler.reserve({a: 9, b: 9}) == {a: 3, b: 3}  # what is left of it
    assert host.pool.available == 0
    host.steps(4)
    assert host.scheduler.reserve({a: 9, b: 9}) == {}  # both need one and there is none
    assert host.scheduler.preemptions == 0


def test_guesses_leave_room_for_prompts_and_for_growth() -> None:
    host = Host(max_step_tokens=9, max_drawn=9)
    (a,) = host.add("a", 2, answer=20)
    host.step()
    assert host.scheduler.draft_room == 8
    assert host.scheduler.reserve({a: 20}) == {a: 8}
    host.add("b", 20)
    assert (host.scheduler.draft_room, host.scheduler.backlog) == (4, 20)
    assert host.scheduler.reserve({a: 20}) == {a: 4}
    assert Host(max_drawn=0).scheduler.draft_room == 4  # as many as there are rows
    low = Host(pages=8, watermark=0.25, max_drawn=16)
    (c,) = low.add("c", 4, answer=28)
    low.step()
    assert low.scheduler.reserve({c: 15}) == {c: 15}
    (d,) = low.add("d", 4, answer=20)
    low.step()
    assert low.pool.available == 2
    assert low.scheduler.reserve({c: 15, d: 15}) == {c: 14}  # in pages it has
    assert low.scheduler.reserve({d: 15}) == {d: 3}
    assert low.pool.available == 1


def test_no_guess_goes_past_the_end_of_an_answer() -> None:
    host = Host()
    (a,) = host.add("a", 3, answer=3)
    host.step()
    assert host.scheduler.reserve({a: 9}) == {a: 1}
    host.step()
    assert host.scheduler.reserve({a: 9}) == {}


def test_a_short_prompt_does_not_wait_for_the_rest_of_a_long_one() -> None:
    host = Host(overtake=4.0)
    host.add("long", 40)
    assert shape(host.step()) == [("long", 0, 16)]
    host.add("short", 4)
    assert shape(host.step()) == [("short", 0, 4), ("long", 16, 12)]
    assert shape(host.step()) == [("short", 4, 1), ("long", 28, 12)]


def test_what_others_have_computed_makes_a_long_prompt_short() -> None:
    host = Host(prefix=True, overtake=4.0, max_step_tokens=64)
    host.add("first", 40, answer=1)
    host.step()
    host.add("other", 8, salt="of its own")
    host.add("again", 42)  # 40 of it are cached
    assert [name for name, *_ in shape(host.step())] == ["again", "other"]
