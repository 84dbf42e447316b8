"""Comparing what kernels wrote with what they should have written."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from tests.emulation.emulator import EmulatorBackend

bfloat16, float16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
DTYPES = [bfloat16, float16, float32]
ORDER_SEEDS = range(6)

# A test whose `device` is a GPU only: too large for the emulation.
gpu_only = pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)

# A test of checks that come before any launch: with NumPy arrays, which only the emulation takes.
emulated_only = pytest.mark.parametrize("device", ["emulated"], indirect=True)


def random_values(seed, shape, dtype, spread=2):
    """Normal values of quite different size (10^-spread to 10^spread)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape)
    return x.astype(np.float32).astype(dtype)


def bits(x):
    """The values as integers, all NaNs the same one."""
    x = np.ascontiguousarray(x)
    integers = x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.int64)
    return np.where(np.isnan(x.astype(np.float32)), -1, integers)


def assert_same_bits(got, expected):
    """Every bit the same, the sign of zero included; any NaN for a NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_array_equal(bits(got), bits(expected))


def distances(got, expected):
    """How many representable values apart they are. NaNs, and infinities, must be at the same places."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    wide_got, wide_expected = got.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(wide_got), np.isnan(wide_expected))
    np.testing.assert_array_equal(np.isinf(wide_got), np.isinf(wide_expected))
    return np.abs(_ordered(got) - _ordered(expected))


def _ordered(x):
    """The values as integers in the same order, neighbours 1 apart; NaNs as 0."""
    magnitude_bits = 8 * x.dtype.itemsize - 1
    integers = bits(x)
    magnitude = integers & ((1 << magnitude_bits) - 1)
    return np.where(integers < 0, 0, np.where(integers >> magnitude_bits, -magnitude, magnitude))


def assert_few(apart, dtype):
    """At most 0.1% of bfloat16 results, and four times as many of the denser float16, differ from the expected ones: as
    many as last bits of float32 before the final rounding may change."""
    fraction = {bfloat16: 0.001, float16: 0.004}[dtype]
    assert np.count_nonzero(apart) <= max(2, apart.size * fraction)


def read_only(device, *arrays):
    """The arrays where kernels can read them; a kernel that writes to one of them fails, at least in the emulation."""
    on_device = [device.array(a) for a in arrays]
    if device.emulated:
        for a in on_device:
            a.flags.writeable = False
    return on_device


def in_every_order(run):
    """The result of run() in the emulation, the same bits for every order of threads and blocks."""
    results = []
    for seed in ORDER_SEEDS:
        with use_backend(EmulatorBackend(order_seed=seed)):
            results.append(run())
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_same_bits(got, expected)
    return results[0]
