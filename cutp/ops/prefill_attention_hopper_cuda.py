"""What `prefill_attention_cuda.prefill_attention` passes to prefill_attention_hopper.cu, and the work it lists."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np

from cutp.array.layout import Layout
from cutp.array.tensor_map import ROW_ELEMENTS, TensorMap
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, LaunchPlan

CAPABILITY = (9, 0)
"""Of the GPUs that this kernel is for."""
DTYPES = ("bfloat16", "float16")
ITEM_WIDTH = 4
"""Numbers of an entry of the work list."""

_MULTIPROCESSORS = 132  # of an H100 or H200; others get the same bits, if not the best speed
_L2_BYTES = 20 << 20  # less than half of what there is, for each half of L2 holds what its own side reads
_ROW_BYTES = 2 * ROW_ELEMENTS
_BARRIER_BYTES = 512  # and more than the items beside them need


def item_rows(head_dim: int) -> int:
    """Rows that a block of threads computes at once: tokens times query heads per key-value head."""
    return 192 if head_dim == 64 else 128


def hopper_work_list(query_lengths: Any, cache_lengths: Any, row_offsets: Any, group: int,
                     head_dim: int) -> np.ndarray:
    """The work of one prefill batch as int32 [n_items, 4], the longest item first: request, row of the item's first
    token in q, position of that token in its sequence, tokens of the request from it on.

    query_lengths, cache_lengths: int [B], new tokens of every request and tokens in the cache before them. row_offsets:
    int [B], the first row of each in q. An item is item_rows(head_dim) // group tokens.
    """
    tokens = item_rows(head_dim) // group
    new = np.asarray(query_lengths, np.int64)
    counts = -(-new // tokens)
    request = np.repeat(np.arange(len(new)), counts)
    first = (np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    left = new[request] - first
    position = np.asarray(cache_lengths, np.int64)[request] + first
    longest_first = np.argsort(-(position + np.minimum(left, tokens)), kind="stable")
    row = np.asarray(row_offsets, np.int64)[request] + first
    return np.stack([request, row, position, left], axis=1)[longest_first].astype(np.int32)


def plan(q: Layout, pages: Layout, lookup_table: Layout, work_list: Layout, capped: bool) -> LaunchPlan:
    """The launch for checked arrays, soft-capped or not. ConfigError if they have another dtype, or are too large."""
    tokens, n_heads, head_dim = q.shape
    n_kv_heads, page_size = pages.shape[2:4]
    if q.dtype.name not in DTYPES:
        raise ConfigError(f"prefill_attention: q has dtype {q.dtype}; this work list is for {' or '.join(DTYPES)}")
    pool_rows = pages.size // head_dim
    if pool_rows >= 1 << 31:
        raise ConfigError(f"prefill_attention: pages of shape {pages.shape}; the kernel counts 2**31 keys and values")
    items = work_list.shape[0] if tokens else 0
    key_block, shared_bytes = _tile(head_dim)
    numbers = (items, item_rows(head_dim) // (n_heads // n_kv_heads), lookup_table.shape[1], page_size,
               gcd(page_size, key_block), pool_rows, n_heads, n_kv_heads, _L2_BYTES)
    return LaunchPlan(
        min(_MULTIPROCESSORS, items * n_kv_heads), 128 + 2 * item_rows(head_dim),
        (f"DTYPE={DTYPE_DEFINES[q.dtype.name]}", f"HEAD_DIM={head_dim}", *["CAPPED"] * capped),
        tuple(map(np.int32, numbers)), shared_bytes)


def arguments(q: Any, pages: Any, lookup_table: Any, work_list: Any, sinks: Any, out: Any) -> list[Any]:
    """The kernel's first arguments, its arrays."""
    if q.shape[0] == 0:
        return []
    n_heads, head_dim = q.shape[1:]
    n_kv_heads, page_size = pages.shape[2:4]
    group = n_heads // n_kv_heads
    pool = pages.reshape(-1, head_dim)
    return [TensorMap(q, (item_rows(head_dim) // group, group, ROW_ELEMENTS)),
            TensorMap(pool, (gcd(page_size, _tile(head_dim)[0]), ROW_ELEMENTS)),
            out, sinks, lookup_table, work_list]


def _tile(head_dim: int) -> tuple[int, int]:
    """Keys of a block, and shared memory of a block of threads: the constants of prefill_attention_hopper.cu."""
    key_block = 64 if head_dim == 256 else 128
    query_slots = 1 if head_dim == 256 else 2
    stages = 3 if head_dim == 64 else 2
    rows = query_slots * item_rows(head_dim) + 2 * stages * key_block
    return key_block, rows * -(-head_dim // ROW_ELEMENTS) * _ROW_BYTES + _BARRIER_BYTES
