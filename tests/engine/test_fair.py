"""Fairness between users: the virtual token counter, its bound, and that nobody gains by having been away."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tenfold.engine.fair import ANSWER_WEIGHT, PROMPT_WEIGHT, FairQueue
from tenfold.engine.request import Request, SamplingParams
from tenfold.engine.sequence import Sequence, Status
from tests.engine.fake import make_engine


def waiting(
    queue: FairQueue, user: str, order: int, priority: int = 0, tokens: int = 3, overtake: float = 0.0
) -> Sequence:
    request = Request(f"{user}{order}", (1,) * tokens, user=user, priority=priority, arrival=float(order))
    sequence = Sequence(request, 0, order, 10, 4, 0, frozenset())
    queue.enter(user)
    queue.push(sequence, overtake * tokens)
    return sequence


def take(queue: FairQueue) -> Sequence:
    head = queue.head()
    assert head is not None
    queue.remove(head)
    head.status = Status.PREFILL
    return head


def test_within_a_user_the_first_to_arrive_goes_first() -> None:
    queue = FairQueue()
    late, early = waiting(queue, "a", 2), waiting(queue, "a", 1)
    assert [take(queue), take(queue)] == [early, late]
    assert queue.head() is None


def test_a_shorter_prompt_overtakes_until_the_longer_one_is_due() -> None:
    queue, own = FairQueue(), 2.0
    long, short = (waiting(queue, "a", i, tokens=n, overtake=own) for i, n in ((1, 10), (2, 4)))
    assert take(queue) is short  # due after 8 tokens, the long one after 20
    queue.computed("a", 11)
    near, last = (waiting(queue, "a", i, tokens=n, overtake=own) for i, n in ((3, 4), (4, 5)))
    assert take(queue) is near  # due at 19
    assert [take(queue), take(queue)] == [long, last]


def test_what_is_cached_counts_for_nothing() -> None:
    queue = FairQueue()
    short = waiting(queue, "a", 1, tokens=5, overtake=4.0)
    long = Sequence(Request("b", (1,) * 100, user="a", arrival=2.0), 0, 2, 200, 4, 0, frozenset())
    queue.enter("a")
    queue.push(long, 4.0 * (100 - 96))
    assert [take(queue), take(queue)] == [long, short]


def test_an_answer_more_to_a_prompt_has_its_turn() -> None:
    queue = FairQueue()
    first = waiting(queue, "a", 1, tokens=50, overtake=4.0)
    assert take(queue) is first
    child = Sequence(first.request, 1, 1, 60, 4, 0, frozenset())
    child.parent = first
    queue.computed("a", 50)
    late = waiting(queue, "a", 2, tokens=60, overtake=4.0)
    queue.enter("a")
    queue.push(child)
    assert [take(queue), take(queue)] == [child, late]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=30),
    overtake=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    arrivals=st.randoms(use_true_random=False),
)
def test_nobody_is_overtaken_for_longer_than_was_said(
    lengths: list[int], overtake: float, arrivals: random.Random
) -> None:
    """Whoever came later and goes first is shorter, and came before `overtake` times the difference was computed."""
    queue, done, order = FairQueue(), 0, 0
    came: dict[int, int] = {}  # tokens that were computed when somebody came
    left: set[int] = set()
    while left or order < len(lengths):
        if order < len(lengths) and (not left or arrivals.random() < 0.6):
            waiting(queue, "a", order, tokens=lengths[order], overtake=overtake)
            came[order] = done
            left.add(order)
            order += 1
            continue
        taken = take(queue)
        left.remove(taken.order)
        for other in left:
            if other < taken.order:
                assert came[taken.order] - came[other] < overtake * (lengths[other] - lengths[taken.order])
        done += lengths[taken.order]
        queue.computed("a", lengths[taken.order])


def test_the_user_served_least_goes_first() -> None:
    queue = FairQueue()
    a, b = waiting(queue, "a", 1), waiting(queue, "b", 2)
    queue.charge("a", 5)
    assert take(queue) is b
    assert take(queue) is a


def test_priority_goes_before_fairness() -> None:
    queue = FairQueue()
    waiting(queue, "a", 1)
    urgent = waiting(queue, "b", 2, priority=-1)
    queue.charge("b", 100)
    assert take(queue) is urgent


def test_size_and_tokens_follow() -> None:
    queue = FairQueue()
    first, second = waiting(queue, "a", 1, tokens=3), waiting(queue, "a", 2, tokens=4)
    assert (len(queue), queue.tokens) == (2, 7)
    queue.remove(second)  # aborted: it is not at the head
    second.status = Status.FINISHED
    assert (len(queue), queue.tokens) == (1, 3)
    assert take(queue) is first
    assert queue.head() is None


def test_a_new_user_starts_where_the_least_served_one_is() -> None:
    queue = FairQueue()
    waiting(queue, "a", 1)
    waiting(queue, "b", 2)
    queue.charge("a", 70)
    queue.charge("b", 50)
    waiting(queue, "new", 3)
    assert queue.served("new") == 50


def test_time_away_earns_no_credit() -> None:
    queue = FairQueue()
    waiting(queue, "a", 1)
    waiting(queue, "b", 2)
    queue.leave("b")
    queue.charge("a", 1000)
    waiting(queue, "b", 3)
    assert queue.served("b") == 1000


def test_leaving_does_not_wipe_the_slate() -> None:
    queue = FairQueue()
    waiting(queue, "a", 1)
    waiting(queue, "b", 2)
    queue.charge("b", 1000)
    queue.leave("b")
    waiting(queue, "b", 3)
    assert queue.served("b") == 1000
    assert queue.served("a") == 0


def test_users_long_gone_are_forgotten() -> None:
    queue = FairQueue()
    for i in range(5000):
        queue.enter(str(i))
        queue.charge(str(i), i)
        queue.leave(str(i))
    assert len(queue._served) < 2000


def test_the_gap_between_backlogged_users_is_bounded() -> None:
    """Two users always have work waiting; one asks for much more, in longer requests. The paper's bound (theorem 4.4)
    is 2 max(prompt weight * longest prompt, answer weight * tokens that can be in memory)."""
    rng = random.Random(3)
    engine = make_engine(pages=24, max_batch=4, max_step_tokens=16, max_queue=10_000)
    bound = 2 * max(PROMPT_WEIGHT * 40, ANSWER_WEIGHT * 24 * 4)
    for i in range(40):
        engine.add(
            Request(f"a{i}", tuple(rng.choices(range(90), k=40)), SamplingParams(temperature=0.0, max_tokens=12))
        )
        for k in range(6):
            prompt = tuple(rng.choices(range(90), k=3))
            engine.add(Request(f"b{i}-{k}", prompt, SamplingParams(temperature=0.0, max_tokens=4), user="b"))
    queue = engine.scheduler.queue
    gaps = []
    while "" in queue._heaps and "b" in queue._heaps:
        engine.step()
        gaps.append(abs(queue.served("") - queue.served("b")))
    assert len(gaps) > 100
    assert max(gaps) <= bound
    assert max(gaps[len(gaps) // 2 :]) <= 2 * max(gaps[: len(gaps) // 2])  # it does not grow with time
    assert queue.served("") > 4 * bound  # a counter that stood still would show


def test_a_flood_does_not_delay_another_user() -> None:
    engine = make_engine(max_batch=2, max_queue=10_000)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for i in range(100):
        engine.add(Request(f"flood{i}", (i % 90, 5, 6), params, user="flood"))
    for _ in range(10):
        engine.step()
    for i in range(5):
        engine.add(Request(f"small{i}", (i, 7, 8), params, user="small"))
    ended: list[str] = []
    while engine.has_work:
        ended += [o.request_id for o in engine.step() if o.finish]
    assert max(ended.index(f"small{i}") for i in range(5)) < 25


def test_chunks_of_long_prompts_take_turns_between_users() -> None:
    engine = make_engine(max_step_tokens=4, page_size=4)
    engine.add(Request("long", tuple(range(40)), SamplingParams(temperature=0.0, max_tokens=1), user="a"))
    engine.step()
    engine.add(Request("short", (50, 51, 52), SamplingParams(temperature=0.0, max_tokens=1), user="b"))
    outputs = [o for _ in range(3) for o in engine.step()]
    assert [o.request_id for o in outputs if o.finish] == ["short"]


def test_tokens_found_in_the_cache_cost_nothing() -> None:
    engine = make_engine(max_step_tokens=64)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    engine.add(Request("keep", (9,), SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), user="keeper"))
    for name in ("first", "again"):
        before = engine.scheduler.queue.served("a")
        engine.add(Request(name, tuple(range(20, 34)), params, user="a"))
        while name in engine._requests:
            engine.step()
        cost = engine.scheduler.queue.served("a") - before
        assert cost == {"first": 14, "again": 2}[name] * PROMPT_WEIGHT + ANSWER_WEIGHT


def test_work_repeated_after_preemption_costs_nothing() -> None:
    engine = make_engine(pages=5, prefix_cache=False)
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    engine.add(Request("keep", (9,), SamplingParams(temperature=0.0, max_tokens=19, ignore_eos=True), user="keeper"))
    engine.add(Request("long", (1, 2, 3, 4, 5), params, user="a"))
    before = engine.scheduler.queue.served("a")
    while "long" in engine._requests:
        engine.step()
    assert engine.stats().preemptions > 0
    assert engine.scheduler.queue.served("a") - before == 5 * PROMPT_WEIGHT + 9 * ANSWER_WEIGHT


def test_the_oldest_and_the_strictest_are_of_the_whole_queue() -> None:
    queue = FairQueue()
    assert (queue.oldest, queue.strictest(1.0)) == (None, None)
    first, second, third = (waiting(queue, "a", order) for order in (5, 3, 9))
    assert (queue.oldest, queue.strictest(1.0)) == (3.0, 1.0)
    strict = Sequence(Request("s", (1,), user="a", arrival=7.0, ttft=0.5), 0, 7, 10, 4, 0, frozenset())
    loose = Sequence(Request("l", (1,), user="a", arrival=8.0, ttft=5.0), 0, 8, 10, 4, 0, frozenset())
    for sequence in (strict, loose):
        queue.enter("a")
        queue.push(sequence)
    assert queue.strictest(1.0) == 0.5
    assert [take(queue) for _ in range(3)] == [second, first, strict]
    assert (queue.oldest, queue.strictest(1.0)) == (8.0, 1.0)
    assert [take(queue) for _ in range(2)] == [loose, third]
    assert (queue.oldest, queue.strictest(1.0)) == (None, None)
    second.tokens.append(1)
    second.status = Status.WAITING
    queue.push(second)  # preempted: it has its first token
    assert queue.oldest is None


def test_what_waits_no_longer_is_forgotten_though_nobody_asks() -> None:
    queue = FairQueue()
    for order in range(2000):
        waiting(queue, "a", order)
        take(queue)
    assert all(len(numbers._heap) <= 64 for numbers in (queue._arrivals, queue._own, queue._others))
