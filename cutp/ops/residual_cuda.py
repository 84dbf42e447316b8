"""Launchers of residual.cu.

The specifications are `scale`, `clip`, `scale_rows` and `residual_add` of `cutp.ops.residual`, and for `finish_logits`
what `DistributedTransformer` does with the output of its head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import (
    DTYPE_DEFINES,
    MAX_ROWS,
    VECTOR_BYTES,
    check_array,
    check_axes,
    check_dtype,
    vector_width,
)

_THREADS, _MAX_GRID_Y = 256, 65535


def scale(x: Any, factor: float, *, out: Any, pdl: bool = False) -> None:
    """out = x * factor. x, out: any shape, contiguous, of one dtype (bfloat16, float16 or float32); `out` may be `x`.
    ConfigError otherwise."""
    _check("scale", {"x": x, "out": out})
    _launch("scale", x, [x, out], [np.float32(factor)], pdl)


def clip(x: Any, limit: float, *, out: Any, pdl: bool = False) -> None:
    """out = x clamped to [-limit, limit], for a limit that is not negative; arrays as for `scale`."""
    _check("clip", {"x": x, "out": out})
    if not limit >= 0:
        raise ConfigError(f"clip: limit is {limit}; it must not be negative")
    _launch("clip", x, [x, out], [np.float32(limit)], pdl)


def scale_rows(x: Any, shares: Any, *, out: Any, pdl: bool = False) -> None:
    """out = x * shares. x, out: [T, d], d a multiple of 16 bytes; shares: [T, 1]; otherwise as for `scale`."""
    op = "scale_rows"
    check_axes(op, "x", x, "T, d")
    _check(op, {"x": x, "out": out})
    rows, dim = x.shape
    check_array(op, "shares", shares, (rows, 1), x.dtype)
    width = vector_width(x.dtype)
    blocks = -(-dim // (_THREADS * width))
    if dim % width or rows > MAX_ROWS or blocks > _MAX_GRID_Y:
        raise ConfigError(f"{op}: x of shape {x.shape}; rows need a multiple of {VECTOR_BYTES} bytes, and the grid has "
                          "a limit")
    launch("residual.cu", op, (rows, blocks), _THREADS, [x, shares, out, np.int32(dim)],
           defines=(f"DTYPE={DTYPE_DEFINES[x.dtype.name]}",), pdl=pdl)


def residual_add(x: Any, y: Any, multiplier: float = 1.0, *, out: Any, pdl: bool = False) -> None:
    """out = x + y * multiplier, the product rounded before the sum. x, y, out: as for `scale`; `out` may be x or y."""
    _check("residual_add", {"x": x, "y": y, "out": out})
    _launch("residual_add", x, [x, y, out], [np.float32(multiplier)], pdl)


def finish_logits(logits: Any, logits_scaling: float = 1.0, softcapping: float | None = None, *, out: Any,
                  pdl: bool = False) -> None:
    """out = logits / logits_scaling in float32, then softcapping * tanh(that / softcapping) unless it is None.

    logits: any shape, contiguous, bfloat16, float16 or float32; out: float32 of that shape, `logits` itself if that is
    float32. ConfigError otherwise, and for a scaling or cap of 0.
    """
    check_dtype("finish_logits", "logits", logits)
    check_array("finish_logits", "logits", logits, logits.shape)
    check_array("finish_logits", "out", out, logits.shape, np.dtype(np.float32))
    for name, value in (("logits_scaling", logits_scaling), ("softcapping", softcapping)):
        if value is not None and np.float32(value) == 0:
            raise ConfigError(f"finish_logits: {name} is {value}, but logits are divided by it")
    cap = np.float32(0.0 if softcapping is None else softcapping)
    _launch("finish_logits", logits, [logits, out], [np.float32(logits_scaling), cap], pdl)


def _check(op: str, arrays: dict[str, Any]) -> None:
    x = arrays["x"]
    check_dtype(op, "x", x)
    for name, array in arrays.items():
        check_array(op, name, array, x.shape, x.dtype)


def _launch(name: str, x: Any, arrays: list[Any], scalars: list[np.generic], pdl: bool) -> None:
    launch(
        "residual.cu", name, -(-x.size // (_THREADS * vector_width(x.dtype))), _THREADS,
        [*arrays, np.int64(x.size), *scalars], defines=(f"DTYPE={DTYPE_DEFINES[x.dtype.name]}",), pdl=pdl,
    )
