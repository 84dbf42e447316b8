"""Sizes of the cache, per rank, and the values that are refused."""

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.kv_cache import KVCacheParams

FIELDS = dict(dtype=np.dtype(np.float32), n_heads=8, n_kv_heads=2, head_dim=16, num_layers=3, page_size=4)


@pytest.mark.parametrize("dtype, itemsize", [(np.float32, 4), (ml_dtypes.bfloat16, 2), (np.float16, 2)])
def test_bytes_per_token(dtype, itemsize):
    params = KVCacheParams(**FIELDS | {"dtype": np.dtype(dtype)})
    assert params.bytes_per_token() == 2 * 3 * 2 * 16 * itemsize
    assert [params.bytes_per_token(2, rank) for rank in range(2)] == [2 * 3 * 1 * 16 * itemsize] * 2


@pytest.mark.parametrize("n_heads, n_kv_heads, size, local", [
    (8, 2, 1, [2]), (8, 2, 4, [1, 1, 1, 1]), (8, 8, 3, [3, 3, 2]), (6, 3, 2, [2, 1]), (8, 1, 8, [1] * 8)])
def test_local_key_value_heads(n_heads, n_kv_heads, size, local):
    params = KVCacheParams(**FIELDS | {"n_heads": n_heads, "n_kv_heads": n_kv_heads})
    assert [params.local_kv_heads(size, rank) for rank in range(size)] == local


@pytest.mark.parametrize("name", ["n_heads", "n_kv_heads", "head_dim", "num_layers", "page_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_values_below_one_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        KVCacheParams(**FIELDS | {name: value})


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(ConfigError, match="8 heads"):
        KVCacheParams(**FIELDS).bytes_per_token(9, 0)


LATENT = FIELDS | dict(n_kv_heads=1, head_dim=576, latent=True)


@pytest.mark.parametrize("size", (1, 3, 8))
def test_a_latent_cache_has_one_vector_a_token_on_every_rank(size):
    params = KVCacheParams(**LATENT)
    assert params.planes == 1 and KVCacheParams(**FIELDS).planes == 2
    assert [params.local_kv_heads(size, rank) for rank in range(size)] == [1] * size
    assert [params.bytes_per_token(size, rank) for rank in range(size)] == [3 * 576 * 4] * size


def test_a_latent_cache_of_several_heads_is_refused():
    with pytest.raises(ConfigError, match="one head that all others share, not 2"):
        KVCacheParams(**LATENT | {"n_kv_heads": 2})
    with pytest.raises(ConfigError, match="8 heads"):
        KVCacheParams(**LATENT).bytes_per_token(9, 0)
