"""Launchers of residual.cu.

The specifications are the functions of `cutp.ops.residual` of the same names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import (
    DTYPE_DEFINES,
    MAX_ROWS,
    VECTOR_BYTES,
    LaunchPlan,
    check_array,
    check_axes,
    check_dtype,
    vector_width,
)

_THREADS, _MAX_GRID_Y = 256, 65535
_LOGITS = 8  # that a thread of finish_logits works on


def scale(x: Any, factor: float, *, out: Any, pdl: bool = False) -> None:
    """out = x * factor. x, out: any shape, contiguous, of one dtype (bfloat16, float16 or float32); `out` may be `x`.
    ConfigError otherwise."""
    _launch("scale", [x, out], [np.float32(factor)], pdl)


def clip(x: Any, limit: float, *, out: Any, pdl: bool = False) -> None:
    """out = x clamped to [-limit, limit], for a limit that is not negative; arrays as for `scale`."""
    if not limit >= 0:
        raise ConfigError(f"clip: limit is {limit}; it must not be negative")
    _launch("clip", [x, out], [np.float32(limit)], pdl)


def scale_rows(x: Any, shares: Any, *, out: Any, pdl: bool = False) -> None:
    """out = x * shares. x, out: [T, d], d a multiple of 16 bytes; shares: [T, 1]; otherwise as for `scale`."""
    plan = _rows_plan(layout(x), layout(shares), layout(out))
    launch("residual.cu", "scale_rows", plan.grid, plan.block, [x, shares, out, *plan.numbers], defines=plan.defines,
           pdl=pdl)


def residual_add(x: Any, y: Any, multiplier: float = 1.0, *, out: Any, pdl: bool = False) -> None:
    """out = x + y * multiplier, the product rounded before the sum. x, y, out: as for `scale`; `out` may be x or y."""
    _launch("residual_add", [x, y, out], [np.float32(multiplier)], pdl)


def finish_logits(logits: Any, logits_scaling: float = 1.0, softcapping: float | None = None, *, out: Any,
                  pdl: bool = False) -> None:
    """out = logits / logits_scaling in float32, then softcapping * tanh(that / softcapping) unless it is None.

    logits: any shape, contiguous, bfloat16, float16 or float32; out: float32 of that shape, `logits` itself if that is
    float32. ConfigError otherwise, and for a scaling or cap of 0.
    """
    for name, value in (("logits_scaling", logits_scaling), ("softcapping", softcapping)):
        if value is not None and np.float32(value) == 0:
            raise ConfigError(f"finish_logits: {name} is {value}, but logits are divided by it")
    cap = np.float32(0.0 if softcapping is None else softcapping)
    _launch("finish_logits", [logits, out], [np.float32(logits_scaling), cap], pdl)


def _launch(op: str, arrays: list[Any], settings: list[np.generic], pdl: bool) -> None:
    """Starts an elementwise kernel; the last array is written."""
    plan = _plan(op, tuple(map(layout, arrays)))
    launch("residual.cu", op, plan.grid, plan.block, [*arrays, *plan.numbers, *settings], defines=plan.defines, pdl=pdl)


@remembered
def _plan(op: str, arrays: tuple[Layout, ...]) -> LaunchPlan:
    x, out = arrays[0], arrays[-1]
    first = "logits" if op == "finish_logits" else "x"
    check_dtype(op, first, x)
    check_array(op, first, x, x.shape)
    for y in arrays[1:-1]:
        check_array(op, "y", y, x.shape, x.dtype)
    check_array(op, "out", out, x.shape, np.dtype(np.float32) if op == "finish_logits" else x.dtype)
    each = _LOGITS if op == "finish_logits" else vector_width(x.dtype)
    return LaunchPlan(-(-x.size // (_THREADS * each)), _THREADS,
                      (f"DTYPE={DTYPE_DEFINES[x.dtype.name]}",), (np.int64(x.size),))


@remembered
def _rows_plan(x: Layout, shares: Layout, out: Layout) -> LaunchPlan:
    op = "scale_rows"
    check_axes(op, "x", x, "T, d")
    check_dtype(op, "x", x)
    rows, dim = x.shape
    for name, array, shape in (("x", x, x.shape), ("out", out, x.shape), ("shares", shares, (rows, 1))):
        check_array(op, name, array, shape, x.dtype)
    width = vector_width(x.dtype)
    blocks = -(-dim // (_THREADS * width))
    if dim % width or rows > MAX_ROWS or blocks > _MAX_GRID_Y:
        raise ConfigError(f"{op}: x of shape {x.shape}; rows need a multiple of {VECTOR_BYTES} bytes, and the grid has "
                          "a limit")
    return LaunchPlan((rows, blocks), _THREADS, (f"DTYPE={DTYPE_DEFINES[x.dtype.name]}",), (np.int32(dim),))
