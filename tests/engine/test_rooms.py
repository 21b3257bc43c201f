"""Where a packed cache lets a sequence go on from: only where what stood exact before is still there."""

from typing import Any

import pytest

from tenfold.cache.rooms import Rooms
from tenfold.engine.request import Request, SamplingParams
from tests.engine import fake
from tests.engine.test_scheduler import Host

SPEC = "k2v2g16w6s1"
PARAMS = SamplingParams(temperature=0.0, max_tokens=3)
TEXT = tuple((5 * i + i * i) % 40 for i in range(60))


def engine(**changes: Any) -> Any:
    sizes = {"kv_cache": SPEC, "page_size": 4, "max_model_len": 100, "max_step_tokens": 16} | changes
    return fake.make_engine(pages=200, **sizes)


def ask(engine: Any, name: str, prompt: tuple[int, ...], **values: Any) -> int:
    """How many prompt tokens were found cached; the answer must be right."""
    before = engine.stats().prefix_hit_tokens
    engine.add(Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=3, **values)))
    outputs = fake.drain(engine)
    for tokens in fake.answers(outputs).values():
        assert tokens == fake.reference(prompt, len(prompt) + 3)
    return int(engine.stats().prefix_hit_tokens - before)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_conversation_goes_on_from_where_it_ended(lookahead: int) -> None:
    own = engine(lookahead=lookahead)
    assert ask(own, "a", TEXT[:21]) == 0
    said = (*TEXT[:21], *fake.reference(TEXT[:21], 24))
    assert ask(own, "b", (*said, 7, 8, 9, 3)) in (20, 24)  # the last token may have had no step of its own


@pytest.mark.parametrize("lookahead", [0, 1])
def test_where_texts_part_is_found_the_third_time(lookahead: int) -> None:
    own = engine(lookahead=lookahead)
    assert ask(own, "a", (*TEXT[:33], 7, 7)) == 0
    assert ask(own, "b", (*TEXT[:33], 8, 8)) == 0  # nobody kept the room at 32: now it is
    assert ask(own, "c", (*TEXT[:33], 9, 9)) == 32


def test_answers_to_one_request_share_its_prompt() -> None:
    own = engine()
    ask(own, "a", TEXT[:34], n=3)
    assert own.stats().computed_tokens < 34 + 2 * (34 - 32) + 3 * 4


def test_without_a_prefix_cache_no_room_is_kept() -> None:
    own = engine(prefix_cache=False)
    ask(own, "a", TEXT[:21])
    assert own.rooms.kept == 0
    assert own.rooms.total == own.config.max_batch


def test_an_aborted_prompt_leaves_nothing_that_a_long_chunk_has_run_over() -> None:
    """The step in flight writes a chunk longer than a room; the pages before it are cached, their room is not."""
    own = engine(lookahead=1, max_step_tokens=50, max_model_len=128)
    own.add(Request("a", (*TEXT, *TEXT), PARAMS))
    own.step()
    own.step()
    own.abort("a")
    fake.drain(own)
    assert own.stats().pages_cached > 0
    assert own.rooms.kept == 0


class RoomHost(Host):
    def __init__(self, **limits: Any) -> None:
        super().__init__(prefix=True, **limits)
        self.rooms = self.scheduler.rooms = Rooms(6, 20)


def test_a_place_is_offered_only_when_the_step_that_led_there_was_read() -> None:
    host = RoomHost()
    host.add("a", 14, answer=2)
    while host.scheduler.unfinished:
        host.step()
    kept = host.rooms.kept
    first = host.add("b", 11, answer=8)[0]
    reached = host.scheduler.plan()
    assert reached.entries[0].length == 8  # up to where it parts
    behind = host.scheduler.plan()
    assert behind.rooms == ((first.room, first.parted),)
    assert host.rooms.kept == kept
    host.finish(reached)
    assert host.rooms.kept == kept + 1
    host.finish(behind)


def test_a_step_that_failed_offers_no_place() -> None:
    host = RoomHost()
    host.add("a", 14, answer=2)
    while host.scheduler.unfinished:
        host.step()
    kept = host.rooms.kept
    host.add("b", 11, answer=8)
    reached, behind = host.scheduler.plan(), host.scheduler.plan()
    for plan in (reached, behind):
        host.scheduler.retire_step()
        for entry in plan.entries:
            if host.scheduler.retire(entry, computed=False):
                host.scheduler.finish(entry.sequence)
    assert host.rooms.kept == kept
    host.rooms.check(host.scheduler.held_rooms())


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_long_chunk_whose_step_failed_finds_what_stood_before_it_again(lookahead: int) -> None:
    """It took the places of the tokens before it: run again, it would read its own."""
    own = engine(lookahead=lookahead, max_step_tokens=50, max_model_len=200)
    own.add(Request("other", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=12)))
    own.step()
    own.add(Request("long", TEXT * 2, PARAMS))
    outputs = own.step()
    sample, failed = own.runner.sample, []

    def once(*given: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("a moment's fault")
        return sample(*given)

    own.runner.sample = once
    outputs += fake.drain(own)
    assert failed
    assert not any(o.error for o in outputs)
    assert fake.answers(outputs)["long", 0] == fake.reference(TEXT * 2, len(TEXT) * 2 + 3)
