"""The kernels of rms_norm.cu against their specification in NumPy."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops import rms_norm as reference
from cutp.ops.residual import residual_add
from cutp.ops.rms_norm_cuda import add_rms_norm, rms_norm
from tests.emulation.emulator import EmulatorBackend, needs_compiler

bfloat16, float16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
DTYPES = [bfloat16, float16, float32]
# One warp a row (with idle lanes, whole, the most that fits), several warps, all of them, two vectors per thread.
BF16_DIMS = [8, 64, 72, 256, 264, 1000, 1528, 4096, 5120, 8192, 8200, 16384]
LLAMA, GEMMA = (0.0, False), (1.0, True)


def random_rows(seed, *shape, dtype):
    """Rows of different size, with two channels that are much larger than the others, and one row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, (*shape[:-1], 1))
    x[..., [0, shape[-1] // 2]] *= 100
    x.reshape(-1, shape[-1])[shape[0] // 2] = 0
    return x.astype(np.float32).astype(dtype)


def random_weight(seed, dim, dtype, offset):
    return (1 - offset + 0.3 * np.random.default_rng(seed).standard_normal(dim)).astype(np.float32).astype(dtype)


def ordered(x):
    """The values as integers in the same order, neighbours 1 apart."""
    bits = x.view({2: np.int16, 4: np.int32}[x.dtype.itemsize]).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF if x.dtype.itemsize == 4 else bits & 0x7FFF), bits)


def assert_equals_reference(got, expected):
    """Equal but for 1 unit in the last place in at most 0.1% of 16-bit values; float32 sums in another order."""
    assert got.dtype == expected.dtype and not np.isnan(got.astype(np.float32)).any()
    distance = np.abs(ordered(got) - ordered(expected))
    if got.dtype == float32:
        assert distance.max() <= 8
    else:
        assert distance.max() <= 1
        assert np.count_nonzero(distance) <= max(1, got.size / 1000)


@pytest.mark.parametrize("offset_and_order", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dim", BF16_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_kernels_equal_the_reference(device, dtype, dim, offset_and_order):
    offset, multiply_before_cast = offset_and_order
    if dtype == float32:
        dim //= 2
    rows = 1 + dim % 7
    options = {"weight_offset": offset, "multiply_before_cast": multiply_before_cast}
    x, residual = (random_rows(dim + i, rows, dim, dtype=dtype) for i in range(2))
    weight = random_weight(dim, dim, dtype, offset)
    on_device = [device.array(a) for a in (x, residual, weight)]
    if device.emulated:
        for a in on_device:
            a.flags.writeable = False
    out, sums, out_of_sums = (device.poisoned(x.shape, dtype) for _ in range(3))
    rms_norm(on_device[0], on_device[2], 1e-5, **options, out=out)
    add_rms_norm(*on_device, 1e-5, **options, residual_out=sums, out=out_of_sums, pdl=True)
    assert_equals_reference(device.numpy(out), reference.rms_norm(x, weight, 1e-5, **options))
    expected_sums = residual_add(residual, x)
    np.testing.assert_array_equal(device.numpy(sums), expected_sums)
    assert_equals_reference(device.numpy(out_of_sums), reference.rms_norm(expected_sums, weight, 1e-5, **options))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_eps(device, eps):
    x, weight = random_rows(1, 4, 128, dtype=float32)[[0, 1, 3]] * np.float32(1e-2), np.ones(128, np.float32)
    out = device.poisoned(x.shape, float32)
    rms_norm(device.array(x), device.array(weight), eps, out=out)
    assert_equals_reference(device.numpy(out), reference.rms_norm(x, weight, eps))


@pytest.mark.parametrize("dim", [128, 2048])
def test_a_row_does_not_depend_on_the_others(device, dim):
    x, weight = random_rows(2, 9, dim, dtype=bfloat16), random_weight(2, dim, bfloat16, 0)
    alone = np.concatenate([run_alone(device, row[None], weight) for row in x])
    np.testing.assert_array_equal(run_alone(device, x, weight), alone)
    x[4] = np.nan
    x[5, 3] = np.inf
    other = [0, 1, 2, 3, 6, 7, 8]
    np.testing.assert_array_equal(run_alone(device, x, weight)[other], alone[other])


def run_alone(device, x, weight):
    out = device.poisoned(x.shape, x.dtype)
    rms_norm(device.array(x), device.array(weight), 1e-6, out=out)
    return device.numpy(out)


def test_normalisation_over_heads(device):
    x, weight = random_rows(3, 5, 3, 64, dtype=bfloat16), random_weight(3, 64, bfloat16, 0)
    assert_equals_reference(run_alone(device, x, weight), reference.rms_norm(x, weight, 1e-6))


def test_values_that_float16_cannot_square(device):
    x = np.full((1, 64), 60000, np.float16)
    np.testing.assert_array_equal(run_alone(device, x, np.ones(64, np.float16)), np.ones((1, 64)))


@pytest.mark.parametrize("dim", [64, 2048])
def test_in_place(device, dim):
    x, residual = (random_rows(4 + i, 3, dim, dtype=bfloat16) for i in range(2))
    weight = random_weight(4, dim, bfloat16, 0)
    sums = residual_add(residual, x)
    normed = reference.rms_norm(sums, weight, 1e-5)
    w = device.array(weight)
    for sums_into, out_into in (("residual", "x"), ("x", "residual"), ("residual", None)):
        arrays = {"x": device.array(x), "residual": device.array(residual), None: device.poisoned(x.shape, bfloat16)}
        add_rms_norm(arrays["x"], arrays["residual"], w, 1e-5, residual_out=arrays[sums_into], out=arrays[out_into])
        np.testing.assert_array_equal(device.numpy(arrays[sums_into]), sums)
        assert_equals_reference(device.numpy(arrays[out_into]), normed)
    x_in_place = device.array(x)
    rms_norm(x_in_place, w, 1e-5, out=x_in_place)
    assert_equals_reference(device.numpy(x_in_place), reference.rms_norm(x, weight, 1e-5))


def test_no_rows(device):
    empty = device.array(np.zeros((0, 64), np.float32))
    rms_norm(empty, device.array(np.ones(64, np.float32)), 1e-5, out=empty)


@needs_compiler
@pytest.mark.parametrize(("dtype", "rows", "dim"), [(bfloat16, 6, 128), (bfloat16, 3, 1528), (float32, 2, 8192)])
def test_the_result_does_not_depend_on_the_order_of_threads(dtype, rows, dim):
    x, residual = (random_rows(6 + i, rows, dim, dtype=dtype) for i in range(2))
    weight = random_weight(6, dim, dtype, 0)
    results = []
    for seed in range(6):
        sums, out = np.full_like(x, np.nan), np.full_like(x, np.nan)
        with use_backend(EmulatorBackend(order_seed=seed)):
            add_rms_norm(x, residual, weight, 1e-5, residual_out=sums, out=out)
        results.append((sums, out))
    for sums, out in results:
        np.testing.assert_array_equal(sums, results[0][0])
        np.testing.assert_array_equal(out, results[0][1])
    assert_equals_reference(results[0][1], reference.rms_norm(residual_add(residual, x), weight, 1e-5))


@pytest.mark.parametrize(("change", "message"), [
    ({"x": np.zeros((2, 128), np.float32)[:, ::2]}, "x of shape .* is not contiguous"),
    ({"weight": np.ones(8, np.float32)}, r"weight has shape \(8,\); it needs \(64,\)"),
    ({"weight": np.ones(64, np.float16)}, "weight has dtype float16, but x has float32"),
    ({"out": np.zeros((3, 64), np.float32)}, r"out has shape \(3, 64\); it needs \(2, 64\)"),
    ({"residual": np.zeros((2, 32), np.float32)}, "residual has shape"),
    ({"residual_out": np.zeros((2, 64), np.float64)}, "residual_out has dtype float64"),
    ({"x": np.zeros((2, 64), np.int32)}, "x has dtype int32; it needs bfloat16, float16, float32"),
    ({"x": np.float32(1).reshape(())}, "x has no axis"),
])
def test_arguments_that_do_not_fit(change, message):
    x = change.get("x", np.zeros((2, 64), np.float32))
    given = {name: np.zeros_like(x) for name in ("residual", "residual_out", "out")}
    given = {"x": x, "weight": np.ones(64, np.float32), **given, **change}
    with pytest.raises(ConfigError, match=message):
        add_rms_norm(**given, eps=1e-5)


@pytest.mark.parametrize(("dim", "dtype"), [(12, bfloat16), (66, float32), (0, float32), (16392, bfloat16)])
def test_row_lengths_that_are_refused(dim, dtype):
    x = np.zeros((2, dim), dtype)
    with pytest.raises(ConfigError, match=f"rows of {dim} {dtype} elements; their number must be a multiple of"):
        rms_norm(x, np.ones(dim, dtype), 1e-5, out=x)
