"""Root-mean-square and mean-variance normalisation over the last axis."""

from __future__ import annotations

import numpy as np

from cutp.ops.rounding import as_float32, rounded, store


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, *, weight_offset: float = 0.0,
             multiply_before_cast: bool = False, mean_square: np.ndarray | None = None,
             out: np.ndarray | None = None) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last axis (Zhang & Sennrich, 2019).

    x: [..., d]; weight: [d]. The result has the shape and dtype of `x`.
    `multiply_before_cast` is the order of the last two roundings: False rounds the normalised value first
    and then the product (LlamaRMSNorm), True rounds once, after the product (Gemma2RMSNorm).
    mean_square: float32 [..., 1], taken instead of that of `x`, for an `x` that is one rank's part of a longer vector
    (see `square_sum`).
    """
    x32 = as_float32(x)
    if mean_square is None:
        mean_square = np.mean(np.square(x32), axis=-1, keepdims=True, dtype=np.float32)
    normalised = x32 * (1.0 / np.sqrt(mean_square + np.float32(eps)))
    if not multiply_before_cast:
        normalised = rounded(normalised, x.dtype)
    scale = as_float32(weight)
    if weight_offset:
        scale = scale + np.float32(weight_offset)
    return store(normalised * scale, x.dtype, out)


def square_sum(x: np.ndarray) -> np.ndarray:
    """The sum of squares over the last axis of `x` [..., d], float32 [..., 1]."""
    return np.sum(np.square(as_float32(x)), axis=-1, keepdims=True, dtype=np.float32)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float,
               out: np.ndarray | None = None) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, rounded once (Ba et al., 2016).

    x: [..., d]; weight, bias: [d] (bias may be None). The result has the shape and dtype of `x`.
    """
    x32 = as_float32(x)
    centred = x32 - x32.mean(axis=-1, keepdims=True, dtype=np.float32)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True, dtype=np.float32)
    y = centred * (1.0 / np.sqrt(variance + np.float32(eps))) * as_float32(weight)
    if bias is not None:
        y = y + as_float32(bias)
    return store(y, x.dtype, out)
