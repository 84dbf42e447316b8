"""Launchers of decode_plan.cu and decode_attention.cu. The specification is `cutp.ops.attention.paged_attention`.

    shapes = decode_workspace(batch, max_length, n_heads, n_kv_heads, head_dim)
    plan, partials = empty(shapes.plan, int32), empty(shapes.partials, float32)
    counters = zeros(shapes.counters, uint32)
    decode_plan(kv_lengths, n_kv_heads, plan=plan)  # once a step
    decode_attention(q, pages, table, kv_lengths, plan, scale, ...)  # every layer

or, with the rotary embedding and the write of keys and values in the same kernel, `rotary_decode_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, LaunchPlan

_HEAD_DIMS = (64, 80, 96, 128, 256)
_ROTARY_HEAD_DIMS = (64, 128)
_MAX_HEADS = 8  # query heads of a task, times what `_head_tiles` gives
_WARP, _WARPS = 32, 4
_TILE = 16  # tokens; a page is a multiple
_GRANULE, _MAX_SPLIT = 64, 2048  # tokens of the shortest and the longest split, as in decode_plan.cu
# The best grid of `decode_attention` is this times the number of multiprocessors.
BLOCKS_PER_MULTIPROCESSOR = 2
_TASKS = 256  # of one long request: about two for each multiprocessor of a large GPU
_PLAN_THREADS = 256
_MAX_INT32 = 2**31 - 1
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class DecodeWorkspace:
    """Shapes of the arrays that decode attention works in.

    plan: int32, one for each attention window that layers of the model have; partials: float32; counters: uint32, all
    zero before the first launch, and left so by each. Launches that may run at the same time need their own partials
    and counters.
    """

    plan: tuple[int, ...]
    partials: tuple[int, ...]
    counters: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 4 * sum(int(np.prod(shape)) for shape in (self.plan, self.partials, self.counters))


def decode_workspace(batch: int, max_length: int, n_heads: int, n_kv_heads: int, head_dim: int) -> DecodeWorkspace:
    """What `batch` requests of up to `max_length` tokens each need; heads are those of this rank."""
    capacity = batch * max_splits(max_length, n_kv_heads)
    return DecodeWorkspace(
        plan=(1 + capacity, 4),
        partials=(capacity * n_heads * (head_dim + 2),),
        # A task has a counter for each warp; it has at least one of the n_heads.
        counters=(capacity * n_heads * _WARPS,),
    )


def max_splits(max_length: int, n_kv_heads: int) -> int:
    """The most splits that a request of at most `max_length` tokens is divided into."""
    return max(1, min(-(-max_length // _GRANULE), _target_splits(n_kv_heads)), -(-max_length // _MAX_SPLIT))


def decode_plan(kv_lengths: Any, n_kv_heads: int, *, window: int | None = None, together: bool = False, plan: Any,
                pdl: bool = False) -> None:
    """Lists in `plan` what `decode_attention` has to do in this step.

    kv_lengths: int32 [B], tokens of each request in the cache, the new one included; 0 for a row that only pads the
    batch. window: each token sees itself and the window - 1 tokens before it. together: the requests are divided into
    as many tasks as occupy the GPU once, each by its share of all tokens; otherwise each as if it were alone, so that
    its result does not depend on the others. plan: int32 [1 + items, 4], of the shape that `decode_workspace` gives.
    ConfigError for other arrays.
    """
    launched = _plan_launch(layout(kv_lengths), layout(plan), n_kv_heads, window, together)
    launch("decode_plan.cu", "decode_plan", launched.grid, launched.block, [kv_lengths, plan, *launched.numbers],
           pdl=pdl)


def decode_attention(q: Any, pages: Any, lookup_table: Any, kv_lengths: Any, plan: Any, scale: float, *,
                     softcap: float | None = None, sinks: Any = None, partials: Any, counters: Any, blocks: int,
                     out: Any, pdl: bool = False) -> None:
    """out[b] = attention of q[b], the newest token of request b, over the tokens that `plan` gives to it.

    q, out: [B, H, D], bfloat16, float16 or float32, D one of 64, 80, 96, 128, 256; pages: [P, 2, H_kv, S, D] of the
    same dtype, S a multiple of 16; head h reads key-value head h // (H / H_kv). lookup_table: int32 [B, pages of the
    longest request], in which page numbers count only as far as a request is long. kv_lengths: as given to
    `decode_plan`; rows of length 0 become zeros. softcap, sinks (float32 [H]): see the specification. partials,
    counters: see `decode_workspace`. blocks: size of the grid, of any effect on the time only; see
    `BLOCKS_PER_MULTIPROCESSOR`.

    All arrays are contiguous. The result of a row has the same bits whatever the other rows are. With pdl, kernels
    that may still be running must not write lookup_table and kv_lengths: they are read at once.
    """
    score_scale, cap = _score_numbers("decode_attention", scale, softcap)
    launched = _attention_launch(layout(q), layout(pages), layout(lookup_table), layout(kv_lengths), layout(plan),
                                 optional_layout(sinks), layout(partials), layout(counters), blocks, layout(out))
    if launched is not None:
        launch("decode_attention.cu", "decode_attention", launched.grid, launched.block,
               [q, None, None, pages, lookup_table, kv_lengths, plan, sinks, out, partials, counters,
                *launched.numbers, score_scale, cap],
               shared_bytes=launched.shared_bytes, defines=launched.defines, pdl=pdl)


def rotary_decode_attention(qkv: Any, cos: Any, sin: Any, pages: Any, lookup_table: Any, kv_lengths: Any, plan: Any,
                            scale: float, *, softcap: float | None = None, sinks: Any = None, partials: Any,
                            counters: Any, blocks: int, out: Any, pdl: bool = False) -> None:
    """The same bits, in `out` and in `pages`, as `rotary_kv_write` and then `decode_attention`; see `turns_heads`.

    qkv: [B, (H + 2 * H_kv) * D], the query, key and value heads of the newest token of each request; cos, sin: float32
    [B, D/2]: channels i and i + D/2 of queries and keys are turned together. The new key and value go to the request's
    last token, by `lookup_table` and `kv_lengths`; no other request may see that token. All else as in
    `decode_attention`, but with pdl the tokens before the newest one are read at once, too.
    """
    score_scale, cap = _score_numbers("rotary_decode_attention", scale, softcap)
    launched = _rotary_launch(layout(qkv), layout(cos), layout(sin), layout(pages), layout(lookup_table),
                              layout(kv_lengths), layout(plan), optional_layout(sinks), layout(partials),
                              layout(counters), blocks, layout(out))
    if launched is not None:
        launch("decode_attention.cu", "decode_attention", launched.grid, launched.block,
               [qkv, cos, sin, pages, lookup_table, kv_lengths, plan, sinks, out, partials, counters,
                *launched.numbers, score_scale, cap],
               shared_bytes=launched.shared_bytes, defines=launched.defines, pdl=pdl)


def turns_heads(head_dim: int, rotary_dim: int, n_heads: int, n_kv_heads: int, dtype: Any, *,
                interleaved: bool) -> bool:
    """Whether there is a `rotary_decode_attention` for these heads: all of a head is turned, its two halves together,
    and one task takes all query heads of a key-value head."""
    if interleaved or rotary_dim != head_dim or head_dim not in _ROTARY_HEAD_DIMS:
        return False
    group = n_heads // n_kv_heads
    return group <= _MAX_HEADS * _head_tiles(head_dim, group, dtype.name != "float32")


@remembered
def _plan_launch(kv_lengths: Layout, plan: Layout, n_kv_heads: int, window: int | None,
                 together: bool) -> LaunchPlan:
    what = "decode_plan"
    _check_array(what, "kv_lengths", kv_lengths, (None,), "int32")
    _check_array(what, "plan", plan, (None, 4), "int32")
    if window is not None and window < 1:
        raise ConfigError(f"{what}: window is {window}, it must be at least 1")
    if n_kv_heads < 1:
        raise ConfigError(f"{what}: n_kv_heads is {n_kv_heads}")
    batch, capacity = kv_lengths.shape[0], plan.shape[0] - 1
    if capacity < batch:
        raise ConfigError(f"{what}: plan has room for {capacity} items, fewer than the {batch} requests")
    window = _MAX_INT32 if window is None else min(window, _MAX_INT32)
    return LaunchPlan(1, _PLAN_THREADS, (),
                      tuple(map(np.int32, (batch, capacity, window, _target_splits(n_kv_heads), together))))


@remembered
def _attention_launch(q: Layout, pages: Layout, lookup_table: Layout, kv_lengths: Layout, plan: Layout,
                      sinks: Layout | None, partials: Layout, counters: Layout, blocks: int,
                      out: Layout) -> LaunchPlan | None:
    what = "decode_attention"
    _check_heads(what, "q", q)
    _check_attention(what, pages, lookup_table, kv_lengths, plan, sinks, partials, counters, blocks, q.shape, q.dtype)
    _check_array(what, "out", out, q.shape, q.dtype.name)
    return _launch_plan(q.shape, q.dtype, pages, lookup_table, plan, blocks)


@remembered
def _rotary_launch(qkv: Layout, cos: Layout, sin: Layout, pages: Layout, lookup_table: Layout, kv_lengths: Layout,
                   plan: Layout, sinks: Layout | None, partials: Layout, counters: Layout, blocks: int,
                   out: Layout) -> LaunchPlan | None:
    what = "rotary_decode_attention"
    _check_heads(what, "out", out)
    _check_attention(what, pages, lookup_table, kv_lengths, plan, sinks, partials, counters, blocks, out.shape,
                     out.dtype)
    batch, n_heads, head_dim = out.shape
    n_kv_heads = pages.shape[2]
    _check_array(what, "qkv", qkv, (batch, (n_heads + 2 * n_kv_heads) * head_dim), out.dtype.name)
    for name, array in (("cos", cos), ("sin", sin)):
        _check_array(what, name, array, (batch, head_dim // 2), "float32")
    if not turns_heads(head_dim, head_dim, n_heads, n_kv_heads, out.dtype, interleaved=False):
        raise ConfigError(f"{what}: there is no kernel for {n_heads // n_kv_heads} {out.dtype} query heads of "
                          f"{head_dim} that share a key-value head")
    return _launch_plan(out.shape, out.dtype, pages, lookup_table, plan, blocks, rotates=True)


def _score_numbers(what: str, scale: float, softcap: float | None) -> tuple[np.float32, np.float32]:
    """What a score is multiplied by, and the cap of its exponent of 2, or 0."""
    if softcap is None:
        return np.float32(scale * _LOG2_E), np.float32(0.0)
    if not softcap > 0:
        raise ConfigError(f"{what}: softcap is {softcap}, it must be positive")
    return np.float32(scale / softcap), np.float32(softcap * _LOG2_E)


def _launch_plan(shape: tuple[int, ...], dtype: np.dtype, pages: Layout, lookup_table: Layout, plan: Layout,
                 blocks: int, *, rotates: bool = False) -> LaunchPlan | None:
    batch, n_heads, head_dim = shape
    if batch == 0:
        return None
    n_kv_heads, page_size = pages.shape[2:4]
    group = n_heads // n_kv_heads
    tensor_cores = dtype.name != "float32"
    head_tiles = _head_tiles(head_dim, group, tensor_cores)
    numbers = batch, plan.shape[0] - 1, lookup_table.shape[1], page_size, n_kv_heads, group
    return LaunchPlan(
        blocks, _WARPS * _WARP,
        (f"DTYPE={DTYPE_DEFINES[dtype.name]}", f"HEAD_DIM={head_dim}", f"HEAD_TILES={head_tiles}",
         *["ROTARY"] * rotates),
        tuple(map(np.int32, numbers)), _shared_bytes(head_dim, group, head_tiles, tensor_cores, rotates))


def _target_splits(n_kv_heads: int) -> int:
    return max(1, _TASKS // n_kv_heads)


def _head_tiles(head_dim: int, group: int, tensor_cores: bool) -> int:
    """How many groups of 8 query heads one task takes: two where that saves reading keys and values twice and fits."""
    return 2 if tensor_cores and group > _MAX_HEADS and head_dim <= 128 else 1


def _shared_bytes(head_dim: int, group: int, head_tiles: int, tensor_cores: bool, rotates: bool) -> int:
    """For each warp a copy of the queries and of their angles, and the peaks, totals and result rows of the heads of a
    task."""
    heads = _MAX_HEADS * head_tiles
    queries = -(-head_dim // 32) * head_tiles * _WARP * 16 + 4 * head_dim * rotates if tensor_cores else 0
    return _WARPS * (queries + 8 * heads + 4 * min(group, heads) * (head_dim + 4))


def _check_heads(what: str, name: str, array: Layout) -> None:
    """ConfigError unless `array` is [B, H, D] with heads that there is a kernel for."""
    if array.dtype.name not in DTYPE_DEFINES:
        raise ConfigError(f"{what}: {name} has dtype {array.dtype}; it needs {', '.join(DTYPE_DEFINES)}")
    _check_array(what, name, array, (None, None, None), array.dtype.name)
    if array.shape[2] not in _HEAD_DIMS:
        raise ConfigError(f"{what}: {name} has head dimension {array.shape[2]}; it needs one of "
                          f"{', '.join(map(str, _HEAD_DIMS))}")


def _check_attention(what: str, pages: Layout, lookup_table: Layout, kv_lengths: Layout, plan: Layout,
                     sinks: Layout | None, partials: Layout, counters: Layout, blocks: int, shape: tuple[int, ...],
                     dtype: np.dtype) -> None:
    """ConfigError, naming the argument, if an array does not fit to queries of this shape and dtype."""
    batch, n_heads, head_dim = shape
    _check_array(what, "pages", pages, (None, 2, None, None, head_dim), dtype.name)
    n_kv_heads, page_size = pages.shape[2:4]
    if n_kv_heads < 1 or n_heads < 1 or n_heads % n_kv_heads:
        raise ConfigError(f"{what}: q has {n_heads} heads, not a multiple of the {n_kv_heads} heads of pages")
    if page_size < 1 or page_size % _TILE:
        raise ConfigError(f"{what}: pages have {page_size} tokens; it must be a multiple of {_TILE}")
    _check_array(what, "lookup_table", lookup_table, (batch, None), "int32")
    _check_array(what, "kv_lengths", kv_lengths, (batch,), "int32")
    _check_array(what, "plan", plan, (None, 4), "int32")
    if sinks is not None:
        _check_array(what, "sinks", sinks, (n_heads,), "float32")
    if blocks < 1:
        raise ConfigError(f"{what}: blocks is {blocks}")
    _check_workspace(what, shape, n_kv_heads, plan, partials, counters, lookup_table.shape[1] * page_size)


def _check_workspace(what: str, shape: tuple[int, ...], n_kv_heads: int, plan: Layout, partials: Layout,
                     counters: Layout, max_length: int) -> None:
    """ConfigError unless there is room for requests as long as the lookup table allows."""
    batch, n_heads, head_dim = shape
    capacity = plan.shape[0] - 1
    needed = decode_workspace(batch, max_length, n_heads, n_kv_heads, head_dim).plan[0] - 1
    if capacity < needed:
        raise ConfigError(f"{what}: plan has room for {capacity} items; {batch} requests of up to {max_length} tokens "
                          f"may need {needed}")
    _check_array(what, "partials", partials, (None,), "float32")
    _check_array(what, "counters", counters, (None,), "uint32")
    for name, array, size in (("partials", partials, capacity * n_heads * (head_dim + 2)),
                              ("counters", counters, capacity * n_heads * _WARPS)):
        if array.size < size:
            raise ConfigError(f"{what}: {name} has {array.size} elements; a plan of {capacity} items needs {size}")


def _check_array(what: str, name: str, array: Layout, shape: tuple[int | None, ...], dtype: str) -> None:
    """ConfigError unless `array` is contiguous, of this dtype and of this shape; None stands for any length."""
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConfigError(f"{what}: {name} has shape {array.shape}; it needs ({wanted})")
    if array.dtype.name != dtype:
        raise ConfigError(f"{what}: {name} has dtype {array.dtype}; it needs {dtype}")
    if not array.is_contiguous:
        raise ConfigError(f"{what}: {name} of shape {array.shape} and strides {array.strides} is not contiguous")
