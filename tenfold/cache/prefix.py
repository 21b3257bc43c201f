"""The prefix cache: full pages found again by what they hold.

A page's key is a SHA-256 over the key of the page before it, its own tokens and the keys of pictures that they show,
starting from the salt; so equal keys mean equal tokens and pictures from the start of the sequence, and requests with
different salts never meet. A page enters only
after its contents were computed, and leaves when the pool gives it to somebody else.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence

from tenfold.cache.pages import PagePool


class PageKeys:
    """The growing chain of keys of one sequence's full pages; tokens already hashed are never hashed again."""

    __slots__ = ("_last", "_marks", "_page_size", "keys")

    def __init__(self, salt: str, page_size: int, marks: Mapping[int, bytes] | None = None) -> None:
        """marks: what pages hold beside their tokens, by page."""
        self._marks = marks or {}
        self.keys: list[bytes] = []
        self._page_size = page_size
        self._last = hashlib.sha256(b"tenfold prefix\0" + salt.encode()).digest()

    def extend(self, tokens: Sequence[int], pages: int) -> list[bytes]:
        """The keys of at least the first `pages` full pages of `tokens` (which must start as in earlier calls)."""
        size = self._page_size
        for i in range(len(self.keys), pages):
            held = array("q", tokens[i * size : (i + 1) * size]).tobytes() + self._marks.get(i, b"")
            self._last = hashlib.sha256(self._last + held).digest()
            self.keys.append(self._last)
        return self.keys


class PrefixCache:
    """Maps keys to pages of `pool`. A page is registered under at most one key, a key leads to at most one page."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._page_of)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known beginning of `keys`; no reference is taken."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: bytes, page: int) -> None:
        """Offer a computed, still referenced page. Where the key is known already the older page stays the shared
        one.
        """
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
            self._pool.keep(page)

    def clear(self) -> None:
        """Forget every page that no sequence is using now."""
        self._pool.drop_idle()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
