"""Launchers of rms_norm.cu. The specifications are in `cutp.ops.rms_norm`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, LaunchPlan

_MAX_VECTORS_PER_THREAD = {"bfloat16": 2, "float16": 2, "float32": 4}
_WARP, _MAX_THREADS = 32, 1024
_ROWS_PER_BLOCK = 4  # of rows that take one warp each


def rms_norm(x: Any, weight: Any, eps: float, *, weight_offset: float = 0.0, multiply_before_cast: bool = False,
             square_sums: Any = None, total_dim: int | None = None, out: Any, pdl: bool = False) -> None:
    """out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last axis.

    x, out: [..., d], weight: [d], of one dtype (bfloat16, float16 or float32); d is a multiple of 16 bytes, at most
    16384. They are contiguous, but that what lies along the first axis of x and of out, the tokens, may be apart, by a
    multiple of 16 bytes. `out` may be `x`. square_sums: float32 [T, 1], for an x [T, d] that is a part of vectors of
    `total_dim` elements: the sums of squares over those. ConfigError otherwise.
    """
    plan = _rms_norm_plan(layout(x), layout(weight), layout(out), optional_layout(square_sums), total_dim)
    _launch("rms_norm", plan, [x, weight, out, square_sums],
            [np.float32(eps), np.float32(weight_offset), np.int32(multiply_before_cast)], pdl)


def square_sum(x: Any, *, out: Any, pdl: bool = False) -> None:
    """out = the sum of squares of each row. x: [T, d], rows as for `rms_norm`; out: float32 [T, 1], rows apart as they
    like. ConfigError otherwise."""
    _launch("square_sum", _square_sum_plan(layout(x), layout(out)), [x, out], [], pdl)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float, *, out: Any, pdl: bool = False) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias, over the last axis.

    x, out: [..., d]; weight and bias (or None): [d]; otherwise as contiguous arrays of `rms_norm`.
    """
    _launch("layer_norm", _layer_norm_plan(layout(x), layout(weight), optional_layout(bias), layout(out)),
            [x, weight, bias, out], [np.float32(eps)], pdl)


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, *, weight_offset: float = 0.0,
                 multiply_before_cast: bool = False, residual_out: Any, out: Any, pdl: bool = False) -> None:
    """residual_out = x + residual, rounded; out = rms_norm(residual_out, weight, eps).

    x, residual, residual_out, out: [..., d]; otherwise as `rms_norm`. `residual_out` may be `residual` or `x`, and
    `out` may be `x` or `residual`; `residual_out` and `out` are two arrays.
    """
    plan = _add_rms_norm_plan(layout(x), layout(residual), layout(weight), layout(residual_out), layout(out))
    _launch("add_rms_norm", plan, [x, residual, weight, residual_out, out],
            [np.float32(eps), np.float32(weight_offset), np.int32(multiply_before_cast)], pdl)


def _launch(name: str, plan: LaunchPlan | None, arrays: list[Any], settings: list[np.generic], pdl: bool) -> None:
    if plan is not None:
        launch("rms_norm.cu", name, plan.grid, plan.block, [*arrays, *plan.numbers, *settings], defines=plan.defines,
               pdl=pdl)


@remembered
def _rms_norm_plan(x: Layout, weight: Layout, out: Layout, square_sums: Layout | None,
                   total_dim: int | None) -> LaunchPlan | None:
    dim = _check({"x": x, "out": out}, weight, apart=True)
    strides = _token_stride("rms_norm", "x", x), _token_stride("rms_norm", "out", out)
    if (square_sums is None) != (total_dim is None):
        raise ConfigError("rms_norm: square_sums and total_dim are given together")
    sums_stride = 0
    if square_sums is not None:
        sums_stride = _check_sums("rms_norm", "square_sums", x, square_sums)
        if total_dim < dim:
            raise ConfigError(f"rms_norm: rows of {dim} elements are no part of {total_dim}")
    per_token = max(1, x.size // dim // x.shape[0]) if x.ndim > 1 and x.shape[0] else 1
    return _plan(x, dim, np.int32(per_token), *map(np.int64, (*strides, sums_stride)), np.int32(total_dim or dim))


@remembered
def _square_sum_plan(x: Layout, out: Layout) -> LaunchPlan | None:
    dim = _check({"x": x}, None, apart=True)
    if x.ndim != 2:
        raise ConfigError(f"square_sum: x has shape {x.shape}; it needs [T, d]")
    return _plan(x, dim, np.int64(_token_stride("square_sum", "x", x)),
                 np.int64(_check_sums("square_sum", "out", x, out)))


@remembered
def _layer_norm_plan(x: Layout, weight: Layout, bias: Layout | None, out: Layout) -> LaunchPlan | None:
    dim = _check({"x": x, "out": out}, weight)
    if bias is not None:
        _check({"x": x}, bias, "bias")
    return _plan(x, dim)


@remembered
def _add_rms_norm_plan(x: Layout, residual: Layout, weight: Layout, residual_out: Layout,
                       out: Layout) -> LaunchPlan | None:
    return _plan(x, _check({"x": x, "residual": residual, "residual_out": residual_out, "out": out}, weight))


def _plan(x: Layout, dim: int, *numbers: np.generic) -> LaunchPlan | None:
    """For the rows of `dim` elements of x, with their number and `dim` before the other numbers; None for no rows."""
    rows = x.size // dim
    if rows == 0:
        return None
    vectors = dim * x.dtype.itemsize // 16
    # The fewest vectors per thread that fit, a power of two as the variants are; then whole warps.
    per_thread = 1
    while per_thread * _MAX_THREADS < vectors:
        per_thread *= 2
    threads = -(-vectors // (per_thread * _WARP)) * _WARP
    rows_per_block = _ROWS_PER_BLOCK if threads == _WARP else 1
    return LaunchPlan(-(-rows // rows_per_block), (threads, rows_per_block),
                      (f"DTYPE={DTYPE_DEFINES[x.dtype.name]}", f"VECTORS_PER_THREAD={per_thread}"),
                      (np.int32(rows), np.int32(dim), *numbers))


def _check(rows: dict[str, Layout], weight: Layout | None, weight_name: str = "weight", apart: bool = False) -> int:
    """The row length; ConfigError, naming the argument, if an array does not fit. apart: whether what lies along the
    first axis of the rows may be apart."""
    x = rows["x"]
    if x.dtype.name not in DTYPE_DEFINES:
        raise ConfigError(f"rms_norm: x has dtype {x.dtype}; it needs {', '.join(DTYPE_DEFINES)}")
    if x.ndim == 0:
        raise ConfigError("rms_norm: x has no axis to normalise over")
    dim = x.shape[-1]
    weights = [] if weight is None else [(weight_name, weight, (dim,))]
    for name, array, shape in (*((n, a, x.shape) for n, a in rows.items()), *weights):
        if array.shape != shape:
            raise ConfigError(f"rms_norm: {name} has shape {array.shape}; it needs {shape} for x of shape {x.shape}")
        if array.dtype != x.dtype:
            raise ConfigError(f"rms_norm: {name} has dtype {array.dtype}, but x has {x.dtype}")
        if apart and name in rows:
            _token_stride("rms_norm", name, array)
        elif not array.is_contiguous:
            raise ConfigError(f"rms_norm: {name} of shape {array.shape} and strides {array.strides} is not contiguous")
    width = 16 // x.dtype.itemsize
    largest = _MAX_VECTORS_PER_THREAD[x.dtype.name] * _MAX_THREADS * width
    if dim % width or not 0 < dim <= largest:
        raise ConfigError(f"rms_norm: rows of {dim} {x.dtype} elements; their number must be a multiple of {width}, "
                          f"at most {largest}")
    return dim


def _token_stride(op: str, name: str, array: Layout) -> int:
    """Elements from one entry of the first axis to the next; ConfigError unless each is contiguous by itself, and they
    lie apart, in order, by multiples of 16 bytes."""
    inside, item = math.prod(array.shape[1:]), array.dtype.itemsize
    if array.is_contiguous:
        return inside if array.ndim > 1 else 0
    stride = array.strides[0] // item
    if array.ndim == 1 or not array.inner.is_contiguous or stride < inside or stride * item % 16:
        raise ConfigError(f"{op}: {name} of shape {array.shape} and strides {array.strides} is not contiguous, but for "
                          "its first axis, along which it may be a multiple of 16 bytes apart")
    return stride


def _check_sums(op: str, name: str, x: Layout, sums: Layout) -> int:
    """Elements from one sum to the next."""
    if x.ndim != 2 or sums.shape != (x.shape[0], 1) or sums.dtype.name != "float32":
        raise ConfigError(f"{op}: {name} is {sums.dtype} {sums.shape}; x of shape {x.shape} needs one float32 a row")
    return sums.strides[0] // sums.dtype.itemsize
