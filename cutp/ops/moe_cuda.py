"""Launchers of moe.cu. The specifications are `expert_rows` and `combine_experts` of `cutp.ops.moe`.

What experts compute has room for T * k rows, the most that there can be; rows at and beyond offsets[count], which only
the device knows, are neither written nor read.
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

_WARP, _THREADS, _MAX_GRID_Y = 32, 256, 65535
_MANY_SLOTS = 4096  # from which on blocks of the most threads are worth while


def expert_rows(experts: Any, first: int, count: int, *, tokens: Any, offsets: Any, positions: Any,
                pdl: bool = False) -> None:
    """`moe.expert_rows` of experts first .. first + count - 1.

    experts: int32 [T, k], with -1 for slots that are padding. Written are tokens: int32 [T * k], in its first
    offsets[count] elements; offsets: int32 [count + 1]; positions: int32 [T, k]. Contiguous; ConfigError otherwise.
    """
    plan = _rows_plan(layout(experts), first, count, layout(tokens), layout(offsets), layout(positions))
    launch("moe.cu", "expert_rows", plan.grid, plan.block, [experts, tokens, offsets, positions, *plan.numbers],
           defines=plan.defines, pdl=pdl)


def combine_experts(y: Any, positions: Any, weights: Any, *, out: Any, pdl: bool = False) -> None:
    """out = `moe.combine_experts`. y: [rows, H]; positions: int32 [T, k]; weights: float32 [T, k]; out: [T, H].

    y and out have one dtype (bfloat16, float16 or float32); H is a multiple of 16 bytes; positions are below the number
    of rows (not checked). Contiguous; ConfigError otherwise.
    """
    plan = _combine_plan(layout(y), layout(positions), layout(weights), layout(out))
    launch("moe.cu", "combine_experts", plan.grid, plan.block, [y, positions, weights, out, *plan.numbers],
           defines=plan.defines, pdl=pdl)


@remembered
def _rows_plan(experts: Layout, first: int, count: int, tokens: Layout, offsets: Layout,
               positions: Layout) -> LaunchPlan:
    op = "expert_rows"
    check_axes(op, "experts", experts, "T, k")
    check_array(op, "experts", experts, experts.shape, np.int32)
    if first < 0 or count < 0 or first + count > MAX_ROWS:
        raise ConfigError(f"{op}: there are no experts {first} .. {first + count - 1}")
    if experts.size > MAX_ROWS - _WARP * 4:
        raise ConfigError(f"{op}: experts of shape {experts.shape} is too large for one launch")
    check_array(op, "tokens", tokens, (experts.size,), np.int32)
    check_array(op, "offsets", offsets, (count + 1,), np.int32)
    check_array(op, "positions", positions, experts.shape, np.int32)
    return LaunchPlan(count + 1, _THREADS if experts.size < _MANY_SLOTS else 4 * _THREADS, ("DTYPE=F32",),
                      tuple(map(np.int32, (experts.size, experts.shape[1], first, count))))


@remembered
def _combine_plan(y: Layout, positions: Layout, weights: Layout, out: Layout) -> LaunchPlan:
    op = "combine_experts"
    check_dtype(op, "y", y)
    check_axes(op, "y", y, "rows, H")
    check_axes(op, "positions", positions, "T, k")
    (n_tokens, top_k), dim = positions.shape, y.shape[1]
    check_array(op, "y", y, y.shape)
    check_array(op, "positions", positions, (n_tokens, top_k), np.int32)
    check_array(op, "weights", weights, (n_tokens, top_k), np.float32)
    check_array(op, "out", out, (n_tokens, dim), y.dtype)
    width = vector_width(y.dtype)
    if dim % width:
        raise ConfigError(f"{op}: {dim} columns of {y.dtype}; they need a multiple of {VECTOR_BYTES} bytes")
    vectors = dim // width
    threads = max(_WARP, min(-(-vectors // _WARP) * _WARP, _THREADS))
    blocks = -(-vectors // threads)
    if n_tokens > MAX_ROWS or blocks > _MAX_GRID_Y:
        raise ConfigError(f"{op}: out of shape {out.shape} is too large for one launch")
    return LaunchPlan((n_tokens, blocks), threads, (f"DTYPE={DTYPE_DEFINES[y.dtype.name]}",),
                      (np.int32(top_k), np.int32(dim)))
