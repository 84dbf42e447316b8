"""What skinny_gemm.cu and stream_gemm.cu are both held to.

`run(x, weight, bias=None, out_dtype=None)` is the product that a kernel computed, as a NumPy array of `out_dtype`, by
default that of x.
"""

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.linear import linear

bfloat16, float16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)

# What models have, too large for the emulation: N, K, M.
LARGE = [(6144, 4096, 8), (4096, 4096, 17), (4096, 14336, 1), (14336, 2048, 64), (1280, 8192, 5), (768, 4096, 33),
         (4096, 512, 8), (32064, 896, 16), (4096, 1792, 31)]


def case_id(value):
    return value.name if isinstance(value, np.dtype) else "x".join(map(str, value))


def integers(seed, *shape):
    """Small integers: sums of their products are exact in float32, whatever the order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(make, dtype, n, k, m):
    """x [m, k], weight [n, k], bias [n]."""
    return tuple(a.astype(dtype) for a in (make(1, m, k), make(2, n, k), make(3, n)))


def check_equals_float64_up_to_one_rounding(run, dtype, shape, error):
    """error: what that of a sum is below, times the sum of magnitudes."""
    x, weight, bias = inputs(normal, dtype, *shape)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    slack = error * (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T)
    assert (np.abs(run(x, weight, out_dtype=float32) - exact) <= slack).all(), shape
    biased = exact + bias.astype(np.float64)
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2 * np.abs(biased)
    got = run(x, weight, bias).astype(np.float64)
    assert (np.abs(got - biased) <= 1.001 * rounding + 1.001 * slack).all(), shape


def check_one_rounding_after_the_bias(run, dtype, shape):
    x, weight, bias = inputs(normal, dtype, *shape)
    sums = run(x, weight, out_dtype=float32)
    biased = run(x, weight, bias, float32)
    np.testing.assert_array_equal(biased, sums + bias.astype(np.float32))
    np.testing.assert_array_equal(run(x, weight, bias), biased.astype(dtype))
    assert (biased.astype(dtype) != sums.astype(dtype) + bias).any()  # two roundings would be seen


def check_a_row_depends_on_nothing_but_itself(run, dtype, n, k, max_m):
    x, weight, bias = inputs(normal, dtype, n, k, max_m)
    whole = run(x, weight, bias, float32)
    for m in (1, 5, 8, 9, 16, 17, 32, 33):
        np.testing.assert_array_equal(run(x[:m], weight, bias, float32), whole[:m], err_msg=f"{n} {k} {m}")
    order = np.random.default_rng(0).permutation(max_m)
    np.testing.assert_array_equal(run(x[order], weight, bias, float32), whole[order])
    # Another order of the sum would be seen: not all sums are exact.
    assert (whole != x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)).any()


def check_what_is_not_finite_stays_in_its_row_and_column(run, dtype, k):
    for m in (7, 12):
        x, weight, _ = inputs(integers, dtype, 21, k, m)
        clean = linear(x, weight)
        x[m - 1, k - 4], x[2, 0], weight[20, k - 3], weight[4, 1] = np.nan, np.inf, np.nan, -np.inf
        x[2, 1] = 1
        got = run(x, weight)
        affected = np.zeros(got.shape, bool)
        affected[[m - 1, 2]] = True
        affected[:, [20, 4]] = True
        assert not np.isfinite(got[affected].astype(np.float32)).any()
        np.testing.assert_array_equal(got[~affected], clean[~affected])


def ones(*shape, dtype=bfloat16):
    return np.ones(shape, dtype)


def check_refused(multiply, message, x, weight, bias=None, out=None):
    out = ones(x.shape[0], weight.shape[0]) if out is None else out
    with pytest.raises(ConfigError, match=message):
        multiply(x, weight, bias, out=out)


def check_bad_arguments(multiply, most):
    """Of any product of bfloat16 rows of 64 with up to `most` of them."""
    x, weight = ones(2, 64), ones(8, 64)
    for message, *arguments in (
        ("x has dtype int32", x.astype(np.int32), weight),
        ("x has shape", ones(64), weight, None, ones(1, 8)),
        ("weight has shape", x, ones(64)),
        ("weight has shape", x, ones(8, 72)),
        ("weight has dtype", x, weight.astype(float16)),
        ("weight .*not contiguous", x, ones(8, 128)[:, :64]),
        ("bias has shape", x, weight, ones(9)),
        ("bias has dtype", x, weight, ones(8, dtype=float32)),
        ("bias .*not contiguous", x, weight, ones(16)[::2]),
        ("out has shape", x, weight, None, ones(8, 2)),
        ("out has dtype", x, weight, None, ones(2, 8, dtype=float16)),
        ("out .*rows that are not contiguous", x, weight, None, ones(2, 16)[:, ::2]),
        ("out .*rows -16 bytes apart", x, weight, None, ones(2, 8)[::-1]),
        (f"x has {most + 1} rows, more than {most}", ones(most + 1, 64), weight),
        ("x .*rows that are not contiguous", ones(2, 128)[:, ::2], weight),
        ("x .*rows 136 bytes apart", ones(2, 68)[:, :64], weight),
        ("x .*rows 0 bytes apart", np.broadcast_to(ones(64), (2, 64)), weight),
    ):
        check_refused(multiply, message, *arguments)
