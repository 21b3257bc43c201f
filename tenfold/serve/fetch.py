"""Pictures by URL: `data:` always, http and https from hosts that the operator allowed.

Invariant: what is connected to is what was checked. One parser reads a URL, its host is resolved once, every address
it has must be a public one, and the connection goes to that address and not to a name; the same for each redirect. A
picture takes no more bytes and time than its limits, all redirects together.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httptools

from tenfold.base.pictures import LIMITS, PictureError, PictureLimits, data_url
from tenfold.serve.settings import ServeConfig

PORTS = {"http": 80, "https": 443}
MOST_REDIRECTS = 3
MOST_HEAD = 64 << 10  # bytes of an answer before its body
PART = 64 << 10
AGENT = "tenfold"
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is given out to the internet

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class FetchError(PictureError):
    """A URL from which no picture came; the sentence tells what the client can do about it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart. host: as the certificate must name it; path: with the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == PORTS[self.scheme] else f"{name}:{self.port}"


Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolved(host: str, port: int) -> list[str]:
    """Addresses of a host. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether an address is one of the internet at large. IPv6 addresses that stand for IPv4 ones count as these."""
    try:
        own: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(own, ipaddress.IPv6Address):
        inner = own.ipv4_mapped or own.sixtofour or (own.teredo[1] if own.teredo else None)
        if own in NAT64:
            inner = ipaddress.IPv4Address(int(own) & 0xFFFFFFFF)
        own = inner or own
    if isinstance(own, ipaddress.IPv6Address) and own not in UNICAST:
        return False
    return own.is_global and not (own.is_multicast or own.is_reserved)


def ascii_name(host: str) -> str:
    """A host's name as DNS knows it. Raises ValueError for one that it cannot know."""
    return host if host.isascii() else host.encode("idna").decode("ascii")


@lru_cache(maxsize=1)
def certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


@dataclass(frozen=True, slots=True)
class Fetcher:
    """hosts: names that pictures may come from: a name, one with "*." in front for all below it, or "*" for any;
    "name:port" allows a port other than the scheme's. seconds: for one picture. public, resolve: how addresses are
    found and judged.
    """

    hosts: tuple[str, ...] = ()
    seconds: float = 10.0
    limits: PictureLimits = LIMITS
    public: Callable[[str], bool] = is_public
    resolve: Resolve = resolved

    @classmethod
    def of(cls, settings: ServeConfig) -> "Fetcher":
        hosts = [entry.strip().lower() for entry in settings.image_hosts.split(",")]
        limits = PictureLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
        return cls(tuple(filter(None, hosts)), settings.image_timeout, limits)

    async def fetch_all(self, urls: Sequence[str]) -> list[bytes]:
        """The same for several at one time; the first error ends all. Raises PictureError."""
        tasks = [asyncio.ensure_future(self.fetch(url)) for url in urls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def fetch(self, url: str) -> bytes:
        """The bytes at a URL, not yet known to be a picture. Raises PictureError."""
        if url[:5].lower() == "data:":
            return data_url(url, self.limits)
        try:
            async with asyncio.timeout(self.seconds or None):
                return await self._follow(url)
        except TimeoutError:
            raise FetchError(
                f"The picture's host did not answer within {self.seconds:g} seconds; send the picture as a data URL."
            ) from None
        except (OSError, UnicodeError, httptools.HttpParserError, EOFError):
            raise FetchError(
                "The picture could not be fetched: its host cannot be reached, or does not speak HTTP; check the URL, "
                "or send the picture as a data URL."
            ) from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(MOST_REDIRECTS + 1):
            target = self._target(url)
            answer = await self._get(target, await self._address(target))
            if answer.location is None:
                return answer.body()
            url = urljoin(url, answer.location)
        raise FetchError(f"The picture's URL leads on more than {MOST_REDIRECTS} times; give the last address itself.")

    def _target(self, url: str) -> Target:
        """Raises FetchError for a URL that is not allowed."""
        try:
            parts = urlsplit(url)
            scheme, host = parts.scheme, ascii_name((parts.hostname or "").rstrip("."))
            port = parts.port or PORTS.get(scheme, 0)
        except ValueError:
            raise FetchError("The picture's URL is not valid.") from None
        if scheme not in PORTS or not host or any(c <= " " or c == "\x7f" for c in url):
            raise FetchError("The picture's URL has another scheme or no host; allowed: data:, https:// and http://.")
        if parts.username is not None or parts.password is not None:
            raise FetchError("The picture's URL has a user name in it; allowed are URLs without.")
        if not self.hosts:
            raise FetchError(
                "Pictures by URL are off in this server; send the picture as a data URL, or start the server with "
                "--image-hosts."
            )
        if not self._allowed(host, port, scheme):
            raise FetchError(
                f"Pictures from {host[:100]!r} are not allowed in this server; send the picture as a data URL, or add "
                "the host to --image-hosts."
            )
        return Target(scheme, host, port, _path(parts))

    def _allowed(self, host: str, port: int, scheme: str) -> bool:
        for entry in self.hosts:
            name, _, allowed_port = entry.lower().partition(":")
            wanted = int(allowed_port) if allowed_port.isdigit() else PORTS[scheme]
            below = name.startswith("*.") and host.endswith(name[1:])
            if port == wanted and (name in ("*", host) or below):
                return True
        return False

    async def _address(self, target: Target) -> str:
        """Where to connect to. Raises FetchError, OSError."""
        addresses = await self.resolve(target.host, target.port)
        if not addresses or not all(map(self.public, addresses)):
            raise FetchError(
                f"{target.host[:100]!r} is not a host of the public internet, and pictures are fetched from no other."
            )
        return addresses[0]

    async def _get(self, target: Target, address: str) -> "Answer":
        secure = certificates() if target.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            address, target.port, ssl=secure, server_hostname=target.host if secure else None, limit=PART
        )
        answer = Answer(self.limits.max_bytes)
        try:
            writer.write(
                f"GET {target.path} HTTP/1.1\r\nhost: {target.origin}\r\nuser-agent: {AGENT}\r\naccept: image/*\r\n"
                "accept-encoding: identity\r\nconnection: close\r\n\r\n".encode("ascii")
            )
            await writer.drain()
            while not answer.complete:
                part = await reader.read(PART)
                if not part:
                    answer.ended()
                    break
                answer.feed(part)
        finally:
            writer.transport.abort()
        return answer


class Answer:
    """What a host sends back, read as it comes. Raises PictureError as soon as it is not a picture to be had."""

    def __init__(self, max_bytes: int) -> None:
        self.location: str | None = None
        self.complete = False
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._head = 0
        self._length: int | None = None
        self._begun = False  # the body
        self._failure: PictureError | None = None
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, part: bytes) -> None:
        if not self._begun:
            self._head += len(part)
            if self._head > MOST_HEAD + PART:
                raise FetchError("The picture's host answers with a head that is too long.")
        try:
            self._parser.feed_data(part)
        except httptools.HttpParserCallbackError:
            if self._failure is None:
                raise
        if self._failure is not None:
            raise self._failure

    def ended(self) -> None:
        """The host closed the connection. Raises EOFError where something is missing."""
        if not self._begun or (self._length is not None and self._size < self._length):
            raise EOFError
        self.complete = True

    def body(self) -> bytes:
        return b"".join(self._parts)

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"location":
            self.location = quote(value, safe="%/:=&?~#+!$,;'@()*[]")
        elif lower == b"content-length" and value.strip().isdigit():
            self._length = int(value)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._begun = status >= 200
        if not self._begun:
            return
        if status in (301, 302, 303, 307, 308) and self.location is not None:
            self.complete = True
            return
        self.location = None
        if status != 200:
            self._fail(FetchError(f"The picture's host answered with the status {status}; check the URL."))
        elif self._length is not None and self._length > self._max_bytes:
            self._fail(self._too_large())

    def on_body(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._max_bytes:
            self._fail(self._too_large())
        self._parts.append(part)

    def on_message_complete(self) -> None:
        self.complete = self._begun

    def _too_large(self) -> PictureError:
        return FetchError(f"The picture has more than {self._max_bytes} bytes, which is the most allowed.")

    def _fail(self, error: PictureError) -> None:
        """An exception out of a callback would come back as the parser's own."""
        self._failure = self._failure or error


def _path(parts: SplitResult) -> str:
    path = quote(parts.path or "/", safe="%/:=&~+!$,;'@()*")
    return f"{path}?{quote(parts.query, safe='%/:=&?~+!$,;@()*')}" if parts.query else path
