"""The paged key-value cache."""

from cutp.kv_cache.paged import PageAllocator, PagedKVCache, allocate_caches
from cutp.kv_cache.params import KVCacheParams

__all__ = ["KVCacheParams", "PageAllocator", "PagedKVCache", "allocate_caches"]
