"""The paged key-value cache: memory in pages, and which request owns which page (Kwon et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.errors import CapacityError
from cutp.kv_cache.params import KVCacheParams


@dataclass(frozen=True)
class PagedKVCache:
    """One device's pages.

    blocks: one array a layer, [P, 2, H_kv_local, S, D] (keys at index 0 of axis 1, values at index 1), so that one
    head's page is one contiguous run. A latent cache has [P, 1, 1, S, D].
    """

    params: KVCacheParams
    blocks: list[np.ndarray]

    @classmethod
    def allocate(cls, params: KVCacheParams, num_pages: int, size: int = 1, rank: int = 0) -> PagedKVCache:
        """A cache of `num_pages` pages for rank `rank` of `size`; the memory is not touched until it is used."""
        shape = (num_pages, params.planes, params.local_kv_heads(size, rank), params.page_size, params.head_dim)
        return cls(params, [np.empty(shape, params.dtype) for _ in range(params.num_layers)])

    @property
    def num_pages(self) -> int:
        return len(self.blocks[0])


def allocate_caches(params: KVCacheParams, num_pages: int, devices) -> list[PagedKVCache]:
    """One empty cache of `num_pages` pages for every device of `devices` that lives in this process."""
    group = DeviceGroup.of(devices)
    return [PagedKVCache.allocate(params, num_pages, group.size, rank) for rank in group.local_ranks]


class PageAllocator:
    """Hands out page numbers; the lowest free page first, so every rank makes the same choice."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages; CapacityError when fewer are free."""
        if count < 0:
            raise ValueError(f"{count} pages cannot be taken")
        if count > len(self._free):
            raise CapacityError(f"{count} cache pages were asked for, {len(self._free)} of {self.num_pages} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Frees `pages`; ValueError for one that is not out, which would end up with two owners."""
        if len(set(pages)) != len(pages) or not set(self._free).isdisjoint(pages):
            raise ValueError(f"pages {pages} were given back, but not all of them were out")
        self._free.extend(pages)
        self._free.sort(reverse=True)
