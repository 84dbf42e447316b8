"""x W^T + b against float64 sums, and its single rounding."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops.linear import linear, linear_per_head

pytestmark = pytest.mark.filterwarnings("error")
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def reference(x, weight, bias):
    y = np.zeros((len(x), len(weight)))
    for t in range(len(x)):
        for n in range(len(weight)):
            y[t, n] = sum(float(a) * float(b) for a, b in zip(x[t], weight[n], strict=True))
            y[t, n] += 0.0 if bias is None else float(bias[n])
    return y


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(0, 6), st.integers(0, 9), st.integers(0, 7), st.booleans(), st.integers(0, 2**32 - 1))
def test_equals_float64_sums(t, k, n, has_bias, seed):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((t, k)).astype(np.float32), rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if has_bias else None
    out = np.full((t, n), np.nan, np.float32)
    assert linear(x, weight, bias, out) is out
    np.testing.assert_allclose(out, reference(x, weight, bias), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(linear(x, weight, bias), out)


@pytest.mark.parametrize("dtype", [bfloat16, np.dtype(np.float16)])
def test_sum_and_bias_are_rounded_once(dtype):
    rng = np.random.default_rng(1)
    # Integers: the float32 sum is exact, so the one rounding to `dtype` is the only one.
    x = rng.integers(-8, 9, (5, 32)).astype(dtype)
    weight = rng.integers(-8, 9, (6, 32)).astype(dtype)
    bias = rng.integers(-8, 9, 6).astype(dtype)
    y = linear(x, weight, bias)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, reference(x, weight, bias).astype(np.float32).astype(dtype))


def test_bias_is_added_before_the_rounding():
    # 257 lies between the bfloat16 values 256 and 258: rounded first it would become 256, and stay 256.
    y = linear(np.array([[256, 1]], bfloat16), np.ones((1, 2), np.float32), np.array([0.5], np.float32))
    assert y[0, 0] == 258


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 6), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_every_head_has_its_matrix(t, heads, k, n, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((t, heads, k)).astype(np.float32)
    weight = rng.standard_normal((heads, n, k)).astype(np.float32)
    got = linear_per_head(x, weight)
    assert got.shape == (t, heads, n) and got.dtype == np.float32
    for h in range(heads):
        np.testing.assert_allclose(got[:, h], reference(x[:, h], weight[h], None), rtol=1e-5, atol=1e-5)


def test_sum_per_head_is_rounded_once():
    x = np.array([[[256, 1, 1]]], bfloat16)  # 256 + 1 is no bfloat16 number, 256 + 2 is
    got = linear_per_head(x, np.ones((1, 1, 3), np.float32))
    assert got.dtype == bfloat16 and got[0, 0, 0] == 258
