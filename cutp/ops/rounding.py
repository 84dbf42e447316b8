"""Where a value is rounded: float32 in, the model's dtype out."""

from __future__ import annotations

import numpy as np

float32 = np.dtype(np.float32)


def as_float32(x: np.ndarray) -> np.ndarray:
    """`x` as float32; the same array when it is float32 already."""
    return x if x.dtype == float32 else x.astype(float32)


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 `x` with its values rounded to `dtype`, still float32 (one rounding point inside an operation)."""
    return x if dtype == float32 or x.dtype == dtype else x.astype(dtype).astype(float32)


def store(x: np.ndarray, dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
    """`x` rounded to `dtype`, written to `out` where one is given."""
    if out is None:
        return x.astype(dtype, copy=False)
    out[...] = rounded(x, dtype)
    return out
