"""Routing: against the formulas in float64, ties, extremes, and independence of the batch."""

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.moe_routing import route_group_limited, route_softmax, route_top_k_softmax

pytestmark = pytest.mark.filterwarnings("error")
F32 = np.float32
ROUTERS = {
    "softmax": lambda logits, k: route_softmax(logits, k, renormalize=False),
    "renormalized": lambda logits, k: route_softmax(logits, k, renormalize=True),
    "top_k_softmax": route_top_k_softmax,
    "sigmoid": lambda logits, k: route_group_limited(logits, None, k),
}


def draw(tokens, experts, seed=0):
    return (2 * np.random.default_rng(seed).standard_normal((tokens, experts))).astype(F32)


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def expected(name, row, k):
    chosen = sorted(range(len(row)), key=lambda e: -row[e])[:k]  # stable: the lower index first
    row = row.astype(np.float64)
    if name == "top_k_softmax":
        return chosen, softmax(row[chosen])
    weights = 1 / (1 + np.exp(-row[chosen])) if name == "sigmoid" else softmax(row)[chosen]
    return chosen, weights if name == "softmax" else weights / weights.sum()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("experts, k", [(1, 1), (4, 2), (7, 7), (40, 1), (128, 8)])
def test_equals_the_formula(name, experts, k):
    logits = draw(11, experts)
    chosen, weights = ROUTERS[name](logits, k)
    assert chosen.dtype == np.int32 and weights.dtype == F32 and chosen.shape == weights.shape == (11, k)
    for row, got, weight in zip(logits, chosen, weights, strict=True):
        want, values = expected(name, row, k)
        assert got.tolist() == want
        np.testing.assert_allclose(weight, values, rtol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_logits_of_16_bits_are_read_exactly_and_weights_are_not_rounded(dtype):
    logits = draw(9, 12).astype(dtype)
    for route in ROUTERS.values():
        for got, want in zip(route(logits, 3), route(logits.astype(F32), 3), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ROUTERS)
def test_ties_go_to_the_lower_index(name):
    for value in (0.0, -3.0, 7.5):
        chosen, weights = ROUTERS[name](np.full((2, 200), value, F32), 5)
        assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 2
        assert (weights == weights[0, 0]).all()
    row = np.array([[1, 2, 0, 2, 1, 2, -0.0]], F32)
    assert ROUTERS[name](row, 6)[0].tolist() == [[1, 3, 5, 0, 4, 2]]
    rows = np.random.default_rng(0).integers(0, 4, (5, 256)).astype(F32)
    assert ROUTERS[name](rows, 100)[0].tolist() == [expected(name, row, 100)[0] for row in rows]


def test_the_choice_compares_logits_not_probabilities():
    # Both probabilities of the small ones underflow to 0, but their logits differ.
    chosen, weights = route_softmax(np.array([[-300, -200, 0]], F32), 2, renormalize=False)
    assert chosen.tolist() == [[2, 1]]
    assert weights.tolist() == [[1, 0]]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("big", [1e4, 3e38])
def test_large_logits(name, big):
    chosen, weights = ROUTERS[name](np.array([[-big, big, 0, big]], F32), 3)
    assert chosen.tolist() == [[1, 3, 2]]
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_numbers_that_are_none_come_last(name):
    nan, inf = np.nan, np.inf
    chosen, _ = ROUTERS[name](np.array([[nan, 1, nan, -1, 0], [nan] * 5, [-inf, nan, -inf, nan, 2]], F32), 4)
    assert chosen.tolist() == [[1, 4, 3, 0], [0, 1, 2, 3], [4, 0, 2, 1]]


@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_has_the_same_bits_in_every_batch(name):
    logits = draw(31, 37)
    chosen, weights = ROUTERS[name](logits, 5)
    order = np.random.default_rng(1).permutation(31)
    for rows in (order, [3], [3, 3], order[:8]):
        some = ROUTERS[name](logits[rows], 5)
        np.testing.assert_array_equal(some[0], chosen[rows])
        np.testing.assert_array_equal(some[1], weights[rows])


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name):
    chosen, weights = ROUTERS[name](np.zeros((0, 6), F32), 2)
    assert chosen.shape == weights.shape == (0, 2)
    assert (chosen.dtype, weights.dtype) == (np.int32, F32)


def by_hand_group_limited(row, bias, k, groups, kept, renormalize, scaling):
    """One token, by DeepseekV3TopkRouter's steps."""
    scores = 1 / (1 + np.exp(-row.astype(np.float64)))
    biased = scores + bias
    size = len(row) // groups
    group_scores = [sum(sorted(biased[g * size:(g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -group_scores[g])[:kept]
    candidates = [e for e in range(len(row)) if e // size in best]
    chosen = sorted(candidates, key=lambda e: -biased[e])[:k]
    weights = scores[chosen]
    if renormalize:
        weights = weights / (weights.sum() + 1e-20)
    return chosen, weights * scaling


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("experts, k, groups, kept", [(8, 2, 1, 1), (8, 3, 4, 2), (12, 6, 2, 1), (256, 8, 8, 4),
                                                      (9, 5, 3, 3), (6, 1, 3, 1)])
def test_group_limited(experts, k, groups, kept, renormalize):
    logits, bias = draw(20, experts), draw(1, experts, 5)[0] / 8
    chosen, weights = route_group_limited(logits, bias, k, num_groups=groups, top_groups=kept, renormalize=renormalize,
                                          scaling=2.5)
    for row, got, weight in zip(logits, chosen, weights, strict=True):
        want, values = by_hand_group_limited(row, bias, k, groups, kept, renormalize, 2.5)
        assert got.tolist() == want
        np.testing.assert_allclose(weight, values, rtol=1e-5)


def test_experts_outside_the_kept_groups_are_never_chosen():
    # All scores of the kept group are far below zero: the others must not be taken as the larger ones.
    bias = np.array([-50, -50, -60, -60, -100, -40], F32)
    chosen, _ = route_group_limited(np.zeros((1, 6), F32), bias, 2, num_groups=3, top_groups=1)
    assert chosen.tolist() == [[0, 1]]


def test_equal_groups_go_to_the_lower():
    chosen, _ = route_group_limited(np.zeros((1, 8), F32), np.zeros(8, F32), 4, num_groups=4, top_groups=2)
    assert chosen.tolist() == [[0, 1, 2, 3]]


def test_a_token_whose_scores_are_all_zero_keeps_finite_weights():
    _, weights = route_group_limited(np.full((1, 4), -200, F32), None, 2)
    assert weights.tolist() == [[0, 0]]


@pytest.mark.parametrize("options, message", [
    (dict(num_groups=4), "6 experts.*1 of 4 equal groups"),
    (dict(num_groups=3, top_groups=4), "4 of 3"),
    (dict(num_groups=3, top_groups=0), "0 of 3"),
    (dict(num_groups=0), "0 equal groups"),
    (dict(num_groups=6, top_groups=3), "groups of 1 expert"),
    (dict(num_groups=3, top_groups=1), "3 experts a token.*among 2"),
])
def test_groups_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        route_group_limited(np.zeros((1, 6), F32), None, 3, **options)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("k", [0, 5])
def test_more_experts_than_there_are(name, k):
    with pytest.raises(ConfigError, match=f"{k} experts a token.*among 4"):
        ROUTERS[name](np.zeros((1, 4), F32), k)
