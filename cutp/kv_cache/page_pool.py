"""Which pages of the key-value cache are free, held or kept for reuse."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cutp.errors import CapacityError


class PagePool:
    """Numbers of `num_pages` pages of `page_size` tokens; equal calls give equal numbers on every rank.

    A page is free, held by one request or more (which is counted), or idle: held by nobody, with contents that the
    prefix cache still knows. `take` gives the lowest free page; when none is left, the page that has been idle for
    longest, and calls `on_evict` with its number first.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self.on_evict: Callable[[int], None] | None = None
        self._holders = [0] * num_pages
        self._free = list(range(num_pages))  # a heap
        self._idle: OrderedDict[int, None] = OrderedDict()  # idle for longest first
        self._kept: set[int] = set()

    @property
    def free_pages(self) -> int:
        """Pages that can be taken: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def idle_pages(self) -> int:
        return len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def holders(self, page: int) -> int:
        """How many hold `page`."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` pages, held once; CapacityError when fewer can be taken."""
        if count < 0:
            raise ValueError(f"{count} pages cannot be taken")
        if count > self.free_pages:
            raise CapacityError(f"{count} cache pages were asked for, {self.free_pages} of {self.num_pages} are free")
        pages = [heapq.heappop(self._free) if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Holds `pages`, which are held or idle, once more; ValueError for a free one, whose contents are lost."""
        if any(self._holders[page] == 0 and page not in self._idle for page in pages):
            raise ValueError(f"pages {list(pages)} were to be shared, but not all of them hold something")
        for page in pages:
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Holds `pages` once less. Of those that become idle the last is evicted first: the others lead to it.

        ValueError for one that is not held, which would end up with two owners.
        """
        if len(set(pages)) != len(pages) or any(self._holders[page] == 0 for page in pages):
            raise ValueError(f"pages {list(pages)} were released, but not all of them were held")
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    heapq.heappush(self._free, page)

    def keep(self, page: int) -> None:
        """From now on a held `page` becomes idle, not free, when nobody holds it any more."""
        if self._holders[page] == 0:
            raise ValueError(f"page {page} is to be kept, but nobody holds it")
        self._kept.add(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._kept.remove(page)
        if self.on_evict is not None:
            self.on_evict(page)
        return page
