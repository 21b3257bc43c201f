"""Bytes no HTTP client would send, over a real socket: what uvicorn and httptools make of them, and what we add."""

import socket
import time

import pytest

from tests.serve.live import Live, read_all

HOST = b"Host: localhost\r\n"
BODY = b'{"model": "tiny", "prompt": "Hi", "max_tokens": 2}'


@pytest.fixture(scope="module")
def live():
    server = Live(max_head=4096, max_body=4096)
    yield server
    server.close()


@pytest.fixture(scope="module")
def hasty():
    server = Live(read_timeout=0.5)
    yield server
    server.close()


def post(*headers, body=BODY, path=b"/v1/completions"):
    return b"POST %s HTTP/1.1\r\n%sConnection: close\r\n%s\r\n%s" % (path, HOST, b"".join(headers), body)


LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def statuses(answer):
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def test_the_server_works(live):
    assert statuses(live.send(post(LENGTH))) == [200]
    chunks = b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])
    assert statuses(live.send(post(CHUNKED, body=chunks))) == [200]


SMUGGLING = {
    "length and chunks": post(LENGTH, CHUNKED, body=b"0\r\n\r\n" + BODY),
    "chunks and length": post(CHUNKED, LENGTH, body=b"0\r\n\r\n" + BODY),
    "two lengths": post(LENGTH, b"Content-Length: 3\r\n"),
    "two equal lengths": post(LENGTH, LENGTH),
    "list of lengths": post(b"Content-Length: 3, 3\r\n"),
    "negative length": post(b"Content-Length: -1\r\n"),
    "signed length": post(b"Content-Length: +50\r\n"),
    "length in hex": post(b"Content-Length: 0x32\r\n"),
    "endless length": post(b"Content-Length: 99999999999999999999999\r\n"),
    "encoding that is not chunked": post(b"Transfer-Encoding: chunked, identity\r\n", LENGTH),
    "unknown encoding": post(b"Transfer-Encoding: xchunked\r\n", LENGTH),
    "two encodings": post(CHUNKED, b"Transfer-Encoding: identity\r\n"),
    "space before the colon": post(b"Content-Length : 5\r\n"),
    "folded header": post(b"X-A: b\r\n c: d\r\n"),
    "zero byte in a header": post(b"X-A: b\x00c\r\n"),
    "bare CR in a header": post(b"X-A: b\rX-B: c\r\n"),
    "no colon": post(b"nonsense\r\n"),
    "bad chunk size": post(CHUNKED, body=b"zz\r\n" + BODY),
    "signed chunk size": post(CHUNKED, body=b"+5\r\nabcde\r\n0\r\n\r\n"),
    "huge chunk size": post(CHUNKED, body=b"fffffffffffffffff\r\na"),
    "chunk longer than it says": post(CHUNKED, body=b"1\r\nabc\r\n0\r\n\r\n"),
    "no method": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "unknown method": b"HACK / HTTP/1.1\r\n%s\r\n" % HOST,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET / HTTP/9.9\r\n%s\r\n" % HOST,
    "no target": b"GET  HTTP/1.1\r\n%s\r\n" % HOST,
    "target that is no path": b"GET v1/models HTTP/1.1\r\n%s\r\n" % HOST,
    "target of bytes": b"GET /\xff\xfe HTTP/1.1\r\n%s\r\n" % HOST,
    "zero byte in the target": b"GET /\x00 HTTP/1.1\r\n%s\r\n" % HOST,
    "asterisk": b"OPTIONS * HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST,
    "tunnel": b"CONNECT evil.example:443 HTTP/1.1\r\n%s\r\n" % HOST,
    "two hosts": b"GET /v1/models HTTP/1.1\r\n%sHost: evil.example\r\n\r\n" % HOST,
    "text in JSON only": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_ambiguous_requests_are_refused_once_and_the_connection_closed(live, name):
    answer = live.send(SMUGGLING[name])
    codes = statuses(answer)
    assert len(codes) == 1, answer
    assert 400 <= codes[0] < 500, answer
    assert b'{"error":' in answer.replace(b" ", b"")


def test_the_authority_in_a_target_is_not_a_name_of_ours(live):
    answer = live.send(b"GET http://evil.example/v1/models HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
    assert statuses(answer) == [200], "the path counts, and Host is checked"
    answer = live.send(b"GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert statuses(answer) == [421]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 8000,
        b"GET /v1/models?" + b"a" * 8000,
        b"GET /v1/models HTTP/1.1\r\nX-A: " + b"a" * 8000,
        b"GET /v1/models HTTP/1.1\r\n" + b"X-A: b\r\n" * 2000,
        b"GET /v1/models HTTP/1.1\r\n" + b"a" * 8000,
    ],
    ids=["path", "query", "value", "many", "name"],
)
def test_a_head_without_end_is_cut_off(live, head):
    with live.connect() as client:
        for start in range(0, len(head), 1000):
            try:
                client.sendall(head[start : start + 1000])
                time.sleep(0.002)  # so that it comes in parts
            except OSError:
                break
        answer = read_all(client)
    assert statuses(answer) == [431], answer
    assert b"--max-head" in answer


def test_a_large_head_that_comes_at_once_is_refused_as_well(live):
    answer = live.send(b"GET /v1/models HTTP/1.1\r\n%sX-A: %s\r\n\r\n" % (HOST, b"a" * 5000))
    assert statuses(answer) == [431]


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", []), (b"GET /v1/mod", [408]), (b"GET /v1/models HTTP/1.1\r\n" + HOST, [408]), (post(LENGTH)[:-5], [408])],
    ids=["nothing", "half a line", "half a head", "half a body"],
)
def test_a_request_that_never_ends_is_not_waited_for(hasty, sent, status):
    assert statuses(hasty.send(sent)) == status


def test_the_time_to_read_starts_anew_with_each_request(hasty):
    with hasty.connect() as client:
        for _ in range(4):
            time.sleep(0.15)  # together longer than a head may take
            client.sendall(b"GET /health HTTP/1.1\r\n" + HOST)
            client.sendall(b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(65536)
            assert statuses(answer) == [200]
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert statuses(read_all(client)) == [408]


def test_too_large_a_body_is_refused_before_it_is_sent(live):
    answer = live.send(post(b"Content-Length: 5000\r\n", b"Expect: 100-continue\r\n", body=b""))
    assert statuses(answer) == [413]


def test_websockets_and_other_upgrades(live):
    upgrade = b"Upgrade: %s\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    for protocol in (b"websocket", b"h2c"):
        asked = b"GET /v1/models HTTP/1.1\r\n%sConnection: Upgrade, close\r\n%s\r\n" % (HOST, upgrade % protocol)
        assert statuses(live.send(asked)) == [200], "answered as if nothing but HTTP/1.1 had been asked for"


def test_requests_sent_without_waiting_are_answered_in_turn_and_not_collected_without_end(live):
    get = b"GET /v1/models HTTP/1.1\r\n%s\r\n" % HOST
    last = get.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert statuses(live.send(get * 5 + last)) == [200] * 6
    assert 400 in statuses(live.send(get * 5000))


def test_the_server_still_works_after_all_that(live):
    assert statuses(live.send(post(LENGTH))) == [200]
    assert not live.server.server_state.connections


def test_a_client_that_does_not_read_is_let_go():
    """Its buffers and ours are full; what it takes after that, however little, keeps the connection."""
    server = Live(stall_timeout=0.3)
    server_llm = server.llm
    server_llm.answer = "x" * 20_000  # one event each: more than any socket buffers
    try:
        with server.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = b'{"model": "tiny", "prompt": "Hi", "max_tokens": 20000, "stream": true}'
            client.sendall(post(b"Content-Length: %d\r\n" % len(body), body=body))
            deadline = time.monotonic() + 20
            while not server_llm.cancelled and time.monotonic() < deadline:
                time.sleep(0.02)
            assert server_llm.cancelled
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # else what is under way takes minutes
            assert b"[DONE]" not in read_all(client)
    finally:
        server.close()
