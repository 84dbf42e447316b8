"""Page numbers: each page has one owner, the lowest free page goes first, none is lost. Shapes of the pages."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.errors import CapacityError
from cutp.kv_cache import KVCacheParams, PageAllocator, PagedKVCache


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.integers(0, 12), st.lists(st.integers(-5, 6), max_size=30), st.integers(0, 2**32 - 1))
def test_any_sequence_of_takes_and_returns(num_pages, steps, seed):
    """A positive step takes that many pages, another returns a random earlier lot."""
    rng = np.random.default_rng(seed)
    allocator, free, lots = PageAllocator(num_pages, 4), set(range(num_pages)), []
    for step in steps:
        if step > len(free):
            with pytest.raises(CapacityError, match=f"{step} cache pages .* {len(free)} of {num_pages} are free"):
                allocator.take(step)
        elif step > 0:
            pages = allocator.take(step)
            assert pages == sorted(free)[:step]
            free -= set(pages)
            lots.append(pages)
        elif lots:
            lot = lots.pop(rng.integers(len(lots)))
            allocator.give_back(list(rng.permutation(lot)))
            free |= set(lot)
        assert allocator.free_pages == len(free)
    assert allocator.num_pages == num_pages


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for(tokens, pages):
    assert PageAllocator(1, 4).pages_for(tokens) == pages


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
