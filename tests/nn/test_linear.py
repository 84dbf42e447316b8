"""Linear layers, whole and divided: partial sums, concatenations, one bias, stacked weights, the output head."""

import ml_dtypes
import numpy as np
import pytest

from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.nn.distributed_transformer import forward_sharded_layers
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear, FusedLinear, Linear, gate_up_linear, qkv_linear
from cutp.nn.module import sharded
from cutp.nn.sharding import EvenSegment, ShardingStrategy
from tests.nn.building import DEVICE_COUNTS, close, cpus, fill

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def inputs(rows, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def by_hand(x, values, name=""):
    y = x.astype(np.float64) @ values[f"{name}weight"].astype(np.float64).T
    return y + values.get(f"{name}bias", 0)


@pytest.mark.parametrize("has_bias", [False, True])
def test_whole_layer(has_bias):
    layer = Linear(13, 6, float32, has_bias=has_bias)
    values = fill(layer)
    assert set(values) == ({"weight", "bias"} if has_bias else {"weight"})
    x, out = inputs(4, 13), np.full((4, 6), np.nan, np.float32)
    assert layer(x, out) is out
    close(out, by_hand(x, values))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("in_dim", [13, 16, 5])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_row_parallel_shards_sum_to_the_layer(n, in_dim, has_bias):
    layer = Linear(in_dim, 6, float32, has_bias=has_bias)
    values = fill(layer)
    x = inputs(4, in_dim)
    shards = sharded(layer, ShardingStrategy.columnwise(n), cpus(n))
    assert len(shards) == n and all(shard.out_dim == 6 for shard in shards)
    partial = forward_sharded_layers(shards, np.array_split(x, n, axis=1))
    close(sum(partial), by_hand(x, values))


@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_row_parallel_bias_is_on_rank_0_alone(n):
    layer = Linear(8, 3, float32, has_bias=True)
    fill(layer, {"weight": np.zeros((3, 8), np.float32), "bias": np.array([100, 200, 300], np.float32)})
    shards = sharded(layer, ShardingStrategy.columnwise(n), cpus(n))
    partial = forward_sharded_layers(shards, np.array_split(inputs(2, 8), n, axis=1))
    np.testing.assert_array_equal(partial[0], [[100, 200, 300]] * 2)
    for shard, rest in zip(shards[1:], partial[1:], strict=True):
        assert shard.bias.local_shape == (0,) and not rest.any()


@pytest.mark.parametrize("out_dim", [13, 16, 5])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_column_parallel_shards_concatenate_to_the_layer(n, out_dim):
    layer = Linear(7, out_dim, float32, has_bias=True)
    values = fill(layer)
    x = inputs(4, 7)
    parts = forward_sharded_layers(sharded(layer, ShardingStrategy.rowwise(n), cpus(n)), [x] * n)
    assert [part.shape[1] for part in parts] == [len(a) for a in np.array_split(np.arange(out_dim), n)]
    close(np.concatenate(parts, axis=1), by_hand(x, values))


@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_head_aware_columns(n):
    layer = Linear(8 * 3, 5, float32, has_bias=True)
    values = fill(layer)
    x = inputs(4, 24)
    shards = sharded(layer, ShardingStrategy.head_aware_columnwise(n, 8, 3, 2), cpus(n))
    pieces = np.split(x, np.cumsum([shard.in_dim for shard in shards])[:-1], axis=1)
    close(sum(forward_sharded_layers(shards, pieces)), by_hand(x, values))


@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_replicas_are_the_layer(n):
    layer = Linear(5, 4, float32, has_bias=True)
    values = fill(layer)
    x = inputs(3, 5)
    for y in forward_sharded_layers(sharded(layer, ShardingStrategy.replicate(n), cpus(n)), [x] * n):
        close(y, by_hand(x, values))


def test_the_result_has_the_dtype_of_the_input():
    layer = Linear(5, 4, bfloat16, has_bias=True)
    fill(layer)
    assert layer(inputs(3, 5).astype(bfloat16)).dtype == bfloat16


def test_stacked_names_and_storage():
    layer = qkv_linear(5, 4, 2, 3, float32, has_bias=True)
    names = [f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    assert [name for name, _ in layer.named_weights()] == names
    layer.materialize()
    values = fill(layer)
    x = inputs(6, 5)
    expected = np.concatenate([by_hand(x, values, f"{p}_proj.") for p in "qkv"], axis=1)
    out = np.full(expected.shape, np.nan, np.float32)
    assert layer(x, out) is out
    close(out, expected)
    layer.q_proj.weight.store(2 * values["q_proj.weight"])  # the weights are views of the one buffer
    close(layer(x)[:, :12], 2 * (expected[:, :12] - values["q_proj.bias"]) + values["q_proj.bias"])


def test_data_that_came_first_moves_into_the_buffer():
    layer = gate_up_linear(5, 4, float32)
    weights = {name: inputs(4, 5, seed) for seed, name in enumerate(("gate_proj", "up_proj"))}
    for name, value in weights.items():
        getattr(layer, name).weight.store(value)
    x = inputs(2, 5, 9)
    close(layer(x), np.concatenate([x @ w.T for w in weights.values()], axis=1))


@pytest.mark.parametrize("width", [8, 11])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_gate_up_shards(n, width):
    layer = gate_up_linear(5, width, float32, has_bias=True)
    values = fill(layer)
    x = inputs(3, 5)
    gates, ups = [], []
    for shard in sharded(layer, ShardingStrategy.tensor_parallel(n), cpus(n)):
        gate, up = np.split(shard(x), [shard.out_dims[0]], axis=1)
        assert gate.shape == up.shape
        gates.append(gate)
        ups.append(up)
    close(np.concatenate(gates, axis=1), by_hand(x, values, "gate_proj."))
    close(np.concatenate(ups, axis=1), by_hand(x, values, "up_proj."))


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_qkv_shards(n, heads, kv_heads):
    layer = qkv_linear(5, heads, kv_heads, 2, float32, has_bias=True)
    values = fill(layer)
    x = inputs(3, 5)
    q, k, v = (by_hand(x, values, f"{p}_proj.").reshape(3, -1, 2) for p in "qkv")
    seen = 0
    for shard in sharded(layer, ShardingStrategy.tensor_parallel(n), cpus(n)):
        ends = np.cumsum(shard.out_dims)
        local_q, local_k, local_v = (part.reshape(3, -1, 2) for part in np.split(shard(x), ends[:-1], axis=1))
        group = local_q.shape[1] // local_k.shape[1]
        for i in range(local_q.shape[1]):
            kv_head = seen // (heads // kv_heads)
            close(local_q[:, i], q[:, seen])
            close(local_k[:, i // group], k[:, kv_head])
            close(local_v[:, i // group], v[:, kv_head])
            seen += 1
    assert seen == heads


def test_replicated_stack():
    layer = gate_up_linear(5, 4, float32)
    fill(layer)
    x = inputs(3, 5)
    for shard in sharded(layer, ShardingStrategy.replicate(3), cpus(3)):
        np.testing.assert_array_equal(shard(x), layer(x))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_output_head(n, has_bias):
    head = ColumnParallelLinear(5, 11, float32, cpus(n), has_bias=has_bias)
    values = fill(head)
    x = inputs(3, 5)
    expected = by_hand(x, values)
    borders = [indices[0] if len(indices) else 11 for indices in np.array_split(np.arange(11), n)]
    assert head.starts == borders
    for y in head([x] * n):
        close(y, expected)
    for start, part in zip(head.starts, head.local([x] * n), strict=True):
        close(part, expected[:, start : start + part.shape[1]])


@pytest.mark.parametrize("n", (1, 2, 3))
def test_output_head_over_a_communicator(n):
    x = inputs(3, 5)

    def rank_main(comm):
        head = ColumnParallelLinear(5, 11, float32, comm)
        values = fill(head)
        [y] = head([x])
        return y, by_hand(x, values)

    for y, expected in run_threads(n, rank_main, timeout=20):
        close(y, expected)


@pytest.mark.parametrize("vocab", [8, 11])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_tied_head_uses_the_table_of_the_embedding(n, vocab):
    embedding = VocabParallelEmbedding(vocab, 5, float32, cpus(n))
    head = ColumnParallelLinear(5, vocab, float32, cpus(n), tied_weight=embedding)
    values = fill(embedding)
    assert all(a.weight is b.weight for a, b in zip(head.shards, embedding.shards, strict=True))
    x = inputs(3, 5)
    for y in head([x] * n):
        close(y, by_hand(x, values))


def test_errors_of_the_output_head():
    with pytest.raises(ConfigError, match="at least one device"):
        ColumnParallelLinear(5, 8, float32, [])
    embedding = VocabParallelEmbedding(8, 5, float32, cpus(2))
    with pytest.raises(ConfigError, match="bias when its weight is tied"):
        ColumnParallelLinear(5, 8, float32, cpus(2), tied_weight=embedding, has_bias=True)
    with pytest.raises(ConfigError, match=r"\(8, 5\).*\(9, 5\)"):
        ColumnParallelLinear(5, 9, float32, cpus(2), tied_weight=embedding)
    head = ColumnParallelLinear(5, 8, float32, cpus(2))
    fill(head)
    with pytest.raises(ValueError):
        head([inputs(1, 5)])


@pytest.mark.parametrize("n", (1, 3))
def test_clip_weight(n):
    layer = Linear(6, 7, float32, clip_weight=0.5)
    weight = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    x = np.eye(6, dtype=np.float32)
    parts = sharded(layer, ShardingStrategy.rowwise(n), cpus(n))
    for part in parts:
        part.load({"weight": weight})
    got = np.concatenate([part(x) for part in parts], axis=1)
    np.testing.assert_array_equal(got.T, np.clip(weight, -0.5, 0.5))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_one_weight_for_several_matrices(n, has_bias):
    """The same numbers as stacked matrices of their own, divided each by itself."""
    for make, names in ((lambda fused: qkv_linear(7, 6, 2, 3, float32, has_bias=has_bias, fused=fused), "qkv"),
                        (lambda fused: gate_up_linear(7, 5, float32, has_bias=has_bias, fused=fused), ("gate", "up"))):
        stacked, fused = make(False), make(True)
        values = fill(stacked)
        kinds = ("weight", "bias") if has_bias else ("weight",)
        joined = {kind: np.concatenate([values[f"{name}_proj.{kind}"] for name in names]) for kind in kinds}
        assert {name: weight.shape for name, weight in fused.named_weights()} == {
            kind: array.shape for kind, array in joined.items()}
        fused.load(joined)
        x = inputs(4, 7)
        np.testing.assert_array_equal(fused(x), stacked(x))
        assert fused.out_dims == stacked.out_dims
        strategy = ShardingStrategy.tensor_parallel(n)
        for a, b in zip(sharded(fused, strategy, cpus(n)), sharded(stacked, strategy, cpus(n)), strict=True):
            assert a.out_dims == b.out_dims and a.out_dim == sum(b.out_dims)
            np.testing.assert_array_equal(a(x), b(x))
        for replica in sharded(fused, ShardingStrategy.replicate(n), cpus(n)):
            np.testing.assert_array_equal(replica(x), stacked(x))


def test_a_fused_weight_is_not_divided_across_its_matrices():
    with pytest.raises(ConfigError, match="FusedLinear cannot be sharded by strategy 'rowwise'"):
        sharded(FusedLinear(4, [EvenSegment(3)] * 2, float32), ShardingStrategy.rowwise(2), cpus(2))
    # Six rows in two halves of three are another layer than in parts of two and four.
    one, other = (FusedLinear(4, [EvenSegment(a), EvenSegment(6 - a)], float32) for a in (3, 2))
    assert one.signature() != other.signature()
