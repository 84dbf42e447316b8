"""Launchers of rms_norm.cu. The specification is `cutp.ops.rms_norm.rms_norm`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES

_MAX_VECTORS_PER_THREAD = {"bfloat16": 2, "float16": 2, "float32": 4}
_WARP, _MAX_THREADS = 32, 1024
_ROWS_PER_BLOCK = 4  # of rows that take one warp each


def rms_norm(x: Any, weight: Any, eps: float, *, weight_offset: float = 0.0, multiply_before_cast: bool = False,
             out: Any, pdl: bool = False) -> None:
    """out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last axis.

    x, out: [..., d], weight: [d], contiguous, of one dtype (bfloat16, float16 or float32); d is a multiple of 16 bytes,
    at most 16384. `out` may be `x`. ConfigError otherwise.
    """
    dim = _check({"x": x, "out": out}, weight)
    _launch("rms_norm", x, [x, weight, out], dim, eps, weight_offset, multiply_before_cast, pdl)


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, *, weight_offset: float = 0.0,
                 multiply_before_cast: bool = False, residual_out: Any, out: Any, pdl: bool = False) -> None:
    """residual_out = x + residual, rounded; out = rms_norm(residual_out, weight, eps).

    x, residual, residual_out, out: [..., d]; otherwise as `rms_norm`. `residual_out` may be `residual` or `x`, and
    `out` may be `x` or `residual`; `residual_out` and `out` are two arrays.
    """
    dim = _check({"x": x, "residual": residual, "residual_out": residual_out, "out": out}, weight)
    _launch("add_rms_norm", x, [x, residual, weight, residual_out, out], dim, eps, weight_offset, multiply_before_cast,
            pdl)


def _check(rows: dict[str, Any], weight: Any) -> int:
    """The row length; ConfigError, naming the argument, if an array does not fit."""
    x = rows["x"]
    if x.dtype.name not in DTYPE_DEFINES:
        raise ConfigError(f"rms_norm: x has dtype {x.dtype}; it needs {', '.join(DTYPE_DEFINES)}")
    if x.ndim == 0:
        raise ConfigError("rms_norm: x has no axis to normalise over")
    dim = x.shape[-1]
    for name, array, shape in (*((n, a, x.shape) for n, a in rows.items()), ("weight", weight, (dim,))):
        if array.shape != shape:
            raise ConfigError(f"rms_norm: {name} has shape {array.shape}; it needs {shape} for x of shape {x.shape}")
        if array.dtype != x.dtype:
            raise ConfigError(f"rms_norm: {name} has dtype {array.dtype}, but x has {x.dtype}")
        if not array.flags.c_contiguous:
            raise ConfigError(f"rms_norm: {name} of shape {array.shape} and strides {array.strides} is not contiguous")
    width = 16 // x.dtype.itemsize
    largest = _MAX_VECTORS_PER_THREAD[x.dtype.name] * _MAX_THREADS * width
    if dim % width or not 0 < dim <= largest:
        raise ConfigError(f"rms_norm: rows of {dim} {x.dtype} elements; their number must be a multiple of {width}, "
                          f"at most {largest}")
    return dim


def _launch(name: str, x: Any, arrays: list[Any], dim: int, eps: float, weight_offset: float,
            multiply_before_cast: bool, pdl: bool) -> None:
    rows = x.size // dim
    if rows == 0:
        return
    vectors = dim * x.dtype.itemsize // 16
    # The fewest vectors per thread that fit, a power of two as the variants are; then whole warps.
    per_thread = 1
    while per_thread * _MAX_THREADS < vectors:
        per_thread *= 2
    threads = -(-vectors // (per_thread * _WARP)) * _WARP
    rows_per_block = _ROWS_PER_BLOCK if threads == _WARP else 1
    launch(
        "rms_norm.cu", name, -(-rows // rows_per_block), (threads, rows_per_block),
        [*arrays, np.int32(rows), np.int32(dim), np.float32(eps), np.float32(weight_offset),
         np.int32(multiply_before_cast)],
        defines=(f"DTYPE={DTYPE_DEFINES[x.dtype.name]}", f"VECTORS_PER_THREAD={per_thread}"), pdl=pdl,
    )
