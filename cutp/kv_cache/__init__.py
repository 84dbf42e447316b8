"""The paged key-value cache."""

from cutp.kv_cache.page_pool import PagePool
from cutp.kv_cache.paged import PagedKVCache, allocate_caches
from cutp.kv_cache.params import KVCacheParams
from cutp.kv_cache.prefix_cache import PrefixCache

__all__ = ["KVCacheParams", "PagePool", "PagedKVCache", "PrefixCache", "allocate_caches"]
