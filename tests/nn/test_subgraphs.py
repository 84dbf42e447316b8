"""Groups of layers that share a body: what is refused, the default, the runs, and that results stay the same."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp import nn
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.subgraphs import LayerRun, plan_layer_runs
from tests.nn.building import cpus, fill
from tests.nn.decoder import Spec, build, forward

float32 = np.dtype(np.float32)
SPEC = Spec(layers=5)


def layers(spec=SPEC, n=1):
    return build(spec, cpus(n)).layers


def mixed(second, n=1, first=SPEC):
    """A layer of each of two models."""
    return [layers(first, n)[0], layers(second, n)[0]]


def covered(runs):
    return [index for run in runs for index in range(run.start, run.stop)]


@pytest.mark.parametrize("groups, message", [
    ([[]], "group 0 is empty"),
    ([[0, 1], []], "group 1 is empty"),
    ([[0, 5]], r"group 0 names layer 5; the layers are 0 \.\. 4"),
    ([[1], [-1]], r"group 1 names layer -1; the layers are 0 \.\. 4"),
    ([[0, 1], [2, 1]], "layer 1 is in subgraph groups 0 and 1"),
    ([[3, 3]], "layer 3 is in subgraph groups 0 and 0"),
    ([[True, 2]], "group 0 names layer True"),
    ([["0"]], "group 0 names layer '0'"),
    (["01"], "group 0 names layer '0'"),
    ([[1.0]], r"group 0 names layer 1\.0"),
    ([[None]], "group 0 names layer None"),
    ([0, 1], "group 0 is 0, not a list"),
])
@pytest.mark.parametrize("use_subgraphs", [True, False])
def test_groups_that_cannot_be(groups, message, use_subgraphs):
    with pytest.raises(ConfigError, match=message):
        plan_layer_runs(layers(), use_subgraphs, groups)
    with pytest.raises(ConfigError, match=message):
        build(SPEC, cpus(2), use_subgraphs=use_subgraphs, subgraph_layer_groups=groups)


MIXED = {
    "width of the mlp": (dict(width=10), r"mlp\.gate_proj\.weight is float32\[11, 10\] in layer 0 and "
                                         r"float32\[10, 10\] in layer 1"),
    "heads": (dict(heads=4), r"q_proj\.weight is float32\[24, 10\].*float32\[16, 10\]"),
    "key-value heads": (dict(kv_heads=3), r"k_proj\.weight is float32\[8, 10\].*float32\[12, 10\]|q_proj\.out_dim is"),
    "the same size, other heads": (dict(heads=12, kv_heads=4, head_dim=2), r"(head_dim|n_heads|q_proj\.out_dim) is"),
    "bias": (dict(bias=True), r"q_proj\.bias is"),
    "output bias": (dict(output_bias=True), r"o_proj\.bias is None in layer 0 and float32\[10\] in layer 1"),
    "query norm": (dict(qk_norm="head"), "q_norm"),
    "norm over the projection": (dict(qk_norm="projection"), "q_norm|norm_over_projection"),
    "fused weights": (dict(fused=True), r"mlp\.gate_up_proj|q_proj"),
    "norms after the branches": (dict(norms="post"), "post_mlp_layernorm|input_layernorm"),
    "norms on both sides": (dict(norms="both"), "post_mlp_layernorm|post_self_attn_layernorm"),
    "parallel branches": (dict(norms="parallel"), "parallel is False in layer 0 and True|post_attention_layernorm"),
    "sinks": (dict(sinks=True), r"sinks is None in layer 0 and float32\[6\] in layer 1"),
    "window": (dict(window=(4,)), "window is None in layer 0 and 4 in layer 1"),
    "scale": (dict(scale=0.25), r"scale is 0\.5 in layer 0 and 0\.25 in layer 1"),
    "soft-cap": (dict(softcap=2.0), r"softcap is None in layer 0 and 2\.0"),
    "clip": (dict(clip=2.0), r"clip_qkv is None in layer 0 and 2\.0"),
    "no positions": (dict(rotary=("none",)), r"rope is \(.* in layer 0 and None in layer 1"),
    "rotary layout": (dict(rotary=("interleaved",)), r"rope is \(.*False.*True"),
    "norm": (dict(layer_norm=True), "input_layernorm"),
    "offset of the norm": (dict(norm_offset=1.0), r"input_layernorm\.weight_offset is 0\.0 in layer 0 and 1\.0"),
    "swiglu limit": (dict(swiglu_limit=1.0), r"swiglu_limit is None in layer 0 and 1\.0"),
    "residual multiplier": (dict(residual_multiplier=0.5), r"residual_multiplier is 1\.0 in layer 0 and 0\.5"),
    "overlap": (dict(overlap=True), "overlap_o_proj is False in layer 0 and True in layer 1"),
}


@pytest.mark.parametrize("n", (1, 2, 4))
@pytest.mark.parametrize("change, message", MIXED.values(), ids=MIXED)
def test_mixed_layers_are_refused(change, message, n):
    """On every number of devices, also where the shards of one device happen to be alike."""
    both = mixed(replace(SPEC, **change), n)
    for pair in (both, both[::-1]):
        with pytest.raises(ConfigError, match="subgraph group 0 mixes layers.*different groups"):
            plan_layer_runs(pair, True, [[0, 1]])
    with pytest.raises(ConfigError, match=message):
        plan_layer_runs(both, True, [[0, 1]])
    assert plan_layer_runs(both, True, [[1], [0]]) == [LayerRun(0, 1, 1), LayerRun(1, 2, 0)]
    assert plan_layer_runs(both, True) == [LayerRun(0, 1, 0), LayerRun(1, 2, 1)]


@pytest.mark.parametrize("change", [dict(theta=7.0), dict(parameters=RopeParameters("linear", factor=2.0)),
                                    dict(rotary_dim=2)], ids=str)
def test_other_frequencies_are_another_body(change):
    def block(**kwargs):
        rope = nn.RotaryEmbedding(4, **dict(max_seq_len=8) | kwargs)
        attention = nn.AttentionWithRope(6, 2, 2, 4, float32, rope)
        return nn.DistributedTransformerBlock(nn.TensorParallelAttentionWithRope(attention, cpus(1)),
                                              nn.MLP(6, 4, float32), nn.RMSNorm(6, float32), nn.RMSNorm(6, float32),
                                              cpus(1))

    with pytest.raises(ConfigError, match="rope is"):
        plan_layer_runs([block(), block(**change)], True, [[0, 1]])
    # Two embeddings that compute the same are no difference.
    assert plan_layer_runs([block(**change), block(**change)], True) == [LayerRun(0, 2, 0)]


def test_all_ranks_find_the_same_fault():
    """Four ranks hold 3, 3, 3, 2 and 3, 3, 2, 2 rows: alike on most of them, refused on all."""
    def rank_main(comm):
        pair = [build(replace(SPEC, width=width), comm).layers[0] for width in (11, 10)]
        with pytest.raises(ConfigError, match="mixes layers") as error:
            plan_layer_runs(pair, True, [[0, 1]])
        return str(error.value)

    assert len(set(run_threads(4, rank_main, timeout=20))) == 1


def test_another_class_is_another_body():
    class OtherNorm(nn.RMSNorm):
        def __call__(self, x):
            return super().__call__(x) + 1

    both = layers()[:2]
    both[1].input_layernorm = nn.module.sharded(OtherNorm(10, float32, 1e-3), nn.ShardingStrategy.replicate(1), cpus(1))
    with pytest.raises(ConfigError, match="input_layernorm.class is RMSNorm in layer 0 and .*OtherNorm in layer 1"):
        plan_layer_runs(both, True, [[0, 1]])


def test_a_layer_that_is_loaded_is_like_one_that_is_not():
    both = layers()[:2]
    fill(both[0])
    assert plan_layer_runs(both, True) == [LayerRun(0, 2, 0)]


def test_defaults():
    alike, window = layers(), layers(replace(SPEC, window=(3, None)))
    assert plan_layer_runs(alike) == [LayerRun(0, 5, None)]
    assert plan_layer_runs(alike, False, [[0, 1]]) == [LayerRun(0, 5, None)]
    assert plan_layer_runs(alike, True) == [LayerRun(0, 5, 0)]
    assert plan_layer_runs(alike, True, []) == [LayerRun(0, 5, None)]
    assert plan_layer_runs(window, True) == [LayerRun(i, i + 1, i % 2) for i in range(5)]
    assert plan_layer_runs([], True) == []
    assert build(SPEC, cpus(1)).layer_runs == [LayerRun(0, 5, None)]


def test_layers_in_no_group_run_by_themselves():
    runs = plan_layer_runs(layers(), True, [[4, 3], (0,)])
    assert runs == [LayerRun(0, 1, 1), LayerRun(1, 3, None), LayerRun(3, 5, 0)]


@st.composite
def groupings(draw, num_layers=5):
    """Disjoint groups of some of the layers."""
    owners = draw(st.lists(st.integers(-1, 2), min_size=num_layers, max_size=num_layers))
    groups = [[i for i, owner in enumerate(owners) if owner == number] for number in range(3)]
    return draw(st.permutations([draw(st.permutations(group)) for group in groups if group]))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(groupings())
def test_runs_cover_every_layer_once_and_keep_to_their_group(groups):
    runs = plan_layer_runs(layers(), True, groups)
    assert covered(runs) == list(range(5))
    owner = {index: number for number, group in enumerate(groups) for index in group}
    for run in runs:
        assert run.start < run.stop
        assert {owner.get(index) for index in range(run.start, run.stop)} == {run.group}
    assert all(a.group != b.group for a, b in zip(runs, runs[1:], strict=False))


@pytest.mark.parametrize("n", (1, 2, 3))
def test_results_do_not_depend_on_groups(n):
    plain = build(SPEC, cpus(n))
    values = fill(plain)
    (expected,) = forward(plain)

    @settings(max_examples=12, derandomize=True, deadline=None)
    @given(groupings())
    def same_bits(groups):
        for chosen in (groups, None):
            model = build(SPEC, cpus(n), use_subgraphs=True, subgraph_layer_groups=chosen)
            fill(model, values)
            np.testing.assert_array_equal(forward(model)[0], expected)

    same_bits()
    for got in run_threads(n, lambda comm: _grouped(comm, values), timeout=20):
        np.testing.assert_array_equal(got, expected)


def _grouped(comm, values):
    model = build(SPEC, comm, use_subgraphs=True, subgraph_layer_groups=[[3, 0, 4]])
    fill(model, values)
    return forward(model)[0]
