"""The kernels of activation.cu against their specification in NumPy."""

import numpy as np
import pytest

from cutp.errors import ConfigError, UnsupportedModelError
from cutp.ops import activation as reference
from cutp.ops.activation_cuda import activation, clamped_swiglu, gated_activation
from tests.emulation.emulator import needs_compiler
from tests.ops.kernel_results import (
    DTYPES,
    assert_few,
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

NAMES = sorted(reference.ACTIVATIONS)
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 20, -20, 87, -87, 100, -100, 3e4, -3e4]


def values(seed, shape, dtype):
    """Mostly where the functions bend, some far out, some special."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * rng.choice([0.01, 1, 4, 30], shape)).astype(np.float32)
    flat = x.reshape(-1)
    flat[: min(len(SPECIAL), flat.size)] = SPECIAL[: flat.size]
    rng.shuffle(flat)
    return flat.reshape(shape).astype(dtype)


def assert_close(got, expected, unit):
    """Apart by one value in few 16-bit results (by two where a product follows), by eight in float32.

    Where `unit` is not 0 the error in float32 is a few `unit` * 2^-24, however small the result is (`error_unit`);
    how many 16-bit results it takes to the next value is not counted there.
    """
    apart, unit = distances(got, expected), np.broadcast_to(unit, got.shape)
    with np.errstate(invalid="ignore"):
        wide = expected.astype(np.float64)
        error = np.abs(got.astype(np.float64) - wide)
    next_value = {bfloat16: 2.0**-7, float16: 2.0**-10, float32: 0.0}[got.dtype] * np.abs(wide)
    apart[error <= 1e-42] = 0  # far below -80 the exponential has few bits left, or none
    apart[(unit > 0) & (error <= 4 * 2.0**-24 * unit + next_value)] = 0
    if got.dtype == float32:
        assert apart.max(initial=0) <= 8
    else:
        assert apart.max(initial=0) <= 2
        assert_few(apart, got.dtype)


def error_unit(name, x):
    """|x| where the gelus add 1 and a number near -1: the absolute error of that sum stays when it becomes small."""
    x = np.nan_to_num(x.astype(np.float64))
    return np.abs(x) * (x < -0.5) if name.startswith("gelu") else np.zeros(x.shape)


def gated_error_unit(name, gate_up):
    gate, up = np.hsplit(gate_up.astype(np.float32), 2)
    return error_unit(name, gate) * np.abs(np.nan_to_num(up))


def activated(device, x, name, **options):
    out = device.poisoned(x.shape, x.dtype)
    activation(*read_only(device, x), name, out=out, **options)
    return device.numpy(out)


def gated(device, gate_up, name, **options):
    out = device.poisoned((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    gated_activation(*read_only(device, gate_up), name, out=out, **options)
    return device.numpy(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(device, dtype, name):
    x = values(1, (3, 1000), dtype)
    assert_close(activated(device, x, name, pdl=True), reference.activation(x, name), error_unit(name, x))


# Less than a vector, one, one and a bit; a block of 256 vectors, less and more; nothing.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (7,), (2, 4), (9,), (3, 683), (2048,), (2049,), (0, 5)])
@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
def test_activation_of_any_number_of_elements(device, dtype, shape):
    x = values(2, shape, dtype)
    assert_close(activated(device, x, "silu"), reference.activation(x, "silu"), 0)


def test_activation_in_place(device):
    x = random_values(3, (5, 33), bfloat16)
    y = device.array(x)
    activation(y, "relu", out=y)
    assert_same_bits(device.numpy(y), reference.activation(x, "relu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation(device, dtype, name, limit):
    x = values(4, (7, 2 * 344), dtype)
    expected = reference.gated_activation(x, name, limit=limit)
    assert_close(gated(device, x, name, limit=limit, pdl=True), expected, gated_error_unit(name, x))


@pytest.mark.parametrize("width", [8, 16, 256, 264, 2048, 2056, 4096])
def test_gated_activation_of_many_widths(device, width):
    x = random_values(width, (2, 2 * width), bfloat16, spread=0.5)
    assert_close(gated(device, x, "silu"), reference.gated_activation(x, "silu"), 0)


def test_the_limit_clamps_gate_from_above_and_up_from_both_sides(device):
    gate = np.array([[5, 5, 5, -5, 2, np.nan, 1, 1]], np.float32)
    up = np.array([[3, -9, 9, 4, 4, 1, np.nan, -2]], np.float32)
    got = gated(device, np.hstack([gate, up]), "relu", limit=4)
    np.testing.assert_array_equal(got, [[12, -16, 16, 0, 8, np.nan, np.nan, -2]])


def clamped(device, gate_up, **options):
    out = device.poisoned((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    clamped_swiglu(*read_only(device, gate_up), out=out, **options)
    return device.numpy(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"alpha": 0.75, "limit": 2.5}, {"limit": 1000.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamped_swiglu(device, dtype, options):
    x = values(8, (5, 2 * 344), dtype)
    got, expected = clamped(device, x, pdl=True, **options), reference.clamped_swiglu(x, **options)
    # A sigmoid that rounds to its neighbour takes the product two values further.
    assert_close(got, expected, 2 * np.abs(np.nan_to_num(expected.astype(np.float64))))


def test_the_steps_of_clamped_swiglu_are_rounded(device):
    x = values(9, (40, 2 * 256), bfloat16)
    exact = reference.clamped_swiglu(x.astype(np.float32)).astype(bfloat16)
    with np.errstate(invalid="ignore"):
        expected = reference.clamped_swiglu(x)
        assert np.count_nonzero(distances(exact, expected)) > expected.size / 10
        assert np.count_nonzero(distances(clamped(device, x), expected)) <= expected.size / 1000


def test_what_clamped_swiglu_clamps(device):
    gate = np.array([[9, -9, 2, np.nan, 1, 0, 0, 8]], np.float32)
    up = np.array([[-9, 9, -9, 1, np.nan, 1, -1, 7.5]], np.float32)
    got = clamped(device, np.hstack([gate, up]))
    np.testing.assert_allclose(got, reference.clamped_swiglu(np.hstack([gate, up])), rtol=1e-6)
    assert got[0, 0] < -41 and got[0, 7] > 55 and np.isnan(got[0, 3:5]).all()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_nothing_to_gate(device, shape):
    for launcher in (lambda x: gated(device, x, "silu"), lambda x: clamped(device, x)):
        assert launcher(np.zeros(shape, np.float32)).shape == (shape[0], shape[1] // 2)


def test_a_row_does_not_depend_on_the_others(device):
    x = random_values(5, (6, 2 * 72), bfloat16, spread=0.5)
    x[3] = np.nan
    assert_same_bits(gated(device, x, "gelu_tanh"),
                     np.concatenate([gated(device, row[None], "gelu_tanh") for row in x]))
    # The position in a vector makes no difference either.
    assert_same_bits(activated(device, x, "gelu")[:, 1:], activated(device, np.ascontiguousarray(x[:, 1:]), "gelu"))


@needs_compiler
def test_the_result_does_not_depend_on_the_order_of_threads():
    x = random_values(6, (4, 2 * 264), bfloat16, spread=0.5)

    def run():
        ungated, product = np.full_like(x, np.nan), np.full((4, 264), np.nan, bfloat16)
        activation(x, "silu", out=ungated)
        gated_activation(x, "silu", out=product)
        return ungated, product

    ungated, product = in_every_order(run)
    assert_close(ungated, reference.activation(x, "silu"), 0)
    assert_close(product, reference.gated_activation(x, "silu"), 0)


@gpu_only
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (33, 3584), (257, 1376), (65, 28672)])
def test_real_sizes(device, rows, width, name):
    x = random_values(rows, (rows, 2 * width), bfloat16, spread=0.5)
    assert_close(gated(device, x, name), reference.gated_activation(x, name), gated_error_unit(name, x))


@gpu_only
def test_more_than_65535_rows(device):
    x = random_values(7, (70000, 16), bfloat16, spread=0.5)
    assert_close(gated(device, x, "silu"), reference.gated_activation(x, "silu"), 0)


@pytest.mark.parametrize(("change", "message"), [
    ({"gate_up": np.zeros((2, 32), np.float64)}, "gate_up has dtype float64; it needs bfloat16, float16, float32"),
    ({"gate_up": np.zeros(32, np.float32)}, r"gate_up has shape \(32,\); it needs \[T, 2F\]"),
    ({"gate_up": np.zeros((2, 33), np.float32)}, r"gate_up has shape \(2, 33\); it needs \(2, 32\)"),
    ({"gate_up": np.zeros((2, 64), np.float32)[:, ::2]}, "gate_up of shape .* is not contiguous"),
    ({"out": np.zeros((2, 32), np.float32)}, r"out has shape \(2, 32\); it needs \(2, 16\)"),
    ({"out": np.zeros((2, 16), np.float16)}, "out has dtype float16; it needs float32"),
    ({"gate_up": np.zeros((2, 20), np.float32), "out": np.zeros((2, 10), np.float32)},
     "10 columns of float32; they need a multiple of 16 bytes"),
])
def test_arguments_that_do_not_fit(change, message):
    given = {"gate_up": np.zeros((2, 32), np.float32), "out": np.zeros((2, 16), np.float32), **change}
    with pytest.raises(ConfigError, match=f"gated_activation: {message}"):
        gated_activation(**given, name="silu")
    with pytest.raises(ConfigError, match=f"clamped_swiglu: {message}"):
        clamped_swiglu(**given)


@pytest.mark.parametrize(("x", "out", "message"), [
    (np.zeros(8, np.int32), np.zeros(8, np.int32), "x has dtype int32"),
    (np.zeros(16, np.float32)[::2], np.zeros(8, np.float32), "x of shape .* is not contiguous"),
    (np.zeros(8, np.float32), np.zeros(9, np.float32), r"out has shape \(9,\); it needs \(8,\)"),
    (np.zeros(8, np.float32), np.zeros(8, bfloat16), "out has dtype bfloat16; it needs float32"),
])
def test_arguments_that_do_not_fit_the_activation_alone(x, out, message):
    with pytest.raises(ConfigError, match=f"activation: {message}"):
        activation(x, "silu", out=out)


def test_unknown_function():
    x = np.zeros((1, 8), np.float32)
    for launcher in (activation, gated_activation):
        with pytest.raises(UnsupportedModelError, match="'mish'"):
            launcher(x, "mish", out=x)
