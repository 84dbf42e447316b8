"""RMS and layer normalisation against float64, and where their values are rounded."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops.rms_norm import layer_norm, rms_norm, square_sum

pytestmark = pytest.mark.filterwarnings("error")
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def random_rows(seed, rows, dim, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dim)) * 10.0 ** rng.uniform(-3, 3, (rows, 1))
    return x.astype(np.float32).astype(dtype), (1 + 0.3 * rng.standard_normal(dim)).astype(np.float32).astype(dtype)


def rms_reference(x, weight, eps, offset=0.0):
    y = np.empty(x.shape)
    for t, row in enumerate(x.astype(np.float64)):
        rms = math.sqrt(sum(v * v for v in row) / len(row) + eps)
        for i, v in enumerate(row):
            y[t, i] = v / rms * (float(weight[i]) + offset)
    return y


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([0.0, 1e-6, 1e-5, 0.1]), st.sampled_from([0.0, 1.0]),
       st.booleans(), st.integers(0, 2**32 - 1))
def test_rms_norm_equals_float64(rows, dim, eps, offset, multiply_before_cast, seed):
    x, weight = random_rows(seed, rows, dim)
    out = np.full(x.shape, np.nan, np.float32)
    got = rms_norm(x, weight, eps, weight_offset=offset, multiply_before_cast=multiply_before_cast, out=out)
    assert got is out
    np.testing.assert_allclose(out, rms_reference(x, weight, eps, offset), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [bfloat16, np.dtype(np.float16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_rounds_twice_in_llama_order_and_once_in_gemma_order(dtype, offset):
    x, weight = random_rows(3, 60, 24, dtype)
    ones = np.ones(24)
    normalised = rms_reference(x, ones, 1e-5).astype(np.float32)
    scale = weight.astype(np.float64) + offset
    twice = (normalised.astype(dtype).astype(np.float64) * scale).astype(np.float32).astype(dtype)
    once = rms_reference(x, weight, 1e-5, offset).astype(np.float32).astype(dtype)
    assert (twice != once).mean() > 0.05  # the order can be told from the result
    for order, expected in ((False, twice), (True, once)):
        y = rms_norm(x, weight, 1e-5, weight_offset=offset, multiply_before_cast=order)
        assert y.dtype == dtype
        # A float32 value next to a rounding border may fall on the other side than the float64 one.
        assert (y != expected).mean() < 0.005


def test_rms_norm_over_heads():
    x, weight = random_rows(5, 12, 8)
    y = rms_norm(x.reshape(3, 4, 8), weight, 1e-6)
    np.testing.assert_allclose(y.reshape(12, 8), rms_reference(x, weight, 1e-6), rtol=2e-6, atol=1e-6)


def test_rms_norm_of_16_bit_values_does_not_overflow():
    x = np.full((1, 4), 60000, np.float16)
    np.testing.assert_array_equal(rms_norm(x, np.ones(4, np.float16), 1e-6), np.ones((1, 4)))


@pytest.mark.parametrize("norm", [lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: layer_norm(x, w, w, 1e-5)])
def test_a_row_does_not_depend_on_the_others(norm):
    x, weight = random_rows(9, 7, 33)
    alone = np.concatenate([norm(row[None], weight) for row in x])
    np.testing.assert_array_equal(norm(x, weight), alone)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(0, 5), st.integers(2, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_layer_norm_equals_float64(rows, dim, has_bias, seed):
    x, weight = random_rows(seed, rows, dim)
    bias = x[0] / np.abs(x[0]).max() if rows and has_bias else None
    out = np.full(x.shape, np.nan, np.float32)
    assert layer_norm(x, weight, bias, 1e-3, out) is out
    for t, row in enumerate(x.astype(np.float64)):
        mean = sum(row) / dim
        std = math.sqrt(sum((v - mean) ** 2 for v in row) / dim + 1e-3)
        expected = [(v - mean) / std * float(weight[i]) + (0 if bias is None else float(bias[i]))
                    for i, v in enumerate(row)]
        np.testing.assert_allclose(out[t], expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_rounds_once():
    x, weight = random_rows(4, 60, 24, bfloat16)
    bias = weight[::-1]
    wide = layer_norm(x.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32), 1e-5)
    y = layer_norm(x, weight, bias, 1e-5)
    assert y.dtype == bfloat16
    np.testing.assert_array_equal(y, wide.astype(bfloat16))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([0.0, 1.0]),
       st.booleans(), st.integers(0, 2**32 - 1))
def test_parts_of_a_vector_are_normalised_by_the_whole(rows, lengths, offset, multiply_before_cast, seed):
    x, weight = random_rows(seed, rows, sum(lengths))
    cuts = np.cumsum(lengths)[:-1]
    parts = np.split(x, cuts, axis=1)
    sums = [square_sum(part) for part in parts]
    assert all(total.dtype == np.float32 and total.shape == (rows, 1) for total in sums)
    mean = sum(sums) / np.float32(sum(lengths))
    got = [rms_norm(part, w, 1e-6, weight_offset=offset, multiply_before_cast=multiply_before_cast, mean_square=mean)
           for part, w in zip(parts, np.split(weight, cuts), strict=True)]
    whole = rms_reference(x, weight, 1e-6, offset)
    np.testing.assert_allclose(np.concatenate(got, axis=1), whole, rtol=2e-6, atol=1e-6)


def test_squares_are_summed_in_float32():
    x = np.full((2, 300), 17, bfloat16)
    np.testing.assert_array_equal(square_sum(x), np.full((2, 1), 300 * 17.0**2, np.float32))
