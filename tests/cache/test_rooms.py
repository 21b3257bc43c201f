"""Rooms are in one state each, and what is kept is found by the longest beginning until its room is needed."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tenfold.cache.rooms import Rooms


def test_the_longest_kept_beginning_is_found() -> None:
    rooms = Rooms(4, 8)
    a, b = rooms.take(), rooms.take()
    rooms.give(a, b"2")
    rooms.give(b, b"3")
    assert rooms.match([b"1", b"2", b"3", b"4"]) == (3, b)
    assert rooms.match([b"1", b"2"]) == (2, a)
    assert rooms.match([b"1"]) == rooms.match([]) == (0, -1)


def test_the_longest_unused_is_given_away_first() -> None:
    rooms = Rooms(2, 8)
    a, b = rooms.take(), rooms.take()
    rooms.give(a, b"a")
    rooms.give(b, b"b")
    rooms.match([b"a"])
    assert rooms.take() == b
    assert rooms.take() == a
    with pytest.raises(IndexError):
        rooms.take()


def test_a_key_has_one_room() -> None:
    rooms = Rooms(3, 8)
    a, b = rooms.take(), rooms.take()
    rooms.give(a, b"k")
    rooms.give(b, b"k")
    assert rooms.match([b"k"]) == (1, b)
    assert (rooms.kept, rooms.used, rooms.available) == (1, 0, 3)
    rooms.clear()
    assert (rooms.kept, rooms.match([b"k"])) == (0, (0, -1))
    rooms.check([])


class Lives(RuleBasedStateMachine):
    @initialize(total=st.integers(1, 6))
    def start(self, total: int) -> None:
        self.rooms, self.used = Rooms(total, 8), []

    @precondition(lambda self: self.rooms.available)
    @rule()
    def take(self) -> None:
        room = self.rooms.take()
        assert room not in self.used
        self.used.append(room)

    @precondition(lambda self: self.used)
    @rule(data=st.data(), key=st.one_of(st.none(), st.binary(min_size=1, max_size=1)))
    def give(self, data: st.DataObject, key: bytes | None) -> None:
        room = data.draw(st.sampled_from(self.used))
        self.used.remove(room)
        self.rooms.give(room, key)
        assert key is None or self.rooms.match([key]) == (1, room)

    @invariant()
    def every_room_is_somewhere(self) -> None:
        if hasattr(self, "rooms"):
            self.rooms.check(self.used)
            assert self.rooms.available + self.rooms.used == self.rooms.total


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=30, stateful_step_count=20, deadline=None, database=None)
