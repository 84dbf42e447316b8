"""Launcher of grouped_gemm.cu. The specification is `cutp.ops.moe.grouped_linear`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import (
    DTYPE_DEFINES,
    MAX_ROWS,
    VECTOR_BYTES,
    check_array,
    check_axes,
    check_dtype,
    vector_width,
)

_THREADS = 128
_LINE_BYTES = 128  # of a row in a stage
_MULTIPROCESSORS = 132  # of the GPU that the choices are made for; others get the same bits, if not the best speed


class Tile(NamedTuple):
    """What a block computes, and the stages of its ring: a variant of the kernel."""

    rows: int
    columns: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.rows + self.columns) * _LINE_BYTES


_SMALL, _SHORT, _MEDIUM, _LARGE = Tile(16, 32, 8), Tile(16, 64, 6), Tile(64, 128, 3), Tile(128, 128, 3)
_FLOAT = Tile(32, 64, 4)


def grouped_linear(x: Any, weight: Any, offsets: Any, bias: Any = None, *, tokens: Any = None, out: Any,
                   expected_rows: int | None = None, pdl: bool = False) -> None:
    """out[i] = x[tokens[i]] weight[e]^T + bias[e] for the rows i of each expert e; sums in float32, rounded once.

    weight: [E, N, K]; bias: [E, N] or None; offsets: int32 [E + 1], ascending: rows offsets[e] .. offsets[e + 1] are of
    expert e; None where all experts have equally many of the R rows. out: [R, N], where R is the most rows that there
    can be; those beyond offsets[E] are left alone. x: [T, K] with tokens int32 [R], below T (not checked), or [R, K].
    x, weight and bias have one dtype (bfloat16, float16 or float32), out has it or float32. K is a multiple of 16
    bytes. Contiguous; ConfigError otherwise.

    expected_rows: how many of the R rows there are as a rule; it decides about speed only. The bits of a row of the
    result depend on its row of x and its expert only, not on R, nor on the other rows.
    """
    op = "grouped_linear"
    rows, experts, n, k = _check(op, layout(x), layout(weight), optional_layout(offsets), optional_layout(bias),
                                 optional_layout(tokens), layout(out))
    if rows == 0 or experts == 0 or n == 0:
        return
    tile = choose_tile(rows if expected_rows is None else min(rows, expected_rows), experts, n, x.dtype)
    row_tiles = most_row_tiles(rows, experts, tile.rows)
    grid = row_tiles * -(-n // tile.columns)
    if grid > MAX_ROWS:
        raise ConfigError(f"{op}: out of shape {out.shape} for {experts} experts is too large for one launch")
    launch(
        "grouped_gemm.cu", "grouped_gemm", grid, _THREADS,
        [x, weight, bias, out, tokens, offsets, np.int32(experts), np.int32(row_tiles), np.int32(n), np.int32(k),
         np.int32(rows // experts), np.int32(out.dtype.name == "float32")],
        shared_bytes=tile.shared_bytes, pdl=pdl,
        defines=(f"DTYPE={DTYPE_DEFINES[x.dtype.name]}", f"ROWS={tile.rows}", f"COLUMNS={tile.columns}",
                 f"STAGES={tile.stages}"),
    )


def choose_tile(rows: int, experts: int, n: int, dtype: np.dtype) -> Tile:
    """The tile for so many rows of `experts` experts with matrices of n rows.

    As long as an expert has few rows, its matrix is what takes time: another tile of rows reads it again, if from the
    cache. Rows that a tile has too many cost as much as others.
    """
    if dtype.name == "float32":
        return _FLOAT
    if rows > 96 * experts:
        return _LARGE
    if rows > 24 * experts:
        return _MEDIUM
    # Every multiprocessor needs two blocks.
    return _SHORT if min(rows, experts) * -(-n // _SHORT.columns) >= 2 * _MULTIPROCESSORS else _SMALL


def most_row_tiles(rows: int, experts: int, tile_rows: int) -> int:
    """How many tiles so many rows can make, however they are divided: each expert's last tile may have a single row."""
    return rows if rows <= experts else experts + (rows - experts) // tile_rows


@remembered
def _check(op: str, x: Layout, weight: Layout, offsets: Layout | None, bias: Layout | None, tokens: Layout | None,
           out: Layout) -> tuple[int, int, int, int]:
    """R, E, N and K; ConfigError, naming the argument, if an array does not fit."""
    check_dtype(op, "x", x)
    check_axes(op, "x", x, "rows, K")
    check_axes(op, "weight", weight, "E, N, K")
    check_axes(op, "out", out, "R, N")
    experts, n, k = weight.shape
    rows = out.shape[0]
    check_array(op, "x", x, (x.shape[0] if tokens is not None else rows, k))
    check_array(op, "weight", weight, (experts, n, k), x.dtype)
    if offsets is not None:
        check_array(op, "offsets", offsets, (experts + 1,), np.int32)
    elif experts and rows % experts:
        raise ConfigError(f"{op}: {rows} rows cannot be divided evenly among {experts} experts; offsets are needed")
    check_array(op, "out", out, (rows, n), np.float32 if out.dtype.name == "float32" else x.dtype)
    if bias is not None:
        check_array(op, "bias", bias, (experts, n), x.dtype)
    if tokens is not None:
        check_array(op, "tokens", tokens, (rows,), np.int32)
    width = vector_width(x.dtype)
    if k % width or k == 0:
        raise ConfigError(f"{op}: rows of {k} {x.dtype} elements; their number must be a positive multiple of "
                          f"{width}, which is {VECTOR_BYTES} bytes")
    if max(rows, n, k) > MAX_ROWS - 4096:
        raise ConfigError(f"{op}: out of shape {out.shape} and rows of {k} are too large for one launch")
    return rows, experts, n, k
