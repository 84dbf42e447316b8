"""Launchers of latent_decode.cu. The specification is `cutp.ops.latent_attention.latent_attention`.

    shapes = latent_decode_workspace(batch, max_length, n_heads)
    plan, partials = empty(shapes.plan, int32), empty(shapes.partials, float32)
    latent_decode_plan(kv_lengths, n_heads, plan=plan)  # once a step
    latent_decode_attention(q, pages, table, kv_lengths, plan, scale, ...)  # every layer
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, MAX_ROWS, LaunchPlan, check_array, check_axes, check_dtype

CHANNELS, VALUE_DIM = 576, 512
"""Of the cached latents and of those among them that are values, in all models that cutp knows."""

_WARP = 32
_TILE = 16  # tokens; a page is a multiple
_KEYS = 32  # that a block takes at a time
_GRANULE, _MAX_SPLIT = 64, 2048  # tokens of the shortest and the longest split, as in decode_plan.cu
_PLAN_THREADS, _MERGE_THREADS = 256, 256
_NO_WINDOW = 2**31 - 1
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class LatentDecodeWorkspace:
    """Shapes of the arrays that latent decode attention works in: plan, int32; partials, float32.

    Launches that may run at the same time need their own partials.
    """

    plan: tuple[int, ...]
    partials: tuple[int, ...]


def latent_decode_workspace(batch: int, max_length: int, n_heads: int, *, whole: bool = False) -> LatentDecodeWorkspace:
    """What `batch` requests of up to `max_length` tokens each need; heads are those of this rank.

    whole: requests are so many that only those longer than 2048 tokens are divided.
    """
    most = max(1, min(-(-max_length // _GRANULE), _target_splits(n_heads, whole)), -(-max_length // _MAX_SPLIT))
    return LatentDecodeWorkspace(plan=(1 + batch * most, 4), partials=(batch * most * n_heads * (VALUE_DIM + 2),))


def latent_decode_plan(kv_lengths: Any, n_heads: int, *, whole: bool = False, plan: Any, pdl: bool = False) -> None:
    """Lists in `plan` what `latent_decode_attention` has to do in this step.

    kv_lengths: int32 [B], tokens of each request in the cache, the new one included; 0 for a row that only pads the
    batch. plan: int32 [1 + items, 4], of the shape that `latent_decode_workspace` gives for this `whole`. ConfigError
    otherwise.
    """
    launched = _plan_launch(layout(kv_lengths), layout(plan), n_heads, whole)
    launch("decode_plan.cu", "decode_plan", launched.grid, launched.block, [kv_lengths, plan, *launched.numbers],
           pdl=pdl)


def latent_decode_attention(q: Any, pages: Any, lookup_table: Any, kv_lengths: Any, plan: Any, scale: float, *,
                            table_rows: Any = None, whole: bool = False, partials: Any, blocks: int, out: Any,
                            pdl: bool = False) -> None:
    """out[b] = attention of q[b], the newest token of request b, over the latents of all tokens of the request.

    q: [B, H, 576], absorbed queries next to rotated ones, bfloat16 or float16; pages: [P, 1, 1, S, 576] of the same
    dtype, S a multiple of 16; out: [B, H, 512], still to be multiplied by W_v. lookup_table: int32 [B, pages of the
    longest request], in which page numbers count only as far as a request is long; with table_rows, int64 [B], any
    number of rows, of which request b has row table_rows[b] (not checked): then the requests can be the tokens of a
    prompt. kv_lengths, whole: as given to `latent_decode_plan`; rows of length 0 become zeros. partials: see
    `latent_decode_workspace`. blocks: of the grid, of any effect on the time only; best is `blocks_per_multiprocessor`
    times the number of multiprocessors.

    All arrays are contiguous. The result of a row has the same bits whatever the other rows are. ConfigError otherwise.
    """
    if not 0 < scale < math.inf:
        raise ConfigError(f"latent_decode_attention: scale is {scale}; it must be positive")
    launches = _attention_launches(layout(q), layout(pages), layout(lookup_table), layout(kv_lengths), layout(plan),
                                   optional_layout(table_rows), whole, layout(partials), blocks, layout(out))
    if launches is None:
        return
    attend, merge = launches
    launch("latent_decode.cu", "latent_decode", attend.grid, attend.block,
           [q, pages, lookup_table, table_rows, kv_lengths, plan, out, partials, *attend.numbers,
            np.float32(scale * _LOG2_E)],
           shared_bytes=attend.shared_bytes, defines=attend.defines, pdl=pdl)
    launch("latent_decode.cu", "latent_merge", merge.grid, merge.block, [plan, out, partials, *merge.numbers],
           defines=merge.defines, pdl=pdl)


def blocks_per_multiprocessor(n_heads: int) -> int:
    """How many blocks of `latent_decode_attention` run on a multiprocessor at once."""
    return 1 if _task_heads(n_heads) == 64 else 2


def _target_splits(n_heads: int, whole: bool) -> int:
    """How many splits a long request has. A partial result of a head is as much memory as two of its keys, so many
    heads have long splits; a request alone should still occupy a large GPU."""
    return 1 if whole else 64 if n_heads <= 32 else 32


def _task_heads(n_heads: int) -> int:
    return next((heads for heads in (16, 32) if n_heads <= heads), 64)


def _threads(heads: int) -> int:
    return (8 if heads == 64 else 4) * _WARP


def _shared_bytes(heads: int) -> int:
    """Queries, two blocks of keys, and the weights of one."""
    return (heads + 2 * _KEYS) * CHANNELS * 2 + heads * (_KEYS * 2 + 16)


@remembered
def _plan_launch(kv_lengths: Layout, plan: Layout, n_heads: int, whole: bool) -> LaunchPlan:
    op = "latent_decode_plan"
    check_axes(op, "kv_lengths", kv_lengths, "B")
    check_axes(op, "plan", plan, "1 + items, 4")
    batch, capacity = kv_lengths.shape[0], plan.shape[0] - 1
    check_array(op, "kv_lengths", kv_lengths, (batch,), np.int32)
    check_array(op, "plan", plan, (1 + capacity, 4), np.int32)
    if n_heads < 1 or capacity < batch:
        raise ConfigError(f"{op}: a plan of {capacity} items for {batch} requests of {n_heads} heads")
    return LaunchPlan(1, _PLAN_THREADS, (),
                      tuple(map(np.int32, (batch, capacity, _NO_WINDOW, _target_splits(n_heads, whole), 0))))


@remembered
def _attention_launches(q: Layout, pages: Layout, lookup_table: Layout, kv_lengths: Layout, plan: Layout,
                        table_rows: Layout | None, whole: bool, partials: Layout, blocks: int,
                        out: Layout) -> tuple[LaunchPlan, LaunchPlan] | None:
    """Of the two kernels; None for nothing to do."""
    batch, n_heads, page_size = _check("latent_decode_attention", q, pages, lookup_table, kv_lengths, plan, table_rows,
                                       whole, partials, blocks, out)
    if batch == 0 or n_heads == 0:
        return None
    heads, capacity = _task_heads(n_heads), plan.shape[0] - 1
    defines = (f"DTYPE={DTYPE_DEFINES[q.dtype.name]}", f"HEADS={heads}")
    numbers = batch, capacity, lookup_table.shape[1], page_size, n_heads
    return (LaunchPlan(blocks, _threads(heads), defines, tuple(map(np.int32, numbers)), _shared_bytes(heads)),
            LaunchPlan(2 * blocks, _MERGE_THREADS, defines, (np.int32(capacity), np.int32(n_heads))))


def _check(op: str, q: Layout, pages: Layout, lookup_table: Layout, kv_lengths: Layout, plan: Layout,
           table_rows: Layout | None, whole: bool, partials: Layout, blocks: int, out: Layout) -> tuple[int, int, int]:
    """Requests, heads and tokens a page; ConfigError, naming the argument, if an array does not fit."""
    check_dtype(op, "q", q, ("bfloat16", "float16"))
    check_axes(op, "q", q, "B, H, 576")
    check_axes(op, "pages", pages, "P, 1, 1, S, 576")
    check_axes(op, "lookup_table", lookup_table, "B, pages")
    check_axes(op, "plan", plan, "1 + items, 4")
    check_axes(op, "partials", partials, "values")
    batch, n_heads = q.shape[:2]
    n_pages, page_size, max_pages = pages.shape[0], pages.shape[3], lookup_table.shape[1]
    check_array(op, "q", q, (batch, n_heads, CHANNELS))
    check_array(op, "pages", pages, (n_pages, 1, 1, page_size, CHANNELS), q.dtype)
    if table_rows is not None:
        check_array(op, "table_rows", table_rows, (batch,), np.int64)
    check_array(op, "lookup_table", lookup_table, (batch if table_rows is None else lookup_table.shape[0], max_pages),
                np.int32)
    check_array(op, "kv_lengths", kv_lengths, (batch,), np.int32)
    check_array(op, "plan", plan, (plan.shape[0], 4), np.int32)
    check_array(op, "partials", partials, partials.shape, np.float32)
    check_array(op, "out", out, (batch, n_heads, VALUE_DIM), q.dtype)
    if page_size < 1 or page_size % _TILE or n_pages * page_size > MAX_ROWS:
        raise ConfigError(f"{op}: {n_pages} pages of {page_size} tokens; a page needs a multiple of {_TILE}, and all "
                          f"together at most {MAX_ROWS} tokens")
    if blocks < 1:
        raise ConfigError(f"{op}: blocks is {blocks}")
    capacity = plan.shape[0] - 1
    needed = latent_decode_workspace(batch, max_pages * page_size, n_heads, whole=whole).plan[0] - 1
    if capacity < needed:
        raise ConfigError(f"{op}: plan has room for {capacity} items; {batch} requests of up to "
                          f"{max_pages * page_size} tokens may need {needed}")
    if partials.size < capacity * n_heads * (VALUE_DIM + 2):
        raise ConfigError(f"{op}: partials has {partials.size} elements; a plan of {capacity} items needs "
                          f"{capacity * n_heads * (VALUE_DIM + 2)}")
    return batch, n_heads, page_size
