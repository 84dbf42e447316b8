"""Shapes of the pages."""

import ml_dtypes
import numpy as np
import pytest

from cutp.kv_cache import KVCacheParams, PagedKVCache


@pytest.mark.parametrize("size", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_shapes(size, dtype):
    params = KVCacheParams(np.dtype(dtype), n_heads=8, n_kv_heads=4, head_dim=5, num_layers=2, page_size=6)
    for rank in range(size):
        cache = PagedKVCache.allocate(params, 7, size, rank)
        assert cache.num_pages == 7 and cache.params is params and len(cache.blocks) == 2
        for block in cache.blocks:
            assert block.shape == (7, 2, params.local_kv_heads(size, rank), 6, 5) and block.dtype == dtype
            assert block[3, 1, 0].flags.c_contiguous  # one head's page is one run
        one_token = sum(block[0, :, :, 0].nbytes for block in cache.blocks)
        assert one_token == params.bytes_per_token(size, rank)


@pytest.mark.parametrize("size", (1, 3))
def test_shape_of_a_latent_cache(size):
    params = KVCacheParams(np.dtype(np.float16), n_heads=3, n_kv_heads=1, head_dim=20, num_layers=2, page_size=6,
                           latent=True)
    for rank in range(size):
        cache = PagedKVCache.allocate(params, 7, size, rank)
        assert [block.shape for block in cache.blocks] == [(7, 1, 1, 6, 20)] * 2
        assert sum(block[0, :, :, 0].nbytes for block in cache.blocks) == params.bytes_per_token(size, rank)
