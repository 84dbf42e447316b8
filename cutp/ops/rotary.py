"""Rotary position embedding: the table of angles, and its application to query and key heads."""

from __future__ import annotations

import numpy as np

from cutp.ops.rounding import as_float32, rounded, store


def rotary_table(positions: np.ndarray, inv_freq: np.ndarray, attention_scaling: np.ndarray | float,
                 dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * inv_freq, times the attention scaling, rounded to `dtype`.

    positions: int [T]; inv_freq: float32 [R/2] or one row per token [T, R/2]; attention_scaling: a number or
    [T]. Returns two float32 arrays [T, R/2] whose values are representable in `dtype`. The angle is a float32
    product, as in Hugging Face's rotary modules: at large positions its rounding is part of the result.
    """
    angles = positions.astype(np.float32)[:, None] * inv_freq
    scaling = np.asarray(attention_scaling, np.float32)
    if scaling.ndim:
        scaling = scaling[:, None]
    return rounded(np.cos(angles) * scaling, dtype), rounded(np.sin(angles) * scaling, dtype)


def apply_rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleaved: bool = False,
                 out: np.ndarray | None = None) -> np.ndarray:
    """Rotates the first R = 2 * cos.shape[1] channels of every head (Su et al., 2021); the rest passes through.

    x: [T, H, D]; cos, sin: float32 [T, R/2]. Channel pairs are (i, i + R/2), or (2i, 2i + 1) when
    `interleaved`. Both products are rounded to the dtype of `x` before they are added, and the sum again.
    """
    half = cos.shape[1]
    x32 = as_float32(x)
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        first, second = x32[..., 0:2 * half:2], x32[..., 1:2 * half:2]
    else:
        first, second = x32[..., :half], x32[..., half:2 * half]
    dtype = x.dtype
    y = np.empty_like(x32)
    rotated_first = rounded(first * cos, dtype) - rounded(second * sin, dtype)
    rotated_second = rounded(second * cos, dtype) + rounded(first * sin, dtype)
    if interleaved:
        y[..., 0:2 * half:2], y[..., 1:2 * half:2] = rotated_first, rotated_second
    else:
        y[..., :half], y[..., half:2 * half] = rotated_first, rotated_second
    y[..., 2 * half:] = x32[..., 2 * half:]
    return store(y, dtype, out)
