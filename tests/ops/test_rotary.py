"""Rotation of query and key heads against complex multiplication in float64, and its rounding points."""

import cmath
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops.rotary import apply_rotary, rotary_table

pytestmark = pytest.mark.filterwarnings("error")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)


def pairs(rotary_dim, interleaved):
    half = rotary_dim // 2
    return [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), st.booleans(),
       st.integers(0, 2**32 - 1))
def test_equals_complex_multiplication(tokens, heads, half, rest, interleaved, seed):
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 50, tokens)
    inv_freq = (10.0 ** -rng.uniform(0, 2, half)).astype(np.float32)
    scaling = np.float32(rng.uniform(0.5, 1.5))
    x = rng.standard_normal((tokens, heads, 2 * half + rest)).astype(np.float32)
    cos, sin = rotary_table(positions, inv_freq, scaling, float32)
    out = np.full(x.shape, np.nan, np.float32)
    assert apply_rotary(x, cos, sin, interleaved=interleaved, out=out) is out
    for t in range(tokens):
        for h in range(heads):
            expected = x[t, h].astype(np.float64)
            for i, (a, b) in enumerate(pairs(2 * half, interleaved)):
                turned = complex(x[t, h, a], x[t, h, b]) * cmath.rect(scaling, float(positions[t]) * float(inv_freq[i]))
                expected[a], expected[b] = turned.real, turned.imag
            np.testing.assert_allclose(out[t, h], expected, rtol=1e-4, atol=3e-5)
            np.testing.assert_array_equal(out[t, h, 2 * half:], x[t, h, 2 * half:])


def test_output_may_be_the_input():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 8)).astype(np.float32)
    cos, sin = rotary_table(np.arange(3), np.array([1, 0.5, 0.1], np.float32), 1.0, float32)
    for interleaved in (False, True):
        expected = apply_rotary(x, cos, sin, interleaved=interleaved)
        same = x.copy()
        np.testing.assert_array_equal(apply_rotary(same, cos, sin, interleaved=interleaved, out=same), expected)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)
    inv_freq = (1000.0 ** -(np.arange(8) / 8)).astype(np.float32)

    def at(x, position):
        return apply_rotary(x, *rotary_table(np.array([position]), inv_freq, 1.0, float32)).ravel()

    scores = [at(q, base + 7) @ at(k, base) for base in (0, 1, 20, 300)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


@pytest.mark.parametrize("dtype", [bfloat16, np.dtype(np.float16)])
def test_table_is_scaled_and_then_rounded(dtype):
    positions, inv_freq, scaling = np.array([0, 1, 5, 77]), np.array([1.0, 0.3, 0.01], np.float32), np.float32(1.19)
    cos, sin = rotary_table(positions, inv_freq, scaling, dtype)
    assert cos.dtype == sin.dtype == float32 and cos.shape == sin.shape == (4, 3)
    for t, position in enumerate(positions):
        for i, frequency in enumerate(inv_freq):
            angle = float(np.float32(position) * frequency)
            for got, function in ((cos, math.cos), (sin, math.sin)):
                # The product in float32, then one rounding; equal unless float32 arithmetic crosses a border.
                assert got[t, i] == np.float32(function(angle) * float(scaling)).astype(dtype)


def test_angle_is_a_float32_product():
    position, frequency = 65000, np.float32(0.7317)
    cos, sin = rotary_table(np.array([position]), np.array([frequency]), 1.0, float32)
    angle = float(np.float32(position) * frequency)
    assert abs(angle - position * float(frequency)) > 1e-4  # the rounding of the angle can be seen
    np.testing.assert_allclose([cos[0, 0], sin[0, 0]], [math.cos(angle), math.sin(angle)], atol=1e-5)


def test_one_row_of_frequencies_and_one_scaling_a_token():
    inv_freq = np.array([[1.0, 0.5], [0.25, 0.125], [2.0, 3.0]], np.float32)
    scaling = np.array([1.0, 2.0, 0.5], np.float32)
    positions = np.array([3, 3, 4])
    cos, sin = rotary_table(positions, inv_freq, scaling, float32)
    for t in range(3):
        alone = rotary_table(positions[t : t + 1], inv_freq[t], float(scaling[t]), float32)
        np.testing.assert_array_equal(np.stack([cos[t], sin[t]]), np.stack(alone)[:, 0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_products_and_their_sum_are_rounded(interleaved):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((40, 2, 12)).astype(np.float32).astype(bfloat16)
    cos, sin = rotary_table(rng.integers(0, 100, 40), rng.uniform(0.01, 1, 4).astype(np.float32), 1.0, bfloat16)
    y = apply_rotary(x, cos, sin, interleaved=interleaved)
    assert y.dtype == bfloat16

    def r(value):
        return float(np.float32(value).astype(bfloat16))

    at_the_end = 0
    for t in range(40):
        for h in range(2):
            for i, (a, b) in enumerate(pairs(8, interleaved)):
                c, s, first, second = float(cos[t, i]), float(sin[t, i]), float(x[t, h, a]), float(x[t, h, b])
                assert float(y[t, h, a]) == r(r(first * c) - r(second * s))
                assert float(y[t, h, b]) == r(r(second * c) + r(first * s))
                at_the_end += float(y[t, h, a]) != r(first * c - second * s)
            np.testing.assert_array_equal(y[t, h, 8:], x[t, h, 8:])
    assert at_the_end > 20  # rounding only at the end would give something else
