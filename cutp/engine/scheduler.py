"""Which tokens of which requests the next forward pass computes.

Every rank runs the same scheduler on the same requests, so the decisions need no communication.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cutp.engine.request import Request
from cutp.kv_cache.paged import PageAllocator


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. stop - 1 of one request."""

    request: Request
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the request's last known token is in the chunk, so that a next one can be predicted."""
        return self.stop == self.request.length


class Scheduler:
    """First come, first served, with prompts in chunks.

    Every pass takes the pending tokens of the running requests, oldest first, up to `max_batch_tokens`: one token for
    a request that is generating, a chunk of the prompt otherwise. A waiting request is admitted when the pages for all
    the tokens it may reach are free, so an admitted request always finishes.
    """

    def __init__(self, allocator: PageAllocator, max_batch_tokens: int, max_running: int):
        self.allocator = allocator
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next pass: generating requests, then prompts, each in the order they came."""
        self._admit()
        budget = self.max_batch_tokens
        chunks = []
        # Requests that generate come before new prompts, so a long prompt does not stall them.
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            count = min(request.pending, budget)
            if count == 0:
                break
            chunks.append(Chunk(request, request.cached, request.cached + count))
            budget -= count
        return chunks

    def finish(self, request: Request) -> None:
        """Takes a running request out and frees its pages."""
        self.running.remove(request)
        self.allocator.give_back(request.pages)
        request.pages = []

    def clear(self) -> None:
        """Drops all requests."""
        self.waiting.clear()
        for request in list(self.running):
            self.finish(request)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            needed = self.allocator.pages_for(self.waiting[0].max_total)
            if needed > self.allocator.free_pages:
                return
            request = self.waiting.popleft()
            request.pages = self.allocator.take(needed)
            self.running.append(request)
