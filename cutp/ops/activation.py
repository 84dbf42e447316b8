"""Activations of the feed-forward layer, alone and gated."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cutp.errors import ConfigError, UnsupportedModelError
from cutp.ops.rounding import as_float32, rounded, store


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # exp of a non-positive number only: no overflow at either end.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.frompyfunc(math.erf, 1, 1)(x).astype(np.float32)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x * np.float32(1 / math.sqrt(2.0)))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(np.float32(math.sqrt(2.0 / math.pi)) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}
_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def activation_name(name: str) -> str:
    """The table's name for `name` (Hugging Face's spellings included); UnsupportedModelError when unknown."""
    known = _ALIASES.get(name, name)
    if known not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not one of {', '.join([*ACTIVATIONS, *_ALIASES])}")
    return known


def activation(x: np.ndarray, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """act(x) elementwise, rounded once to the dtype of `x`."""
    return store(ACTIVATIONS[activation_name(name)](as_float32(x)), x.dtype, out)


def gated_activation(gate_up: np.ndarray, name: str, *, limit: float | None = None,
                     out: np.ndarray | None = None) -> np.ndarray:
    """act(gate) * up (SwiGLU for "silu"; Shazeer, 2020).

    gate_up: [T, 2F], the gate in the first F columns and up in the others. Returns [T, F]. The activated gate
    is rounded before the product, and the product again. `limit` clamps gate from above and up from both sides
    before the activation.
    """
    width = _half(gate_up)
    gate, up = as_float32(gate_up[..., :width]), as_float32(gate_up[..., width:])
    if limit is not None:
        gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
    activated = rounded(ACTIVATIONS[activation_name(name)](gate), gate_up.dtype)
    return store(activated * up, gate_up.dtype, out)


def clamped_swiglu(gate_up: np.ndarray, *, alpha: float = 1.702, limit: float = 7.0,
                   out: np.ndarray | None = None) -> np.ndarray:
    """gate * sigmoid(alpha * gate) * (up + 1), the gate clamped from above and up from both sides (GptOssExperts).

    gate_up: [T, 2F], the gate in the first F columns and up in the others. Returns [T, F]. Every step is rounded to the
    dtype of `gate_up`, as Hugging Face's implementation does.
    """
    width = _half(gate_up)
    dtype = gate_up.dtype
    gate = np.minimum(as_float32(gate_up[..., :width]), np.float32(limit))
    up = np.clip(as_float32(gate_up[..., width:]), np.float32(-limit), np.float32(limit))
    share = rounded(_sigmoid(rounded(gate * np.float32(alpha), dtype)), dtype)
    return store(rounded(up + np.float32(1), dtype) * rounded(gate * share, dtype), dtype, out)


def _half(gate_up: np.ndarray) -> int:
    if gate_up.shape[-1] % 2:
        raise ConfigError(f"gate and up side by side need an even number of columns, not {gate_up.shape[-1]}")
    return gate_up.shape[-1] // 2
