"""Rows sorted by expert, grouped products and their weighted sum, each against a loop over tokens and experts."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.errors import ConfigError
from cutp.ops.moe import combine_experts, expert_rows, grouped_linear

pytestmark = pytest.mark.filterwarnings("error")
F32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def choose(tokens, k, num_experts, seed=0):
    """Distinct experts of each token."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(num_experts)[:k] for _ in range(tokens)], np.int32).reshape(tokens, k)


def draw(*shape, seed=0, dtype=F32):
    return np.random.default_rng(seed).standard_normal(shape).astype(F32).astype(dtype)


SMALL = st.integers(0, 8)


@given(SMALL, st.integers(1, 4), st.integers(4, 8), SMALL, SMALL, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows(tokens, k, num_experts, first, count, seed):
    count = min(count, num_experts - min(first, num_experts))
    experts = choose(tokens, k, num_experts, seed)
    rows = expert_rows(experts, first, count)
    wanted = [(e, t, j) for e in range(first, first + count) for t in range(tokens) for j in range(k)
              if experts[t, j] == e]
    assert rows.tokens.tolist() == [t for _, t, _ in wanted]
    assert rows.offsets.tolist() == [sum(e < first + i for e, _, _ in wanted) for i in range(count + 1)]
    assert rows.positions.shape == experts.shape
    for t in range(tokens):
        for j in range(k):
            place = (experts[t, j], t, j)
            assert rows.positions[t, j] == (wanted.index(place) if place in wanted else -1)
    assert {part.dtype for part in rows} == {np.dtype(np.int32)}


@pytest.mark.parametrize("dtype", [F32, bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("in_dim, out_dim", [(1, 1), (7, 5), (33, 18), (64, 48)])
def test_grouped_linear(in_dim, out_dim, has_bias, dtype):
    rows = expert_rows(choose(10, 2, 5), 1, 3)
    x, weight = draw(10, in_dim, dtype=dtype), draw(3, out_dim, in_dim, seed=1)
    bias = draw(3, out_dim, seed=2) if has_bias else None
    out = np.zeros((len(rows.tokens), out_dim), dtype)
    assert grouped_linear(x, weight, rows.offsets, bias, tokens=rows.tokens, out=out) is out
    exact = np.zeros(out.shape)
    for i, token in enumerate(rows.tokens):
        expert = np.searchsorted(rows.offsets, i, side="right") - 1
        exact[i] = weight[expert].astype(np.float64) @ x[token].astype(np.float64)
        exact[i] += bias[expert] if has_bias else 0
    np.testing.assert_allclose(out.astype(np.float64), exact, rtol=2**-8 if dtype == bfloat16 else 1e-5, atol=1e-5)
    np.testing.assert_array_equal(grouped_linear(x[rows.tokens], weight, rows.offsets, bias), out)


def test_the_bias_is_added_before_the_one_rounding():
    x, weight = np.ones((1, 2), bfloat16), np.array([[[1, 2**-8]]], F32)
    bias = np.array([[2**-8]], F32)  # 1 + 2^-8 rounds to 1 in bfloat16, 1 + 2^-7 does not
    assert grouped_linear(x, weight, np.array([0, 1]), bias)[0, 0] == 1 + 2**-7


@pytest.mark.parametrize("in_dim, out_dim", [(32, 31), (33, 17), (512, 40)])
def test_a_row_has_the_same_bits_next_to_any_rows(in_dim, out_dim):
    x, weight, bias = draw(70, in_dim), draw(2, out_dim, in_dim, seed=1), draw(2, out_dim, seed=2)
    whole = grouped_linear(x, weight, np.array([0, 5, 70]), bias)
    for start, stop in ((5, 6), (5, 10), (9, 70), (40, 57)):
        part = grouped_linear(x[start:stop], weight, np.array([0, 0, stop - start]), bias)
        np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("dtype", [F32, bfloat16])
def test_combine(dtype):
    experts, weights = choose(8, 3, 6), np.abs(draw(8, 3, seed=3))
    rows = expert_rows(experts, 2, 3)
    y = draw(len(rows.tokens), 9, dtype=dtype)
    out = np.zeros((8, 9), dtype)
    assert combine_experts(y, rows.positions, weights, out=out) is out
    for t in range(8):
        total = np.zeros(9, F32)
        for j in range(3):
            if 2 <= experts[t, j] < 5:
                total = total + weights[t, j] * y[rows.positions[t, j]].astype(F32)
        np.testing.assert_array_equal(out[t], total.astype(dtype))


def test_slots_are_added_in_order_and_rounded_once():
    # In float32: (1 + 2^-24) + 2^-24 = 1, while 1 + (2^-24 + 2^-24) is not.
    y = np.array([[1], [2**-24], [2**-24]], F32)
    ones = np.ones((1, 3), F32)
    for order, total in (([0, 1, 2], 1), ([1, 2, 0], 1 + 2**-23)):
        assert combine_experts(y, np.array([order], np.int32), ones)[0, 0] == np.float32(total)
    # In bfloat16 every partial sum would round to 1.
    y = np.array([[1], [2**-8], [2**-8]], bfloat16)
    assert combine_experts(y, np.array([[0, 1, 2]], np.int32), ones)[0, 0] == 1 + 2**-7


def test_nothing_on_this_rank():
    rows = expert_rows(choose(3, 2, 4), 4, 0)
    y = grouped_linear(draw(3, 5), np.zeros((0, 6, 5), F32), rows.offsets, tokens=rows.tokens)
    assert y.shape == (0, 6)
    np.testing.assert_array_equal(combine_experts(y, rows.positions, np.ones((3, 2), F32)), np.zeros((3, 6)))


def test_no_tokens():
    rows = expert_rows(np.zeros((0, 2), np.int32), 0, 4)
    assert rows.offsets.tolist() == [0] * 5 and rows.positions.shape == (0, 2)
    y = grouped_linear(draw(0, 5), draw(4, 6, 5), rows.offsets, draw(4, 6), tokens=rows.tokens)
    assert combine_experts(y, rows.positions, np.zeros((0, 2), F32)).shape == (0, 6)


@pytest.mark.parametrize("in_dim, offsets", [(6, [0, 1, 2]), (5, [0, 2])])
def test_sizes_that_do_not_fit(in_dim, offsets):
    with pytest.raises(ConfigError, match="2 experts with matrices of 4 x 5"):
        grouped_linear(draw(2, in_dim), draw(2, 4, 5), np.array(offsets))
