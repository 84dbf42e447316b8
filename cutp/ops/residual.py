"""The residual stream: scaling and adding, each rounded to its dtype."""

from __future__ import annotations

import numpy as np

from cutp.ops.rounding import as_float32, rounded, store


def scale(x: np.ndarray, factor: float, out: np.ndarray | None = None) -> np.ndarray:
    """x * factor, any shape, in the dtype of `x`. A factor of 1 returns `x` itself when there is no `out`."""
    if factor == 1.0 and out is None:
        return x
    return store(as_float32(x) * np.float32(factor), x.dtype, out)


def clip(x: np.ndarray, limit: float, out: np.ndarray | None = None) -> np.ndarray:
    """x clamped to [-limit, limit], any shape, in the dtype of `x`."""
    # np.clip gives float32 for bfloat16; rounding its result also rounds the bounds.
    return store(np.clip(as_float32(x), np.float32(-limit), np.float32(limit)), x.dtype, out)


def scale_rows(x: np.ndarray, shares: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Each row of x [T, d] times its number of shares [T, 1], rounded once, in the dtype of `x`."""
    return store(as_float32(shares) * as_float32(x), x.dtype, out)


def residual_add(x: np.ndarray, y: np.ndarray, multiplier: float = 1.0, out: np.ndarray | None = None) -> np.ndarray:
    """x + y * multiplier, the product rounded before the sum and the sum again; x and y of one shape and dtype."""
    addend = as_float32(y)
    if multiplier != 1.0:
        addend = rounded(addend * np.float32(multiplier), x.dtype)
    return store(as_float32(x) + addend, x.dtype, out)


def finish_logits(logits: np.ndarray, scaling: float = 1.0, softcapping: float | None = None) -> np.ndarray:
    """logits / scaling in float32, then softcapping * tanh(that / softcapping) unless it is None; float32."""
    logits = logits.astype(np.float32, copy=False)
    if scaling != 1.0:
        logits = logits / np.float32(scaling)
    if softcapping is not None:
        cap = np.float32(softcapping)
        logits = cap * np.tanh(logits / cap)
    return logits
