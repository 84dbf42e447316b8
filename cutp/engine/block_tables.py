"""The pages of all running requests as one array, changed only where a request's pages change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cutp.engine.request import Request


class BlockTables:
    """array: int32 [max_running, max_pages]; row `request.slot` begins with the request's pages, in order.

    The rest of a row is 0, a page that exists. counts: int32 [max_running], the pages in each row.
    """

    def __init__(self, max_running: int, max_pages: int):
        self.array = np.zeros((max_running, max_pages), np.int32)
        self.counts = np.zeros(max_running, np.int32)

    def append(self, slot: int, pages: Sequence[int]) -> None:
        """Adds pages to the end of a row."""
        count = int(self.counts[slot])
        self.array[slot, count : count + len(pages)] = pages
        self.counts[slot] = count + len(pages)

    def replace(self, slot: int, index: int, page: int) -> None:
        """Another page in the place of one."""
        self.array[slot, index] = page

    def clear(self, slot: int) -> None:
        """Empties a row."""
        self.array[slot, : self.counts[slot]] = 0
        self.counts[slot] = 0

    def lookup_table(self, requests: Sequence[Request]) -> np.ndarray:
        """The rows of `requests`, int32 [B, P], where P is the largest number of pages among them. A copy."""
        slots = np.array([request.slot for request in requests], np.intp)
        width = int(self.counts[slots].max(initial=0))
        return self.array[slots, :width]
