"""What a key-value cache looks like, before any memory is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.comm.partition import split_heads
from cutp.errors import ConfigError

PAGE_SIZE = 64


@dataclass(frozen=True)
class KVCacheParams:
    """Shape of the paged cache of one model.

    dtype: of keys and values. n_heads, n_kv_heads: query and key-value heads of the whole model. page_size: tokens
    a page. Key-value heads are replicated where there are more ranks than key-value heads.
    """

    dtype: np.dtype
    n_heads: int
    n_kv_heads: int
    head_dim: int
    num_layers: int
    page_size: int = PAGE_SIZE

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "head_dim", "num_layers", "page_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"KVCacheParams: {name} is {value}, it must be at least 1")

    def local_kv_heads(self, size: int, rank: int) -> int:
        """Key-value heads that rank `rank` of `size` stores."""
        return split_heads(self.n_heads, self.n_kv_heads, size, rank).n_kv_heads

    def bytes_per_token(self, size: int = 1, rank: int = 0) -> int:
        """Bytes rank `rank` of `size` needs for one token: keys and values of all layers."""
        return 2 * self.num_layers * self.local_kv_heads(size, rank) * self.head_dim * np.dtype(self.dtype).itemsize
