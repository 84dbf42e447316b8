"""Mixture of experts: whole, divided by width and by expert, against the formula in float64."""

import ml_dtypes
import numpy as np
import pytest

from cutp import settings
from cutp.errors import ConfigError
from cutp.nn.linear import Linear
from cutp.nn.mlp import MLP
from cutp.nn.module import sharded
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import GroupLimitedRouter, SoftmaxRouter, TopKSoftmaxRouter
from cutp.nn.sharding import ShardingStrategy
from tests.nn.building import close, cpus, fill

HIDDEN, WIDTH, TOP_K = 12, 10, 2
RANKS = (1, 2, 3, 4, 7)
STRATEGIES = {"tensor": ShardingStrategy.tensor_parallel, "expert": ShardingStrategy.expert_parallel}
F32 = np.dtype(np.float32)


def inputs(tokens=9, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, HIDDEN)).astype(np.float32)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def mixtral(num_experts=5, dtype=F32, top_k=TOP_K, **options):
    router = SoftmaxRouter(HIDDEN, num_experts, top_k, dtype, renormalize=True)
    return MoE(router, Experts(num_experts, HIDDEN, WIDTH, dtype), **options)


def gpt_oss(num_experts=5):
    router = TopKSoftmaxRouter(HIDDEN, num_experts, TOP_K, F32, has_bias=True)
    return MoE(router, Experts(num_experts, HIDDEN, WIDTH, F32, has_bias=True, fused=True, swiglu_limit=0.8,
                               swiglu_alpha=1.7))


def deepseek(num_experts=6):
    router = GroupLimitedRouter(HIDDEN, num_experts, 3, F32, num_groups=3, top_groups=2, scaling=2.5)
    return MoE(router, Experts(num_experts, HIDDEN, WIDTH, F32), shared_experts=MLP(HIDDEN, 7, F32))


def gated_shared(num_experts=4):
    router = SoftmaxRouter(HIDDEN, num_experts, TOP_K, F32, renormalize=False)
    return MoE(router, Experts(num_experts, HIDDEN, WIDTH, F32, has_bias=True, swiglu_limit=0.8),
               shared_experts=MLP(HIDDEN, 7, F32, has_bias=True), shared_expert_gate=Linear(HIDDEN, 1, F32))


MODELS = {"mixtral": mixtral, "gpt_oss": gpt_oss, "deepseek": deepseek, "gated_shared": gated_shared}


def linear(values, name, x):
    return values[f"{name}.weight"].astype(np.float64) @ x + values.get(f"{name}.bias", 0)


def feed_forward(values, prefix, x, limit=None, alpha=None):
    if f"{prefix}gate_up_proj.weight" in values:
        gate, up = np.split(linear(values, f"{prefix}gate_up_proj", x), 2)
    else:
        gate, up = linear(values, f"{prefix}gate_proj", x), linear(values, f"{prefix}up_proj", x)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    y = gate * sigmoid(gate) * up if alpha is None else gate * sigmoid(alpha * gate) * (up + 1)
    return linear(values, f"{prefix}down_proj", y)


def by_hand(name, moe, values, x):
    """One token at a time, the choice by Python's sort."""
    rows = []
    for token in x.astype(np.float64):
        logits = linear(values, "gate", token)
        scores = logits
        if name == "deepseek":
            scores = sigmoid(logits) + values["gate.e_score_correction_bias"]
            groups = scores.reshape(3, -1)
            kept = np.argsort(-np.sort(groups)[:, -2:].sum(1))[:2]
            scores = np.where(np.isin(np.arange(3), kept)[:, None], groups, -9).ravel()
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:moe.gate.top_k]
        if name == "deepseek":
            weights = sigmoid(logits[chosen]) / sigmoid(logits[chosen]).sum() * 2.5
        elif name == "gated_shared":
            weights = softmax(logits)[chosen]
        else:
            weights = softmax(logits[chosen])
        routed = moe.routed
        y = sum(w * feed_forward(values, f"experts.{e}.", token, routed.swiglu_limit, routed.swiglu_alpha)
                for w, e in zip(weights, chosen, strict=True))
        if moe.shared_experts is not None:
            share = sigmoid(linear(values, "shared_expert_gate", token)) if name == "gated_shared" else 1
            y = y + share * feed_forward(values, "shared_experts.", token)
        rows.append(y)
    return np.array(rows)


def run(moe, strategy, ranks, x):
    shards = sharded(moe, STRATEGIES[strategy](ranks), cpus(ranks))
    return [shard(x) for shard in shards]


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_formula(name):
    moe = MODELS[name]()
    values = fill(moe)
    close(moe(inputs()), by_hand(name, moe, values, inputs()))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MODELS)
def test_shards_sum_to_the_layer(name, ranks, strategy):
    moe = MODELS[name]()
    values = fill(moe)
    before = sharded(moe, STRATEGIES[strategy](ranks), cpus(ranks))  # cut from data that is there
    close(sum(shard(inputs()) for shard in before), by_hand(name, moe, values, inputs()))
    after = sharded(MODELS[name](), STRATEGIES[strategy](ranks), cpus(ranks))  # built empty, then filled
    for shard in after:
        assert [n for n, _ in shard.named_weights()] == list(values)
        shard.load(values)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one(inputs()), other(inputs()))


@pytest.mark.parametrize("ranks, counts", [(2, [3, 2]), (3, [2, 2, 1]), (7, [1, 1, 1, 1, 1, 0, 0])])
def test_expert_parallel_ranks_hold_whole_experts(ranks, counts):
    shards = sharded(mixtral(), ShardingStrategy.expert_parallel(ranks), cpus(ranks))
    elements = 3 * HIDDEN * WIDTH
    held = [sum(np.prod(weight.local_shape) for name, weight in shard.named_weights() if name.startswith("experts"))
            for shard in shards]
    assert held == [count * elements for count in counts]
    assert all(dict(shard.named_weights())["gate.weight"].ranges is None for shard in shards)


def test_tensor_parallel_ranks_hold_a_part_of_every_expert():
    shards = sharded(gpt_oss(), ShardingStrategy.tensor_parallel(3), cpus(3))
    for shard, width in zip(shards, [4, 3, 3], strict=True):
        shapes = {name: weight.local_shape for name, weight in shard.named_weights()}
        assert shapes["experts.4.gate_up_proj.weight"] == (2 * width, HIDDEN)
        assert shapes["experts.4.gate_up_proj.bias"] == (2 * width,)
        assert shapes["experts.4.down_proj.weight"] == (HIDDEN, width)
    assert [s.routed.experts[0].down_proj.bias.local_shape for s in shards] == [(HIDDEN,), (0,), (0,)]


def test_weights_lie_in_one_buffer():
    moe = gpt_oss()
    fill(moe)
    moe(inputs())
    for kind in ("gate_up_proj", "down_proj"):
        for of in ("weight", "bias"):
            data = [getattr(getattr(expert, kind), of).data for expert in moe.routed.experts]
            assert all(part.base is not None and part.base is data[0].base for part in data)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_token_has_the_same_bits_in_every_batch(name, strategy):
    moe = MODELS[name]()
    fill(moe)
    x = inputs(33)
    whole = run(moe, strategy, 3, x)
    order = np.random.default_rng(3).permutation(len(x))
    for rank, permuted in enumerate(run(moe, strategy, 3, x[order])):
        np.testing.assert_array_equal(permuted, whole[rank][order])
    for rows in ([4], [7, 7, 7], list(range(5))):
        for rank, some in enumerate(run(moe, strategy, 3, x[rows])):
            np.testing.assert_array_equal(some, whole[rank][rows])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_no_tokens(name, strategy):
    moe = MODELS[name]()
    fill(moe)
    for y in run(moe, strategy, 4, inputs(0)):
        assert y.shape == (0, HIDDEN)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_tokens_to_one_expert(strategy):
    moe = mixtral(top_k=1)
    values = fill(moe)
    values["gate.weight"][:] = 0  # all tie: the first expert has every token, the others none
    fill(moe, values)
    expected = [feed_forward(values, "experts.0.", token) for token in inputs().astype(np.float64)]
    close(sum(run(moe, strategy, 4, inputs())), np.array(expected))


def test_a_token_without_an_expert_on_a_rank_adds_nothing():
    moe = mixtral(top_k=1)
    values = fill(moe)
    values["gate.weight"][:] = 0
    fill(moe, values)
    first, *others = run(moe, "expert", 4, inputs())
    assert np.abs(first).min() > 0
    for y in others:
        np.testing.assert_array_equal(y, np.zeros_like(y))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16(strategy):
    moe = mixtral(dtype=np.dtype(ml_dtypes.bfloat16))
    values = fill(moe)
    parts = run(moe, strategy, 3, inputs().astype(ml_dtypes.bfloat16))
    assert all(part.dtype == ml_dtypes.bfloat16 for part in parts)
    expected = by_hand("mixtral", moe, values, inputs().astype(ml_dtypes.bfloat16).astype(np.float64))
    close(sum(part.astype(np.float32) for part in parts), expected, 0.05)


def test_the_group_limited_router_does_not_round_its_logits_or_its_bias():
    router = GroupLimitedRouter(HIDDEN, 6, 2, np.dtype(ml_dtypes.bfloat16))
    values = fill(router)
    values["e_score_correction_bias"] = 1 + np.arange(6, dtype=np.float32) / 2**20
    router.load(values)
    np.testing.assert_array_equal(router.e_score_correction_bias.value, values["e_score_correction_bias"])
    x = inputs().astype(ml_dtypes.bfloat16)
    exact = sigmoid(x.astype(np.float64) @ values["weight"].T.astype(np.float64))
    chosen, weights = router(x)
    order = np.argsort(-(exact + values["e_score_correction_bias"]))
    np.testing.assert_array_equal(chosen, order[:, :2])
    scores = np.take_along_axis(exact, chosen, 1)
    np.testing.assert_allclose(weights, scores / scores.sum(1, keepdims=True), rtol=1e-6)


def test_the_setting(monkeypatch):
    monkeypatch.delenv("CUTP_MOE", raising=False)
    assert not mixtral().expert_parallel
    assert mixtral(expert_parallel=True).expert_parallel
    monkeypatch.setenv("CUTP_MOE", "expert")
    assert mixtral().expert_parallel
    assert not mixtral(expert_parallel=False).expert_parallel
    monkeypatch.setenv("CUTP_MOE", "both")
    with pytest.raises(ConfigError, match="CUTP_MOE='both'.*'tensor' nor 'expert'"):
        settings.moe()


@pytest.mark.parametrize("make, message", [
    (lambda: SoftmaxRouter(HIDDEN, 4, 5, F32, renormalize=True), "5 experts a token.*among 4"),
    (lambda: SoftmaxRouter(HIDDEN, 4, 0, F32, renormalize=True), "0 experts a token"),
    (lambda: GroupLimitedRouter(HIDDEN, 6, 2, F32, num_groups=4), "6 experts.*4 equal groups"),
    (lambda: GroupLimitedRouter(HIDDEN, 6, 4, F32, num_groups=3, top_groups=1), "4 experts a token.*among 2"),
    (lambda: Experts(0, HIDDEN, WIDTH, F32), "0 experts"),
    (lambda: Experts(2, HIDDEN, WIDTH, F32, swiglu_alpha=1.7), "swiglu_limit"),
    (lambda: MoE(SoftmaxRouter(HIDDEN, 4, 2, F32, renormalize=True), Experts(5, HIDDEN, WIDTH, F32)), "4 experts.*5"),
    (lambda: MoE(SoftmaxRouter(HIDDEN, 4, 2, F32, renormalize=True), Experts(4, HIDDEN, WIDTH, F32),
                 shared_expert_gate=Linear(HIDDEN, 1, F32)), "without shared_experts"),
])
def test_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_strategy_that_does_not_fit():
    with pytest.raises(ConfigError, match="MoE cannot be sharded by strategy 'rowwise'"):
        mixtral().sharding_strategy = ShardingStrategy.rowwise(2)
