"""linear_per_head.cu against ops/linear.py, in the emulation and on a GPU."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.linear import linear_per_head as reference
from cutp.ops.linear_per_head_cuda import linear_per_head
from tests.ops.kernel_results import DTYPES, assert_same_bits, bfloat16, emulated_only, float16, float32, in_every_order

# Tokens, heads, N, K: less than a tile, whole tiles, a bit more; nothing.
SIZES = [(1, 1, 8, 8), (3, 2, 32, 16), (32, 1, 128, 32), (33, 2, 136, 40), (70, 1, 40, 72), (0, 2, 16, 16)]


def arrays(make, size, dtype, transposed, seed=0):
    """x and out inside of larger arrays, as heads of queries are; what is beside them is NaN."""
    tokens, heads, n, k = size
    rng = np.random.default_rng(seed)
    x = np.full((tokens, heads, k + 8), np.nan, np.float32)
    x[..., :k] = make(rng, (tokens, heads, k))
    rows = np.full((heads, (k if transposed else n) + 3, n if transposed else k), np.nan, np.float32)
    rows[:, 3:] = make(rng, rows[:, 3:].shape)
    return x.astype(dtype), rows.astype(dtype)


def run(device, x, rows, size, transposed):
    tokens, heads, n, k = size
    there, weight = device.array(x), device.array(rows)[:, 3:]
    out = device.poisoned((tokens, heads, n + 8), x.dtype)
    linear_per_head(there[..., :k], weight.transpose(0, 2, 1) if transposed else weight, out=out[..., 8:], pdl=True)
    got = device.numpy(out)
    assert np.isnan(got[..., :8].astype(np.float32)).all()
    return np.ascontiguousarray(got[..., 8:])


def expected(x, rows, size, transposed):
    weight = rows[:, 3:].transpose(0, 2, 1) if transposed else rows[:, 3:]
    return reference(x[..., : size[3]], weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_sums(device, dtype, size, transposed):
    """Small integers: every product is where it belongs."""
    x, rows = arrays(lambda rng, shape: rng.integers(-4, 5, shape), size, dtype, transposed)
    assert_same_bits(run(device, x, rows, size, transposed), expected(x, rows, size, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_values(device, dtype, transposed):
    size = (37, 2, 48, 128)
    x, rows = arrays(lambda rng, shape: rng.standard_normal(shape), size, dtype, transposed, seed=1)
    truth = expected(x.astype(float32), rows.astype(float32), size, transposed)
    unit = {bfloat16: 2.0**-8, float16: 2.0**-11, float32: 2.0**-20}[dtype]
    np.testing.assert_allclose(run(device, x, rows, size, transposed).astype(np.float32), truth, rtol=unit,
                               atol=128 * 2.0**-20)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_does_not_depend_on_the_others(device, transposed):
    size = (40, 2, 32, 64)
    x, rows = arrays(lambda rng, shape: rng.standard_normal(shape), size, bfloat16, transposed, seed=2)
    together = run(device, x, rows, size, transposed)
    for t in (0, 9, 39):
        alone = run(device, np.ascontiguousarray(x[t : t + 1]), rows, (1, *size[1:]), transposed)
        assert_same_bits(alone[0], together[t])


@emulated_only
@pytest.mark.parametrize("transposed", [False, True])
def test_the_result_does_not_depend_on_the_order_of_threads(device, transposed):
    size = (34, 2, 136, 40)
    x, rows = arrays(lambda rng, shape: rng.standard_normal(shape), size, bfloat16, transposed, seed=3)
    in_every_order(lambda: (run(device, x, rows, size, transposed),))


@emulated_only
@pytest.mark.parametrize(("change", "message"), [
    ({"x": np.zeros((2, 3), np.float32)}, r"x has shape \(2, 3\); it needs \[T, H, K\]"),
    ({"x": np.zeros((2, 3, 16), np.int32)}, "x has dtype int32"),
    ({"weight": np.zeros((3, 8, 16), np.float16)}, "weight has dtype float16, but x has float32"),
    ({"weight": np.zeros((3, 8, 12), np.float32)}, r"weight has shape \(3, 8, 12\); it needs \(3, 8, 16\)"),
    ({"weight": np.zeros((3, 8, 32), np.float32)[..., ::2]}, "weight of shape .* has rows that are not contiguous"),
    ({"weight": np.zeros((3, 8, 18), np.float32)[..., :16]}, "no multiple of 16 bytes apart"),
    ({"out": np.zeros((2, 3, 9), np.float32)}, r"out has shape \(2, 3, 9\); it needs \(2, 3, 8\)"),
    ({"out": np.zeros((2, 3, 16), np.float32)[..., ::2]}, "out of shape .* has rows that are not contiguous"),
    ({"x": np.zeros((2, 3, 10), np.float32), "weight": np.zeros((3, 8, 10), np.float32)}, "multiples of 16 bytes"),
    ({"weight": np.zeros((3, 16, 6), np.float32).transpose(0, 2, 1), "out": np.zeros((2, 3, 6), np.float32)},
     "multiples of 16 bytes"),
])
def test_arguments_that_do_not_fit(device, change, message):
    given = {"x": np.zeros((2, 3, 16), np.float32), "weight": np.zeros((3, 8, 16), np.float32),
             "out": np.zeros((2, 3, 8), np.float32), **change}
    with pytest.raises(ConfigError, match=f"linear_per_head: .*{message}"):
        linear_per_head(given["x"], given["weight"], out=given["out"])
