"""The channel between the two processes: order, pieces, an end that does not read, and the end."""

import random
import select
import socket
import threading

import msgspec
import pytest

from tenfold.engine.channel import Channel
from tenfold.engine.wire import LENGTH


@pytest.fixture
def ends():
    pair = [Channel(end) for end in socket.socketpair()]
    yield pair
    for channel in pair:
        channel.close()


def read_all(channel, count):
    found = []
    while len(found) < count and not channel.ended:
        assert select.select([channel.fd], [], [], 20)[0], "nothing came"
        found += channel.read()
    return found


def test_both_ways_and_empty_messages(ends):
    a, b = ends
    a.send(b"one")
    a.send(b"")
    b.send(b"back")
    assert read_all(b, 2) == [b"one", b""]
    assert read_all(a, 1) == [b"back"]
    assert (a.waiting, a.read(), a.ended) == (0, [], False)


def test_an_end_that_does_not_read_holds_up_nobody_and_misses_nothing(ends):
    a, b = ends
    rng = random.Random(1)
    messages = [rng.randbytes(rng.choice((1, 1000, 300_000))) for _ in range(60)]
    for message in messages:
        a.send(message)
    assert a.waiting > 1_000_000
    assert read_all(b, len(messages)) == messages
    flusher = a._flusher
    flusher.join(20)
    assert not flusher.is_alive()
    assert a.waiting == 0
    a.send(b"next")
    assert read_all(b, 1) == [b"next"]


def test_messages_of_several_threads_stay_whole(ends):
    a, b = ends

    def work(i):
        for _ in range(200):
            a.send(bytes([i]) * (i * 1000))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 6)]
    for thread in threads:
        thread.start()
    found = read_all(b, 1000)
    assert sorted(found) == sorted(bytes([i]) * (i * 1000) for i in range(1, 6) for _ in range(200))
    for thread in threads:
        thread.join()


def test_a_message_in_pieces(ends):
    left, right = socket.socketpair()
    channel = Channel(right)
    data = LENGTH.pack(3) + b"abc" + LENGTH.pack(2) + b"de"
    found = []
    for at in range(len(data)):
        left.send(data[at : at + 1])
        found.append(channel.read())
    assert [messages for messages in found if messages] == [[b"abc"], [b"de"]]
    left.close()
    channel.close()


def test_what_was_sent_before_the_end_comes_before_it(ends):
    a, b = ends
    b.send(b"never read")
    a.send(b"x" * 100_000)
    a.close()
    assert read_all(b, 2) == [b"x" * 100_000]
    assert b.ended
    b.send(b"nobody")
    assert (b.waiting, b.read()) == (0, [])


def test_closing_waits_for_what_has_not_been_sent(ends):
    a, b = ends
    message = b"x" * 3_000_000
    a.send(message)
    closing = threading.Thread(target=a.close, args=(20.0,))
    closing.start()
    assert read_all(b, 1) == [message]
    closing.join(20)
    assert not closing.is_alive()


def test_closing_without_patience_leaves_no_thread(ends):
    a, _ = ends
    a.send(b"x" * 3_000_000)
    flusher = a._flusher
    a.close()
    assert not flusher.is_alive()
    a.close()
    a.send(b"nobody")
    assert (a.waiting, a.read(), a.ended) == (0, [], True)


def test_a_length_beyond_all_bounds_is_no_message(ends):
    left, right = socket.socketpair()
    channel = Channel(right)
    left.send(LENGTH.pack(2**32 - 1))
    with pytest.raises(msgspec.DecodeError, match="4294967295 bytes"):
        channel.read()
    left.close()
    channel.close()
