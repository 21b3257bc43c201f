"""Who owns which page of the KV store.

Every page is in exactly one state: free (contents undefined), used (one or more references) or idle (no reference, but
contents somebody asked to keep). `free + used + idle == total` holds after every call. Pages are handed out free ones
first, then the longest idle. Knows nothing of requests or of what the pages hold.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PagePool:
    """Reference counts over `total` pages, numbered from 0. `on_evict(page)` is called just before a kept page is
    given away.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"the KV cache was given {total} pages; it needs at least 1: raise kv_memory.")
        self.total = total
        self.references = [0] * total
        self.on_evict: Callable[[int], None] = lambda page: None
        self._free = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._kept = bytearray(total)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._idle)

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int = 1) -> list[int]:
        """`count` pages with one reference each, or [] when there are not so many (then nothing changes)."""
        if count > len(self._free) + len(self._idle):
            return []
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self.references[page] = 1
            pages.append(page)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each page; idle pages come back into use."""
        for page in pages:
            if self.references[page] == 0:
                del self._idle[page]  # KeyError: retaining a free page is a bug of the caller
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each page. Kept pages turn idle in this order (the first is given away first),
        others free.
        """
        for page in pages:
            count = self.references[page] - 1
            if count < 0:
                raise AssertionError(f"page {page} was released more often than retained")
            self.references[page] = count
            if count == 0:
                if self._kept[page]:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """The contents of this used page are worth keeping once nobody refers to it."""
        if self.references[page] == 0:
            raise AssertionError(f"page {page} is to be kept but nobody owns it")
        self._kept[page] = 1

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def drop_idle(self) -> None:
        """Give up the contents of all idle pages."""
        while self._idle:
            self._free.append(self._evict())

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._kept[page] = 0
        self.on_evict(page)
        return page

    def check(self, references: dict[int, int] | None = None) -> None:
        """Raises AssertionError unless every page is in exactly one state (and, where given, has just these
        references).
        """
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle, f"pages both free and idle: {free & idle}"
        for page, count in enumerate(self.references):
            assert (count == 0) == (page in free or page in idle), (
                f"page {page} has {count} references and a wrong state"
            )
            assert page not in idle or self._kept[page], f"page {page} is idle though nobody keeps it"
            assert page not in free or not self._kept[page], f"page {page} is free though somebody keeps it"
            if references is not None:
                assert count == references.get(page, 0), (
                    f"page {page} counts {count} references, {references.get(page, 0)} held"
                )
