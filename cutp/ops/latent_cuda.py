"""Launchers of latent.cu. The specifications are `cutp.ops.rotary.apply_rotary`, `cutp.ops.kv_write.latent_write` and
`cutp.ops.latent_attention.latent_attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import (
    DTYPE_DEFINES,
    MAX_ROWS,
    LaunchPlan,
    check_array,
    check_axes,
    check_dtype,
    vector_width,
)

_WARPS, _THREADS, _MAX_GRID_Y = 4, 128, 65535
_LOG2_E = 1.4426950408889634


def max_channels(dtype: Any) -> int:
    """The most channels of a latent that `latent_attention` takes."""
    return 32 * (5 if np.dtype(dtype).name == "float32" else 3) * vector_width(np.dtype(dtype))


def latent_rotary_write(compressed: Any, latent: Any, q: Any, cos: Any, sin: Any, slots: Any, pages: Any, *,
                        q_out: Any, interleaved: bool, pdl: bool = False) -> None:
    """Turns the shared keys and the queries; latents and keys go into their slots, queries into `q_out`.

    compressed: [T, R + D_r], of which the last D_r channels are the key; latent: [T, R], the rest of it, normed; q:
    [T, H, D_n + D_r], turned in its last D_r channels; cos, sin: float32 [T, D_r / 2]; slots: int64 [T], a negative one
    is padding for which nothing is written; pages: [P, 1, 1, S, R + D_r]; q_out: [T, H, R + D_r], of which the last D_r
    channels are written. One dtype (bfloat16, float16 or float32), contiguous; ConfigError otherwise.
    """
    plan = _write_plan(layout(compressed), layout(latent), layout(q), layout(cos), layout(sin), layout(slots),
                       layout(pages), layout(q_out), interleaved)
    launch("latent.cu", "latent_rotary_write", plan.grid, plan.block,
           [compressed, latent, q, cos, sin, slots, pages, q_out, *plan.numbers], defines=plan.defines, pdl=pdl)


def latent_attention(q: Any, pages: Any, lookup_table: Any, lengths: Any, scale: float, *, table_rows: Any = None,
                     out: Any, pdl: bool = False) -> None:
    """out[t] = attention of q[t] over the first lengths[t] latents of its request: the absorbed form, for every size.

    q: [T, H, C], bfloat16, float16 or float32; pages: [P, 1, 1, S, C]; out: [T, H, V], the first V <= C channels of the
    latents are values. lookup_table: int32 [B, pages]; table_rows: int64 [T], the row of it that token t belongs to
    (not checked), or None for row t. lengths: int32 [T]; rows of length 0 become zeros. C and V are multiples of 16
    bytes, C at most `max_channels`. Contiguous; ConfigError otherwise. A row's bits do not depend on the others.
    """
    if not 0 < scale < math.inf:
        raise ConfigError(f"latent_attention: scale is {scale}; it must be positive")
    plan = _attention_plan(layout(q), layout(pages), layout(lookup_table), layout(lengths), optional_layout(table_rows),
                           layout(out))
    launch("latent.cu", "latent_attention", plan.grid, plan.block,
           [q, pages, lookup_table, table_rows, lengths, out, *plan.numbers, np.float32(scale * _LOG2_E)],
           defines=plan.defines, pdl=pdl)


@remembered
def _write_plan(compressed: Layout, latent: Layout, q: Layout, cos: Layout, sin: Layout, slots: Layout, pages: Layout,
                q_out: Layout, interleaved: bool) -> LaunchPlan:
    op = "latent_rotary_write"
    check_dtype(op, "compressed", compressed)
    for name, array, axes in (("compressed", compressed, "T, R + D_r"), ("latent", latent, "T, R"),
                              ("q", q, "T, H, D_n + D_r"), ("cos", cos, "T, D_r / 2"),
                              ("pages", pages, "P, 1, 1, S, R + D_r"), ("q_out", q_out, "T, H, R + D_r")):
        check_axes(op, name, array, axes)
    (tokens, channels), heads, half = compressed.shape, q.shape[1], cos.shape[1]
    rank, dtype = channels - 2 * half, compressed.dtype
    for name, array, shape in (("compressed", compressed, (tokens, channels)), ("latent", latent, (tokens, rank)),
                               ("q", q, (tokens, heads, q.shape[2])), ("q_out", q_out, (tokens, heads, channels)),
                               ("pages", pages, (pages.shape[0], 1, 1, pages.shape[3], channels))):
        check_array(op, name, array, shape, dtype)
    for name, array in (("cos", cos), ("sin", sin)):
        check_array(op, name, array, (tokens, half), np.float32)
    check_array(op, "slots", slots, (tokens,), np.int64)
    if q.shape[2] < 2 * half or tokens > MAX_ROWS or heads // _WARPS + 1 > _MAX_GRID_Y:
        raise ConfigError(f"{op}: q of shape {q.shape} does not fit to {half} angles, or is too large for one launch")
    numbers = heads, rank, q.shape[2] - 2 * half, 2 * half, interleaved
    return LaunchPlan((tokens, heads // _WARPS + 1), _THREADS, (f"DTYPE={DTYPE_DEFINES[dtype.name]}",),
                      tuple(map(np.int32, numbers)))


@remembered
def _attention_plan(q: Layout, pages: Layout, lookup_table: Layout, lengths: Layout, table_rows: Layout | None,
                    out: Layout) -> LaunchPlan:
    op = "latent_attention"
    check_dtype(op, "q", q)
    for name, array, axes in (("q", q, "T, H, C"), ("pages", pages, "P, 1, 1, S, C"), ("out", out, "T, H, V"),
                              ("lookup_table", lookup_table, "B, pages")):
        check_axes(op, name, array, axes)
    (tokens, heads, channels), value_dim, width = q.shape, out.shape[2], vector_width(q.dtype)
    page_size, (requests, max_pages) = pages.shape[3], lookup_table.shape
    for name, array, shape in (("q", q, (tokens, heads, channels)), ("out", out, (tokens, heads, value_dim)),
                               ("pages", pages, (pages.shape[0], 1, 1, page_size, channels))):
        check_array(op, name, array, shape, q.dtype)
    check_array(op, "lookup_table", lookup_table, (tokens if table_rows is None else requests, max_pages), np.int32)
    check_array(op, "lengths", lengths, (tokens,), np.int32)
    if table_rows is not None:
        check_array(op, "table_rows", table_rows, (tokens,), np.int64)
    if channels % width or value_dim % width or not 0 < value_dim <= channels <= max_channels(q.dtype):
        raise ConfigError(f"{op}: {value_dim} of {channels} {q.dtype} channels; both need to be multiples of {width}, "
                          f"at most {max_channels(q.dtype)}")
    rows = -(-heads // _WARPS)
    if tokens > MAX_ROWS or rows > _MAX_GRID_Y:
        raise ConfigError(f"{op}: q of shape {q.shape} is too large for one launch")
    return LaunchPlan((tokens, rows), _THREADS, (f"DTYPE={DTYPE_DEFINES[q.dtype.name]}",),
                      tuple(map(np.int32, (heads, channels, value_dim, max_pages, page_size))))
