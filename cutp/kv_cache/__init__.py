"""The paged key-value cache."""

from cutp.kv_cache.page_pool import PagePool
from cutp.kv_cache.paged import PageAllocator, PagedKVCache, allocate_caches
from cutp.kv_cache.params import KVCacheParams
from cutp.kv_cache.prefix_cache import PrefixCache

__all__ = ["KVCacheParams", "PageAllocator", "PagePool", "PagedKVCache", "PrefixCache", "allocate_caches"]
