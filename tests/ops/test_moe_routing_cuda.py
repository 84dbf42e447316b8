"""moe_routing.cu against ops/moe_routing.py, in the emulation and on a GPU."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops import moe_routing as reference
from cutp.ops.moe_routing_cuda import route_group_limited, route_softmax, route_top_k_softmax
from tests.ops.kernel_results import DTYPES, ORDER_SEEDS, bfloat16, emulated_only, float32, gpu_only

# Tokens, experts, chosen: one expert, whole and broken lanes, all experts, the most that can be.
SHAPES = [(1, 1, 1), (5, 7, 7), (9, 8, 2), (4, 31, 3), (3, 33, 6), (6, 128, 8), (7, 160, 6), (2, 512, 32), (0, 8, 2)]
# The same of groups and groups kept.
GROUPED = [(5, 8, 2, 1, 1), (6, 160, 6, 8, 3), (3, 256, 8, 8, 4), (4, 18, 4, 9, 2), (2, 64, 32, 32, 16),
           (3, 512, 32, 2, 1), (3, 30, 5, 3, 3), (0, 16, 2, 4, 2)]

RULES = {
    "softmax": (reference.route_softmax, route_softmax, {"renormalize": False}),
    "renormalized softmax": (reference.route_softmax, route_softmax, {"renormalize": True}),
    "top-k softmax": (reference.route_top_k_softmax, route_top_k_softmax, {}),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(device, tokens, top_k):
    return {"experts": device.poisoned((tokens, top_k), np.int32),
            "weights": device.poisoned((tokens, top_k), np.float32)}


def run(device, kernel, logits, top_k, slots=None, pdl=False, **options):
    out = outputs(device, len(logits), top_k)
    kernel(device.array(logits), top_k, slots=None if slots is None else device.array(slots), pdl=pdl, **out, **options)
    return device.numpy(out["experts"]), device.numpy(out["weights"])


def run_grouped(device, logits, bias, top_k, **options):
    bias = None if bias is None else device.array(bias)
    return run(device, lambda x, k, **more: route_group_limited(x, bias, k, **more), logits, top_k, **options)


def all_rules(device, count):
    """Each rule as a function of logits of so many experts, a multiple of 4, and of how many are chosen."""
    for _, kernel, options in RULES.values():
        yield partial(run, device, kernel, **options)
    bias = normal(7, count)
    yield lambda logits, top_k, **more: run_grouped(device, logits, bias, top_k, num_groups=4, top_groups=2, **more)


def assert_routed(got, expected, err_msg=""):
    """The same experts; weights up to the last bits of exp and of a sum."""
    np.testing.assert_array_equal(got[0], expected[0], err_msg=err_msg)
    assert got[0].dtype == np.int32 and got[1].dtype == float32
    np.testing.assert_allclose(got[1], expected[1], rtol=3e-6, atol=1e-36, err_msg=err_msg)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("rule", RULES)
def test_shapes(device, rule, dtype):
    numpy_rule, kernel, options = RULES[rule]
    for tokens, count, top_k in SHAPES:
        logits = (3 * normal(count, tokens, count)).astype(dtype)
        expected = numpy_rule(logits, top_k, **options)
        assert_routed(run(device, kernel, logits, top_k, **options), expected, f"{tokens} {count} {top_k}")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_groups(device, renormalize, with_bias):
    for tokens, count, top_k, groups, kept in GROUPED:
        logits, bias = 2 * normal(count, tokens, count), normal(7, count) if with_bias else None
        options = {"num_groups": groups, "top_groups": kept, "renormalize": renormalize, "scaling": 2.5}
        expected = reference.route_group_limited(logits, bias, top_k, **options)
        got = run_grouped(device, logits, bias, top_k, **options)
        assert_routed(got, expected, f"{tokens} {count} {top_k} {groups} {kept}")


def test_weights_equal_float64(device):
    logits = 4 * normal(1, 20, 100)
    exact = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    experts, weights = run(device, route_softmax, logits, 5, renormalize=False)
    chosen = np.take_along_axis(exact, experts, 1)
    np.testing.assert_allclose(weights, chosen / exact.sum(1, keepdims=True), rtol=2e-6)
    for kernel, options in ((route_softmax, {"renormalize": True}), (route_top_k_softmax, {})):
        _, weights = run(device, kernel, logits, 5, **options)
        np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True), rtol=2e-6)
    experts, weights = run_grouped(device, logits, None, 5, renormalize=False, scaling=1.5)
    scores = 1.5 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(weights, np.take_along_axis(scores, experts, 1), rtol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_equal_logits_go_to_the_lower_expert(device, rule):
    numpy_rule, kernel, options = RULES[rule]
    rng = np.random.default_rng(3)
    few = rng.integers(-1, 2, (8, 70)).astype(np.float32)
    zeros = np.where(rng.random((4, 70)) < 0.5, np.float32(0.0), np.float32(-0.0))  # which are equal
    logits = np.concatenate([few, zeros])
    for top_k in (1, 6, 32):
        got = run(device, kernel, logits, top_k, **options)
        assert_routed(got, numpy_rule(logits, top_k, **options))
        np.testing.assert_array_equal(got[0][-1], np.arange(top_k))


def test_equal_scores_and_groups_go_to_the_lower_one(device):
    rng = np.random.default_rng(4)
    # Large ones differ, but their sigmoids are all 1.
    for logits in (rng.integers(-2, 3, (9, 48)).astype(np.float32), rng.integers(20, 90, (3, 48)).astype(np.float32),
                   np.zeros((1, 48), np.float32)):
        for options in ({}, {"num_groups": 8, "top_groups": 3}, {"num_groups": 24, "top_groups": 7}):
            got = run_grouped(device, logits, None, 5, **options)
            assert_routed(got, reference.route_group_limited(logits, None, 5, **options))


def test_a_group_counts_its_two_best(device):
    # The best expert is alone in its group, which loses: 0.9 + 0.1 against 0.6 + 0.6.
    scores = np.array([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1]], np.float32)
    logits = np.log(scores / (1 - scores))
    experts, weights = run_grouped(device, logits, None, 2, num_groups=2, top_groups=1, renormalize=False)
    np.testing.assert_array_equal(experts, [[3, 4]])
    np.testing.assert_allclose(weights, [[0.6, 0.6]], rtol=1e-6)
    # The bias has a say in both choices, and none in the weights; three equal ones count no more than two.
    bias = np.array([0, 0.25, 0, 0, 0, 0], np.float32)
    experts, weights = run_grouped(device, logits, bias, 2, num_groups=2, top_groups=1, renormalize=False)
    np.testing.assert_array_equal(experts, [[0, 1]])
    np.testing.assert_allclose(weights, [[0.9, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite(device, rule):
    numpy_rule, kernel, options = RULES[rule]
    logits = normal(5, 8, 40)
    logits[0, 3] = np.nan
    logits[1] = np.nan
    logits[2, 7] = np.inf
    logits[3, 5] = -np.inf
    logits[4] = -np.inf
    logits[5, :38] = np.nan
    logits[6, :38], logits[6, 38:] = -np.inf, np.nan
    for top_k in (4, 30):
        with np.errstate(invalid="ignore"):
            expected = numpy_rule(logits, top_k, **options)
        assert_routed(run(device, kernel, logits, top_k, **options), expected)


def test_what_is_not_finite_in_groups(device):
    logits, bias = normal(6, 6, 32), normal(7, 32)
    logits[0, 3] = np.nan
    logits[1] = np.nan
    logits[2, :30] = np.nan
    logits[3, 5], logits[3, 9] = np.inf, -np.inf
    bias[4], bias[12] = np.nan, -np.inf
    for options in ({"num_groups": 4, "top_groups": 2}, {"num_groups": 4, "top_groups": 4}, {}):
        for top_k in (3, 16):
            expected = reference.route_group_limited(logits, bias, top_k, **options)
            got = run_grouped(device, logits, bias, top_k, **options)
            assert_routed(got, expected)
            assert all(len(set(row)) == top_k for row in got[0].tolist())


def test_padding_chooses_nothing(device):
    logits = normal(8, 11, 24)
    slots = np.arange(11, dtype=np.int64)
    padding = np.array([1, 4, 5, 10])
    slots[padding] = [-1, -7, -(2**40), -1]
    slots[3] = 2**40
    used = np.delete(np.arange(11), padding)
    for route in all_rules(device, 24):
        whole, (experts, weights) = route(logits, 3), route(logits, 3, slots=slots)
        assert (experts[padding] == -1).all() and (weights[padding] == 0).all()
        np.testing.assert_array_equal(experts[used], whole[0][used])
        np.testing.assert_array_equal(weights[used], whole[1][used])


def test_a_token_depends_on_nothing_but_itself(device):
    logits = normal(10, 9, 96)
    for route in all_rules(device, 96):
        whole = route(logits, 6)
        for rows in (slice(0, 1), slice(8, 9), slice(2, 7), slice(None, None, -1)):
            for got, expected in zip(route(logits[rows], 6), whole, strict=True):
                np.testing.assert_array_equal(got, expected[rows])


def test_programmatic_launch_and_order_of_threads(device):
    logits = normal(12, 6, 64)
    for route in all_rules(device, 64):
        whole = route(logits, 6)
        results = [route(logits, 6, pdl=True)]
        if device.emulated:
            from tests.emulation.emulator import EmulatorBackend

            for seed in ORDER_SEEDS:
                with use_backend(EmulatorBackend(order_seed=seed)):
                    results.append(route(logits, 6))
        for got in results:
            np.testing.assert_array_equal(got[0], whole[0])
            np.testing.assert_array_equal(got[1], whole[1])


@gpu_only
def test_many_tokens(device):
    logits, bias = normal(14, 5000, 256), normal(15, 256) / 8
    for numpy_rule, kernel, options in RULES.values():
        assert_routed(run(device, kernel, logits.astype(bfloat16), 8, **options),
                      numpy_rule(logits.astype(bfloat16), 8, **options))
    options = {"num_groups": 8, "top_groups": 4, "scaling": 2.5}
    experts, weights = run_grouped(device, logits, bias, 8, **options)
    expected = reference.route_group_limited(logits, bias, 8, **options)
    # Where two scores differ by a last bit of exp, either choice is right.
    same = (experts == expected[0]).all(1)
    assert same.mean() > 0.999
    np.testing.assert_allclose(weights[same], expected[1][same], rtol=3e-6)


@emulated_only
def test_bad_arguments(device):
    def refused(message, *, logits=None, top_k=2, kernel=route_top_k_softmax, **options):
        logits = np.zeros((3, 8), np.float32) if logits is None else logits
        out = outputs(device, 3, top_k) | {key: options.pop(key) for key in ("experts", "weights") if key in options}
        with pytest.raises(ConfigError, match=message):
            kernel(logits, top_k, **out, **options)

    def grouped(logits, top_k, correction_bias=None, **options):
        route_group_limited(logits, correction_bias, top_k, **options)

    refused("logits has dtype int32", logits=np.zeros((3, 8), np.int32))
    refused("logits has shape", logits=np.zeros(8, np.float32))
    refused("logits .*not contiguous", logits=np.zeros((3, 16), np.float32)[:, ::2])
    refused("9 experts a token cannot be chosen among 8", top_k=9)
    refused("0 experts a token", top_k=0)
    refused("2 of 513 experts; at most 32 of 512", logits=np.zeros((3, 513), np.float32))
    refused("33 of 40 experts; at most 32 of 512", logits=np.zeros((3, 40), np.float32), top_k=33)
    refused("slots has dtype int32", slots=np.zeros(3, np.int32))
    refused("slots has shape", slots=np.zeros(4, np.int64))
    refused("experts has dtype int64", experts=np.zeros((3, 2), np.int64))
    refused("experts has shape", experts=np.zeros((2, 3), np.int32))
    refused("weights has dtype bfloat16", weights=np.zeros((3, 2), ml_dtypes.bfloat16))
    refused("cannot be routed to 1 of 3 equal groups", kernel=grouped, num_groups=3)
    refused("3 experts a token cannot be chosen among 2", kernel=grouped, num_groups=4, top_k=3)
    refused("64 groups; at most 32", kernel=grouped, logits=np.zeros((3, 128), np.float32), num_groups=64,
            top_groups=64)
    refused("correction_bias has dtype bfloat16", kernel=grouped, correction_bias=np.zeros(8, ml_dtypes.bfloat16))
    refused("correction_bias has shape", kernel=grouped, correction_bias=np.zeros(9, np.float32))
    refused("logits has shape", kernel=grouped, logits=np.zeros(8, np.float32))
