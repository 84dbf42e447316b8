"""Which tokens of which requests the next forward pass computes.

Every rank runs the same scheduler on the same requests, so the decisions need no communication.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cutp.engine.block_tables import BlockTables
from cutp.engine.request import Request
from cutp.errors import CapacityError
from cutp.kv_cache.page_pool import PagePool
from cutp.kv_cache.prefix_cache import PageKeys, PrefixCache

# The oldest request may use this share of a pass for its prompt even when the others could fill the pass.
_OLDEST_SHARE = 1 / 4


class Chunk(NamedTuple):
    """Tokens start .. stop - 1 of one request. A tuple: it is made in a third of a frozen dataclass's time."""

    request: Request
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the request's last known token is in the chunk, so that a next one can be predicted."""
        return self.stop == self.request.length


@dataclass(frozen=True)
class Plan:
    """One pass. chunks: what to compute, generating requests first. admitted: requests that now have a slot;
    preempted: those that lost theirs. cached_tokens: tokens taken from the prefix cache."""

    chunks: list[Chunk]
    admitted: list[Request]
    preempted: list[Request]
    cached_tokens: int


@dataclass
class _Pass:
    """A plan while it is made. computing: keys of the pages that its prompt chunks write."""

    budget: int
    decodes: list[Chunk] = field(default_factory=list)
    prompts: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    computing: set[bytes] = field(default_factory=set)
    cached_tokens: int = 0


class Scheduler:
    """Continuous batching with strict seniority: a smaller id goes first, always.

    A pass takes one token of every request that generates, then chunks of prompts, each oldest first, up to
    `max_batch_tokens` (Agrawal et al., 2023). Pages are taken as tokens need them. When none is left, the youngest
    running request is preempted: it loses its pages and its slot, waits as the first in the queue, and is computed
    again, from the pages the prefix cache still has and with the tokens it has generated. A request takes pages from
    younger ones only; where there are none, it pauses.

    Full pages are shared through the prefix cache once they are computed. A prompt whose next page is written by an
    older request in the same pass is left out of that pass, so equal prompts that arrive together are computed once.

    No request starves. Only the first of the queue is admitted and only the youngest is preempted, so every running
    request is older than every waiting one, and the oldest of all runs, or is admitted at once when nothing runs (alone
    it fits, which `add` checks). It is never preempted; it finds a page, as it may take one from any other; it waits
    for nobody's pages; and it gets a token in every pass, as the generating ones leave room for it when its prompt is
    not computed yet. So it is done after at most max_total passes, and then the next one is the oldest.

    max_running: requests with a slot at once. max_len: tokens a request may reach at most.
    """

    def __init__(self, pool: PagePool, *, max_batch_tokens: int, max_running: int, max_len: int,
                 prefix_cache: PrefixCache | None = None):
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.max_len = max_len
        self.tables = BlockTables(max_running, pool.pages_for(max_len))
        self.waiting: deque[Request] = deque()  # both by id, and all running ids are below all waiting ones
        self.running: list[Request] = []
        self._free_slots = list(range(max_running))  # a heap
        self._keys: dict[int, PageKeys] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request. ValueError when its id is not above all others; CapacityError when it could never run."""
        youngest = self.waiting[-1] if self.waiting else self.running[-1] if self.running else None
        if youngest is not None and request.id <= youngest.id:
            raise ValueError(f"request {request.id} was added after request {youngest.id}; ids must grow")
        if request.max_total > self.max_len or self.pool.pages_for(request.max_total) > self.pool.num_pages:
            raise CapacityError(f"request {request.id} may reach {request.max_total} tokens; the limit is "
                                f"{self.max_len}, and the cache holds {self.pool.num_pages * self.pool.page_size}")
        if self.prefix_cache is not None and request.share_prefix:
            self._keys[request.id] = self.prefix_cache.keys(request.tokens, request.cache_salt)
        self.waiting.append(request)

    def schedule(self) -> Plan:
        """The next pass. It has a chunk whenever there is work."""
        step = _Pass(self.max_batch_tokens)
        for request in self._plan_decodes(step):
            if request.slot is not None:  # preempted for one of the prompts before it
                self._plan_prompt(step, request)
        if not step.preempted:  # who lost its slot in this pass gets none in the same pass
            self._admit(step)
        return Plan(step.decodes + step.prompts, step.admitted, step.preempted, step.cached_tokens)

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """After the pass: its tokens are in the cache, and full pages may be shared. Chunks of requests that were
        cancelled meanwhile are passed over."""
        page_size = self.pool.page_size
        for request, start, stop in chunks:
            if request.slot is None:
                continue
            request.cached = stop
            first, last = start // page_size, stop // page_size
            if first != last and request.id in self._keys:
                self._publish(request, first, last)

    def finish(self, request: Request) -> None:
        """Takes a running request out and releases its pages."""
        self.running.remove(request)
        self._release(request)
        self._keys.pop(request.id, None)

    def cancel(self, request: Request) -> None:
        """Takes a request out, whether it runs or waits; one that is done is no error."""
        if request.slot is not None:
            self.finish(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            self._keys.pop(request.id, None)

    def clear(self) -> None:
        """Drops all requests."""
        for request in [*self.running, *self.waiting]:
            self.cancel(request)

    def _plan_decodes(self, step: _Pass) -> list[Request]:
        """Plans the requests with one pending token; returns the running ones with several."""
        prompts: list[Request] = []
        decodes, page_size = step.decodes, self.pool.page_size
        budget = step.budget
        if self.running and self.running[0].pending > 1:
            budget -= min(self.running[0].pending, max(1, int(budget * _OLDEST_SHARE)))
        for request in self.running:  # a preemption takes from its end, where the loop has not been
            start, stop = request.cached, request.length
            if stop - start != 1:
                if stop > start:
                    prompts.append(request)
            elif len(decodes) < budget:
                if start < len(request.pages) * page_size:
                    decodes.append(Chunk(request, start, stop))
                elif self._make_room(step, request):
                    self._extend(request, self.pool.take(1))
                    decodes.append(Chunk(request, start, stop))
        step.budget -= len(decodes)
        return prompts

    def _plan_prompt(self, step: _Pass, request: Request) -> None:
        """Plans as much of a request's pending tokens as budget and memory allow, unless another computes them."""
        if step.budget == 0:
            return
        page_size = self.pool.page_size
        keys = self._keys.get(request.id)
        if keys is not None and request.cached % page_size == 0:
            self._reuse(step, request, keys)
            page = request.cached // page_size
            if page < self._shareable(request) and keys[page] in step.computing:
                return
        start = request.cached
        if start >= len(request.pages) * page_size and not self._make_room(step, request):
            return
        room = (len(request.pages) + self.pool.free_pages) * page_size
        stop = min(request.length, start + step.budget, room)
        self._extend(request, self.pool.take(self.pool.pages_for(stop) - len(request.pages)))
        step.prompts.append(Chunk(request, start, stop))
        step.budget -= stop - start
        if keys is not None:
            # A page that is not completed here ends the budget or the known tokens: nobody could follow.
            step.computing.update(keys[page] for page in range(start // page_size, stop // page_size))

    def _admit(self, step: _Pass) -> None:
        """Admits waiting requests, in order, while slots, budget and pages last.

        A request needs the pages for all its known tokens and one more to generate into, beside those that the running
        ones need for theirs: otherwise it would soon be preempted.
        """
        if not (self.waiting and self._free_slots and step.budget):
            return
        room = self.pool.free_pages - sum(map(self._missing_pages, self.running))
        while self.waiting and self._free_slots and step.budget:
            request = self.waiting[0]
            missing = self._missing_pages(request)
            if missing > room and request.id in self._keys:
                missing -= self.prefix_cache.held_pages(self._keys[request.id], self._shareable(request))
            if missing > room:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.slot = heapq.heappop(self._free_slots)
            step.admitted.append(request)
            if request.id in self._keys:
                self.prefix_cache.queried_tokens += request.length
            free = self.pool.free_pages
            self._plan_prompt(step, request)
            room -= free - self.pool.free_pages + self._missing_pages(request)

    def _missing_pages(self, request: Request) -> int:
        """Pages for the known tokens and one more, as far as the request may grow, less those it has."""
        wanted = min(self.pool.pages_for(request.max_total), self.pool.pages_for(request.length) + 1)
        return wanted - len(request.pages)

    def _shareable(self, request: Request) -> int:
        """Full pages at the beginning of a request of which no hidden state is needed."""
        return request.needed_from // self.pool.page_size

    def _reuse(self, step: _Pass, request: Request, keys: PageKeys) -> None:
        """Goes on with pages of the prefix cache as far as it has them."""
        pages = self.prefix_cache.share(keys, request.cached // self.pool.page_size, self._shareable(request))
        if pages:
            self._extend(request, pages)
            request.cached += len(pages) * self.pool.page_size
            step.cached_tokens += len(pages) * self.pool.page_size

    def _make_room(self, step: _Pass, request: Request) -> bool:
        """Sees that a page can be taken; False when only younger requests' pages could be, and there are none."""
        while not self.pool.free_pages:
            victim = self.running[-1]
            if victim is request:
                return False
            self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            step.preempted.append(victim)
            if step.decodes and step.decodes[-1].request is victim:
                step.decodes.pop()
                step.budget += 1
        return True

    def _extend(self, request: Request, pages: list[int]) -> None:
        request.pages.extend(pages)
        self.tables.append(request.slot, pages)

    def _publish(self, request: Request, first: int, last: int) -> None:
        """Makes computed pages known; where another request was quicker, its page takes the place of this one's."""
        keys = self._keys[request.id]
        for index in range(first, last):
            page = self.prefix_cache.publish(keys[index], request.pages[index])
            if page != request.pages[index]:
                request.pages[index] = page
                self.tables.replace(request.slot, index, page)

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        self.tables.clear(request.slot)
        heapq.heappush(self._free_slots, request.slot)
        request.pages, request.slot, request.cached = [], None, 0
