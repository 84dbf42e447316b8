"""The linear map on a GPU, y = x w^T + b, by cuBLASLt: made for graphs (no allocation, an explicit workspace)."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from cutp.array import cuda, graph
from cutp.array.arena import ALIGNMENT, address
from cutp.array.cublaslt import CUDA_TYPES, LinearPlan, LinearShape
from cutp.array.dtypes import float32
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError, DeviceError

WORKSPACE_BYTES = 32 * 2**20
"""The workspace that cuBLAS recommends for Hopper; with less, some of its algorithms are not available."""


def linear(x: Any, w: Any, out: Any, bias: Any = None, *, workspace: Any, allow_tf32: bool = False,
           row_invariant: bool = False) -> Any:
    """out = x w^T + bias on the current stream; returns `out`.

    x [M, K], w [N, K], out [M, N]: CuPy arrays whose rows are contiguous (the rows may be apart); bias [N] or None.
    x and w are bfloat16, float16 or float32, out is the same or float32, bias is as out. Sums are formed in float32,
    the bias is added to them, and the result is rounded once; only where rows are no multiples of 16 bytes, cuBLASLt
    may round the sums to a 16-bit out before it adds the bias. float32 factors are used as they are, unless
    `allow_tf32` lets the hardware round them to TF32 first.

    workspace: a uint8 array (from an Arena; WORKSPACE_BYTES is a good size) that nothing else uses meanwhile: one
    for each stream. Equal shapes give equal bits; with `row_invariant`, at some cost, the bits of a row of the result
    depend on nothing but that row of x. Can be captured, but call it once before with the same shapes.
    Raises ConfigError for arrays that do not fit, DeviceError if cuBLASLt is missing or fails.
    """
    device = cuda.current_device()
    stream = cuda.cupy().cuda.get_current_stream().ptr
    graph.keep_for_capture((x, w, out, bias, workspace))
    return _engine(device).linear(x, w, out, bias, workspace, allow_tf32, stream, row_invariant)


@lru_cache(maxsize=64)
def _engine(device: int) -> LinearEngine:
    return LinearEngine(_bindings())


class LinearEngine:
    """cuBLASLt on one GPU: its handle, which belongs to no stream, and the plans of all shapes seen so far."""

    def __init__(self, lt: Any):
        self._lt = lt
        self._plans: dict[LinearShape, LinearPlan] = {}
        # A plan's description holds the address of the bias while the product is started.
        self._lock = threading.Lock()
        try:
            self._handle = lt.create()
        except (RuntimeError, lt.cuBLASLtError) as error:
            raise DeviceError(f"cuBLASLt cannot be used: {error}", hint=cuda.INSTALL_HINT) from error

    def linear(self, x: Any, w: Any, out: Any, bias: Any, workspace: Any, allow_tf32: bool, stream: int,
               row_invariant: bool = False) -> Any:
        """See `linear` of this module."""
        shape = linear_shape(x, w, out, bias, workspace, allow_tf32, row_invariant)
        if shape.m == 0 or shape.n == 0:
            return out
        addresses = (address(w), address(x), address(out), None if bias is None else address(bias), address(workspace))
        try:
            with self._lock:
                plan = self._plans.get(shape)
                if plan is None:
                    plan = self._plans[shape] = LinearPlan(self._lt, self._handle, shape)
                plan.run(*addresses, shape.workspace_bytes, stream)
        except (RuntimeError, self._lt.cuBLASLtError) as error:
            raise DeviceError(f"cuBLASLt failed at {shape}: {error}") from error
        return out


def linear_shape(x: Any, w: Any, out: Any, bias: Any, workspace: Any, allow_tf32: bool = False,
                 row_invariant: bool = False) -> LinearShape:
    """Check the arguments of `linear` (ConfigError) and describe them."""
    return _described(layout(x), layout(w), layout(out), optional_layout(bias), layout(workspace), allow_tf32,
                      address(w) % ALIGNMENT, address(x) % ALIGNMENT, address(out) % ALIGNMENT,
                      address(workspace) % ALIGNMENT, row_invariant)


@remembered
def _described(x: Layout, w: Layout, out: Layout, bias: Layout | None, workspace: Layout, allow_tf32: bool,
               w_place: int, x_place: int, out_place: int, workspace_place: int,
               row_invariant: bool) -> LinearShape:
    """For arrays at these distances from a multiple of ALIGNMENT."""
    for name, array in (("x", x), ("w", w), ("out", out)):
        if array.ndim != 2:
            raise ConfigError(f"linear: {name} has shape {array.shape}, it must be a matrix")
    (m, k), (n, _) = x.shape, w.shape
    if w.shape != (n, k) or out.shape != (m, n):
        raise ConfigError(f"linear: x {x.shape}, w {w.shape} and out {out.shape} are not [M, K], [N, K] and [M, N]")
    if k == 0:
        raise ConfigError("linear: K is 0")
    if x.dtype not in CUDA_TYPES or w.dtype != x.dtype or out.dtype not in (x.dtype, float32):
        raise ConfigError(
            f"linear: x {x.dtype}, w {w.dtype} and out {out.dtype}: x and w must both be bfloat16, float16 or "
            "float32, and out the same or float32"
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype != out.dtype or bias.strides != (bias.itemsize,)):
        raise ConfigError(f"linear: bias {bias.dtype} {bias.shape} must be contiguous, {out.dtype} ({n},)")
    if workspace.dtype != np.uint8 or workspace_place:
        raise ConfigError(f"linear: workspace must be uint8 and start at a multiple of {ALIGNMENT} bytes")
    return LinearShape(
        m, n, k, np.dtype(x.dtype), np.dtype(out.dtype), _row_step(x, "x"), _row_step(w, "w"), _row_step(out, "out"),
        (_alignment(w_place), _alignment(x_place), _alignment(out_place)), bias is not None,
        bool(allow_tf32 and x.dtype == float32), workspace.size, row_invariant,
    )


def _row_step(array: Layout, name: str) -> int:
    """Elements from one row to the next, for an array of contiguous rows that do not overlap."""
    rows, columns = array.shape
    if array.size == 0:
        return max(1, columns)  # the strides of an empty array mean nothing
    down, right = array.strides
    if rows == 1:
        down = columns * array.itemsize
    if (columns > 1 and right != array.itemsize) or down % array.itemsize or down < columns * array.itemsize:
        raise ConfigError(f"linear: {name} {array.shape} with strides {array.strides} has no contiguous rows")
    return max(1, down // array.itemsize)


def _alignment(place: int) -> int:
    """The largest power of two, up to ALIGNMENT, that divides the address."""
    return (place | ALIGNMENT) & -(place | ALIGNMENT)


def _bindings() -> Any:
    try:
        from nvmath.bindings import cublasLt
    except ImportError as error:
        raise DeviceError("matrix products on a GPU need nvmath-python, which is not installed",
                          hint=cuda.INSTALL_HINT) from error
    return cublasLt
