"""Norm layers: their options reach the operation, replicas are equal, and other widths are refused."""

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.nn.distributed_transformer import forward_sharded_layers
from cutp.nn.module import sharded
from cutp.nn.norm import LayerNorm, RMSNorm, ShardedRMSNorm
from cutp.nn.sharding import ShardingStrategy
from tests.nn.building import DEVICE_COUNTS, close, cpus, fill

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def inputs(dtype=np.float32):
    return np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    norm = RMSNorm(6, np.float32, eps=0.1, weight_offset=offset)
    weight = fill(norm)["weight"]
    x = inputs().astype(np.float64)
    close(norm(inputs()), x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 0.1) * (weight + offset))


def test_order_of_rounding():
    x = inputs(bfloat16)
    wide = x.astype(np.float64)
    normalised = (wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + 1e-6)).astype(np.float32)
    results = {}
    for before_cast in (True, False):
        norm = RMSNorm(6, bfloat16, multiply_before_cast=before_cast)
        weight = fill(norm)["weight"]
        results[before_cast] = norm(x)
    np.testing.assert_array_equal(results[True], (normalised * weight).astype(bfloat16))
    np.testing.assert_array_equal(results[False],
                                  (normalised.astype(bfloat16).astype(np.float32) * weight).astype(bfloat16))
    assert (results[True] != results[False]).any()
    assert RMSNorm(6, bfloat16).multiply_before_cast


@pytest.mark.parametrize("use_bias", [False, True])
def test_layer_norm(use_bias):
    norm = LayerNorm(6, np.float32, eps=0.1, use_bias=use_bias)
    values = fill(norm)
    assert set(values) == ({"weight", "bias"} if use_bias else {"weight"})
    x = inputs().astype(np.float64)
    expected = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 0.1) * values["weight"]
    close(norm(inputs()), expected + values.get("bias", 0))


@pytest.mark.parametrize("make", [lambda: RMSNorm(6, np.float32), lambda: LayerNorm(6, np.float32)])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_replicas(n, make):
    norm = make()
    fill(norm)
    for y in forward_sharded_layers(sharded(norm, ShardingStrategy.replicate(n), cpus(n)), [inputs()] * n):
        np.testing.assert_array_equal(y, norm(inputs()))


@pytest.mark.parametrize("norm", [RMSNorm(6, np.float32), LayerNorm(6, np.float32)])
def test_another_width_is_refused(norm):
    fill(norm)
    with pytest.raises(ConfigError, match=r"dimension 6 .*\(2, 5\)"):
        norm(np.zeros((2, 5), np.float32))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_sharded_rms_norm(n, offset):
    """Every shard normalises its channels by the mean square of all of them."""
    norm = ShardedRMSNorm(6, np.float32, eps=0.1, weight_offset=offset)
    weight = fill(norm)["weight"]
    shards = sharded(norm, ShardingStrategy.rowwise(n), cpus(n))
    parts = np.array_split(inputs(), n, axis=1)
    total = sum(shard.square_sum(part) for shard, part in zip(shards, parts, strict=True))
    assert total.dtype == np.float32 and total.shape == (5, 1)
    got = np.concatenate([shard(part, total) for shard, part in zip(shards, parts, strict=True)], axis=1)
    x = inputs().astype(np.float64)
    close(got, x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 0.1) * (weight + offset))
    close(norm(inputs()), got)


def test_a_shard_of_a_norm_needs_the_sum_of_all():
    norm = ShardedRMSNorm(6, np.float32)
    fill(norm)
    first, second = sharded(norm, ShardingStrategy.rowwise(2), cpus(2))
    with pytest.raises(ConfigError, match="shard of 3 of 6 channels was called without the sum of squares"):
        first(inputs()[:, :3])
    with pytest.raises(ConfigError, match=r"shard of 3 of 6 channels was given an array of shape \(5, 6\)"):
        second(inputs(), np.ones((5, 1), np.float32))
    with pytest.raises(ConfigError, match="cannot be sharded by strategy 'columnwise'"):
        sharded(ShardedRMSNorm(6, np.float32), ShardingStrategy.columnwise(2), cpus(2))
    for replica in sharded(norm, ShardingStrategy.replicate(2), cpus(2)):
        np.testing.assert_array_equal(replica(inputs()), norm(inputs()))


def test_a_sharded_norm_rounds_as_a_whole_one_does():
    x = inputs(bfloat16)
    for before_cast in (True, False):
        whole, parts = (kind(6, bfloat16, multiply_before_cast=before_cast) for kind in (RMSNorm, ShardedRMSNorm))
        fill(parts, fill(whole))
        got = parts(x)
        assert got.dtype == bfloat16
        np.testing.assert_array_equal(got, whole(x))
