"""Launcher of prefill_attention.cu and prefill_attention_hopper.cu. The specification is
`cutp.ops.attention.paged_attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cutp.array.kernel import launch, runs_on
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops import prefill_attention_hopper_cuda as hopper
from cutp.ops.launch_arguments import DTYPE_DEFINES, LaunchPlan

_HEAD_DIMS = (64, 80, 96, 128, 256)
_ITEM_ROWS = 128
_ITEM_WIDTH = 2  # numbers of an entry of the work list for prefill_attention.cu
_LOG2_E = math.log2(math.e)
_NO_WINDOW = 1 << 30


def prefill_work_list(query_lengths: Any, cache_lengths: Any, group: int, *, head_dim: int | None = None,
                      dtype: np.dtype | None = None, row_offsets: Any = None) -> np.ndarray:
    """The work of one prefill batch as int32 [n_items, 2 or 4], the longest item first.

    query_lengths, cache_lengths: int [B], new tokens and tokens in the cache before, of every request; group: query
    heads per key-value head, at most 128. With a head dim, dtype and row_offsets, int [B], the rows of q where the new
    tokens of each request begin, the list is for the kernel that is best for them on the GPU in use; otherwise for
    the one that every GPU has. The order of items is for speed only, and items that begin with -1 may be added to
    reach a fixed size.
    """
    if not 0 < group <= _ITEM_ROWS:
        raise ConfigError(f"prefill_work_list: {group} query heads per key-value head; 1 to {_ITEM_ROWS} can be done")
    if head_dim is not None and _is_for_hopper(np.dtype(dtype)):
        return hopper.hopper_work_list(query_lengths, cache_lengths, row_offsets, group, head_dim)
    tokens = _ITEM_ROWS // group
    new, cached = np.asarray(query_lengths, np.int64), np.asarray(cache_lengths, np.int64)
    counts = -(-new // tokens)
    request = np.repeat(np.arange(len(new)), counts)
    first = (np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    keys = cached[request] + np.minimum(first + tokens, new[request])
    longest_first = np.argsort(-keys, kind="stable")
    return np.stack([request, first], axis=1)[longest_first].astype(np.int32)


def _is_for_hopper(dtype: np.dtype) -> bool:
    """Whether the GPU in use runs prefill_attention_hopper.cu, and it computes with this dtype."""
    return dtype.name in hopper.DTYPES and runs_on(hopper.CAPABILITY)


def prefill_attention(q: Any, pages: Any, lookup_table: Any, input_row_offsets: Any, cache_lengths: Any,
                      work_list: Any, scale: float, *, window: int | None = None, softcap: float | None = None,
                      sinks: Any = None, out: Any, pdl: bool = False) -> None:
    """out = softmax(scale * q k^T) v for every token over its own request's keys up to and including itself.

    q, out: [T, H, D]; q's tokens may lie further apart than H * D elements, by a multiple of 16 bytes.
    pages: [P, 2, H_kv, S, D], of the same dtype (bfloat16, float16, float32); S a multiple of 16, D one of 64, 80, 96,
    128, 256. int32 arrays, read by the kernel: lookup_table [B, max pages], input_row_offsets [B + 1], cache_lengths
    [B], work_list as made by `prefill_work_list` for H / H_kv, whose width says which kernel it is for. Tokens that are
    in no item, or in no request, are left alone. sinks: float32 [H]. window, softcap: as in `paged_attention`.
    ConfigError otherwise.

    The result of a token has the same bits in whatever batch and chunk of its prompt one kernel computes it.
    """
    if not 0 < scale < math.inf:
        raise ConfigError(f"prefill_attention: scale is {scale}; it must be positive")
    if window is not None and window < 1:
        raise ConfigError(f"prefill_attention: window is {window}; it must be at least 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ConfigError(f"prefill_attention: softcap is {softcap}; it must be positive")
    plan = _plan(layout(q), layout(pages), layout(out), optional_layout(sinks), layout(lookup_table),
                 layout(input_row_offsets), layout(cache_lengths), layout(work_list), bool(softcap))
    settings = (np.int32(min(window or _NO_WINDOW, _NO_WINDOW)), np.float32(softcap or 0.0),
                np.float32(scale / softcap if softcap else 1.0), np.float32((1.0 if softcap else scale) * _LOG2_E))
    if work_list.shape[1] == hopper.ITEM_WIDTH:
        name, arrays = "prefill_attention_hopper", hopper.arguments(q, pages, lookup_table, work_list, sinks, out)
    else:
        name = "prefill_attention"
        arrays = (q, pages, sinks, out, lookup_table, input_row_offsets, cache_lengths, work_list)
    launch(f"{name}.cu", name, plan.grid, plan.block, [*arrays, *plan.numbers, *settings],
           shared_bytes=plan.shared_bytes, defines=plan.defines, pdl=pdl)


@remembered
def _plan(q: Layout, pages: Layout, out: Layout, sinks: Layout | None, lookup_table: Layout,
          input_row_offsets: Layout, cache_lengths: Layout, work_list: Layout, capped: bool) -> LaunchPlan:
    _check_arrays(q, pages, out, sinks)
    batch = cache_lengths.shape[0] if cache_lengths.ndim == 1 else 0
    width = hopper.ITEM_WIDTH if work_list.shape[1:] == (hopper.ITEM_WIDTH,) else _ITEM_WIDTH
    for name, array, shape in (("cache_lengths", cache_lengths, (batch,)),
                               ("input_row_offsets", input_row_offsets, (batch + 1,)),
                               ("lookup_table", lookup_table, (batch, *lookup_table.shape[1:2])),
                               ("work_list", work_list, (*work_list.shape[:1], width))):
        _check_integers(name, array, shape)
    if width == hopper.ITEM_WIDTH:
        return hopper.plan(q, pages, lookup_table, work_list, capped)
    _, n_heads, head_dim = q.shape
    n_kv_heads, page_size = pages.shape[2:4]
    block_rows, _, threads, shared_bytes = _tile(head_dim, q.dtype.itemsize)
    items = work_list.shape[0] if q.shape[0] else 0
    numbers = (np.int64(q.strides[0] // q.dtype.itemsize), np.uint64(-(-(1 << 40) // (page_size // 16))),
               *map(np.int32, (lookup_table.shape[1], page_size, n_heads, n_kv_heads)))
    return LaunchPlan(items * (_ITEM_ROWS // block_rows) * n_kv_heads, threads,
                      (f"DTYPE={DTYPE_DEFINES[q.dtype.name]}", f"HEAD_DIM={head_dim}"), numbers, shared_bytes)


def _tile(head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows and keys of a block, its threads and its shared memory: the constants of prefill_attention.cu."""
    row_bytes = head_dim * itemsize + 16
    if itemsize == 4:
        rows, keys, threads = 32, 16 if head_dim >= 256 else 32, 128
        weights = rows * (keys + 4) * 4
    else:
        rows, keys, threads = 128, 32 if head_dim >= 128 else 64, 256 if head_dim == 256 else 128
        weights = 0
    return rows, keys, threads, (rows + 4 * keys) * row_bytes + weights


def _check_arrays(q: Layout, pages: Layout, out: Layout, sinks: Layout | None) -> None:
    if q.dtype.name not in DTYPE_DEFINES:
        raise ConfigError(f"prefill_attention: q has dtype {q.dtype}; it needs {', '.join(DTYPE_DEFINES)}")
    if q.ndim != 3 or q.shape[2] not in _HEAD_DIMS:
        raise ConfigError(f"prefill_attention: q has shape {q.shape}; it needs [tokens, heads, head dim] with a head "
                          f"dim of {', '.join(map(str, _HEAD_DIMS))}")
    _, n_heads, head_dim = q.shape
    itemsize = q.dtype.itemsize
    if q.strides[1:] != (head_dim * itemsize, itemsize) or q.strides[0] % 16 or q.strides[0] < 0:
        raise ConfigError(f"prefill_attention: q of shape {q.shape} has strides {q.strides}; the heads of a token must "
                          "be contiguous, and tokens a multiple of 16 bytes apart")
    if pages.ndim != 5 or pages.shape[1] != 2 or pages.shape[4] != head_dim:
        raise ConfigError(f"prefill_attention: pages has shape {pages.shape}; it needs [pages, 2, heads, page size, "
                          f"{head_dim}] for q of shape {q.shape}")
    n_kv_heads, page_size = pages.shape[2:4]
    if page_size == 0 or page_size % 16 or page_size >= 1 << 16:
        raise ConfigError(f"prefill_attention: pages of {page_size} tokens; their number must be a multiple of 16, "
                          f"below {1 << 16}")
    if n_kv_heads == 0 or n_heads % n_kv_heads or not 0 < n_heads // n_kv_heads <= _ITEM_ROWS:
        raise ConfigError(f"prefill_attention: pages has {n_kv_heads} heads and q has {n_heads}; these must be a "
                          f"multiple of those, at most {_ITEM_ROWS} times as many")
    if pages.size // (16 * head_dim) >= 1 << 32:
        raise ConfigError(f"prefill_attention: pages of shape {pages.shape}; the kernel counts 2**32 groups of 16 keys")
    expected = [("out", out, q.shape, q.dtype), ("pages", pages, pages.shape, q.dtype)]
    if sinks is not None:
        expected.append(("sinks", sinks, (n_heads,), np.dtype(np.float32)))
    for name, array, shape, dtype in expected:
        if array.shape != shape:
            raise ConfigError(f"prefill_attention: {name} has shape {array.shape}; it needs {shape} for q of shape "
                              f"{q.shape}")
        if array.dtype != dtype:
            raise ConfigError(f"prefill_attention: {name} has dtype {array.dtype}; it needs {dtype}")
        if not array.is_contiguous:
            raise ConfigError(f"prefill_attention: {name} of shape {array.shape} and strides {array.strides} is not "
                              "contiguous")


def _check_integers(name: str, array: Layout, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ConfigError(f"prefill_attention: {name} has shape {array.shape}; it needs {shape}")
    if array.dtype != np.int32:
        raise ConfigError(f"prefill_attention: {name} has dtype {array.dtype}; it needs int32")
    if not array.is_contiguous:
        raise ConfigError(f"prefill_attention: {name} of shape {array.shape} and strides {array.strides} is not "
                          "contiguous")
