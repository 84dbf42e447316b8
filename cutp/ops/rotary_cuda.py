"""Launchers of rotary.cu and rotary_table.cu.

The specifications are `cutp.ops.rotary.rotary_table`, `cutp.ops.rotary.apply_rotary` and `cutp.ops.kv_write.kv_write`.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
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

_WARP = 32
_THREADS = 128  # a small block: tokens are few in decoding, and their heads then spread over more processors
_TABLE_BLOCK = (_WARP, 8)
_MAX_GRID_Y = 65535


def rotary_table(positions: Any, inv_freq: Any, attention_scaling: Any, dtype: Any, *, request_of_token: Any = None,
                 cos_out: Any, sin_out: Any, pdl: bool = False) -> None:
    """cos_out, sin_out = cos, sin of position * inv_freq, times the attention scaling, rounded to `dtype`.

    positions: int64 [T]. inv_freq: float32 [R/2], or [B, R/2] with a row for each request. attention_scaling: a number,
    or float32 [B]. request_of_token: int64 [T], needed where one of them is per request. cos_out, sin_out: float32
    [T, R/2]. Rows whose position or request is negative are not written. All contiguous. ConfigError otherwise.
    """
    scalings = attention_scaling if getattr(attention_scaling, "ndim", 0) else None
    plan = _table_plan(layout(positions), layout(inv_freq), optional_layout(scalings), np.dtype(dtype),
                       optional_layout(request_of_token), layout(cos_out), layout(sin_out))
    if plan is not None:
        launch("rotary_table.cu", "rotary_table", plan.grid, plan.block,
               [positions, inv_freq, request_of_token, scalings, cos_out, sin_out, *plan.numbers,
                np.float32(1.0 if scalings is not None else attention_scaling)], defines=plan.defines, pdl=pdl)


def rotary_kv_write(qkv: Any, cos: Any, sin: Any, slots: Any, pages: Any, *, q_out: Any, interleaved: bool = False,
                    pdl: bool = False) -> None:
    """Turns queries and keys by their angles; queries go to `q_out`, keys and values into their slots of `pages`.

    qkv: [T, (Hq + 2 * Hkv) * D], the query heads, then the key heads, then the value heads of each token. cos, sin:
    float32 [T, R/2] of `rotary_table`: the first R channels of a head are turned, in pairs (i, i + R/2), or
    (2i, 2i + 1) when `interleaved`; R = 0 turns nothing. slots: int64 [T], page * S + slot inside the page, all
    different and inside the cache (not checked); a token with a negative slot is padding, for which nothing is written,
    not in q_out either. pages: [P, 2, Hkv, S, W]. q_out: [T, Hq, W], memory of its own. W is D or larger: heads become
    longer by zeros. qkv, pages and q_out have one dtype (bfloat16, float16 or float32); all arrays are contiguous; D
    and W are multiples of 16 bytes. ConfigError otherwise.

    Where R/2, or R when `interleaved`, is a multiple of 16 bytes, too, memory is accessed 16 bytes at a time; otherwise
    element by element.
    """
    plan = _kv_write_plan(layout(qkv), layout(cos), layout(sin), layout(slots), layout(pages), layout(q_out),
                          interleaved)
    if plan is not None:
        launch("rotary.cu", "rotary_kv_write", plan.grid, plan.block,
               [qkv, cos, sin, slots, q_out, pages, *plan.numbers], defines=plan.defines, pdl=pdl)


def narrow_heads(x: Any, *, out: Any, pdl: bool = False) -> None:
    """out = the first channels of each head. x: [T, H, W]; out: [T, H, D], D at most W, both multiples of 16 bytes.

    Contiguous, of one dtype (bfloat16, float16 or float32). ConfigError otherwise.
    """
    plan = _narrow_plan(layout(x), layout(out))
    launch("rotary.cu", "narrow_heads", plan.grid, plan.block, [x, out, *plan.numbers], defines=plan.defines, pdl=pdl)


@remembered
def _table_plan(positions: Layout, inv_freq: Layout, scalings: Layout | None, dtype: np.dtype,
                request_of_token: Layout | None, cos_out: Layout, sin_out: Layout) -> LaunchPlan | None:
    op = "rotary_table"
    check_axes(op, "positions", positions, "T")
    if inv_freq.ndim not in (1, 2):
        raise ConfigError(f"{op}: inv_freq has shape {inv_freq.shape}; it needs [R/2] or [B, R/2]")
    n_tokens, half = positions.shape[0], inv_freq.shape[-1]
    check_array(op, "positions", positions, (n_tokens,), np.dtype(np.int64))
    check_array(op, "inv_freq", inv_freq, inv_freq.shape, np.dtype(np.float32))
    for name, array in (("cos_out", cos_out), ("sin_out", sin_out)):
        check_array(op, name, array, (n_tokens, half), np.dtype(np.float32))
    _check_requests(op, n_tokens, inv_freq, scalings, request_of_token)
    if dtype.name not in DTYPE_DEFINES:
        raise ConfigError(f"{op}: dtype is {dtype}; it needs to be one of {', '.join(DTYPE_DEFINES)}")
    if n_tokens == 0 or half == 0:
        return None
    return LaunchPlan(-(-n_tokens // _TABLE_BLOCK[1]), _TABLE_BLOCK, (f"DTYPE={DTYPE_DEFINES[dtype.name]}",),
                      (np.int32(n_tokens), np.int32(half), np.int32(half if inv_freq.ndim == 2 else 0)))


@remembered
def _kv_write_plan(qkv: Layout, cos: Layout, sin: Layout, slots: Layout, pages: Layout, q_out: Layout,
                   interleaved: bool) -> LaunchPlan | None:
    op = "rotary_kv_write"
    n_tokens, q_heads, head_dim = _check_projection(op, qkv, pages, q_out)
    kv_heads, page_size, out_dim = pages.shape[2:5]
    check_axes(op, "cos", cos, "T, R/2")
    half = cos.shape[1]
    for name, array in (("cos", cos), ("sin", sin)):
        check_array(op, name, array, (n_tokens, half), np.dtype(np.float32))
    check_array(op, "slots", slots, (n_tokens,), np.dtype(np.int64))
    if 2 * half > head_dim:
        raise ConfigError(f"{op}: cos of shape {cos.shape} turns {2 * half} channels, but heads have {head_dim}")
    width = vector_width(qkv.dtype)
    turned_together = 2 * half if interleaved else half
    pairs = "ANY" if turned_together % width else "INTERLEAVED" if interleaved else "HALVES"
    heads, (threads, heads_per_block) = q_heads + 2 * kv_heads, _block(pairs, head_dim // width)
    blocks = -(-heads // heads_per_block)
    if n_tokens > MAX_ROWS or blocks > _MAX_GRID_Y:
        raise ConfigError(f"{op}: {n_tokens} tokens of {heads} heads are too many for one launch")
    if n_tokens == 0:
        return None
    numbers = q_heads, kv_heads, head_dim, out_dim, 2 * half, page_size, interleaved
    return LaunchPlan((n_tokens, blocks), (threads, heads_per_block),
                      (f"DTYPE={DTYPE_DEFINES[qkv.dtype.name]}", f"PAIRS={pairs}"), tuple(map(np.int32, numbers)))


@remembered
def _narrow_plan(x: Layout, out: Layout) -> LaunchPlan:
    op = "narrow_heads"
    check_dtype(op, "x", x)
    check_axes(op, "x", x, "T, H, W")
    check_axes(op, "out", out, "T, H, D")
    head_dim, width = out.shape[2], vector_width(x.dtype)
    check_array(op, "x", x, x.shape)
    check_array(op, "out", out, (*x.shape[:2], head_dim), x.dtype)
    if not 0 < head_dim <= x.shape[2] or head_dim % width or x.shape[2] % width:
        raise ConfigError(f"{op}: heads of {x.shape[2]} {x.dtype} elements, cut to {head_dim}; both need a multiple of "
                          f"{VECTOR_BYTES} bytes")
    rows, (threads, rows_per_block) = x.shape[0] * x.shape[1], _block("HALVES", head_dim // width)
    if rows > MAX_ROWS:
        raise ConfigError(f"{op}: x of shape {x.shape} is too large for one launch")
    return LaunchPlan(-(-rows // rows_per_block), (threads, rows_per_block),
                      (f"DTYPE={DTYPE_DEFINES[x.dtype.name]}", "PAIRS=HALVES"),
                      (np.int32(rows), np.int32(x.shape[2]), np.int32(head_dim)))


def _check_requests(op: str, n_tokens: int, inv_freq: Layout, scalings: Layout | None,
                    request_of_token: Layout | None) -> None:
    if scalings is not None:
        check_axes(op, "attention_scaling", scalings, "B")
        n_requests = inv_freq.shape[0] if inv_freq.ndim == 2 else scalings.shape[0]
        check_array(op, "attention_scaling", scalings, (n_requests,), np.dtype(np.float32))
    if request_of_token is not None:
        check_array(op, "request_of_token", request_of_token, (n_tokens,), np.dtype(np.int64))
    elif scalings is not None or inv_freq.ndim == 2:
        name = "attention_scaling" if scalings is not None else "inv_freq"
        raise ConfigError(f"{op}: {name} has a row for each request, so request_of_token is needed")
    if n_tokens > MAX_ROWS:
        raise ConfigError(f"{op}: {n_tokens} tokens; at most {MAX_ROWS} are possible")


def _check_projection(op: str, qkv: Layout, pages: Layout, q_out: Layout) -> tuple[int, int, int]:
    """T, Hq and D; ConfigError if qkv, pages and q_out do not fit to each other."""
    check_dtype(op, "qkv", qkv)
    check_axes(op, "qkv", qkv, "T, (Hq + 2 * Hkv) * D")
    check_axes(op, "pages", pages, "P, 2, Hkv, S, W")
    check_axes(op, "q_out", q_out, "T, Hq, W")
    n_tokens, q_heads, out_dim = qkv.shape[0], q_out.shape[1], q_out.shape[2]
    n_pages, _, kv_heads, page_size, _ = pages.shape
    head_dim = min(qkv.shape[1] // max(1, q_heads + 2 * kv_heads), out_dim)
    check_array(op, "q_out", q_out, (n_tokens, q_heads, out_dim), qkv.dtype)
    check_array(op, "pages", pages, (n_pages, 2, kv_heads, page_size, out_dim), qkv.dtype)
    check_array(op, "qkv", qkv, (n_tokens, (q_heads + 2 * kv_heads) * head_dim))
    if head_dim == 0 or head_dim % vector_width(qkv.dtype) or out_dim % vector_width(qkv.dtype):
        raise ConfigError(f"{op}: heads of {head_dim} {qkv.dtype} elements; they need a multiple of "
                          f"{VECTOR_BYTES} bytes")
    if n_pages * page_size >= 2**32:
        raise ConfigError(f"{op}: pages of shape {pages.shape} have {n_pages * page_size} slots; "
                          f"less than 2^32 are possible")
    return n_tokens, q_heads, head_dim


def _block(pairs: str, head_vectors: int) -> tuple[int, int]:
    """Threads for a head and heads for a block, whole warps together.

    Half as many threads as a head has vectors: each turns a vector of first and one of second channels, or copies two.
    """
    threads = _WARP if pairs == "ANY" else min(-(-head_vectors // 2), _WARP)
    whole_warps = _WARP // gcd(threads, _WARP)
    return threads, whole_warps * max(1, _THREADS // (threads * whole_warps))
