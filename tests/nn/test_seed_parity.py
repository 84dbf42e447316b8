"""The seed's API and semantics, table by table, and the points where implementations are known to differ."""

import inspect
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cutp import nn
from cutp.comm.device_group import DeviceGroup
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError, RequestError
from cutp.kv_cache import KVCacheParams, PagedKVCache, allocate_caches
from cutp.nn.linear import StackedLinear, gate_up_linear
from cutp.nn.module import Weight, sharded
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.rope_parameters import RopeParameters
from tests.nn.building import close, cpus, fill, make_batch, poisoned_caches
from tests.nn.decoder import EVERYTHING, PROMPTS, Spec, all_by_hand, build, ends, forward, results

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
S = nn.ShardingStrategy
SIZES = (1, 2, 3, 4, 8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Symbols and signatures.

POSITIONAL = {
    nn.DistributedTransformer: "dim n_heads layers norm output embedding kv_params devices rope return_logits "
                               "use_subgraphs subgraph_layer_groups logits_scaling",
    nn.DistributedTransformerBlock: "attention mlp attention_norm mlp_norm devices distributed_gemm_config",
    nn.VocabParallelEmbedding: "vocab_size hidden_dim dtype devices",
    nn.ColumnParallelLinear: "in_dim out_dim dtype devices tied_weight",
    nn.RMSNorm: "dim dtype eps weight_offset multiply_before_cast",
    nn.distribute_value: "v devices",
    nn.forward_sharded_layers: "layers xs",
    nn.take: "it n",
}
DEFAULTS = {
    nn.DistributedTransformer: dict(return_logits=nn.ReturnLogits.LAST_TOKEN, use_subgraphs=False,
                                    subgraph_layer_groups=None, logits_scaling=1.0),
    nn.DistributedTransformerBlock: dict(distributed_gemm_config=None),
    nn.ColumnParallelLinear: dict(tied_weight=None),
    nn.RMSNorm: dict(eps=1e-6, weight_offset=0.0, multiply_before_cast=True),
}


@pytest.mark.parametrize("symbol", POSITIONAL, ids=lambda symbol: symbol.__name__)
def test_positional_parameters(symbol):
    parameters = inspect.signature(symbol).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == POSITIONAL[symbol].split()
    assert {p.name: p.default for p in positional if p.default is not p.empty} == DEFAULTS.get(symbol, {})
    # What cutp adds is by keyword and optional.
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters if p not in positional)


def test_every_symbol_of_the_seed_is_there():
    names = {"ColumnParallelLinear", "VocabParallelEmbedding", "KVCacheParams", "RotaryEmbedding", "ReturnLogits",
             "DeviceRef", "DistributedGemmConfig", "ShardableCallable", "Shardable", "ShardingStrategy", "RMSNorm",
             "LayerNorm", "MLP", "Linear", "StackedLinear", "DistributedTransformer", "DistributedTransformerBlock",
             "take", "distribute_value", "forward_sharded_layers"}
    assert names <= set(nn.__all__) and all(hasattr(nn, name) for name in nn.__all__)


def test_take_is_short_when_the_iterator_ends():
    items = iter("abc")
    assert nn.take(items, 2) == ["a", "b"] and nn.take(items, 5) == ["c"] and nn.take(items, 1) == []


@pytest.mark.parametrize("n", (1, 2, 4))
def test_distribute_value_covers_the_local_devices(n):
    value = object()
    assert nn.distribute_value(value, cpus(n)) == [value] * n
    assert run_threads(n, lambda comm: nn.distribute_value(value, comm)) == [[value]] * n
    assert nn.distribute_value(value, DeviceGroup.planned(n, n - 1)) == [value]


@pytest.mark.parametrize("layers, xs", [(0, 1), (3, 2), (2, 3)])
def test_forward_sharded_layers_names_both_counts(layers, xs):
    with pytest.raises(AssertionError, match=rf"\b{layers}\b.*\b{xs}\b"):
        nn.forward_sharded_layers([abs] * layers, [1] * xs)
    assert nn.forward_sharded_layers([lambda x: x + 1, lambda x: 2 * x], [5, 7]) == [6, 14]


@pytest.mark.parametrize("layer", [nn.Linear(2, 2, float32), nn.MLP(2, 2, float32), nn.RMSNorm(2, float32),
                                   nn.LayerNorm(2, float32), gate_up_linear(2, 2, float32)],
                         ids=lambda layer: type(layer).__name__)
def test_layers_are_shardable_callables(layer):
    assert isinstance(layer, nn.Shardable) and isinstance(layer, nn.ShardableCallable)


def test_the_protocols_are_protocols():
    for protocol in (nn.Shardable, nn.ShardableCallable):
        assert getattr(protocol, "_is_protocol", False)
        with pytest.raises(TypeError, match="rotocol"):
            protocol()
    weight = Weight((2, 2), float32)
    assert isinstance(weight, nn.Shardable) and not isinstance(weight, nn.ShardableCallable)
    assert not isinstance(object(), nn.Shardable)


# The block.

class Doubler:
    """A feed-forward layer that is no Module: what a user may bring."""

    def __init__(self, share=1.0):
        self.sharding_strategy, self.share = None, share

    def shard(self, devices):
        size = self.sharding_strategy.num_devices
        return [Doubler(1 / size) for _ in DeviceGroup.of(devices).local_ranks]

    def __call__(self, x):
        return np.float32(2 * self.share) * x


def block_of(spec, devices, mlp=None):
    attention = nn.AttentionWithRope(spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, float32, None)
    return nn.DistributedTransformerBlock(
        nn.TensorParallelAttentionWithRope(attention, devices), mlp or nn.MLP(spec.hidden, spec.width, float32),
        nn.RMSNorm(spec.hidden, float32), nn.RMSNorm(spec.hidden, float32), devices)


@pytest.mark.parametrize("n", (1, 2, 3))
def test_a_block_takes_any_shardable_callable(n):
    block = block_of(Spec(), cpus(n), Doubler())
    fill(block)
    assert not any("mlp" in name for name, _ in block.named_weights())
    block.self_attn = lambda layer_idx, xs, caches, batch: [np.zeros_like(x) for x in xs]
    x = noise(4, 10)
    for y in block(0, [x] * n, [None] * n, None):
        close(y, x + 2 * block.post_attention_layernorm[0](x))


class Gain(nn.Module):
    """A feed-forward layer with a weight of its own; its shards come in a plain list."""

    def __init__(self, share=1.0):
        self.sharding_strategy, self.share, self.weight = None, share, Weight((10,), float32)

    def shard(self, devices):
        return [Gain(1 / self.sharding_strategy.num_devices) for _ in DeviceGroup.of(devices).local_ranks]

    def __call__(self, x):
        return np.float32(self.share) * self.weight.value * x


@pytest.mark.parametrize("n", (1, 2, 3))
def test_the_weights_of_such_a_layer_are_named_and_loaded_like_any(n):
    block = block_of(Spec(), cpus(n), Gain())
    values = fill(block)
    assert [name for name, _ in block.named_weights() if "mlp" in name] == ["mlp.weight"] * n
    x = noise(4, 10)
    close(sum(nn.forward_sharded_layers(block.mlp, [x] * n)), values["mlp.weight"] * x)


@pytest.mark.parametrize("n", (1, 2, 3))
def test_a_block_is_pre_norm_with_two_all_reduces(n):
    group, calls = DeviceGroup(cpus(n)), []
    plain = group.all_reduce
    group.all_reduce = lambda xs: calls.append([x.shape for x in xs]) or plain(xs)
    block = block_of(Spec(), group)
    values = fill(block)
    seen = {}
    attend = block.self_attn
    block.self_attn = lambda i, xs, *rest: seen.setdefault("attended", attend(i, seen.setdefault("normed", xs), *rest))
    x = noise(4, 10)
    params = KVCacheParams(float32, 6, 2, 4, 1, page_size=3)
    ys = block(0, [x] * n, poisoned_caches(params, n), make_batch([[0] * 4], [0]))
    assert calls == [[(4, 10)] * n] * 2

    def norm(v, name):
        return v / np.sqrt((v * v).mean(axis=1, keepdims=True) + 1e-6) * values[f"{name}.weight"]

    close(seen["normed"][0], norm(x, "input_layernorm"))
    h = x + seen["attended"][0]
    inner = norm(h, "post_attention_layernorm")
    gate = inner @ values["mlp.gate_proj.weight"].T
    expected = h + (gate / (1 + np.exp(-gate)) * (inner @ values["mlp.up_proj.weight"].T)) @ values[
        "mlp.down_proj.weight"].T
    for y in ys:
        close(y, expected)


def test_a_block_refuses_layers_that_cannot_be_divided_its_way():
    with pytest.raises(ConfigError, match="RMSNorm cannot be sharded by strategy 'tensor_parallel'"):
        block_of(Spec(), cpus(2), nn.RMSNorm(10, float32))
    with pytest.raises(ConfigError, match="Linear cannot be sharded by strategy 'tensor_parallel'"):
        block_of(Spec(), cpus(2), nn.Linear(10, 10, float32))


@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_layer_norm_serves_as_norm(n):
    spec = Spec(layer_norm=True)
    (last,), values = results(spec, cpus(n))
    close(last, all_by_hand(values, spec).logits[ends()], 1e-4)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("option", [dict(embedding_multiplier=3.0), dict(residual_multiplier=0.3),
                                    dict(embedding_multiplier=0.5, residual_multiplier=2.0, logits_scaling=4.0)],
                         ids=str)
def test_multipliers_under_tensor_parallelism(option, n):
    spec = replace(Spec(heads=8), **option)
    (last,), values = results(spec, cpus(n))
    close(last, all_by_hand(values, spec).logits[ends()], 1e-4)
    plain = all_by_hand(values, Spec(heads=8)).logits[ends()]
    assert abs(last - plain).max() > 0.05


@pytest.mark.parametrize("n", (1, 2, 3, 4, 5, 6))
def test_every_option_at_once(n):
    (last,), values = results(EVERYTHING, cpus(n))
    close(last, all_by_hand(values, EVERYTHING).logits[ends()], 1e-4)


# The forward pass.

@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("mode", nn.ReturnLogits)
def test_result_dtypes_and_unsigned_offsets(mode, n):
    """Offsets may be uint32, as in the seed; logits are float32 whatever the model's dtype."""
    spec = Spec(dtype=bfloat16)
    model = build(spec, cpus(n), return_logits=mode)
    fill(model)
    batch = make_batch(PROMPTS, [0, 0, 0])
    unsigned = replace(batch, input_row_offsets=batch.input_row_offsets.astype(np.uint32), _rotary={})
    caches = poisoned_caches(model.kv_params, n)
    plain, got = forward(model, count=2), model(unsigned, caches, 2)
    assert len(got) == (1 if mode is nn.ReturnLogits.LAST_TOKEN else 3)
    for a, b in zip(plain, got, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(array.dtype == np.float32 for array in got[:2])
    if mode is nn.ReturnLogits.ALL:
        assert got[2] is unsigned.input_row_offsets
    if mode is nn.ReturnLogits.VARIABLE:
        assert got[2].dtype == np.int64 and got[2].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("n", (1, 3))
def test_logits_are_equal_on_every_rank(n):
    got = run_threads(n, lambda comm: results(EVERYTHING, comm, return_logits=nn.ReturnLogits.ALL)[0], timeout=20)
    for result in got[1:]:
        for a, b in zip(got[0], result, strict=True):
            assert a.tobytes() == b.tobytes()


def test_the_number_of_layers_must_be_that_of_the_cache():
    model = build(Spec(), cpus(1))
    parts = (10, 6, model.layers, nn.RMSNorm(10, float32), model.lm_head, model.embed_tokens)
    with pytest.raises(ConfigError, match="2 layers were given, but kv_params is for 3"):
        nn.DistributedTransformer(*parts, replace(model.kv_params, num_layers=3), cpus(1), model.rope)


@pytest.mark.parametrize("options, message", [
    (dict(return_logits="all"), "return_logits is 'all', not a ReturnLogits"),
    (dict(return_hidden_states="all"), "return_hidden_states is 'all', not a ReturnHiddenStates"),
    (dict(logits_scaling=0.0), "logits_scaling is 0"),
    (dict(logit_softcapping=0.0), r"logit_softcapping is 0\.0"),
    (dict(logit_softcapping=-1.0), r"logit_softcapping is -1\.0"),
], ids=str)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        build(Spec(), cpus(1), **options)


def test_the_number_of_heads_must_be_that_of_the_cache():
    model = build(Spec(), cpus(1))
    with pytest.raises(ConfigError, match="n_heads is 5, but kv_params is for 6"):
        nn.DistributedTransformer(10, 5, model.layers, nn.RMSNorm(10, float32), model.lm_head, model.embed_tokens,
                                  model.kv_params, cpus(1), model.rope)


@pytest.mark.parametrize("mode", nn.ReturnLogits)
def test_a_batch_of_no_requests(mode):
    model = build(Spec(), cpus(2), return_logits=mode)
    fill(model)
    got = model(RaggedBatch.of([], 3), allocate_caches(model.kv_params, 1, cpus(2)), 2)
    assert all(logits.shape == (0, 13) for logits in got[:2]) and [each.tolist() for each in got[2:]] in ([], [[0]])


def test_caches_that_do_not_fit_are_refused():
    model = build(Spec(), cpus(2))
    fill(model)
    batch = make_batch(PROMPTS, [0, 0, 0])
    with pytest.raises(ConfigError, match="1 caches were given for 2 local devices"):
        model(batch, poisoned_caches(model.kv_params, 2)[:1])
    other = allocate_caches(replace(model.kv_params, page_size=4), 8, cpus(2))
    with pytest.raises(ConfigError, match="pages of 3 tokens.* pages of 4"):
        model(batch, other)


# Sharding strategies on a weight: which entries each of three ranks holds.

TABLE = {
    "rowwise": (S.rowwise(3), (5, 2), 0, [[0, 1], [2, 3], [4]]),
    "columnwise": (S.columnwise(3), (2, 7), 1, [[0, 1, 2], [3, 4], [5, 6]]),
    "axiswise": (S.axiswise(2, 3), (2, 2, 4), 2, [[0, 1], [2], [3]]),
    "replicate": (S.replicate(3), (3, 2), 0, [[0, 1, 2]] * 3),
    "stacked_qkv": (S.stacked_qkv(3, 4, 2), (24, 2), 0,
                    [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 12, 13, 20, 21], [6, 7, 14, 15, 22, 23]]),
    "stacked_qkv, grouped": (S.stacked_qkv(3, 4, 2, 2), (16, 2), 0,
                             [[0, 1, 8, 9, 12, 13], [2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]),
    "head_aware_columnwise": (S.head_aware_columnwise(3, 4, 2), (2, 8), 1, [[0, 1, 2, 3], [4, 5], [6, 7]]),
    "gate_up": (S.gate_up(3), (2, 1, 10), 2, [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]),
    "gate_up, axis 0": (S.gate_up(3, 0), (8, 2), 0, [[0, 1, 4, 5], [2, 6], [3, 7]]),
    "segmented": (S.segmented(3, 0, [nn.EvenSegment(4), nn.HeadSegment(3, 2)]), (10, 1), 0,
                  [[0, 1, 4, 5], [2, 6, 7], [3, 8, 9]]),
}


@pytest.mark.parametrize("strategy, shape, axis, held", TABLE.values(), ids=TABLE)
def test_strategies(strategy, shape, axis, held):
    whole = noise(*shape)
    weight = Weight(shape, float32)
    weight.store(whole)
    weight.sharding_strategy = strategy
    parts = weight.shard(cpus(3))
    for part, indices in zip(parts, held, strict=True):
        np.testing.assert_array_equal(part.value, np.take(whole, indices, axis=axis))
    one_each = run_threads(3, lambda comm: [part.local_shape for part in weight.shard(comm)])
    assert one_each == [[part.local_shape] for part in parts]


@pytest.mark.parametrize("strategy", [S.tensor_parallel(2), S.expert_parallel(2)], ids=lambda s: s.kind)
def test_placeholders_do_not_divide_a_weight(strategy):
    weight = Weight((4, 4), float32)
    weight.sharding_strategy = strategy
    with pytest.raises(NotImplementedError, match=strategy.kind):
        weight.shard(cpus(2))


def test_sharding_errors_of_a_weight():
    weight = Weight((4, 4), float32)
    with pytest.raises(ValueError, match="Weight has no sharding strategy"):
        weight.shard(cpus(2))
    weight.sharding_strategy = S.rowwise(2)
    with pytest.raises(ValueError, match="for 2 devices, but 3 were given"):
        weight.shard(cpus(3))
    part = weight.shard(cpus(2))[1]
    with pytest.raises(ValueError, match="has no sharding strategy"):
        part.shard(cpus(2))
    part.sharding_strategy = S.rowwise(2)
    with pytest.raises(ValueError, match="already a shard cannot be sharded again"):
        part.shard(cpus(2))
    weight.sharding_strategy = S.axiswise(2, 2)
    with pytest.raises(ValueError, match="axis 2, but the weight has shape"):
        weight.shard(cpus(2))


ACCEPTED = {"Linear": ("replicate", "rowwise", "columnwise"), "MLP": ("replicate", "tensor_parallel"),
            "RMSNorm": ("replicate",), "LayerNorm": ("replicate",), "Embedding": ("replicate", "rowwise"),
            "AttentionWithRope": ("replicate", "tensor_parallel"), "StackedLinear": ("replicate", "tensor_parallel")}
MAKE = {"Linear": lambda: nn.Linear(4, 4, float32), "MLP": lambda: nn.MLP(4, 4, float32),
        "RMSNorm": lambda: nn.RMSNorm(4, float32), "LayerNorm": lambda: nn.LayerNorm(4, float32),
        "Embedding": lambda: nn.Embedding(4, 4, float32), "StackedLinear": lambda: gate_up_linear(4, 4, float32),
        "AttentionWithRope": lambda: nn.AttentionWithRope(4, 2, 2, 2, float32, None)}


@pytest.mark.parametrize("name", MAKE)
def test_a_module_refuses_the_strategies_of_others(name):
    for strategy in (S.replicate(2), S.rowwise(2), S.columnwise(2), S.tensor_parallel(2), S.expert_parallel(2),
                     S.gate_up(2)):
        module = MAKE[name]()
        if strategy.kind in ACCEPTED[name]:
            module.sharding_strategy = strategy
            assert len(module.shard(cpus(2))) == 2 and len(module.shard(DeviceGroup.planned(2, 1))) == 1
        else:
            with pytest.raises(ValueError, match=f"{name} cannot be sharded by strategy '{strategy.kind}'"):
                module.sharding_strategy = strategy


# Layers.

@pytest.mark.parametrize("n", SIZES)
def test_tokens_of_other_ranks_are_masked(n):
    """One rank's table gives zeros for what it does not own; a token that nobody owns is zero everywhere."""
    embedding = nn.VocabParallelEmbedding(5, 3, float32, cpus(n))
    table = fill(embedding)["weight"]
    owners = [rank for rank, part in enumerate(np.array_split(np.arange(5), n)) for _ in part]
    for rank, shard in enumerate(embedding.shards):
        expected = np.where((np.array(owners) == rank)[:, None], table, 0)
        np.testing.assert_array_equal(shard(np.arange(5)), expected)
    assert not embedding(np.array([5, -1]))[0].any()


def test_errors_of_the_column_parallel_linear():
    with pytest.raises(ValueError, match="at least one device"):
        nn.ColumnParallelLinear(4, 6, float32, [])
    embedding = nn.VocabParallelEmbedding(6, 4, float32, cpus(2))
    with pytest.raises(ValueError, match="bias when its weight is tied"):
        nn.ColumnParallelLinear(4, 6, float32, cpus(2), embedding, has_bias=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("n", (1, 2, 3))
def test_mlp_activations(activation, n):
    erf = np.vectorize(__import__("math").erf)
    formula = {"silu": lambda v: v / (1 + np.exp(-v)), "gelu": lambda v: v * (1 + erf(v / np.sqrt(2))) / 2,
               "gelu_tanh": lambda v: v / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
               "relu": lambda v: v * (v > 0), "tanh": np.tanh, "sigmoid": lambda v: 1 / (1 + np.exp(-v))}[activation]
    mlp = nn.MLP(6, 7, float32, activation=activation)
    w = fill(mlp)
    x = noise(5, 6)
    expected = (formula(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T
    parts = sharded(mlp, S.tensor_parallel(n), cpus(n))
    close(sum(nn.forward_sharded_layers(parts, [x] * n)), expected)


def test_a_norm_of_another_width_is_refused():
    for norm in (nn.RMSNorm(4, float32), nn.LayerNorm(4, float32)):
        fill(norm)
        with pytest.raises(ValueError, match="of dimension 4"):
            norm(noise(2, 5))


# Rotary embeddings.

@pytest.mark.parametrize("rope_type, kwargs", [("default", {}), ("linear", dict(factor=2.0))])
def test_positions_beyond_the_trained_length_have_angles(rope_type, kwargs):
    rope = nn.RotaryEmbedding(4, max_seq_len=8, theta=100.0, parameters=RopeParameters(rope_type, **kwargs))
    cos, sin = rope.table(np.array([7, 8, 1000]), 1001)
    angles = np.array([7, 8, 1000])[:, None] / kwargs.get("factor", 1.0) * np.array([1, 0.1])
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-4)


def test_layouts_differ_by_a_permutation_of_the_rows():
    """Interleaved weights, rows permuted to halves, give the half-split layer: what checkpoint converters do."""
    outputs = {}
    for interleaved in (True, False):
        rope = nn.RotaryEmbedding(6, max_seq_len=32, theta=30.0, interleaved=interleaved)
        layer = nn.AttentionWithRope(10, 4, 2, 6, float32, rope)
        values = fill(nn.AttentionWithRope(10, 4, 2, 6, float32, rope))
        if not interleaved:
            for name in ("q_proj.weight", "k_proj.weight"):
                rows = values[name].reshape(-1, 6, 10)
                values[name] = rows[:, [0, 2, 4, 1, 3, 5]].reshape(-1, 10)
        layer.load(values)
        outputs[interleaved] = layer(0, noise(7, 10), poisoned_caches(KVCacheParams(float32, 4, 2, 6, 1, 3))[0],
                                     make_batch([[0] * 7], [0]))
    close(outputs[True], outputs[False])


@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("rotary", [("half", "interleaved"), ("interleaved", "half"), ("none", "half")], ids=str)
def test_each_layer_has_its_own_layout(rotary, n):
    spec = Spec(rotary=rotary)
    (last,), values = results(spec, cpus(n))
    close(last, all_by_hand(values, spec).logits[ends()], 1e-4)
    for other in (rotary[:1], rotary[1:]):
        assert abs(last - all_by_hand(values, replace(spec, rotary=other)).logits[ends()]).max() > 1e-3


# Attention.

@pytest.mark.parametrize("n", (3, 5, 6, 7))
def test_eight_key_value_heads_on_an_uneven_number_of_devices(n):
    spec = Spec(heads=16, kv_heads=8, head_dim=2, qk_norm="head", sinks=True, bias=True)
    model = build(spec, cpus(n))
    values = fill(model)
    close(forward(model)[0], all_by_hand(values, spec).logits[ends()], 1e-4)
    heads = [shard.n_kv_heads for shard in model.layers[0].self_attn.shards]
    assert heads == [len(part) for part in np.array_split(np.arange(8), n)]


@pytest.mark.parametrize("kv_heads, n, held", [(1, 3, [[0], [0], [0]]), (2, 4, [[0], [0], [1], [1]]),
                                               (2, 3, [[0], [0], [1]]), (3, 2, [[0, 1], [2]])])
def test_key_value_heads_are_replicated_where_ranks_outnumber_them(kv_heads, n, held):
    layer = nn.AttentionWithRope(5, 6, kv_heads, 2, float32, None)
    rows = fill(layer)["k_proj.weight"].reshape(kv_heads, 2, 5)
    params = KVCacheParams(float32, 6, kv_heads, 2, 1)
    for rank, (shard, heads) in enumerate(zip(nn.TensorParallelAttentionWithRope(layer, cpus(n)).shards, held,
                                              strict=True)):
        np.testing.assert_array_equal(shard.qkv_proj.k_proj.weight.value, rows[heads].reshape(-1, 5))
        assert params.local_kv_heads(n, rank) == shard.n_kv_heads == len(heads)


@pytest.mark.parametrize("option", [dict(qk_norm="head"), dict(clip=0.3), dict(scale=1.3), dict(window=(2, None)),
                                    dict(softcap=0.7), dict(sinks=True), dict(bias=True), dict(output_bias=True)],
                         ids=str)
@pytest.mark.parametrize("n", (2, 3, 5))
def test_attention_options_in_a_whole_model(option, n):
    spec = replace(Spec(layers=2), **option)
    (last,), values = results(spec, cpus(n))
    close(last, all_by_hand(values, spec).logits[ends()], 1e-4)
    neutral = all_by_hand({key: value for key, value in values.items() if not key.endswith("bias")}, Spec())
    assert abs(last - neutral.logits[ends()]).max() > 1e-3


def test_attention_checks_its_lists():
    parallel = nn.TensorParallelAttentionWithRope(nn.AttentionWithRope(4, 2, 2, 2, float32, None), cpus(2))
    fill(parallel)
    caches = poisoned_caches(KVCacheParams(float32, 2, 2, 2, 1, 3), 2)
    for xs, given in (([noise(2, 4)], caches), ([noise(2, 4)] * 2, caches[:1])):
        with pytest.raises(ValueError):
            parallel(0, xs, given, make_batch([[0, 0]], [0]))
    with pytest.raises(ConfigError, match="a window of 0|window of 0 tokens"):
        nn.AttentionWithRope(4, 2, 2, 2, float32, None, window=0)


# The cache.

@pytest.mark.parametrize("n, local", [(1, [3]), (2, [2, 1]), (4, [1, 1, 1, 1])])
def test_layout_of_a_page(n, local):
    params = KVCacheParams(bfloat16, n_heads=6, n_kv_heads=3, head_dim=5, num_layers=2, page_size=4)
    caches = allocate_caches(params, 7, cpus(n))
    assert all(isinstance(cache, PagedKVCache) for cache in caches)
    for cache, heads in zip(caches, local, strict=True):
        assert [block.shape for block in cache.blocks] == [(7, 2, heads, 4, 5)] * 2
        assert all(block.dtype == bfloat16 for block in cache.blocks)
    shapes = run_threads(n, lambda comm: [cache.blocks[0].shape[2] for cache in allocate_caches(params, 7, comm)])
    assert shapes == [[heads] for heads in local]


def test_continued_requests_read_what_was_cached():
    model = build(Spec(), cpus(2))
    fill(model)
    whole, = forward(model, [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    caches = allocate_caches(model.kv_params, 4, cpus(2))
    for cut in ((0, 2), (2, 3), (3, 6)):
        new = [request[slice(*cut)] for request in ([3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8])]
        (last,) = model(RaggedBatch.of(new, 3, [cut[0]] * 2, max_total=6), caches)
    close(last, whole)


# Parity traps.

@pytest.mark.parametrize("n", SIZES)
def test_trap_a_bias_is_added_once_when_the_inputs_are_divided(n):
    spec = Spec(heads=8, output_bias=True, mlp_bias=True)
    model = build(spec, cpus(n))
    values = fill(model)
    for name in values:
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            values[name] = 100 + values[name]
    fill(model, values)
    close(forward(model)[0], all_by_hand(values, spec).logits[ends()], 2e-4)
    for shard in model.layers[0].self_attn.shards[1:]:
        assert shard.o_proj.bias.local_shape == (0,)


@pytest.mark.parametrize("heads, kv_heads", [(7, 7), (9, 3), (5, 1), (10, 2)])
@pytest.mark.parametrize("n", (2, 3, 4, 5))
def test_trap_uneven_heads(heads, kv_heads, n):
    spec = Spec(heads=heads, kv_heads=kv_heads, sinks=True, bias=True)
    model = build(spec, cpus(n))
    values = fill(model)
    close(forward(model)[0], all_by_hand(values, spec).logits[ends()], 1e-4)
    shares = [shard.n_heads for shard in model.layers[0].self_attn.shards]
    assert sum(shares) == heads and min(shares) >= 1


@pytest.mark.parametrize("vocab", (1, 5, 8, 9, 11))
@pytest.mark.parametrize("n", SIZES)
def test_trap_one_rule_for_remainders(n, vocab):
    """Embedding, head, any row-divided layer and the reduce-scatter cut V % N != 0 the same way."""
    embedding = nn.VocabParallelEmbedding(vocab, 3, float32, cpus(n))
    tied = nn.ColumnParallelLinear(3, vocab, float32, cpus(n), embedding)
    untied = nn.ColumnParallelLinear(3, vocab, float32, cpus(n))
    table = np.arange(3 * vocab, dtype=np.float32).reshape(vocab, 3)
    for module in (embedding, untied):
        module.load({"weight": table})
    first_ones_get_more = np.array_split(table, n)
    for a, b, c, expected in zip(embedding.shards, tied.shards, untied.shards, first_ones_get_more, strict=True):
        assert b.weight is a.weight
        np.testing.assert_array_equal(a.weight.value, expected)
        np.testing.assert_array_equal(c.weight.value, expected)
    assert tied.starts == untied.starts
    scattered = run_threads(n, lambda comm: comm.reduce_scatter(table), timeout=20)
    assert [part.shape for part in scattered] == [part.shape for part in first_ones_get_more]


@pytest.mark.parametrize("vocab", (5, 9, 13))
@pytest.mark.parametrize("n", (2, 3, 4, 8))
def test_trap_tied_and_copied_weights_agree(n, vocab):
    tied = build(Spec(heads=8, vocab=vocab, tied=True), cpus(n))
    values = fill(tied)
    copied = build(Spec(heads=8, vocab=vocab), cpus(n))
    fill(copied, values | {"lm_head.weight": values["embed_tokens.weight"]})
    prompts = [[0, vocab - 1, 2], [vocab - 2]]
    np.testing.assert_array_equal(forward(tied, prompts)[0], forward(copied, prompts)[0])


@pytest.mark.parametrize("n", (1, 2))
def test_trap_variable_with_short_rows(n):
    """Refused on every rank, before anything is written to the cache."""
    def rank_main(comm):
        model = build(Spec(), comm, return_logits=nn.ReturnLogits.VARIABLE)
        fill(model)
        caches = poisoned_caches(model.kv_params, n, [comm.rank])
        with pytest.raises(RequestError, match="request 1 of the batch has 2 tokens.*last 3"):
            model(make_batch(PROMPTS, [0, 4, 0]), caches, 3)  # the cached tokens do not count
        return all(np.isnan(block).all() for block in caches[0].blocks)

    assert run_threads(n, rank_main, timeout=20) == [True] * n


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("mode", nn.ReturnLogits)
def test_trap_scaling_divides_and_comes_before_the_cap(mode, n):
    plain, values = results(Spec(), cpus(n), count=2, return_logits=mode)
    got, _ = results(Spec(), cpus(n), count=2, values=values, return_logits=mode, logits_scaling=0.25,
                     logit_softcapping=2.0)
    for a, b in zip(plain[:2], got[:2], strict=True):
        close(b, 2.0 * np.tanh(4 * a.astype(np.float64) / 2.0))
    scaled, _ = results(Spec(), cpus(n), count=2, values=values, return_logits=mode, logits_scaling=8.0)
    close(scaled[0], plain[0] / 8)


def test_trap_order_of_the_roundings_in_a_norm():
    x = noise(64, 16).astype(bfloat16)
    wide = x.astype(np.float64)
    unit = wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + 1e-6)
    for gemma in (True, False):
        norm = nn.RMSNorm(16, bfloat16, weight_offset=1.0 if gemma else 0.0, multiply_before_cast=gemma)
        weight = 0.1 + 0.7 * noise(16, seed=1)
        norm.load({"weight": weight})
        factor = weight.astype(bfloat16).astype(np.float64) + (1.0 if gemma else 0.0)
        rounded = unit if gemma else unit.astype(bfloat16).astype(np.float64)
        other = unit.astype(bfloat16).astype(np.float64) if gemma else unit
        expected, wrong = ((v * factor).astype(np.float32).astype(bfloat16) for v in (rounded, other))
        # float32 sums may cross a rounding boundary here and there; the other order shows in every fifth entry.
        assert (norm(x) != expected).mean() < 0.01 and (norm(x) != wrong).mean() > 0.1


@pytest.mark.parametrize("n", (2, 3, 4, 8))
def test_trap_sums_are_formed_in_rank_order(n):
    """Partial sums whose order shows: every rank has the bits of ((r0 + r1) + r2) + ..."""
    values = np.array([1e8, 1.0, -1e8, 1.0, 3.0, 1e-3, -7.0, 1e8][:n], np.float32)
    expected = values[0]
    for value in values[1:]:
        expected = np.float32(expected + value)
    layer = nn.Linear(n, 1, float32)
    layer.load({"weight": values[None]})
    group = DeviceGroup(cpus(n))
    shards = sharded(layer, S.columnwise(n), group)
    one = np.ones((1, 1), np.float32)
    for y in group.all_reduce(nn.forward_sharded_layers(shards, [one] * n)):
        assert y[0, 0] == expected

    def rank_main(comm):
        group = DeviceGroup.of(comm)
        [shard] = sharded(layer, S.columnwise(n), group)
        return group.all_reduce([shard(one)])[0][0, 0], group.all_reduce_async([shard(one)]).wait()[0][0, 0]

    assert run_threads(n, rank_main, timeout=20) == [(expected, expected)] * n


def test_trap_sums_of_different_shapes_are_refused():
    group = DeviceGroup(cpus(2))
    for other in (noise(1, 3), noise(2, 3).astype(np.float64), noise(3)):
        for collective in (group.all_reduce, group.all_reduce_async):
            with pytest.raises(ConfigError, match="one shape and dtype"):
                collective([noise(2, 3), other])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", (2, 3, 4, 8))
def test_trap_all_ranks_and_backends_have_the_same_bits(n, overlap):
    spec = replace(EVERYTHING, overlap=overlap, heads=9)
    prompts = [np.arange(70) % 13, [4]]
    (alone,), values = results(spec, cpus(n), prompts=prompts)
    for (got,), _ in run_threads(n, lambda comm: results(spec, comm, prompts=prompts, values=values), timeout=20):
        np.testing.assert_array_equal(got, alone)


def test_stacked_linear_keeps_the_names_of_its_parts():
    stack = StackedLinear(3, ("a", "b"), [nn.EvenSegment(2), nn.EvenSegment(4)], float32, has_bias=True)
    assert [name for name, _ in stack.named_weights()] == ["a.weight", "a.bias", "b.weight", "b.bias"]
