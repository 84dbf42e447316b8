"""A block with other norms than Llama's, or with both branches side by side: values, sums over ranks, errors."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cutp import nn
from cutp.comm.device_group import DeviceGroup
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.kv_cache import KVCacheParams, allocate_caches
from tests.nn.building import close, cpus, fill
from tests.nn.decoder import OTHERWISE, Spec, all_by_hand, build, ends, forward, results

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
KINDS = ("pre", "post", "both", "parallel")


def attention(group, **options):
    return nn.TensorParallelAttentionWithRope(nn.AttentionWithRope(6, 3, 1, 2, float32, None, **options), group)


def norm():
    return nn.RMSNorm(6, float32)


@pytest.mark.parametrize("n", (1, 2, 3, 4))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [Spec(layers=2), OTHERWISE, replace(OTHERWISE, heads=5, kv_heads=1, head_dim=2)],
                         ids=["plain", "otherwise", "5 heads, 1 key-value head"])
def test_equals_float64(spec, kind, n):
    spec = replace(spec, norms=kind)
    (last,), values = results(spec, cpus(n))
    close(last, all_by_hand(values, spec).logits[ends()], 2e-4)
    others = {name: array for name, array in values.items() if "layernorm" not in name}
    for other in KINDS:
        names = {name for name, _ in build(replace(spec, norms=other), cpus(1)).named_weights()}
        missing = {name: np.ones(spec.hidden, np.float32) for name in names - set(others)}
        if other != kind:
            difference = all_by_hand(others | missing, replace(spec, norms=other)).logits[ends()] - last
            assert abs(difference).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_have_the_bits_of_devices_of_one_process(kind):
    spec = replace(OTHERWISE, norms=kind, heads=5, kv_heads=1)
    (alone,), values = results(spec, cpus(3))
    for (got,), _ in run_threads(3, lambda comm: results(spec, comm, values=values), timeout=20):
        np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("kind", ("post", "both", "parallel"))
@pytest.mark.parametrize("n", (1, 3))
def test_overlapped_sums_change_nothing(kind, n):
    prompts = [np.arange(70) % 13, [4]]
    spec = replace(OTHERWISE, norms=kind, overlap=True)
    (overlapped,), values = results(spec, cpus(n), prompts=prompts)
    close(overlapped, all_by_hand(values, spec, prompts).logits[ends(prompts)], 2e-4)


class Counting(DeviceGroup):
    """Notes the shapes that are summed."""

    def __init__(self, n):
        super().__init__(cpus(n))
        self.sums, self.started = [], []

    def all_reduce(self, xs):
        self.sums.append((xs[0].shape, xs[0].dtype.name))
        return super().all_reduce(xs)

    def all_reduce_async(self, xs, **options):
        self.started.append(len(xs[0]))
        return super().all_reduce_async(xs, **options)


def run_block(group, rows, **options):
    config = options.pop("config", None)
    block = nn.DistributedTransformerBlock(
        nn.TensorParallelAttentionWithRope(
            nn.AttentionWithRope(6, 3, 1, 2, float32, None, qk_norm_eps=1e-5,
                                 qk_norm_over_projection=options.pop("over_projection", False)), group, config),
        nn.MLP(6, 5, float32), norm(), None if options.get("parallel") else norm(), group, config, **options)
    fill(block)
    caches = allocate_caches(KVCacheParams(float32, 3, 1, 2, 1, page_size=8), 30, group)
    return block(0, [np.ones((rows, 6), np.float32)] * group.size, caches, nn.RaggedBatch.of([[0] * rows], 8))


def test_a_parallel_block_sums_once():
    whole = ((5, 6), "float32")
    for options, expected in (({}, [whole] * 2), (dict(parallel=True), [whole]),
                              (dict(parallel=True, over_projection=True), [((5, 2), "float32"), whole])):
        group = Counting(2)
        run_block(group, 5, **options)
        assert group.sums == expected


@pytest.mark.parametrize("parallel", [False, True])
def test_a_parallel_block_overlaps_its_sum(parallel):
    group = Counting(2)
    run_block(group, 200, parallel=parallel, config=nn.DistributedGemmConfig(True))
    assert group.started == [50] * (4 if parallel else 8)


def test_names():
    block = nn.DistributedTransformerBlock(attention(cpus(1)), nn.MLP(6, 4, float32), norm(), norm(), cpus(1),
                                           post_attention_norm=norm(), post_mlp_norm=norm())
    names = [name for name, _ in block.named_weights() if "norm" in name]
    assert names == [f"{name}.weight" for name in ("input_layernorm", "post_self_attn_layernorm",
                                                   "post_attention_layernorm", "post_mlp_layernorm")]
    bare = nn.DistributedTransformerBlock(attention(cpus(1)), nn.MLP(6, 4, float32), None, None, cpus(1))
    assert not any("norm" in name for name, _ in bare.named_weights())


@pytest.mark.parametrize("extra", ["mlp_norm", "post_attention_norm", "post_mlp_norm"])
def test_a_parallel_block_has_one_norm(extra):
    norms = {"mlp_norm": None, extra: norm()}
    with pytest.raises(ConfigError, match="no norm but attention_norm"):
        nn.DistributedTransformerBlock(attention(cpus(2)), nn.MLP(6, 4, float32), norm(), norms.pop("mlp_norm"),
                                       cpus(2), parallel=True, **norms)


def test_a_parallel_block_takes_the_parts_of_its_attention():
    class Other(nn.Module):
        def __call__(self, layer_idx, xs, caches, batch):
            return xs

    nn.DistributedTransformerBlock(Other(), nn.MLP(6, 4, float32), norm(), norm(), cpus(2))
    with pytest.raises(ConfigError, match="needs a TensorParallelAttentionWithRope, not a Other"):
        nn.DistributedTransformerBlock(Other(), nn.MLP(6, 4, float32), norm(), None, cpus(2), parallel=True)


@pytest.mark.parametrize("wish, kind", [(True, "expert_parallel"), (False, "tensor_parallel"),
                                        (None, "tensor_parallel")])
def test_a_module_may_ask_for_whole_experts(wish, kind):
    class Experts(nn.MLP):
        def _accepts(self, strategy):
            return strategy.kind == kind

        def _shard(self, strategy, rank):
            return super()._shard(nn.ShardingStrategy.tensor_parallel(strategy.num_devices), rank)

    mlp = Experts(6, 4, float32)
    if wish is not None:
        mlp.expert_parallel = wish
    nn.DistributedTransformerBlock(attention(cpus(2)), mlp, norm(), norm(), cpus(2))
    assert mlp.sharding_strategy.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_bfloat16(kind):
    spec = replace(OTHERWISE, norms=kind, dtype=bfloat16, layers=1)
    model = build(spec, cpus(2))
    values = fill(model)
    assert np.abs(forward(model)[0] - all_by_hand(values, spec).logits[ends()]).max() < 0.15
    group = model.group
    caches = allocate_caches(model.kv_params, 4, group)
    assert all(h.dtype == bfloat16 for h in model.hidden_states(nn.RaggedBatch.of([[3, 1, 4]], 3), caches))


def test_a_norm_comes_after_the_sum_of_its_branch():
    """The norm of a sum is not the sum of norms: with two ranks of opposite parts the result is zero, not noise."""
    class Opposite:
        sharding_strategy = None

        def shard(self, devices):
            return [lambda x: x, lambda x: -x]

        def __call__(self, x):
            raise AssertionError("not divided")

    block = nn.DistributedTransformerBlock(attention(cpus(2)), Opposite(), None, None, cpus(2), post_mlp_norm=norm())
    fill(block)
    block.self_attn = lambda layer_idx, xs, caches, batch: [np.zeros_like(x) for x in xs]
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    for y in block(0, [x, x], [None, None], None):
        np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("before_cast", [True, False])
def test_norms_of_queries_and_keys_have_the_options_of_a_norm(before_cast):
    layer = nn.AttentionWithRope(6, 2, 1, 8, bfloat16, None, qk_norm_eps=1e-3, qk_norm_offset=1.0,
                                 qk_norm_multiply_before_cast=before_cast)
    values = fill(layer)
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32).astype(bfloat16)
    for name, given in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
        same, other = (nn.RMSNorm(8, bfloat16, 1e-3, 1.0, flag) for flag in (before_cast, not before_cast))
        for one in (same, other):
            one.load({"weight": values[f"{name}.weight"]})
        np.testing.assert_array_equal(given(x), same(x))
        assert (given(x) != other(x)).any()
