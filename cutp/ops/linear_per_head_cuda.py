"""Launcher of linear_per_head.cu. The specification is `cutp.ops.linear.linear_per_head`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, VECTOR_BYTES, LaunchPlan, check_axes, check_dtype, vector_width

_THREADS, _MAX_GRID = 128, 65535


def linear_per_head(x: Any, weight: Any, *, out: Any, pdl: bool = False) -> None:
    """out[:, h] = x[:, h] weight[h]^T for each head h; sums in float32, rounded once.

    x: [T, H, K]; weight: [H, N, K], in memory so or, as a transposed view, as [H, K, N]; out: [T, H, N]; of one dtype
    (bfloat16, float16 or float32). The last axis of x and out, and one of the last two of weight, has neighbouring
    elements; the other axes may lie apart, of x and weight by multiples of 16 bytes. K, and N of a transposed weight,
    are multiples of 16 bytes. ConfigError otherwise. The bits of a row depend on that row and its head only.
    """
    plan = _plan(layout(x), layout(weight), layout(out))
    if plan is not None:
        launch("linear_per_head.cu", "linear_per_head", plan.grid, plan.block, [x, weight, out, *plan.numbers],
               defines=plan.defines, pdl=pdl)


@remembered
def _plan(x: Layout, weight: Layout, out: Layout) -> LaunchPlan | None:
    op = "linear_per_head"
    check_dtype(op, "x", x)
    for name, array, axes in (("x", x, "T, H, K"), ("weight", weight, "H, N, K"), ("out", out, "T, H, N")):
        check_axes(op, name, array, axes)
        if array.dtype != x.dtype:
            raise ConfigError(f"{op}: {name} has dtype {array.dtype}, but x has {x.dtype}")
    (tokens, heads, k), n = x.shape, weight.shape[1]
    for name, array, shape in (("weight", weight, (heads, n, k)), ("out", out, (tokens, heads, n))):
        if array.shape != shape:
            raise ConfigError(f"{op}: {name} has shape {array.shape}; it needs {shape} for x of shape {x.shape}")
    if x.size == 0 or n == 0:
        return None
    item, width = x.dtype.itemsize, vector_width(x.dtype)
    transposed = weight.strides[2] != item
    if k % width or transposed and n % width:
        raise ConfigError(f"{op}: weights of shape {weight.shape}; they need multiples of {VECTOR_BYTES} bytes")
    x_strides = _strides(op, "x", x, x.strides[:2], x.strides[2], VECTOR_BYTES)
    rows, last = (2, 1) if transposed else (1, 2)
    weight_strides = _strides(op, "weight", weight, (weight.strides[rows], weight.strides[0]), weight.strides[last],
                              VECTOR_BYTES)
    out_strides = _strides(op, "out", out, out.strides[:2], out.strides[2], item)
    # What a block computes, as in linear_per_head.cu.
    block_rows, block_columns = (8, _THREADS) if x.dtype.name == "float32" else (32, _THREADS)
    grid = -(-n // block_columns), -(-tokens // block_rows), heads
    if max(grid[1:]) > _MAX_GRID:
        raise ConfigError(f"{op}: x of shape {x.shape} is too large for one launch")
    return LaunchPlan(grid, _THREADS, (f"DTYPE={DTYPE_DEFINES[x.dtype.name]}", f"TRANSPOSED={int(transposed)}"),
                      (np.int32(tokens), np.int32(n), np.int32(k),
                       *map(np.int64, (*x_strides, *weight_strides, *out_strides))))


def _strides(op: str, name: str, array: Layout, outer: tuple[int, ...], inner: int, alignment: int) -> list[int]:
    """`outer` in elements; ConfigError unless those are multiples of `alignment` bytes and `inner` is one element."""
    item = array.dtype.itemsize
    if inner != item or any(stride % alignment for stride in outer):
        raise ConfigError(f"{op}: {name} of shape {array.shape} and strides {array.strides} has rows that are not "
                          f"contiguous, or no multiple of {alignment} bytes apart")
    return [stride // item for stride in outer]
