"""The kernels of residual.cu against their specification in NumPy."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops import residual as reference
from cutp.ops.residual_cuda import clip, finish_logits, residual_add, scale, scale_rows
from tests.emulation.emulator import needs_compiler
from tests.ops.kernel_results import (
    DTYPES,
    assert_same_bits,
    bfloat16,
    distances,
    float16,
    float32,
    gpu_only,
    in_every_order,
    random_values,
    read_only,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
# Less than a vector, one, one and a bit; a block of 256 vectors, less and more; nothing.
SHAPES = [(1,), (3,), (4,), (7, 1), (2, 4), (9,), (3, 683), (2048,), (2049,), (5, 1000), (0, 8)]


def values(seed, shape, dtype):
    x = random_values(seed, shape, dtype)
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 3e38]).astype(dtype)
    if x.size > 1000:
        x.reshape(-1)[:: x.size // 60][:60] = np.tile(special, 10)
    return x


def finished(logits, scaling=1.0, cap=None):
    """What DistributedTransformer computes of the logits of its head."""
    y = logits.astype(np.float32) / np.float32(scaling)
    return y if cap is None else np.float32(cap) * np.tanh(y / np.float32(cap))


def run(device, kernel, arrays, *parameters, dtype=None, **options):
    out = device.poisoned(arrays[0].shape, dtype or arrays[0].dtype)
    kernel(*read_only(device, *arrays), *parameters, out=out, **options)
    return device.numpy(out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_residual_add(device, dtype, shape):
    x, y = (values(i, shape, dtype) for i in range(2))
    assert_same_bits(run(device, scale, [x], 0.3, pdl=True), reference.scale(x, 0.3))
    assert_same_bits(run(device, residual_add, [x, y], 0.22, pdl=True), reference.residual_add(x, y, 0.22))


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 12.0, 78.38367])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors(device, dtype, factor):
    x, y = (values(2 + i, (4, 300), dtype) for i in range(2))
    assert_same_bits(run(device, scale, [x], factor), reference.scale(x, factor))
    assert_same_bits(run(device, residual_add, [x, y], factor), reference.residual_add(x, y, factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_without_a_multiplier(device, dtype):
    x, y = (values(4 + i, (4, 300), dtype) for i in range(2))
    assert_same_bits(run(device, residual_add, [x, y]), reference.residual_add(x, y))


def test_in_place(device):
    x, y = (random_values(6 + i, (3, 37), bfloat16) for i in range(2))
    expected = reference.residual_add(x, y, 0.5)
    for target in range(2):
        arrays = [device.array(x), device.array(y)]
        residual_add(*arrays, 0.5, out=arrays[target])
        assert_same_bits(device.numpy(arrays[target]), expected)
    on_device = device.array(x)
    scale(on_device, 3.0, out=on_device)
    assert_same_bits(device.numpy(on_device), reference.scale(x, 3.0))
    logits = device.array(x.astype(np.float32))
    finish_logits(logits, 3.0, out=logits)
    assert_same_bits(device.numpy(logits), finished(x, 3.0))


@pytest.mark.parametrize("scaling", [1.0, 8.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_without_a_cap(device, dtype, shape, scaling):
    logits = values(8, shape, dtype)
    assert_same_bits(run(device, finish_logits, [logits], scaling, dtype=float32, pdl=True), finished(logits, scaling))


@pytest.mark.parametrize(("scaling", "cap"), [(1.0, 30.0), (4.0, 2.5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_with_a_cap(device, dtype, scaling, cap):
    logits = values(9, (5, 1003), dtype)
    got = run(device, finish_logits, [logits], scaling, cap, dtype=float32)
    assert distances(got, finished(logits, scaling, cap)).max() <= 8  # two tanh of up to 2, doubled by the product
    assert np.nanmax(np.abs(got)) <= cap


def test_an_element_does_not_depend_on_the_others(device):
    logits = random_values(10, (5, 101), bfloat16)
    whole = run(device, finish_logits, [logits], 3.0, 5.0, dtype=float32)
    rows = [run(device, finish_logits, [row[None]], 3.0, 5.0, dtype=float32) for row in logits]
    assert_same_bits(whole, np.concatenate(rows))


@needs_compiler
def test_the_result_does_not_depend_on_the_order_of_threads():
    x, y = (random_values(11 + i, (4, 301), float16) for i in range(2))

    def results():
        scaled, added, logits = np.full_like(x, np.nan), np.full_like(x, np.nan), np.full(x.shape, np.nan, float32)
        scale(x, 0.7, out=scaled)
        residual_add(x, y, 0.7, out=added)
        finish_logits(x, 1.5, out=logits)
        return scaled, added, logits

    expected = reference.scale(x, 0.7), reference.residual_add(x, y, 0.7), finished(x, 1.5)
    for got, right in zip(in_every_order(results), expected, strict=True):
        assert_same_bits(got, right)


@gpu_only
@pytest.mark.parametrize("shape", [(1, 4096), (33, 8192), (64, 16032), (7, 128256), (3, 50257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_sizes(device, dtype, shape):
    x, y = (values(13 + i, shape, dtype) for i in range(2))
    assert_same_bits(run(device, scale, [x], 12.0), reference.scale(x, 12.0))
    assert_same_bits(run(device, residual_add, [x, y], 0.22), reference.residual_add(x, y, 0.22))
    assert_same_bits(run(device, finish_logits, [x], 3.3, dtype=float32), finished(x, 3.3))


@pytest.mark.parametrize(("change", "message"), [
    ({"x": np.zeros(8, np.float64)}, "x has dtype float64; it needs bfloat16, float16, float32"),
    ({"x": np.zeros(16, np.float32)[::2]}, "x of shape .* is not contiguous"),
    ({"y": np.zeros(9, np.float32)}, r"y has shape \(9,\); it needs \(8,\)"),
    ({"y": np.zeros(8, bfloat16)}, "y has dtype bfloat16; it needs float32"),
    ({"out": np.zeros((1, 8), np.float32)}, r"out has shape \(1, 8\); it needs \(8,\)"),
    ({"out": np.zeros(8, np.float16)}, "out has dtype float16; it needs float32"),
])
def test_arguments_that_do_not_fit(change, message):
    given = {name: np.zeros(8, np.float32) for name in ("x", "y", "out")}
    with pytest.raises(ConfigError, match=f"residual_add: {message}"):
        residual_add(**{**given, **change})
    if "y" not in change:
        given.pop("y")
        with pytest.raises(ConfigError, match=f"scale: {message}"):
            scale(**{**given, **change}, factor=2.0)


@pytest.mark.parametrize(("change", "message"), [
    ({"logits": np.zeros(8, np.int32)}, "logits has dtype int32"),
    ({"out": np.zeros(8, bfloat16)}, "out has dtype bfloat16; it needs float32"),
    ({"out": np.zeros(4, np.float32)}, r"out has shape \(4,\); it needs \(8,\)"),
    ({"logits_scaling": 0.0}, "logits_scaling is 0.0, but logits are divided by it"),
    ({"softcapping": 0.0}, "softcapping is 0.0, but logits are divided by it"),
])
def test_arguments_that_do_not_fit_the_logits(change, message):
    given = {"logits": np.zeros(8, bfloat16), "out": np.zeros(8, np.float32), **change}
    with pytest.raises(ConfigError, match=f"finish_logits: {message}"):
        finish_logits(**given)


@pytest.mark.parametrize("limit", [0.0, 0.3, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip(device, dtype, limit):
    for shape in SHAPES:
        x = values(6, shape, dtype)
        got, expected = run(device, clip, [x], limit, pdl=True), reference.clip(x, limit)
        # Zeros of either sign are equal to a limit of 0.
        np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
    with pytest.raises(ConfigError, match="limit is -1"):
        clip(x, -1.0, out=x)


@pytest.mark.parametrize("shape", [(1, 8), (3, 264), (2, 4104), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_rows(device, dtype, shape):
    x, shares = values(7, shape, dtype), random_values(8, (shape[0], 1), dtype)
    assert_same_bits(run(device, scale_rows, [x, shares], pdl=True), reference.scale_rows(x, shares))


def test_rows_that_cannot_be_scaled():
    with pytest.raises(ConfigError, match="scale_rows: .*multiple of 16 bytes"):
        scale_rows(np.zeros((2, 6), np.float32), np.zeros((2, 1), np.float32), out=np.zeros((2, 6), np.float32))
    with pytest.raises(ConfigError, match=r"shares has shape \(2,\); it needs \(2, 1\)"):
        scale_rows(np.zeros((2, 8), np.float32), np.zeros(2, np.float32), out=np.zeros((2, 8), np.float32))
