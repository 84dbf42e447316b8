"""Launchers of stream_gemm.cu. The specifications are `cutp.ops.linear.linear` and
`cutp.ops.activation.gated_activation`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.array.tensor_map import ROW_ELEMENTS, TensorMap
from cutp.errors import ConfigError
from cutp.ops.activation import activation_name
from cutp.ops.launch_arguments import DTYPE_DEFINES
from cutp.ops.product_arguments import check_product, row_strides

DTYPES = ("bfloat16", "float16")
PANEL_LENGTH = ROW_ELEMENTS
"""K is a multiple of this."""

MAX_M = 96
"""The most rows of x. With more, every block's reading of all of x takes longer than its weights (NOTES.md)."""

WIDE_MAX_M = 128
"""The same where blocks have so many rows of the weight that a result has one sum."""

# In the order of the enum in activation.cuh; others would make the kernel large.
GATED_ACTIVATIONS = {"silu": 0, "gelu_tanh": 2}
"""The activations that `stream_gemm_gated` knows, with their numbers."""

GATED_MAX_M = 16
"""The most rows of x of `stream_gemm_gated`: beyond, a block's sums take as long to activate as a kernel of its own."""

RING_BYTES = 170 * 1024
"""Shared memory of a block, which leaves room for the small kernels between two products."""

LEAST_BYTES = 114 * 1024
"""What a block takes at least, so that a multiprocessor has room for one only. Where two fit, blocks of one product
come in pairs to the multiprocessors that are free first, and none to others (a step of decoding takes 5 % longer with a
ring of 90 KB, and for 32 rows 13 %: NOTES.md)."""

STAGE_BYTES = 16 * 1024
"""A stage holds as many panels of the weight as fit into this, but at least one; and x beside them."""

_THREADS = 288
_MULTIPROCESSORS = 132  # of the GPU that the choices are made for; others get the same bits, if not the best speed
_ROW_BYTES = 2 * ROW_ELEMENTS
_GROUP_ROWS = 64
# By SPLITS of the kernel: its GROUPS, and those of GATED. The products of one group and one sum wait for each other.
_GROUPS = {4: 1, 2: 2, 1: 4}
_GATED_GROUPS = {4: 2, 2: 2, 1: 4}
_MAX_PANELS = 8
_LEAST_STAGES = 3  # while a stage has more than one panel
_BARRIER_BYTES = 16  # of a stage
_MAX_SIZE = 2**30  # of N and K: the kernel counts in 32 bits
# Bytes per nanosecond that the GPU reads from memory, from L2 in all, and into one multiprocessor.
_MEMORY_RATE, _L2_RATE, _MULTIPROCESSOR_RATE = 4200, 8000, 65


@dataclass(frozen=True)
class Plan:
    """How a product is launched.

    grid: blocks; rows: of each part of the weight in a piece; x_rows: of x in a stage; columns: rows of x that an
    instruction takes; groups: of 64 rows of the weight in a piece; splits: sums of a result; panels: in a stage;
    stages: in the ring; shared_bytes: dynamic shared memory.
    """

    grid: int
    rows: int
    x_rows: int
    columns: int
    groups: int
    splits: int
    panels: int
    stages: int
    shared_bytes: int


def stream_gemm(x: Any, weight: Any, bias: Any = None, *, out: Any, pdl: bool = False,
                chosen: Plan | None = None) -> None:
    """out = x weight^T + bias for at most `max_rows` rows of x; sums in float32, rounded once. On compute capability
    9.0.

    x: [M, K], M may be 0; weight: [N, K], contiguous; bias: [N], contiguous, or None; all bfloat16 or float16. out:
    [M, N] of that dtype or float32. K is a multiple of 64. The rows of x and out may be apart, x's by a multiple of 16
    bytes; x and weight begin at multiples of 16 bytes. ConfigError otherwise.

    A row of the result depends on that row of x only, to the bit: not on M, nor on the other rows. chosen: another
    plan than `plan`'s.
    """
    most = max_rows(weight.shape[0]) if chosen is None else _max_rows_of(chosen.splits)
    m, n, k, out_stride = _check("stream_gemm", layout(x), layout(weight), optional_layout(bias), layout(out), most)
    if m and n:
        _launch(x, weight, bias, out, out_stride, chosen or plan(n, k, m), pdl, np.int32(0), np.float32(inf))


def stream_gemm_gated(x: Any, weight: Any, name: str, bias: Any = None, *, limit: float | None = None, out: Any,
                      pdl: bool = False, chosen: Plan | None = None) -> None:
    """out = act(gate) * up, where gate and up are the two halves of x weight^T + bias, rounded to their dtype.

    The same bits as `stream_gemm` followed by `cutp.ops.activation_cuda.gated_activation`. weight: [2F, K], the rows of
    the gate first; bias: [2F] or None; out: [M, F] of x's dtype; M at most GATED_MAX_M; name: one of GATED_ACTIVATIONS;
    the rest as in `stream_gemm`, limit as in `gated_activation`.
    """
    known = activation_name(name)
    if known not in GATED_ACTIVATIONS:
        raise ConfigError(f"stream_gemm_gated: activation {known} is not one of {', '.join(GATED_ACTIVATIONS)}")
    m, n, k, out_stride = _check("stream_gemm_gated", layout(x), layout(weight), optional_layout(bias), layout(out),
                                 GATED_MAX_M, 2)
    if m and n:
        _launch(x, weight, bias, out, out_stride, chosen or plan(n, k, m, gated=True), pdl,
                np.int32(GATED_ACTIVATIONS[known]), np.float32(inf if limit is None else limit), gated=True)


def max_rows(weight_rows: int) -> int:
    """The most rows of x for a weight of so many rows: MAX_M or WIDE_MAX_M."""
    return _max_rows_of(splits_of(max(1, weight_rows)))


@lru_cache(maxsize=4096)
def plan(n: int, k: int, m: int, *, gated: bool = False) -> Plan:
    """The launch for an y of [m, n] with 1 <= m <= `max_rows`; the weight is [n, k], or [2n, k] if `gated`.

    A block takes pieces of as many rows as make the longest of three times least: that of all weights from memory, that
    of weights and x from L2, where every block reads all of x for each of its pieces, and that of what one
    multiprocessor reads. All blocks have the same number of pieces, except where N ends. None of this changes a bit.
    """
    parts = 2 if gated else 1
    groups = (_GATED_GROUPS if gated else _GROUPS)[splits_of(parts * n)]
    return plan_of_rows(n, k, m, _best_rows(n, m, parts, groups), gated=gated)


def plan_of_rows(n: int, k: int, m: int, rows: int, *, gated: bool = False, splits: int | None = None,
                 stage_bytes: int = STAGE_BYTES, ring_bytes: int | None = None) -> Plan:
    """The plan with these rows in a piece (a multiple of 8, at most 256 / `splits`, half of that if `gated`).

    splits: other sums than `splits_of` gives, and so other bits. stage_bytes, ring_bytes: see STAGE_BYTES, RING_BYTES;
    a ring has at least two stages, even if they need more.
    """
    parts, x_rows = 2 if gated else 1, _x_rows(m)
    splits = splits or splits_of(parts * n)
    groups = (_GATED_GROUPS if gated else _GROUPS)[splits]
    pieces = -(-n // rows)
    passes = -(-pieces // _MULTIPROCESSORS)
    ring_bytes = ring_bytes or RING_BYTES
    # A power of two, as the number of panels in K mostly is.
    panels = 1
    while (2 * panels <= min(_MAX_PANELS, -(-k // PANEL_LENGTH))
           and _stage_bytes(rows, 0, parts, 2 * panels) <= stage_bytes
           and _stages(rows, x_rows, parts, groups, 2 * panels, ring_bytes) >= _LEAST_STAGES):
        panels *= 2
    steps = passes * -(-k // (panels * PANEL_LENGTH))
    stages = max(2, min(_stages(rows, x_rows, parts, groups, panels, ring_bytes), steps))
    shared = stages * (_stage_bytes(rows, x_rows, parts, panels) + _BARRIER_BYTES)
    shared += _bytes_behind(rows, x_rows, parts, groups, panels)
    return Plan(-(-pieces // passes), rows, x_rows, _columns(m), groups, splits, panels, stages,
                max(shared, LEAST_BYTES))


@lru_cache(maxsize=4096)
def splits_of(weight_rows: int) -> int:
    """SPLITS of the kernel: the more, the fewer groups a piece has, chosen for one row of x. It decides about bits and
    therefore depends on nothing but the weight, and is the same whether an activation is part of the product."""
    rows = _best_rows(weight_rows, 1, 1, 4)
    return 4 if rows <= _GROUP_ROWS else 2 if rows <= 2 * _GROUP_ROWS else 1


def _max_rows_of(splits: int) -> int:
    return WIDE_MAX_M if splits == 1 else MAX_M


def _best_rows(n: int, m: int, parts: int, groups: int) -> int:
    """Rows of each part in a piece: a multiple of 8 of which the ring holds three stages."""
    x_rows, most = _x_rows(m), groups // parts * _GROUP_ROWS
    fits = [rows for rows in range(8, min(most, -(-n // 8) * 8) + 1, 8)
            if _stages(rows, x_rows, parts, groups, 1, RING_BYTES) >= _LEAST_STAGES]
    return min(fits, key=lambda rows: (_time(n, m, rows, parts), -rows))


def _columns(m: int) -> int:
    """COLUMNS of the kernel."""
    return next(c for c in (8, 16, 32, 64, 96, 128) if m <= c)


def _x_rows(m: int) -> int:
    """Rows of x in a stage: a multiple of 8, in which the copy engine permutes pieces of rows."""
    return -(-m // 8) * 8


def _time(n: int, m: int, rows: int, parts: int) -> float:
    """What a product with this many rows in a piece takes, in nanoseconds for each byte of a row of the weight."""
    pieces = -(-n // rows)
    passes = -(-pieces // _MULTIPROCESSORS)
    of_block = passes * (parts * rows + m)
    weight, everything = parts * n, parts * n + pieces * m
    longest = max(weight / _MEMORY_RATE, everything / _L2_RATE, of_block / _MULTIPROCESSOR_RATE)
    # The shorter the longest block is, the more even is the end, and the more shared memory is in use at the beginning.
    return longest + 0.25 * of_block / _MULTIPROCESSOR_RATE


def _stage_bytes(rows: int, x_rows: int, parts: int, panels: int) -> int:
    return panels * (parts * rows + x_rows) * _ROW_BYTES


def _stages(rows: int, x_rows: int, parts: int, groups: int, panels: int, ring_bytes: int) -> int:
    """How many stages fit into `ring_bytes`, with what else is there."""
    available = ring_bytes - _bytes_behind(rows, x_rows, parts, groups, panels)
    return available // (_stage_bytes(rows, x_rows, parts, panels) + _BARRIER_BYTES)


def _bytes_behind(rows: int, x_rows: int, parts: int, groups: int, panels: int) -> int:
    """Shared memory behind the stages but the barriers: what the last operands reach into, and where one warpgroup
    gives the other its sums, if the two have not rows of their own."""
    columns = _columns(x_rows)
    reach = max((groups // parts * _GROUP_ROWS - rows) - panels * x_rows, columns - x_rows) * _ROW_BYTES
    return max(0, reach) + (min(columns // 2, 8) * 4 * 128 if groups == parts else 0)


def _launch(x: Any, weight: Any, bias: Any, out: Any, out_stride: int, chosen: Plan, pdl: bool, activation: Any,
            limit: Any, gated: bool = False) -> None:
    (m, k), n = x.shape, out.shape[1]
    defines = [f"DTYPE={DTYPE_DEFINES[x.dtype.name]}", f"COLUMNS={chosen.columns}", f"GROUPS={chosen.groups}",
               f"SPLITS={chosen.splits}"]
    launch(
        "stream_gemm.cu", "stream_gemm", chosen.grid, _THREADS,
        [TensorMap(_in_panels(weight), (chosen.panels, chosen.rows, ROW_ELEMENTS), weight=True),
         TensorMap(_in_panels(x), (chosen.panels, chosen.x_rows, ROW_ELEMENTS)),
         bias, out, np.int32(m), np.int32(n), np.int32(k // PANEL_LENGTH), np.int64(out_stride),
         np.int32(out.dtype.name == "float32"), np.int32(chosen.rows), np.int32(chosen.x_rows), np.int32(chosen.panels),
         np.int32(chosen.stages), np.int32(chosen.shared_bytes), activation, limit],
        shared_bytes=chosen.shared_bytes, defines=tuple(defines + ["GATED"] if gated else defines), pdl=pdl,
    )


def _in_panels(array: Any) -> Any:
    """[rows, K] seen as [K / 64, rows, 64]."""
    rows, k = array.shape
    return array.reshape(rows, k // PANEL_LENGTH, PANEL_LENGTH).transpose(1, 0, 2)


@remembered
def _check(op: str, x: Layout, weight: Layout, bias: Layout | None, out: Layout,
           most: int, parts: int = 1) -> tuple[int, int, int, int]:
    """M, N of `out`, K, and the elements from one row of `out` to the next; ConfigError, naming the argument, if an
    array does not fit."""
    m, n, k = check_product(op, x, weight, bias, out, dtypes=DTYPES, max_rows=most, parts=parts)
    if k % PANEL_LENGTH or not 0 < k <= _MAX_SIZE or weight.shape[0] > _MAX_SIZE:
        raise ConfigError(f"{op}: weight has shape {weight.shape}; its rows need a multiple of {PANEL_LENGTH} "
                          f"elements, not 0, and neither axis more than {_MAX_SIZE}")
    return m, n, k, row_strides(op, x, out)[1]
