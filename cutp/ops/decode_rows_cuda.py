"""Launchers of decode_rows.cu. The specification is `cutp.ops.decode_rows`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import LaunchPlan, check_array, check_axes

_THREADS = 256  # of the kernels


def advance_rows(lengths: Any, temperature: Any, lookup_table: Any, page_size: int, *, positions: Any, slots: Any,
                 kv_lengths: Any, pdl: bool = False) -> None:
    """One token more for every row with a temperature that is not negative; see `cutp.ops.decode_rows.advance_rows`.

    lengths: int64 [B], changed; temperature: float32 [B]; lookup_table: int32 [B, P], rows may be apart, with a page
    for every new token. positions, slots: int64 [B] and kv_lengths: int32 [B], written. ConfigError for other arrays.
    """
    plan = _advance_plan(layout(lengths), layout(temperature), layout(lookup_table), page_size, layout(positions),
                         layout(slots), layout(kv_lengths))
    launch("decode_rows.cu", "advance_rows", plan.grid, plan.block,
           [lengths, temperature, lookup_table, positions, slots, kv_lengths, *plan.numbers], pdl=pdl)


def publish_tokens(tokens: Any, turn: Any, published: Any, *, pdl: bool = False) -> None:
    """published[turn] = tokens, and turn = 1 - turn; see `cutp.ops.decode_rows.publish_tokens`.

    tokens: int64 [B]; turn: int32 [1], 0 or 1; published: int64 [2, R], R at least B, for example of `Memory.mapped`.
    ConfigError for other arrays.
    """
    plan = _publish_plan(layout(tokens), layout(turn), layout(published))
    launch("decode_rows.cu", "publish_tokens", plan.grid, plan.block, [tokens, turn, published, *plan.numbers],
           pdl=pdl)


@remembered
def _advance_plan(lengths: Layout, temperature: Layout, table: Layout, page_size: int, positions: Layout,
                  slots: Layout, kv_lengths: Layout) -> LaunchPlan:
    op = "advance_rows"
    check_axes(op, "lengths", lengths, "B")
    rows = lengths.shape[0]
    for name, array, dtype in (("lengths", lengths, np.int64), ("temperature", temperature, np.float32),
                               ("positions", positions, np.int64), ("slots", slots, np.int64),
                               ("kv_lengths", kv_lengths, np.int32)):
        check_array(op, name, array, (rows,), dtype)
    check_axes(op, "lookup_table", table, "B, P")
    if table.shape[0] != rows or table.dtype != np.int32 or table.strides[1] != 4 or page_size < 1:
        raise ConfigError(f"{op}: lookup_table has shape {table.shape}, dtype {table.dtype} and strides "
                          f"{table.strides}, for pages of {page_size}; it needs {rows} rows of int32, each contiguous")
    return LaunchPlan(-(-rows // _THREADS), _THREADS,
                      numbers=(np.int32(rows), np.int64(table.strides[0] // 4), np.int32(page_size)))


@remembered
def _publish_plan(tokens: Layout, turn: Layout, published: Layout) -> LaunchPlan:
    op = "publish_tokens"
    check_axes(op, "tokens", tokens, "B")
    rows = tokens.shape[0]
    check_array(op, "tokens", tokens, (rows,), np.int64)
    check_array(op, "turn", turn, (1,), np.int32)
    check_axes(op, "published", published, "2, R")
    check_array(op, "published", published, (2, published.shape[1]), np.int64)
    if published.shape[1] < rows:
        raise ConfigError(f"{op}: published has shape {published.shape}; it needs {rows} columns or more")
    return LaunchPlan(1, _THREADS, numbers=(np.int32(rows), np.int32(published.shape[1])))
