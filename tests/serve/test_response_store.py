"""The store of /v1/responses: bounds, order of forgetting, and what is counted."""

import pytest

from tenfold.serve.errors import ApiError
from tenfold.serve.responses.store import OVERHEAD, Store, Stored, packed


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def stored(name, key="", before=(), text="x", run=None):
    entry = Stored(f"resp_{name}", key, before, (packed({"id": f"msg_{name}_i0", "text": text}),), run=run)
    if run is None:
        entry.finish({"output": [{"id": f"msg_{name}_0"}], "status": "completed"})
    return entry


def kept(store, *names):
    return [name for name in names if store.find(f"resp_{name}", "")]


def test_the_least_recently_used_are_forgotten_first():
    store = Store(2, 10**6, 60)
    for name in "ab":
        assert store.put(stored(name))
    store.get("resp_a", "")
    store.put(stored("c"))
    assert kept(store, *"abc") == ["a", "c"]
    assert len(store) == 2


def test_bytes_are_bounded():
    one = stored("a").count()
    store = Store(100, 3 * one, 60)
    for name in "abcdef":
        assert store.put(stored(name))
        assert store.bytes <= store.most_bytes
    assert kept(store, *"abcdef") == ["d", "e", "f"]
    assert store.bytes == 3 * one
    assert store.put(stored("g", text="x" * one))
    assert kept(store, *"defg") == ["f", "g"]
    assert not store.put(stored("h", text="x" * 4 * one))
    assert kept(store, *"fgh") == ["f", "g"]
    for name in "fg":
        store.delete(store.get(f"resp_{name}", ""))
    assert (store.bytes, len(store)) == (0, 0)


def test_what_an_entry_counts_as():
    entry = stored("a", before=(b"12345", b"678"), text="äö")
    texts = [*entry.history, entry.response]
    assert entry.count() == sum(map(len, texts)) + OVERHEAD * len(texts)
    entry.events = (b"12", b"3")
    assert entry.count() == sum(map(len, texts)) + OVERHEAD * (len(texts) + 2) + 3


def test_nothing_is_kept_longer_than_it_may():
    clock = Clock()
    store = Store(10, 10**6, 60, clock)
    store.put(stored("a"))
    clock.now += 50
    store.put(stored("b"))
    store.get("resp_a", "")  # using it does not keep it longer
    clock.now += 11
    assert kept(store, *"ab") == ["b"]
    clock.now += 50
    assert kept(store, *"ab") == []
    assert store.bytes == 0


def test_a_key_finds_only_its_own():
    store = Store(10, 10**6, 60)
    store.put(stored("a", key="ann"))
    assert store.get("resp_a", "ann").id == "resp_a"
    assert store.item("msg_a_0", "ann") == {"id": "msg_a_0"}
    for key in ("bob", ""):
        assert store.item("msg_a_0", key) is None
        with pytest.raises(ApiError) as raised:
            store.get("resp_a", key)
        assert raised.value.status == 404


@pytest.mark.parametrize("id", ["msg_a_1", "msg_a", "msg_b_0", "x", "", "___"])
def test_items_that_are_not_there(id):
    store = Store(10, 10**6, 60)
    store.put(stored("a"))
    assert store.item(id, "") is None


def test_what_is_being_made_is_not_forgotten():
    clock = Clock()
    store = Store(2, 10**6, 60, clock)
    running = stored("a", run=object())
    store.put(running)
    for name in "bcd":
        store.put(stored(name))
    clock.now += 1000
    assert kept(store, *"abcd") == ["a"]
    assert store.running() == [running]
    running.run = None
    clock.now += 1
    store.put(running)
    assert kept(store, "a") == ["a"]


def test_putting_again_counts_anew():
    store = Store(10, 10**6, 60)
    entry = stored("a")
    store.put(entry)
    entry.events = (b"x" * 1000,)
    store.put(entry)
    assert (len(store), store.bytes) == (1, entry.count())
