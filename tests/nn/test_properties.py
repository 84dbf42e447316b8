"""Random shapes and world sizes: sharded equals unsharded, and shards cover every entry exactly once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.comm.partition import split_heads
from cutp.comm.threads import run_threads
from cutp.kv_cache import KVCacheParams
from cutp.nn import (
    MLP,
    AttentionWithRope,
    ColumnParallelLinear,
    EvenSegment,
    HeadSegment,
    Linear,
    RotaryEmbedding,
    ShardingStrategy,
    StackedLinear,
    TensorParallelAttentionWithRope,
    VocabParallelEmbedding,
    Weight,
    forward_sharded_layers,
)
from cutp.nn.module import sharded
from tests.nn.building import cpus, fill, make_batch, poisoned_caches
from tests.nn.decoder import Spec, all_by_hand, build, ends, forward

float32 = np.dtype(np.float32)
S = ShardingStrategy
SIZE = st.integers(1, 8)
ROWS = st.integers(0, 5)


def examples(count):
    return settings(max_examples=count, derandomize=True, deadline=None)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def equal_to_rounding(got, expected, ulps=64):
    """Equal up to `ulps` units in the last place of the largest value."""
    assert got.shape == expected.shape
    largest = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=ulps * np.finfo(np.float32).eps * largest)


# Which entries each rank holds, said once more and in another way.

def even(length, size):
    return [part.tolist() for part in np.array_split(np.arange(length), size)]


def heads_of_ranks(heads, kv_heads, size):
    """[(query heads, key-value heads)], one a rank: the ranks go to the key-value heads, or the other way round."""
    group = heads // kv_heads
    if kv_heads >= size:
        return [([kv * group + i for kv in part for i in range(group)], part) for part in even(kv_heads, size)]
    shares = []
    for kv, ranks in enumerate(even(size, kv_heads)):
        shares += [([kv * group + i for i in part], [kv]) for part in even(group, len(ranks))]
    return shares


def rows_of_heads(heads, dim, first=0):
    return [first + h * dim + d for h in heads for d in range(dim)]


@st.composite
def head_counts(draw, most_kv=4, most_group=4):
    """(heads, key-value heads, head_dim, ranks), each rank with a head."""
    kv_heads = draw(st.integers(1, most_kv))
    heads = kv_heads * draw(st.integers(1, most_group))
    return heads, kv_heads, draw(st.sampled_from((2, 4, 6))), draw(st.integers(1, min(8, heads)))


@st.composite
def divisions(draw, axes=(0, 1)):
    """(strategy, axis, length of that axis, the indices each rank holds)."""
    size, axis, length = draw(SIZE), draw(st.sampled_from(axes)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(("plain", "axiswise", "gate_up", "segmented", "heads")))
    if kind == "plain" and axis > 1:
        kind = "axiswise"
    if kind == "plain":
        return (S.columnwise if axis else S.rowwise)(size), axis, length, even(length, size)
    if kind == "axiswise":
        return S.axiswise(axis, size), axis, length, even(length, size)
    if kind == "gate_up":
        return S.gate_up(size, axis), axis, 2 * length, [part + [length + i for i in part]
                                                         for part in even(length, size)]
    if kind == "segmented":
        lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        held, start = [[] for _ in range(size)], 0
        for one in lengths:
            for rank, part in enumerate(even(one, size)):
                held[rank] += [start + i for i in part]
            start += one
        return S.segmented(size, axis, [EvenSegment(one) for one in lengths]), axis, start, held
    heads, kv_heads, dim, size = draw(head_counts())
    shares = heads_of_ranks(heads, kv_heads, size)
    if axis == 1:
        held = [rows_of_heads(q, dim) for q, _ in shares]
        return S.head_aware_columnwise(size, heads, dim, kv_heads), 1, heads * dim, held
    if axis == 0:
        keys, values = heads * dim, (heads + kv_heads) * dim
        held = [rows_of_heads(q, dim) + rows_of_heads(kv, dim, keys) + rows_of_heads(kv, dim, values)
                for q, kv in shares]
        return S.stacked_qkv(size, heads, dim, kv_heads), 0, (heads + 2 * kv_heads) * dim, held
    held = [rows_of_heads(q, dim) for q, _ in shares]
    return S.segmented(size, axis, [HeadSegment(heads, dim, kv_heads)]), axis, heads * dim, held


@examples(300)
@given(divisions(axes=(0, 1, 2)), st.integers(1, 3))
def test_shard_covers_every_element(division, other):
    """Once; the key and value rows of stacked_qkv once for every rank that reads their head."""
    strategy, axis, length, held = division
    shape = [other, other, other]
    shape[axis] = length
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    weight = Weight(shape, float32)
    weight.store(whole)
    weight.sharding_strategy = strategy
    parts = weight.shard(cpus(strategy.num_devices))
    for part, indices in zip(parts, held, strict=True):
        assert part.shape == tuple(shape) and part.local_shape == part.value.shape
        np.testing.assert_array_equal(part.value, np.take(whole, np.array(indices, int), axis=axis))
    times = Counter(i for indices in held for i in indices)
    assert set(times) == set(range(length))
    seen = Counter(np.concatenate([part.value.ravel() for part in parts]).tolist())
    repeats = np.array([times[i] for i in range(length)], int)
    assert seen == Counter(np.repeat(whole, repeats, axis=axis).ravel().tolist())
    if max(times.values(), default=1) > 1:
        assert len(strategy.segments) == 3  # only stacked_qkv repeats anything


@examples(150)
@given(head_counts(most_kv=8))
def test_key_value_heads_are_replicated_exactly_where_ranks_outnumber_them(counts):
    heads, kv_heads, dim, size = counts
    params = KVCacheParams(float32, heads, kv_heads, dim, 1)
    layer = AttentionWithRope(3, heads, kv_heads, dim, float32, None)
    layer.sharding_strategy = S.tensor_parallel(size)
    shards = layer.shard(cpus(size))
    times = Counter()
    for rank, (shard, (q, kv)) in enumerate(zip(shards, heads_of_ranks(heads, kv_heads, size), strict=True)):
        share = split_heads(heads, kv_heads, size, rank)
        assert (list(range(share.q_start, share.q_stop)), list(range(share.kv_start, share.kv_stop))) == (q, kv)
        assert (shard.n_heads, shard.n_kv_heads) == (len(q), len(kv)) and params.local_kv_heads(size, rank) == len(kv)
        times.update(kv)
    assert set(times) == set(range(kv_heads))
    expected = [1] * kv_heads if kv_heads >= size else [len(part) for part in even(size, kv_heads)]
    assert [times[kv] for kv in range(kv_heads)] == expected


@examples(150)
@given(divisions(), st.integers(1, 9), ROWS, st.booleans())
def test_linear(division, other, rows, has_bias):
    strategy, axis, length, held = division
    in_dim, out_dim = (length, other) if axis else (other, length)
    layer = Linear(in_dim, out_dim, float32, has_bias=has_bias)
    fill(layer)
    x = noise(rows, in_dim)
    whole = layer(x)
    shards = sharded(layer, strategy, cpus(strategy.num_devices))
    if axis == 0:
        for shard, indices in zip(shards, held, strict=True):
            equal_to_rounding(shard(x), whole[:, np.array(indices, int)])
    else:
        parts = forward_sharded_layers(shards, [x[:, np.array(indices, int)] for indices in held])
        equal_to_rounding(sum(parts), whole)


@examples(60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), SIZE, ROWS, st.booleans())
def test_stacked_linear(lengths, in_dim, size, rows, has_bias):
    names = [f"part{i}" for i in range(len(lengths))]
    layer = StackedLinear(in_dim, names, [EvenSegment(n) for n in lengths], float32, has_bias=has_bias)
    fill(layer)
    x = noise(rows, in_dim)
    whole = np.split(layer(x), np.cumsum(lengths)[:-1], axis=1)
    shards = sharded(layer, S.tensor_parallel(size), cpus(size))
    pieces = [np.split(shard(x), np.cumsum(shard.out_dims)[:-1], axis=1) for shard in shards]
    for i, expected in enumerate(whole):
        equal_to_rounding(np.concatenate([piece[i] for piece in pieces], axis=1), expected)


@examples(80)
@given(st.integers(1, 9), st.integers(1, 12), SIZE, ROWS, st.booleans(), st.sampled_from((None, 0.5)),
       st.sampled_from(("silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid")), st.booleans())
def test_mlp(hidden, width, size, rows, has_bias, limit, activation, fused):
    mlp = MLP(hidden, width, float32, activation=activation, has_bias=has_bias, swiglu_limit=limit, fused=fused)
    fill(mlp)
    x = noise(rows, hidden)
    shards = sharded(mlp, S.tensor_parallel(size), cpus(size))
    equal_to_rounding(sum(forward_sharded_layers(shards, [x] * size)), mlp(x))


OPTIONS = st.fixed_dictionaries({
    "has_bias": st.booleans(), "has_output_bias": st.sampled_from((None, True, False)),
    "qk_norm_eps": st.sampled_from((None, 1e-3)), "qk_norm_over_projection": st.booleans(),
    "qk_norm_offset": st.sampled_from((0.0, 1.0)), "fused_qkv": st.booleans(), "clip_qkv": st.sampled_from((None, 0.7)),
    "scale": st.sampled_from((None, 0.9)), "window": st.sampled_from((None, 1, 3)),
    "softcap": st.sampled_from((None, 1.5)), "has_sinks": st.booleans()})


@examples(120)
@given(head_counts(), OPTIONS, st.sampled_from(("half", "interleaved", "none")),
       st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9))
def test_attention(counts, options, rotary, lengths, hidden):
    heads, kv_heads, dim, size = counts
    rope = None if rotary == "none" else RotaryEmbedding(dim, max_seq_len=32, interleaved=rotary == "interleaved")
    layer = AttentionWithRope(hidden, heads, kv_heads, dim, float32, rope, **options)
    fill(layer)
    params = KVCacheParams(float32, heads, kv_heads, dim, 1, page_size=3)
    batch = make_batch([[0] * n for n in lengths], [0] * len(lengths))
    x = noise(sum(lengths), hidden)
    whole = layer(0, x, poisoned_caches(params)[0], batch)
    parallel = TensorParallelAttentionWithRope(layer, cpus(size))
    for y in parallel(0, [x] * size, poisoned_caches(params, size), batch):
        equal_to_rounding(y, whole)


@examples(80)
@given(st.integers(1, 30), st.integers(1, 6), SIZE, st.booleans(), st.integers(0, 2**32 - 1))
def test_embedding_and_head(vocab, hidden, size, tied, seed):
    rng = np.random.default_rng(seed)
    embedding = VocabParallelEmbedding(vocab, hidden, float32, cpus(size))
    head = ColumnParallelLinear(hidden, vocab, float32, cpus(size), embedding if tied else None)
    table, matrix = noise(vocab, hidden), noise(vocab, hidden, seed=1)
    embedding.load({"weight": table})
    if not tied:
        head.load({"weight": matrix})
    tokens = rng.integers(0, vocab, 5)
    hs = embedding(tokens)
    for h, y in zip(hs, head(hs), strict=True):
        np.testing.assert_array_equal(h, table[tokens])
        equal_to_rounding(y, table[tokens] @ (table if tied else matrix).T)
    parts = head.local(hs)
    assert [part.shape[1] for part in parts] == [len(part) for part in even(vocab, size)]


@st.composite
def decoders(draw, most_ranks=8):
    """(Spec, ranks, prompts)."""
    heads, kv_heads, dim, size = draw(head_counts())
    size = min(size, most_ranks)
    vocab = draw(st.integers(2, 20))
    flags = {name: draw(st.booleans()) for name in ("tied", "bias", "output_bias", "mlp_bias", "sinks",
                                                    "layer_norm", "overlap", "fused")}
    maybe = {"clip": 1.0, "scale": 0.6, "softcap": 2.0, "swiglu_limit": 0.7, "logit_softcapping": 2.5}
    spec = Spec(
        vocab=vocab, hidden=draw(st.integers(2, 10)), heads=heads, kv_heads=kv_heads, head_dim=dim,
        width=draw(st.integers(1, 12)), layers=draw(st.integers(1, 3)),
        window=tuple(draw(st.lists(st.sampled_from((None, 2, 4)), min_size=1, max_size=2))),
        rotary=tuple(draw(st.lists(st.sampled_from(("half", "interleaved", "none")), min_size=1, max_size=2))),
        qk_norm=draw(st.sampled_from((None, "head", "projection"))),
        norms=draw(st.sampled_from(("pre", "post", "both", "parallel"))),
        norm_offset=draw(st.sampled_from((0.0, 1.0))), embedding_multiplier=draw(st.sampled_from((1.0, 2.5))),
        residual_multiplier=draw(st.sampled_from((1.0, 0.4))), logits_scaling=draw(st.sampled_from((1.0, 3.0))),
        **flags, **{name: draw(st.sampled_from((None, value))) for name, value in maybe.items()})
    prompts = draw(st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=7), min_size=1, max_size=3))
    return spec, size, prompts


@examples(100)
@given(decoders())
def test_whole_decoder(case):
    """One device against float64, N devices against one."""
    spec, size, prompts = case
    model = build(spec, cpus(1))
    values = fill(model)
    (alone,) = forward(model, prompts)
    np.testing.assert_allclose(alone, all_by_hand(values, spec, prompts).logits[ends(prompts)], rtol=1e-3, atol=2e-4)
    parallel = build(spec, cpus(size))
    parallel.load(values)
    equal_to_rounding(forward(parallel, prompts)[0], alone, ulps=1000)


@pytest.mark.parametrize("most_ranks", (2, 3, 4, 8))
@examples(8)
@given(data=st.data())
def test_whole_decoder_over_threads(most_ranks, data):
    spec, size, prompts = data.draw(decoders(most_ranks))
    one_process = build(spec, cpus(size))
    values = fill(one_process)
    (expected,) = forward(one_process, prompts)

    def rank_main(comm):
        model = build(spec, comm)
        model.load(values)
        return forward(model, prompts)[0]

    for got in run_threads(size, rank_main, timeout=30):
        np.testing.assert_array_equal(got, expected)


@examples(25)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from((2, 3, 4, 8)), ROWS, st.booleans())
def test_linear_over_threads(in_dim, out_dim, size, rows, has_bias):
    """Row-parallel and summed, column-parallel and gathered."""
    layer = Linear(in_dim, out_dim, float32, has_bias=has_bias)
    fill(layer)
    x = noise(rows, in_dim)

    def rank_main(comm):
        [columns] = sharded(layer, S.columnwise(size), comm)
        [rows] = sharded(layer, S.rowwise(size), comm)
        mine = np.array(even(in_dim, size)[comm.rank], int)
        return comm.all_reduce(columns(x[:, mine])), comm.all_gather(rows(x), axis=1)

    for summed, gathered in run_threads(size, rank_main, timeout=30):
        equal_to_rounding(summed, layer(x))
        equal_to_rounding(gathered, layer(x))
