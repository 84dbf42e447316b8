"""Activations against their formulas in float64, their extremes, and the rounding of the gated product."""

import math

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import ConfigError, UnsupportedModelError
from cutp.ops.activation import ACTIVATIONS, activation, activation_name, clamped_swiglu, gated_activation

pytestmark = pytest.mark.filterwarnings("error")
bfloat16 = np.dtype(ml_dtypes.bfloat16)

FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0,
}


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula(name):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(200) * 3, [0, -0.0, 20, -20, 100, -100, 1e4, -1e4]]).astype(np.float32)
    x = x.reshape(4, -1)
    expected = np.vectorize(FORMULAS[name], otypes=[float])(x.astype(np.float64))
    out = np.full(x.shape, np.nan, np.float32)
    assert activation(x, name, out) is out
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [bfloat16, np.dtype(np.float16)])
def test_rounds_once(name, dtype):
    x = np.linspace(-6, 6, 300).astype(np.float32).astype(dtype)
    y = activation(x, name)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, activation(x.astype(np.float32), name).astype(dtype))


@pytest.mark.parametrize("name, known", [("silu", "silu"), ("swish", "silu"), ("gelu_new", "gelu_tanh"),
                                         ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")])
def test_names(name, known):
    assert activation_name(name) == known


def test_unknown_name():
    with pytest.raises(UnsupportedModelError, match="'mish'.*silu"):
        activation_name("mish")


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows, width", [(0, 3), (1, 1), (5, 7)])
@pytest.mark.parametrize("limit", [None, 0.75])
def test_gated(name, rows, width, limit):
    x = (2 * np.random.default_rng(rows).standard_normal((rows, 2 * width))).astype(np.float32)
    out = np.full((rows, width), np.nan, np.float32)
    assert gated_activation(x, name, limit=limit, out=out) is out
    for t in range(rows):
        for i in range(width):
            gate, up = float(x[t, i]), float(x[t, width + i])
            if limit is not None:
                gate, up = min(gate, limit), min(max(up, -limit), limit)
            assert out[t, i] == pytest.approx(FORMULAS[activation_name(name)](gate) * up, rel=1e-5, abs=1e-6)


def test_gated_rounds_the_activated_gate_and_the_product():
    x = np.random.default_rng(8).standard_normal((50, 40)).astype(np.float32).astype(bfloat16)
    y = gated_activation(x, "silu")
    assert y.dtype == bfloat16
    gate, up = x[:, :20].astype(np.float64), x[:, 20:].astype(np.float64)
    activated = (gate / (1 + np.exp(-gate))).astype(np.float32)
    expected = (activated.astype(bfloat16).astype(np.float32) * up.astype(np.float32)).astype(bfloat16)
    assert (y != expected).mean() < 0.002
    assert (y != (activated * up).astype(np.float32).astype(bfloat16)).mean() > 0.05


@pytest.mark.parametrize("rows, width", [(0, 3), (1, 1), (6, 7)])
@pytest.mark.parametrize("alpha, limit", [(1.702, 7.0), (0.5, 0.75)])
def test_clamped_swiglu(rows, width, alpha, limit):
    x = (4 * np.random.default_rng(rows).standard_normal((rows, 2 * width))).astype(np.float32)
    out = np.full((rows, width), np.nan, np.float32)
    assert clamped_swiglu(x, alpha=alpha, limit=limit, out=out) is out
    for t in range(rows):
        for i in range(width):
            gate, up = min(float(x[t, i]), limit), min(max(float(x[t, width + i]), -limit), limit)
            expected = gate / (1 + math.exp(-alpha * gate)) * (up + 1)
            assert out[t, i] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_clamped_swiglu_at_its_ends():
    x = np.array([[1e30, -1e30, 7.5, 0, 1e30, -1e30, -7.5, np.inf]], np.float32)
    with np.errstate(over="ignore"):
        assert clamped_swiglu(x).tolist() == [[pytest.approx(56, 1e-4), 0, pytest.approx(-42, 1e-4), 0]]


def test_clamped_swiglu_rounds_every_step():
    x = np.random.default_rng(8).standard_normal((50, 40)).astype(np.float32).astype(bfloat16)

    def rounded(v):
        return v.astype(np.float32).astype(bfloat16).astype(np.float32)

    gate, up = x[:, :20].astype(np.float32), x[:, 20:].astype(np.float32)
    share = rounded(1 / (1 + np.exp(-rounded(gate * np.float32(1.702)).astype(np.float64))))
    expected = (rounded(up + 1) * rounded(gate * share)).astype(bfloat16)
    y = clamped_swiglu(x)
    assert y.dtype == bfloat16
    assert (y != expected).mean() < 0.002
    once = (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)).astype(bfloat16)
    assert (y != once).mean() > 0.1


@pytest.mark.parametrize("op", [clamped_swiglu, lambda x: gated_activation(x, "silu")])
def test_an_odd_number_of_columns(op):
    with pytest.raises(ConfigError, match="not 5"):
        op(np.zeros((1, 5), np.float32))
