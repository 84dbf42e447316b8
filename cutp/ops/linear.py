"""The linear map y = x W^T + b."""

from __future__ import annotations

import numpy as np

from cutp.ops.rounding import as_float32, store


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None,
           out: np.ndarray | None = None) -> np.ndarray:
    """x [T, K] times weight [N, K] transposed, plus bias [N]; [T, N] in the dtype of `x`.

    Products are summed in float32 and the bias is added before the one rounding, as cuBLAS does.
    """
    y = as_float32(x) @ as_float32(weight).T
    if bias is not None:
        y += bias
    return store(y, x.dtype, out)


def linear_per_head(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [T, H, K] times each head's own matrix, weight [H, N, K] transposed; [T, H, N] in the dtype of `x`.

    Products are summed in float32 and rounded once. `weight` may be any view, for example a transposed one.
    """
    y = as_float32(x).transpose(1, 0, 2) @ as_float32(weight).transpose(0, 2, 1)
    return y.transpose(1, 0, 2).astype(x.dtype, copy=False)
