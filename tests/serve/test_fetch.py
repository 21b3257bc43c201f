"""Pictures by URL: whom the server talks to, and how much it takes from them."""

import asyncio
import base64
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tenfold.base.pictures import PictureError, PictureLimits
from tenfold.serve.fetch import Fetcher, FetchError, is_public
from tenfold.serve.settings import ServeConfig

BODY = b"\x89PNG" + bytes(3000)


@asynccontextmanager
async def host(answer: Callable[[bytes], bytes | list[bytes]], pause: float = 0.0) -> Any:
    """A server on this machine that gives `answer(request)`, in parts with a pause before each; yields its port and
    the requests it got.
    """
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            parts = answer(seen[-1])
            for part in [parts] if isinstance(parts, bytes) else parts:
                await asyncio.sleep(pause)
                writer.write(part)
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], seen


def reply(body: bytes = BODY, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def here(port: int, **settings: Any) -> Fetcher:
    """One that takes this machine for a public host."""

    async def resolve(name: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    settings = {"hosts": (f"pictures.example:{port}",), "seconds": 5.0, **settings}
    return Fetcher(public=lambda address: True, resolve=resolve, **settings)


def fetched(
    answer: Callable[[bytes], bytes | list[bytes]], path: str = "/a b.png?x=1&y=é", pause: float = 0.0, **settings: Any
) -> Any:
    async def go() -> Any:
        async with host(answer, pause) as (port, seen):
            return await here(port, **settings).fetch(f"http://pictures.example:{port}{path}".replace(" ", "%20")), seen

    return asyncio.run(go())


def refused(message: str, answer: Any, **settings: Any) -> None:
    with pytest.raises(PictureError, match=message):
        fetched(answer, **settings)


def test_a_picture() -> None:
    body, (request,) = fetched(lambda _: reply())
    assert body == BODY
    head = request.decode().split("\r\n")
    assert head[0] == "GET /a%20b.png?x=1&y=%C3%A9 HTTP/1.1"
    assert head[1].startswith("host: pictures.example:")


def test_bodies_of_every_kind() -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n3\r\nefg\r\n0\r\n\r\n"
    assert fetched(lambda _: chunked)[0] == b"abcdefg"
    assert fetched(lambda _: b"HTTP/1.0 200 OK\r\n\r\nto the end")[0] == b"to the end"
    parts = [bytes([byte]) for byte in reply(b"xyz")]
    assert fetched(lambda _: parts)[0] == b"xyz"
    assert fetched(lambda _: b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + reply(b"ok"))[0] == b"ok"
    assert fetched(lambda _: reply(b""))[0] == b""


def test_size() -> None:
    limits = PictureLimits(max_bytes=1000)
    refused("more than 1000 bytes", lambda _: reply(), limits=limits)
    refused("more than 1000 bytes", lambda _: b"HTTP/1.0 200 OK\r\n\r\n" + bytes(2000), limits=limits)
    refused("head that is too long", lambda _: b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 40000)


def test_time() -> None:
    drip = [b"HTTP/1.1 200 OK\r\n", *[b"a: b\r\n"] * 1000]
    refused("within 0.2 seconds", lambda _: drip, pause=0.05, seconds=0.2)
    refused("within 0.2 seconds", lambda _: reply(), pause=2.0, seconds=0.2)


def test_broken_answers() -> None:
    for wrong in (b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", b"SSH-2.0-OpenSSH\r\n", b"\x16\x03\x01"):
        refused("cannot be reached, or does not speak HTTP", lambda _, wrong=wrong: wrong)
    refused("status 404", lambda _: reply(b"", "404 Not Found"))
    refused("status 304", lambda _: reply(b"", "304 Not Modified"))


def test_nobody_listens() -> None:
    async def go() -> None:
        async with host(lambda _: b"") as (port, _):
            pass
        await here(port).fetch(f"http://pictures.example:{port}/x")

    with pytest.raises(FetchError, match="cannot be reached"):
        asyncio.run(go())


def test_redirects() -> None:
    def moved(request: bytes) -> bytes:
        return reply() if b"GET /there" in request else reply(b"", "302 Found", "location: /there?a=1")

    body, requests = fetched(moved)
    assert body == BODY
    assert [r.split()[1] for r in requests] == [b"/a%20b.png?x=1&y=%C3%A9", b"/there?a=1"]
    refused("more than 3 times", lambda _: reply(b"", "301 Moved", "location: /again"))


@pytest.mark.parametrize(
    "where",
    ["http://elsewhere.example/", "file:///etc/passwd", "//u:p@pictures.example/", "gopher://pictures.example/"],
)
def test_redirects_are_checked_like_the_first_address(where: str) -> None:
    refused(r"not allowed|another scheme|user name", lambda _: reply(b"", "302 Found", f"location: {where}"))


def test_a_redirect_to_a_private_address() -> None:
    """A name that is allowed and public at first, and not the second time it is looked up."""

    async def go() -> None:
        async with host(lambda _: reply(b"", "302 Found", "location: /next")) as (port, seen):
            addresses = iter([["127.0.0.1"], ["10.0.0.7"]])

            async def resolve(name: str, port: int) -> list[str]:
                return next(addresses)

            fetcher = replace(here(port), resolve=resolve, public=lambda a: a == "127.0.0.1")
            with pytest.raises(FetchError, match="not a host of the public internet"):
                await fetcher.fetch(f"http://pictures.example:{port}/")
            assert len(seen) == 1

    asyncio.run(go())


PRIVATE = """
    127.0.0.1 127.8.8.8 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 192.0.2.1
    255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 2001:db8::1 ::127.0.0.1 ::ffff:127.0.0.1
    ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: no-address
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::1]", "127.1"])
def test_this_machine_is_out_of_reach(host: str) -> None:
    """However its address is spelt, with the system's own resolver."""
    fetcher = Fetcher(hosts=("*", host), seconds=5.0)
    with pytest.raises(PictureError):
        asyncio.run(fetcher.fetch(f"http://{host}/picture.png"))


def test_one_private_address_among_public_ones() -> None:
    async def resolve(name: str, port: int) -> list[str]:
        return ["8.8.8.8", "192.168.0.1"]

    with pytest.raises(FetchError, match="public internet"):
        asyncio.run(Fetcher(hosts=("*",), resolve=resolve).fetch("https://pictures.example/x"))


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        ((), "https://a.example/", False),
        (("a.example",), "https://a.example/", True),
        (("a.example",), "https://A.EXAMPLE./", True),
        (("a.example",), "https://b.a.example/", False),
        (("*.a.example",), "https://b.a.example/", True),
        (("*.a.example",), "https://a.example/", False),
        (("*.a.example",), "https://evila.example/", False),
        (("a.example",), "https://a.example:8443/", False),
        (("a.example:8443",), "https://a.example:8443/", True),
        (("*",), "https://anything.example/", True),
        (("*",), "https://anything.example:22/", False),
        (("bücher.example".encode("idna").decode(),), "https://bücher.example/", True),
        (("a.example",), "https://a.example@evil.example/", False),
        (("a.example",), "https://evil.example#a.example", False),
        (("a.example",), "https://evil.example\\@a.example/", False),
        (("*",), "https://a b.example/", False),
        (("*",), "https://" + "a" * 80 + "ü.example/", False),
        (("*",), "http://[::1/", False),
        (("*",), "https://a.example:99999/", False),
        (("*",), "ftp://a.example/", False),
        (("*",), "https:///x", False),
        (("*",), "/etc/passwd", False),
        (("*",), "", False),
    ],
)
def test_hosts(hosts: tuple[str, ...], url: str, allowed: bool) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        raise ConnectionError

    with pytest.raises(PictureError) as caught:
        asyncio.run(Fetcher(hosts=hosts, resolve=resolve).fetch(url))
    assert ("cannot be reached" in str(caught.value)) == allowed


def test_data_urls_need_no_host() -> None:
    fetcher = Fetcher()
    url = "data:image/png;base64," + base64.b64encode(BODY).decode()
    assert asyncio.run(fetcher.fetch_all([url, url])) == [BODY, BODY]
    with pytest.raises(PictureError, match="--image-hosts"):
        asyncio.run(fetcher.fetch_all([url, "https://a.example/"]))


def test_from_settings() -> None:
    settings = ServeConfig(image_hosts=" A.example, *.b.example ,", max_image_bytes=2000, image_timeout=3.0)
    fetcher = Fetcher.of(settings)
    assert fetcher.hosts == ("a.example", "*.b.example")
    assert (fetcher.seconds, fetcher.limits.max_bytes) == (3.0, 2000)
