"""Which names this server answers to, and which web pages may call it.

Invariant: a page that the user merely visits can neither read an answer nor set work off: not by giving a name of its
own this server's address (DNS rebinding), not by a request across sites, not with credentials that a browser adds by
itself.
"""

import ipaddress
import re
import socket
from functools import lru_cache

from tenfold.serve.errors import ApiError
from tenfold.serve.settings import ServeConfig, is_loopback

HOST = re.compile(r"(?:([A-Za-z0-9._-]{1,253})|\[([0-9A-Fa-f:.]{2,45})\])(?::[0-9]{0,5})?")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
EXPOSED = ", ".join(
    [
        *("x-request-id", "retry-after", "x-tenfold-ignored"),
        *(f"x-ratelimit-{a}-{b}" for b in ("requests", "tokens") for a in ("limit", "remaining", "reset")),
    ]
).encode()
HEADER_LIST = re.compile(rb"[A-Za-z0-9_\-, ]{0,2048}")


def listed(text: str) -> frozenset[str]:
    """The entries of a setting that are separated by commas."""
    return frozenset(entry.strip().lower().rstrip("/") for entry in text.split(",") if entry.strip())


class Hosts:
    """The names in `Host` that are this server's.

    A rebound page has a name of its own in `Host`, so addresses are safe where others may use them. Where a key is
    needed on a public address any name will do: such a page has no key.
    """

    def __init__(self, settings: ServeConfig, keys_required: bool) -> None:
        given = listed(settings.allowed_hosts)
        local = is_loopback(settings.host)
        own = set() if local else {socket.gethostname().lower()}
        self.names = given | own | {"localhost", settings.host.lower()}
        self.addresses = not local
        self.any = "*" in given or (not given and keys_required and not local)
        self._known = lru_cache(maxsize=256)(self._accepts)

    def check(self, host: bytes) -> None:
        """Raises ApiError: 400 for what is no name, 421 for a name that is not this server's."""
        found = HOST.fullmatch(host.decode("latin-1"))
        if not found:
            raise ApiError(400, "The Host header is not a name or an address.", code="invalid_host")
        name = (found[1] or found[2]).lower()
        if not self.any and not self._known(name):
            message = (
                f"This server does not answer to the name {name[:64]!r}. Call it by its address or as localhost, or "
                "start it with this name in --allowed-hosts."
            )
            raise ApiError(421, message, code="unknown_host")

    def _accepts(self, name: str) -> bool:
        if name in self.names or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.addresses or address.is_loopback


class Origins:
    """The web origins whose pages may call: none but this server's own unless listed. Credentials are never allowed
    across origins, so a browser adds none of its own; a page sends its key in a header."""

    def __init__(self, settings: ServeConfig) -> None:
        self.allowed = listed(settings.cors_origins)

    def headers(self, head: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What lets the page that asks read the answer, where it may."""
        origin = head.get(b"origin")
        if origin is None or not self.lists(origin):
            return []
        allowed = b"*" if "*" in self.allowed else origin
        return [
            (b"access-control-allow-origin", allowed),
            (b"vary", b"Origin"),
            (b"access-control-expose-headers", EXPOSED),
        ]

    def preflight(self, head: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """The further headers of the answer to a preflight. Raises ApiError (403) for an origin that is not listed."""
        if not self.lists(head[b"origin"]):
            raise cross_site("is not in --cors-origins")
        asked = head.get(b"access-control-request-headers", b"")
        return [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", asked if HEADER_LIST.fullmatch(asked) else b"authorization"),
            (b"access-control-max-age", b"600"),
        ]

    def lists(self, origin: bytes) -> bool:
        return "*" in self.allowed or origin.decode("latin-1").lower() in self.allowed

    def check(self, head: dict[bytes, bytes], method: str, credentials: str) -> None:
        """credentials: "none", "sent" by whoever wrote the request, or "added" by a browser by itself (HTTP Basic).

        Raises ApiError (403) for a request of another site's page that nobody vouches for: a key sent on purpose does,
        one that the browser added does not, nor does no key at all where something would be done."""
        if credentials == "sent" or is_own(head):
            return
        if credentials == "added":
            # A link from elsewhere to the status page is fine: the page it comes from cannot read what it leads to.
            if method != "GET" or head.get(b"sec-fetch-mode") != b"navigate":
                raise cross_site("cannot use the credentials that a browser keeps for this server")
        elif method not in SAFE_METHODS and not self.lists(head.get(b"origin", b"null")):
            raise cross_site("is not in --cors-origins")


def is_own(head: dict[bytes, bytes]) -> bool:
    """Whether a request comes from a page of this server or from no page at all. Schemes may differ: behind a proxy
    only that knows of TLS."""
    origin = head.get(b"origin")
    if origin is not None:
        return origin.partition(b"://")[2].lower() == head.get(b"host", b"").lower()
    return head.get(b"sec-fetch-site", b"none") in (b"same-origin", b"none")


def is_preflight(head: dict[bytes, bytes], method: str) -> bool:
    return method == "OPTIONS" and b"origin" in head and b"access-control-request-method" in head


def cross_site(why: str) -> ApiError:
    return ApiError(403, f"A page of another site sent this request, which {why}.", code="cross_site_request")
