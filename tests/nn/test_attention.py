"""Attention with rotary positions over the paged cache: one layer in float64 by hand, and its division by heads."""

import math

import ml_dtypes
import numpy as np
import pytest

from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.kv_cache import KVCacheParams
from cutp.nn.attention import AttentionWithRope, TensorParallelAttentionWithRope
from cutp.nn.module import sharded
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import ShardingStrategy
from tests.nn.building import DEVICE_COUNTS, close, cpus, fill, make_batch, poisoned_caches

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN, DIM, THETA = 10, 6, 100.0
ROPE = RotaryEmbedding(DIM, max_seq_len=64, theta=THETA)
LENGTHS = (4, 1, 7)
OPTIONS = {
    "plain": {},
    "no positions": {"rope": None},
    "interleaved, partial": {"rope": RotaryEmbedding(DIM, max_seq_len=64, theta=THETA, interleaved=True, rotary_dim=4)},
    "biases": {"has_bias": True},
    "output bias only": {"has_output_bias": True},
    "no output bias": {"has_bias": True, "has_output_bias": False},
    "qk norm": {"qk_norm_eps": 1e-3},
    "qk norm, offset": {"qk_norm_eps": 1e-3, "qk_norm_offset": 1.0},
    "qk norm over the projection": {"qk_norm_eps": 1e-2, "qk_norm_over_projection": True},
    "clip": {"clip_qkv": 0.4},
    "scale": {"scale": 0.9},
    "window and softcap": {"window": 3, "softcap": 1.5},
    "sinks": {"has_sinks": True},
}
HEADS = [(4, 4), (4, 2), (6, 2), (6, 3), (8, 1), (8, 2), (5, 1), (9, 3)]


def make(n_heads, n_kv_heads, dtype=float32, *, rope=ROPE, **options):
    return AttentionWithRope(HIDDEN, n_heads, n_kv_heads, DIM, dtype, rope, **options)


def params(n_heads, n_kv_heads, dtype=float32):
    return KVCacheParams(dtype, n_heads, n_kv_heads, DIM, num_layers=2, page_size=3)


def batch_of(lengths, cached=None):
    return make_batch([[0] * n for n in lengths], cached or [0] * len(lengths))


def inputs(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def by_hand(x, values, n_heads, n_kv_heads, *, rope=ROPE, qk_norm_eps=None, qk_norm_offset=0.0,
            qk_norm_over_projection=False, clip_qkv=None, scale=None, window=None, softcap=None, **_):
    """One request's rows [L, HIDDEN], all new, in float64."""
    x = x.astype(np.float64)
    heads = {}
    for p in "qkv":
        y = x @ values[f"{p}_proj.weight"].astype(np.float64).T + values.get(f"{p}_proj.bias", 0)
        y = y if clip_qkv is None else np.clip(y, -clip_qkv, clip_qkv)
        heads_apart = (len(x), -1, DIM)
        y = y if qk_norm_over_projection else y.reshape(heads_apart)
        if p != "v" and qk_norm_eps is not None:
            weight = values[f"{p}_norm.weight"] + qk_norm_offset
            y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + qk_norm_eps) * weight
        y = y.reshape(heads_apart)
        heads[p] = y if p == "v" or rope is None else turned(y, rope)
    q, k, v = heads["q"], heads["k"], heads["v"]
    out = np.zeros((len(x), n_heads, DIM))
    for t in range(len(x)):
        seen = range(0 if window is None else max(0, t - window + 1), t + 1)
        for h in range(n_heads):
            kv = h // (n_heads // n_kv_heads)
            logits = [(DIM**-0.5 if scale is None else scale) * (q[t, h] @ k[j, kv]) for j in seen]
            logits = logits if softcap is None else [softcap * math.tanh(s / softcap) for s in logits]
            total = sum(math.exp(s) for s in logits) + (math.exp(values["sinks"][h]) if "sinks" in values else 0)
            out[t, h] = sum(math.exp(s) / total * v[j, kv] for s, j in zip(logits, seen, strict=True))
    return out.reshape(len(x), -1) @ values["o_proj.weight"].astype(np.float64).T + values.get("o_proj.bias", 0)


def turned(y, rope):
    half, y = rope.rotary_dim // 2, y.copy()
    for t in range(len(y)):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
            angle = t / THETA ** (2 * i / rope.rotary_dim)
            first, second = y[t, :, a].copy(), y[t, :, b].copy()
            y[t, :, a] = first * math.cos(angle) - second * math.sin(angle)
            y[t, :, b] = second * math.cos(angle) + first * math.sin(angle)
    return y


def expected(x, lengths, values, *rest, **options):
    return np.concatenate([by_hand(rows, values, *rest, **options)
                           for rows in np.split(x, np.cumsum(lengths)[:-1])])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 2), (3, 1)])
def test_equals_float64(n_heads, n_kv_heads, options):
    layer = make(n_heads, n_kv_heads, **options)
    values = fill(layer)
    x = inputs(sum(LENGTHS))
    [cache] = poisoned_caches(params(n_heads, n_kv_heads))
    y = layer(1, x, cache, batch_of(LENGTHS))
    close(y, expected(x, LENGTHS, values, n_heads, n_kv_heads, **options), 3e-5)
    assert np.isnan(cache.blocks[0]).all()  # the other layer's pages
    assert np.isfinite(cache.blocks[1]).sum() == 2 * sum(LENGTHS) * n_kv_heads * DIM


@pytest.mark.parametrize("n", DEVICE_COUNTS)
@pytest.mark.parametrize("n_heads, n_kv_heads", HEADS)
def test_division_by_heads_changes_nothing(n_heads, n_kv_heads, n):
    options = dict(has_bias=True, qk_norm_eps=1e-3, has_sinks=True, window=5, softcap=4.0, clip_qkv=1.5)
    layer = make(n_heads, n_kv_heads, **options)
    values = fill(layer)
    if n > n_heads:
        with pytest.raises(ConfigError, match=f"{n_heads} heads cannot be divided among {n} ranks"):
            TensorParallelAttentionWithRope(layer, cpus(n))
        return
    parallel = TensorParallelAttentionWithRope(layer, cpus(n))
    assert sum(shard.n_heads for shard in parallel.shards) == n_heads
    x = inputs(sum(LENGTHS))
    results = parallel(0, [x] * n, poisoned_caches(params(n_heads, n_kv_heads), n), batch_of(LENGTHS))
    assert len(results) == n
    for y in results:
        close(y, expected(x, LENGTHS, values, n_heads, n_kv_heads, **options), 3e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_division_by_heads_with_every_option(options):
    layer = make(6, 2, **options)
    values = fill(layer)
    x = inputs(sum(LENGTHS))
    parallel = TensorParallelAttentionWithRope(layer, cpus(4))
    for y in parallel(0, [x] * 4, poisoned_caches(params(6, 2), 4), batch_of(LENGTHS)):
        close(y, expected(x, LENGTHS, values, 6, 2, **options), 3e-5)


@pytest.mark.parametrize("n", (2, 3))
def test_over_a_communicator(n):
    x = inputs(sum(LENGTHS))

    def rank_main(comm):
        parallel = TensorParallelAttentionWithRope(make(6, 2, has_bias=True), comm)
        values = fill(parallel)
        caches = poisoned_caches(params(6, 2), n, [comm.rank])
        [y] = parallel(0, [x], caches, batch_of(LENGTHS))
        return y, expected(x, LENGTHS, values, 6, 2)

    for y, reference in run_threads(n, rank_main, timeout=20):
        close(y, reference, 3e-5)


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
@pytest.mark.parametrize("n", (1, 4))
def test_cached_prefix_and_chunk_equal_one_shot(n, cut):
    layer = make(4, 2, window=5)
    fill(layer)
    parallel = TensorParallelAttentionWithRope(layer, cpus(n))
    x = inputs(7)
    whole = parallel(0, [x] * n, poisoned_caches(params(4, 2), n), batch_of([7]))[0]
    caches = poisoned_caches(params(4, 2), n)
    first = make_batch([[0] * cut], [0])
    second = make_batch([[0] * (7 - cut)], [cut])
    assert first.lookup_table[0, 0] == second.lookup_table[0, 0]
    close(parallel(0, [x[:cut]] * n, caches, first)[0], whole[:cut])
    close(parallel(0, [x[cut:]] * n, caches, second)[0], whole[cut:])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bfloat16_stays_bfloat16(options):
    layer = make(4, 2, bfloat16, **options)
    values = fill(layer)
    x = inputs(sum(LENGTHS)).astype(bfloat16)
    [cache] = poisoned_caches(params(4, 2, bfloat16))
    y = layer(0, x, cache, batch_of(LENGTHS))
    assert y.dtype == bfloat16
    close(y.astype(np.float32), expected(x, LENGTHS, values, 4, 2, **options), 0.06)
    if "clip_qkv" in options:
        finite = cache.blocks[0].astype(np.float32)
        assert np.nanmax(finite[:, 1]) == float(bfloat16.type(0.4))  # values: clipped, and representable


def test_replicas_are_the_layer():
    layer = make(4, 2, has_bias=True, has_sinks=True, qk_norm_eps=1e-5)
    fill(layer)
    x, batch = inputs(5), batch_of([5])
    whole = layer(0, x, poisoned_caches(params(4, 2))[0], batch)
    for shard in sharded(layer, ShardingStrategy.replicate(2), cpus(2)):
        np.testing.assert_array_equal(shard(0, x, poisoned_caches(params(4, 2))[0], batch), whole)


def test_names():
    layer = TensorParallelAttentionWithRope(make(4, 2, has_bias=True, qk_norm_eps=1e-5, has_sinks=True), cpus(1))
    projections = [f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    names = [name for name, _ in layer.named_weights()]
    assert names == [*projections, "q_norm.weight", "k_norm.weight", "sinks"]
    fused = TensorParallelAttentionWithRope(make(4, 2, has_bias=True, fused_qkv=True), cpus(1))
    assert [name for name, _ in fused.named_weights()] == [f"{module}_proj.{kind}" for module in ("qkv", "o")
                                                          for kind in ("weight", "bias")]


def test_other_strategies_and_wrong_counts_are_refused():
    with pytest.raises(ConfigError, match="AttentionWithRope cannot be sharded by strategy 'rowwise'"):
        make(4, 2).sharding_strategy = ShardingStrategy.rowwise(2)
    layer = make(4, 2)
    fill(layer)
    parallel = TensorParallelAttentionWithRope(layer, cpus(2))
    with pytest.raises(ValueError):
        parallel(0, [inputs(2)], poisoned_caches(params(4, 2), 2), batch_of([2]))


def test_frequencies_follow_the_length_each_request_may_reach():
    """A batch with a table for each request equals the requests one by one."""
    rope = RotaryEmbedding(DIM, max_seq_len=4, parameters=RopeParameters(rope_type="dynamic", factor=2.0, theta=THETA))
    layer = make(4, 2, rope=rope)
    fill(layer)
    x = inputs(sum(LENGTHS))
    whole = layer(0, x, poisoned_caches(params(4, 2))[0], batch_of(LENGTHS))
    for rows, n in zip(np.split(np.arange(len(x)), np.cumsum(LENGTHS)[:-1]), LENGTHS, strict=True):
        close(layer(0, x[rows], poisoned_caches(params(4, 2))[0], batch_of([n])), whole[rows])


def test_sizes_that_do_not_fit_are_refused():
    rope = RotaryEmbedding(4, max_seq_len=8)
    with pytest.raises(ConfigError, match="5 query heads cannot share 2"):
        AttentionWithRope(10, 5, 2, 4, float32, rope)
    with pytest.raises(ConfigError, match="heads of 4, the attention has heads of 6"):
        AttentionWithRope(10, 4, 2, 6, float32, rope)
    with pytest.raises(ConfigError, match="window of 0"):
        AttentionWithRope(10, 4, 2, 4, float32, rope, window=0)
