"""Modules with random weights, ragged batches and empty caches, for the tests of the layers."""

from __future__ import annotations

import zlib

import numpy as np

from cutp.array.device import DeviceRef
from cutp.kv_cache import KVCacheParams, PagedKVCache
from cutp.nn.ragged_batch import RaggedBatch

DEVICE_COUNTS = (1, 2, 3, 4, 8)


def cpus(n):
    return [DeviceRef.CPU()] * n


def random_values(module, seed=0):
    """A whole random tensor for every weight name, the same whatever the sharding."""
    values = {}
    for name, weight in module.named_weights():
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(weight.shape)
        if name.rpartition(".")[0].endswith("norm"):
            draw = 1 + 0.2 * draw
        elif draw.ndim == 2:
            draw /= np.sqrt(weight.shape[1])
        values[name] = draw.astype(np.float32).astype(weight.dtype).astype(np.float32)
    return values


def fill(module, values=None, seed=0):
    """Stores `values` (random ones by default) in the weights, each shard its ranges; returns them."""
    values = random_values(module, seed) if values is None else values
    for child in module.modules():
        child.materialize()
    for name, weight in module.named_weights():
        whole = values[name]
        assert whole.shape == weight.shape
        if weight.ranges is not None:
            index = np.concatenate([np.arange(start, stop) for start, stop in weight.ranges]).astype(int)
            whole = whole[index] if weight.axis == 0 else whole[:, index]
        weight.store(whole)
    return values


def make_batch(tokens, cached, page_size=3, seed=0, max_pages=40):
    """A RaggedBatch of one token list a request, with `cached` tokens before it, on shuffled pages."""
    lengths = [len(ids) for ids in tokens]
    counts = [-(-(n + c) // page_size) for n, c in zip(lengths, cached, strict=True)]
    numbers = iter(np.random.default_rng(seed).permutation(max_pages))
    table = np.zeros((len(tokens), max(counts)), np.int64)
    for row, count in zip(table, counts, strict=True):
        row[:count] = [next(numbers) for _ in range(count)]
    return RaggedBatch(
        tokens=np.concatenate([np.array(ids, np.int64) for ids in tokens]),
        input_row_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        cache_lengths=np.array(cached, np.int64),
        lookup_table=table,
        page_size=page_size,
        rope_lengths=np.array([n + c for n, c in zip(lengths, cached, strict=True)]),
    )


def poisoned_caches(params: KVCacheParams, size=1, ranks=None, num_pages=40):
    """One cache a rank (all of `size` by default), every slot NaN."""
    ranks = range(size) if ranks is None else ranks
    caches = [PagedKVCache.allocate(params, num_pages, size, rank) for rank in ranks]
    for cache in caches:
        for block in cache.blocks:
            block[...] = np.nan
    return caches


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
