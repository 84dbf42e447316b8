"""What a key-value cache looks like, before any memory is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cutp.comm.partition import split_heads
from cutp.errors import ConfigError
from cutp.ops.latent_cuda import max_channels
from cutp.ops.launch_arguments import ATTENTION_HEAD_DIMS, VECTOR_BYTES, vector_width

PAGE_SIZE = 64


@dataclass(frozen=True)
class KVCacheParams:
    """Shape of the paged cache of one model.

    dtype: of keys and values. n_heads, n_kv_heads: query and key-value heads of the whole model. page_size: tokens
    a page. Key-value heads are replicated where there are more ranks than key-value heads.

    latent: the cache of multi-head latent attention. A token has one vector of `head_dim` values (kv_lora_rank +
    qk_rope_head_dim) from which every head makes its key and its value, so there is one plane instead of two,
    `n_kv_heads` is 1, and every rank holds it whole.

    Raises ConfigError for sizes below 1, and for a latent cache of several heads.
    """

    dtype: np.dtype
    n_heads: int
    n_kv_heads: int
    head_dim: int
    num_layers: int
    page_size: int = PAGE_SIZE
    latent: bool = False

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "head_dim", "num_layers", "page_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"KVCacheParams: {name} is {value}, it must be at least 1")
        if self.latent and self.n_kv_heads != 1:
            raise ConfigError(f"KVCacheParams: a latent cache has one head that all others share, not "
                              f"{self.n_kv_heads}")

    def for_kernels(self) -> KVCacheParams:
        """The cache of the same model on a GPU, where heads may have to be longer by zeros.

        ConfigError, naming what is possible, for heads or latents that the attention kernels cannot be given.
        """
        width = vector_width(np.dtype(self.dtype))
        most = max_channels(self.dtype) if self.latent else ATTENTION_HEAD_DIMS[-1]
        if self.head_dim % width or self.head_dim > most:
            what = "latents of the cache" if self.latent else "attention heads"
            raise ConfigError(f"{what} of {self.head_dim} {np.dtype(self.dtype)} elements do not run on a GPU; they "
                              f"need a multiple of {width} ({VECTOR_BYTES} bytes), at most {most}",
                              hint="use device=\"cpu\"")
        if self.latent:
            return self
        return replace(self, head_dim=next(dim for dim in ATTENTION_HEAD_DIMS if dim >= self.head_dim))

    @property
    def planes(self) -> int:
        """Vectors a token and head: key and value, or the one latent vector."""
        return 1 if self.latent else 2

    def local_kv_heads(self, size: int, rank: int) -> int:
        """Key-value heads that rank `rank` of `size` stores."""
        return split_heads(self.n_heads, self.n_kv_heads, size, rank).n_kv_heads

    def bytes_per_token(self, size: int = 1, rank: int = 0) -> int:
        """Bytes rank `rank` of `size` needs for one token: the vectors of all layers."""
        vectors = self.planes * self.num_layers * self.local_kv_heads(size, rank)
        return vectors * self.head_dim * np.dtype(self.dtype).itemsize
