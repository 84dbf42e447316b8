"""The memory of the paged key-value cache (Kwon et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.array.scratch import Memory
from cutp.comm.device_group import DeviceGroup
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
    def allocate(cls, params: KVCacheParams, num_pages: int, size: int = 1, rank: int = 0,
                 memory: Memory | None = None) -> PagedKVCache:
        """A cache of `num_pages` pages for rank `rank` of `size`, in `memory` or, without one, on the host, where it is
        not touched until it is used."""
        shape = (num_pages, params.planes, params.local_kv_heads(size, rank), params.page_size, params.head_dim)
        empty = np.empty if memory is None else memory.empty
        return cls(params, [empty(shape, params.dtype) for _ in range(params.num_layers)])

    @property
    def num_pages(self) -> int:
        return len(self.blocks[0])


def allocate_caches(params: KVCacheParams, num_pages: int, devices) -> list[PagedKVCache]:
    """One empty cache of `num_pages` pages for every device of `devices` that lives in this process."""
    group = DeviceGroup.of(devices)
    return [PagedKVCache.allocate(params, num_pages, group.size, rank) for rank in group.local_ranks]
