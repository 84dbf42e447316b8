"""Launcher of embedding.cu. The specification is `cutp.ops.embedding.embedding`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import MAX_ROWS, VECTOR_BYTES, LaunchPlan, check_array, check_axes, check_dtype

_WARP, _MAX_THREADS = 32, 1024
_ROWS_PER_BLOCK = 4  # of rows that take one warp each


def embedding(tokens: Any, table: Any, vocab_start: int, *, out: Any, pdl: bool = False) -> None:
    """out = the rows of `table` for the tokens this rank owns, zero rows for the others.

    tokens: int32 or int64 [T], any number: a padded row may hold -1 and becomes zeros. table: [V_local, d], rows
    vocab_start .. vocab_start + V_local - 1 of the whole table, bfloat16, float16 or float32. out: [T, d] of the dtype
    of `table`. All contiguous, d a multiple of 16 bytes. ConfigError otherwise.
    """
    plan = _plan(layout(tokens), layout(table), layout(out), vocab_start)
    if plan is not None:
        launch("embedding.cu", f"embedding_{tokens.dtype.name}", plan.grid, plan.block,
               [tokens, table, out, *plan.numbers], pdl=pdl)


@remembered
def _plan(tokens: Layout, table: Layout, out: Layout, vocab_start: int) -> LaunchPlan | None:
    check_axes("embedding", "tokens", tokens, "T")
    check_axes("embedding", "table", table, "V_local, d")
    n_tokens, (n_rows, dim) = tokens.shape[0], table.shape
    check_dtype("embedding", "tokens", tokens, ("int32", "int64"))
    check_dtype("embedding", "table", table)
    check_array("embedding", "tokens", tokens, (n_tokens,))
    check_array("embedding", "table", table, (n_rows, dim))
    check_array("embedding", "out", out, (n_tokens, dim), table.dtype)
    row_bytes = dim * table.dtype.itemsize
    if row_bytes % VECTOR_BYTES:
        raise ConfigError(f"embedding: rows of {dim} {table.dtype} elements are {row_bytes} bytes; "
                          f"they need a multiple of {VECTOR_BYTES} bytes")
    if n_tokens > MAX_ROWS:
        raise ConfigError(f"embedding: {n_tokens} tokens; at most {MAX_ROWS} are possible")
    vectors = row_bytes // VECTOR_BYTES
    if n_tokens == 0 or vectors == 0:
        return None
    threads = min(-(-vectors // _WARP) * _WARP, _MAX_THREADS)
    rows_per_block = _ROWS_PER_BLOCK if threads == _WARP else 1
    return LaunchPlan(-(-n_tokens // rows_per_block), (threads, rows_per_block),
                      numbers=(np.int32(n_tokens), np.int64(vocab_start), np.int64(n_rows), np.int32(vectors)))
