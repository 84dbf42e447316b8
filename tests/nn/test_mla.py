"""Multi-head latent attention: one layer in float64 by hand, its two forms, and its division by heads."""

import math

import ml_dtypes
import numpy as np
import pytest

from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.kv_cache import KVCacheParams
from cutp.nn.mla import MultiHeadLatentAttention, TensorParallelMultiHeadLatentAttention, mla_softmax_scale
from cutp.nn.module import sharded
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import ShardingStrategy
from tests.nn.building import close, cpus, fill, make_batch, poisoned_caches

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN, RANK, NOPE, ROPE_DIM, VALUE, THETA = 10, 7, 5, 4, 6, 100.0
YARN = RopeParameters(rope_type="yarn", factor=8.0, theta=THETA, original_max_position_embeddings=4, mscale=0.7,
                      mscale_all_dim=1.3)
LENGTHS = (4, 1, 7)
OPTIONS = {
    "plain": {},
    "latent of the query": {"q_lora_rank": 8},
    "biases": {"q_lora_rank": 8, "has_bias": True},
    "biases, no latent of the query": {"has_bias": True},
    "halves": {"interleaved": False},
    "yarn": {"parameters": YARN},
    "scale": {"scale": 0.9},
    "large eps": {"q_lora_rank": 8, "norm_eps": 0.3},
}
FORMS = {"expanded": True, "absorbed": False}


def make(n_heads=3, dtype=float32, *, q_lora_rank=None, interleaved=True, parameters=None, **options):
    parameters = parameters or RopeParameters(theta=THETA)
    rope = RotaryEmbedding(ROPE_DIM, max_seq_len=64, parameters=parameters, interleaved=interleaved)
    return MultiHeadLatentAttention(HIDDEN, n_heads, dtype, rope, q_lora_rank=q_lora_rank, kv_lora_rank=RANK,
                                    qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE_DIM, v_head_dim=VALUE, **options)


def params(n_heads=3, dtype=float32):
    return KVCacheParams(dtype, n_heads, 1, RANK + ROPE_DIM, num_layers=2, page_size=3, latent=True)


def batch_of(lengths, cached=None):
    return make_batch([[0] * n for n in lengths], cached or [0] * len(lengths))


def inputs(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def force(layer, expand):
    """All requests in one form."""
    layer.expands = lambda lengths, cached: np.full(len(lengths), expand)


def normed(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def turned(y, interleaved, rope):
    """Rotated heads [L, H, ROPE_DIM] of positions 0 .. L - 1."""
    frequencies, half, y = rope.frequencies(0), ROPE_DIM // 2, y.copy()
    for t in range(len(y)):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            angle = t * float(frequencies.inv_freq[i])
            cos, sin = (frequencies.attention_scaling * f(angle) for f in (math.cos, math.sin))
            first, second = y[t, :, a].copy(), y[t, :, b].copy()
            y[t, :, a], y[t, :, b] = first * cos - second * sin, second * cos + first * sin
    return y


def by_hand(x, values, n_heads, layer, *, q_lora_rank=None, interleaved=True, parameters=None, scale=None,
            norm_eps=1e-6, **_):
    """One request's rows [L, HIDDEN], all new, in float64."""
    def linear(name, rows):
        return rows @ values[f"{name}.weight"].astype(np.float64).T + values.get(f"{name}.bias", 0)

    x = x.astype(np.float64)
    if q_lora_rank is None:
        q = linear("q_proj", x)
    else:
        q = linear("q_b_proj", normed(linear("q_a_proj", x), values["q_a_layernorm.weight"], norm_eps))
    q = q.reshape(len(x), n_heads, NOPE + ROPE_DIM)
    compressed = linear("kv_a_proj_with_mqa", x)
    latent = normed(compressed[:, :RANK], values["kv_a_layernorm.weight"], norm_eps)
    k, v = np.split(linear("kv_b_proj", latent).reshape(len(x), n_heads, NOPE + VALUE), [NOPE], axis=-1)
    q_rope = turned(q[..., NOPE:], interleaved, layer.rope)
    k_rope = turned(compressed[:, None, RANK:], interleaved, layer.rope)[:, 0]
    if scale is None:
        scale = (NOPE + ROPE_DIM) ** -0.5
        if parameters is YARN:
            scale *= (0.1 * 1.3 * math.log(8.0) + 1) ** 2
    out = np.zeros((len(x), n_heads, VALUE))
    for t in range(len(x)):
        for h in range(n_heads):
            logits = [scale * (q[t, h, :NOPE] @ k[j, h] + q_rope[t, h] @ k_rope[j]) for j in range(t + 1)]
            weights = [math.exp(s - max(logits)) for s in logits]
            out[t, h] = sum(w / sum(weights) * v[j, h] for j, w in enumerate(weights))
    return linear("o_proj", out.reshape(len(x), -1))


def expected(x, lengths, values, *rest, **options):
    return np.concatenate([by_hand(rows, values, *rest, **options)
                           for rows in np.split(x, np.cumsum(lengths)[:-1])])


@pytest.mark.parametrize("form", [*FORMS, "by the rule"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_float64(options, form):
    layer = make(**options)
    values = fill(layer)
    if form in FORMS:
        force(layer, FORMS[form])
    x = inputs(sum(LENGTHS))
    [cache] = poisoned_caches(params())
    y = layer(1, x, cache, batch_of(LENGTHS))
    close(y, expected(x, LENGTHS, values, 3, layer, **options), 3e-5)
    assert np.isnan(cache.blocks[0]).all()  # the other layer's pages
    assert np.isfinite(cache.blocks[1]).sum() == sum(LENGTHS) * (RANK + ROPE_DIM)


@pytest.mark.parametrize("n", (1, 2, 3, 4))
@pytest.mark.parametrize("n_heads", (1, 3, 4, 5))
def test_division_by_heads_changes_nothing(n_heads, n):
    options = dict(q_lora_rank=8, has_bias=True, parameters=YARN)
    layer = make(n_heads, **options)
    values = fill(layer)
    if n > n_heads:
        with pytest.raises(ConfigError, match=f"{n_heads} heads cannot be divided among {n} ranks"):
            TensorParallelMultiHeadLatentAttention(layer, cpus(n))
        return
    parallel = TensorParallelMultiHeadLatentAttention(layer, cpus(n))
    assert sum(shard.n_heads for shard in parallel.shards) == n_heads
    x = inputs(sum(LENGTHS))
    caches = poisoned_caches(params(n_heads), n)
    results = parallel(0, [x] * n, caches, batch_of(LENGTHS))
    assert len(results) == n
    for y in results:
        close(y, expected(x, LENGTHS, values, n_heads, layer, **options), 3e-5)
    for cache in caches:  # every rank holds the same latents
        np.testing.assert_array_equal(cache.blocks[0], caches[0].blocks[0])


@pytest.mark.parametrize("n", (2, 3))
def test_over_a_communicator(n):
    x = inputs(sum(LENGTHS))

    def rank_main(comm):
        layer = make(has_bias=True)
        parallel = TensorParallelMultiHeadLatentAttention(layer, comm)
        values = fill(parallel)
        [y] = parallel(0, [x], poisoned_caches(params(), n, [comm.rank]), batch_of(LENGTHS))
        return y, expected(x, LENGTHS, values, 3, layer)

    for y, reference in run_threads(n, rank_main, timeout=20):
        close(y, reference, 3e-5)


def test_only_what_belongs_to_heads_is_divided():
    layer = make(4, q_lora_rank=8, has_bias=True)
    parts = sharded(layer, ShardingStrategy.tensor_parallel(2), cpus(2))
    shapes = [{name: weight.local_shape for name, weight in part.named_weights()} for part in parts]
    whole = {name: weight.shape for name, weight in layer.named_weights()}
    divided = {"q_b_proj.weight": 0, "kv_b_proj.weight": 0, "o_proj.weight": 1}
    for rank, part in enumerate(shapes):
        assert part.pop("o_proj.bias") == ((HIDDEN,) if rank == 0 else (0,))
        for name, shape in part.items():
            axis = divided.get(name)
            assert shape == tuple(n // 2 if i == axis else n for i, n in enumerate(whole[name])), name


@pytest.mark.parametrize("cuts", [[3], [6], [1, 2], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("n", (1, 3))
def test_chunks_equal_one_shot(n, cuts):
    layer = make(q_lora_rank=8)
    fill(layer)
    parallel = TensorParallelMultiHeadLatentAttention(layer, cpus(n))
    x = inputs(7)
    whole = parallel(0, [x] * n, poisoned_caches(params(), n), batch_of([7]))[0]
    for form in (None, *FORMS.values()):
        for shard in parallel.shards:
            if form is not None:
                force(shard, form)
        caches = poisoned_caches(params(), n)
        for start, stop in zip([0, *cuts], [*cuts, 7], strict=True):
            batch = batch_of([stop - start], [start])
            close(parallel(0, [x[start:stop]] * n, caches, batch)[0], whole[start:stop])


def test_each_request_takes_its_own_form(monkeypatch):
    """The batch is put together again in order, and a request's result does not depend on the others."""
    def counted(name, method):
        return lambda q, *rest: forms.append((name, len(q))) or method(q, *rest)

    lengths, cached = (3, 2, 0, 5), (0, 0, 0, 0)
    layer = make()
    values = fill(layer)
    forms = []
    layer.expands = lambda n, c: np.array([True, False, True, False])[: len(n)]
    for name in ("_expanded", "_absorbed"):
        monkeypatch.setattr(layer, name, counted(name, getattr(layer, name)))
    x = inputs(sum(lengths))
    y = layer(0, x, poisoned_caches(params())[0], batch_of(lengths, cached))
    assert sorted(forms) == [("_absorbed", 7), ("_expanded", 3)]
    close(y, expected(x, [3, 2, 5], values, 3, layer), 3e-5)


def real_size():
    """The sizes of DeepSeek-V3."""
    rope = RotaryEmbedding(64, max_seq_len=4096, parameters=RopeParameters())
    return MultiHeadLatentAttention(7168, 128, bfloat16, rope, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                                    qk_rope_head_dim=64, v_head_dim=128)


@pytest.mark.parametrize("new, cached, expand", [
    (1, 0, False), (1, 1, False), (1, 10**6, False),  # decoding
    (2, 0, True), (300, 0, True), (10**6, 0, True),   # prompts
    (2, 4000, False), (150, 4000, False), (200, 4000, True), (512, 10**6, True),
    (0, 0, False), (0, 5, False)])
def test_the_form_with_fewer_multiplications(new, cached, expand):
    assert real_size().expands(np.array([new]), np.array([cached])).tolist() == [expand]


@pytest.mark.parametrize("rank, nope, rope, value", [(512, 128, 64, 128), (7, 5, 4, 6), (2, 8, 2, 9)])
def test_multiplications_are_counted(rank, nope, rope, value):
    """Token by token and pair by pair."""
    table = RotaryEmbedding(rope, max_seq_len=64, parameters=RopeParameters())
    layer = MultiHeadLatentAttention(8, 2, float32, table, q_lora_rank=None, kv_lora_rank=rank, qk_nope_head_dim=nope,
                                     qk_rope_head_dim=rope, v_head_dim=value)
    cases = [(n, c) for n in (2, 3, 6, 9, 24, 40) for c in (0, 1, 2, 7, 60, 500)]
    for n, c in cases:
        pairs = sum(c + i + 1 for i in range(n))
        expanded = (c + n) * rank * (nope + value) + pairs * (nope + rope + value)
        absorbed = n * rank * (nope + value) + pairs * (rank + rope + rank)
        assert layer.expands(np.array([n]), np.array([c])).tolist() == [expanded <= absorbed], (n, c)
    lengths, cached = np.array(cases).T
    assert layer.expands(lengths, cached).tolist() == [layer.expands(lengths[i : i + 1], cached[i : i + 1])[0]
                                                       for i in range(len(cases))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bfloat16_stays_bfloat16(options, form):
    layer = make(3, bfloat16, **options)
    values = fill(layer)
    force(layer, FORMS[form])
    x = inputs(sum(LENGTHS)).astype(bfloat16)
    [cache] = poisoned_caches(params(3, bfloat16))
    y = layer(0, x, cache, batch_of(LENGTHS))
    assert y.dtype == bfloat16
    close(y.astype(np.float32), expected(x, LENGTHS, values, 3, layer, **options), 0.06)


def test_replicas_are_the_layer():
    layer = make(q_lora_rank=8, has_bias=True)
    fill(layer)
    x, batch = inputs(5), batch_of([5])
    whole = layer(0, x, poisoned_caches(params())[0], batch)
    for shard in sharded(layer, ShardingStrategy.replicate(2), cpus(2)):
        np.testing.assert_array_equal(shard(0, x, poisoned_caches(params())[0], batch), whole)


def test_frequencies_follow_the_length_each_request_may_reach():
    parameters = RopeParameters(rope_type="dynamic", factor=2.0, theta=THETA)
    rope = RotaryEmbedding(ROPE_DIM, max_seq_len=4, parameters=parameters)
    layer = MultiHeadLatentAttention(HIDDEN, 3, float32, rope, q_lora_rank=None, kv_lora_rank=RANK,
                                     qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE_DIM, v_head_dim=VALUE)
    fill(layer)
    x = inputs(sum(LENGTHS))
    whole = layer(0, x, poisoned_caches(params())[0], batch_of(LENGTHS))
    for rows, n in zip(np.split(np.arange(len(x)), np.cumsum(LENGTHS)[:-1]), LENGTHS, strict=True):
        close(layer(0, x[rows], poisoned_caches(params())[0], batch_of([n])), whole[rows])


@pytest.mark.parametrize("parameters, factor", [
    (RopeParameters(), 1), (RopeParameters(mscale_all_dim=2.0, factor=8.0), 1),
    (RopeParameters(rope_type="yarn", factor=40.0), 1),
    (RopeParameters(rope_type="yarn", factor=40.0, mscale=1.0), 1),
    (RopeParameters(rope_type="yarn", factor=40.0, mscale_all_dim=1.0), 1.3688879454113936),
    (RopeParameters(rope_type="linear", factor=40.0, mscale_all_dim=0.5), 1.1844439727056968),
    (RopeParameters(rope_type="yarn", factor=1.0, mscale_all_dim=1.0), 1),
    (RopeParameters(rope_type="yarn", factor=0.5, mscale_all_dim=1.0), 1)])
def test_softmax_scale(parameters, factor):
    assert mla_softmax_scale(192, parameters) == pytest.approx(factor**2 / math.sqrt(192), rel=1e-14)


def test_names():
    layer = TensorParallelMultiHeadLatentAttention(make(q_lora_rank=8, has_bias=True), cpus(1))
    assert [name for name, _ in layer.named_weights()] == [
        "q_a_proj.weight", "q_a_proj.bias", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight",
        "kv_a_proj_with_mqa.bias", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight", "o_proj.bias"]
    assert [name for name, _ in make().named_weights()] == [
        "q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"]


def test_signature_tells_different_layers_apart():
    layers = [make(), make(4), make(q_lora_rank=8), make(interleaved=False), make(parameters=YARN), make(scale=0.5),
              make(has_bias=True), make(parameters=RopeParameters(theta=2 * THETA))]
    signatures = [layer.signature() for layer in layers]
    assert all(signatures[i] != signatures[j] for i in range(len(layers)) for j in range(i))
    assert make().signature() == signatures[0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="cannot be sharded by strategy 'rowwise'"):
        make().sharding_strategy = ShardingStrategy.rowwise(2)
    for table in (RotaryEmbedding(8, max_seq_len=8), RotaryEmbedding(4, max_seq_len=8, rotary_dim=2)):
        with pytest.raises(ConfigError, match="the attention has 4 with positions"):
            MultiHeadLatentAttention(10, 3, float32, table, q_lora_rank=None, kv_lora_rank=7, qk_nope_head_dim=5,
                                     qk_rope_head_dim=4, v_head_dim=6)
    layer = make()
    fill(layer)
    for fields in (dict(latent=False), dict(head_dim=RANK + ROPE_DIM + 1)):
        given = dict(n_heads=3, n_kv_heads=1, head_dim=RANK + ROPE_DIM, num_layers=1, page_size=3, latent=True) | fields
        [cache] = poisoned_caches(KVCacheParams(float32, **given))
        with pytest.raises(ConfigError, match="needs a latent cache of 11 values a token"):
            layer(0, inputs(2), cache, batch_of([2]))
