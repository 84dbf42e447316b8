"""Pages whose keys and values were computed before, found again by the tokens that lead to them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

from cutp.kv_cache.page_pool import PagePool

_KEY_BYTES = 16


class PageKeys:
    """The keys of one request's full pages: a hash chain, so a key stands for all the tokens up to its page's end.

    BLAKE2b (RFC 7693) of 128 bits, keyed, of the key of the page before and the page's token ids. Keys are made once,
    when they are first asked for.
    """

    def __init__(self, secret: bytes, salt: bytes, page_size: int, tokens: Callable[[int, int], list[int]]):
        self._secret = secret
        self._page_size = page_size
        self._tokens = tokens
        # The start of the chain: `person` tells it from the key of a page, whatever the salt.
        self._chain = [hashlib.blake2b(salt, digest_size=_KEY_BYTES, key=secret, person=b"salt").digest()]

    def __getitem__(self, index: int) -> bytes:
        """The key of page `index`; ValueError when not all of its tokens are known yet."""
        chain = self._chain
        while len(chain) <= index + 1:
            start = (len(chain) - 1) * self._page_size
            ids = self._tokens(start, start + self._page_size)
            if len(ids) != self._page_size:
                raise ValueError(f"page {len(chain) - 1} has no key: only {len(ids)} of its tokens are known")
            data = chain[-1] + array("q", ids).tobytes()
            chain.append(hashlib.blake2b(data, digest_size=_KEY_BYTES, key=self._secret).digest())
        return chain[index + 1]


class PrefixCache:
    """The full pages of `pool` that are known by key.

    Who holds a page holds all the pages that lead to it, and pages are released last page first; so the page that is
    evicted first is always the end of a chain, and a key that is found has all the keys before it.

    salt: the engine's own secret; without it nobody can make two different pages with one key. hit_tokens of the
    queried_tokens needed no computing; a request asks again after a preemption, and both numbers grow again.
    """

    def __init__(self, pool: PagePool, salt: bytes = b""):
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evicted_pages = 0
        self._pool = pool
        self._secret = hashlib.blake2b(salt).digest()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        """Pages that are known."""
        return len(self._page_of)

    def keys(self, tokens: Callable[[int, int], list[int]], salt: bytes = b"") -> PageKeys:
        """The keys of a request: tokens(start, stop) are its token ids; other salts give other keys."""
        return PageKeys(self._secret, salt, self._pool.page_size, tokens)

    def share(self, keys: PageKeys, start: int, stop: int) -> list[int]:
        """Holds and returns the known pages for start, start + 1, ... below `stop`, up to the first unknown one."""
        pages: list[int] = []
        for index in range(start, stop):
            page = self._page_of.get(keys[index])
            if page is None:
                break
            pages.append(page)
        self._pool.share(pages)
        self.hit_tokens += len(pages) * self._pool.page_size
        return pages

    def held_pages(self, keys: PageKeys, stop: int) -> int:
        """How many of the first `stop` pages are known and held by somebody, so that sharing them takes no memory."""
        for index in range(stop):
            page = self._page_of.get(keys[index])
            if page is None or self._pool.holders(page) == 0:
                return index
        return max(stop, 0)

    def publish(self, key: bytes, page: int) -> int:
        """Makes `page`, which the caller holds and has filled, known by `key`; returns the page to use from now on.

        That is another one when the key is known already: the caller then holds that one, and no longer its own.
        """
        known = self._page_of.get(key)
        if known is None:
            self._page_of[key] = page
            self._key_of[page] = key
            self._pool.keep(page)
            return page
        self._pool.share([known])
        self._pool.release([page])
        return known

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        self.evicted_pages += 1
