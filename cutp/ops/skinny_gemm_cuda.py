"""Launcher of skinny_gemm.cu. The specification is `cutp.ops.linear.linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, vector_width
from cutp.ops.product_arguments import check_product, row_strides

MAX_M = 64
"""The most rows of x; beyond, a product is worth a library's blocking over K."""

_WARP = 32
_MULTIPROCESSORS = 132  # of the GPU that the choices are made for; others get the same bits, if not the best speed
_MAX_STRIDE = 2**25  # offsets between the rows of one block are 32-bit


@dataclass(frozen=True)
class Plan:
    """How a product is launched: blocks, threads per block, dynamic shared memory, the variant of the kernel."""

    grid: int
    block: int
    shared_bytes: int
    defines: tuple[str, ...]


def skinny_gemm(x: Any, weight: Any, bias: Any = None, *, out: Any, pdl: bool = False) -> None:
    """out = x weight^T + bias for at most MAX_M rows of x; sums in float32, rounded once.

    x: [M, K], M may be 0; weight: [N, K], contiguous; bias: [N], contiguous, or None; all of one dtype (bfloat16,
    float16 or float32). out: [M, N] of that dtype or float32. K is a multiple of 16 bytes. The rows of x and out may be
    apart, x's by a multiple of 16 bytes; x and weight begin at multiples of 16 bytes. ConfigError otherwise.

    A row of the result depends on that row of x only, to the bit: not on M, nor on the other rows.
    """
    m, n, k, x_stride, out_stride = _check(layout(x), layout(weight), optional_layout(bias), layout(out))
    if m == 0 or n == 0:
        return
    chosen = plan(n, k, m, x.dtype)
    launch(
        "skinny_gemm.cu", "skinny_gemm", chosen.grid, chosen.block,
        [x, weight, bias, out, np.int32(m), np.int32(n), np.int32(k), np.int32(x_stride), np.int64(out_stride),
         np.int32(out.dtype == np.float32)],
        shared_bytes=chosen.shared_bytes, defines=chosen.defines, pdl=pdl,
    )


def plan(n: int, k: int, m: int, dtype: np.dtype) -> Plan:
    """The launch for y[m, n] = x[m, k] w[n, k]^T with 1 <= m <= MAX_M.

    The order of the sums is a matter of the number of warps, which therefore must not depend on m.
    """
    is_float = dtype.name == "float32"
    tiles, rows, steps = (1, 4, 2) if is_float else _tile(n, m)
    warps = _warps(n, k, is_float)
    columns = 8 * tiles
    return Plan(
        grid=-(-n // rows) * -(-m // columns), block=warps * _WARP, shared_bytes=warps * rows * columns * 4,
        defines=(f"DTYPE={DTYPE_DEFINES[dtype.name]}", f"M_TILES={tiles}", f"ROWS={rows}", f"STEPS={steps}"),
    )


def _warps(n: int, k: int, is_float: bool) -> int:
    """How many warps of a block split K."""
    if k <= 512:  # one slice each for 8 warps: fewer have some loads in flight each
        return 4
    # Fewer blocks than multiprocessors, even of 8 rows: each must keep as much in flight as two blocks otherwise.
    few_blocks = not is_float and n < 8 * _MULTIPROCESSORS
    return 16 if few_blocks and k >= 2048 else 8


def _tile(n: int, m: int) -> tuple[int, int, int]:
    """M_TILES, ROWS and STEPS of a block.

    More rows let the elements of x, which come from L2, serve more weights: from 9 columns on that traffic is as large
    as that of the weights for 16 rows. But every multiprocessor needs a block, and blocks of 16 rows a second one.
    """
    tiles = next(t for t in (1, 2, 4, 8) if m <= 8 * t)
    if tiles == 1:
        blocks = -(-n // 16)
        if blocks < 200:
            return 1, 8, 8
        return (1, 16, 8) if blocks <= 2 * _MULTIPROCESSORS else (1, 16, 4)
    if tiles == 8 and n >= 2 * 48 * _MULTIPROCESSORS:
        return 8, 48, 2
    wide = n >= 4096
    return {(2, False): (2, 16, 4), (2, True): (2, 32, 4), (4, False): (4, 16, 4), (4, True): (4, 32, 2),
            (8, False): (8, 16, 2), (8, True): (8, 32, 4)}[tiles, wide]


@remembered
def _check(x: Layout, weight: Layout, bias: Layout | None, out: Layout) -> tuple[int, int, int, int, int]:
    """M, N, K, and the elements from one row of x, and of out, to the next; ConfigError, naming the argument, if an
    array does not fit."""
    m, n, k = check_product("skinny_gemm", x, weight, bias, out, dtypes=tuple(DTYPE_DEFINES), max_rows=MAX_M)
    width = vector_width(x.dtype)
    if k % width or not 0 < k <= _MAX_STRIDE:
        raise ConfigError(f"skinny_gemm: x has rows of {k} {x.dtype} elements; their number must be a multiple of "
                          f"{width}, at least {width} and at most {_MAX_STRIDE}")
    return m, n, k, *row_strides("skinny_gemm", x, out, _MAX_STRIDE)
