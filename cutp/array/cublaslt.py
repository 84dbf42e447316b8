"""cuBLASLt, through the bindings of nvmath-python: the plan of one matrix product.

cuBLASLt stores matrices by columns. A row-major [M, K] array is, to it, a K x M matrix, so that out = x w^T is
computed as out^T = w x^T: the first factor is w (K x N, transposed), the second x (K x M), the result N x M.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cutp.array.dtypes import bfloat16, float16, float32
from cutp.errors import DeviceError

# Values of cuBLAS and CUDA headers. Sums are formed in float32 in all cases.
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_OP_N, _OP_T = 0, 1
CUDA_TYPES = {float32: 0, float16: 2, bfloat16: 14}

# The number of rows that row-invariant products of any number of rows have their algorithm of: large enough for tiles
# that serve long prompts, small enough for tiles that do not burden decoding.
_INVARIANT_ROWS, _INVARIANT_ALIGNMENT = 128, 16


class LinearShape(NamedTuple):
    """All that the choice of an algorithm depends on.

    `ldx`, `ldw`, `ldo`: elements from one row to the next. `alignments`: the largest powers of two, up to 256, that
    divide the addresses of w, x and out. row_invariant: the bits of a row do not depend on m.
    """

    m: int
    n: int
    k: int
    dtype: np.dtype
    out_dtype: np.dtype
    ldx: int
    ldw: int
    ldo: int
    alignments: tuple[int, int, int]
    bias: bool
    tf32: bool
    workspace_bytes: int
    row_invariant: bool = False

    def __str__(self) -> str:
        return f"[{self.m}, {self.k}] x [{self.n}, {self.k}]^T in {self.dtype.name}"


class LinearPlan:
    """Descriptors and the algorithm for one LinearShape."""

    def __init__(self, lt: Any, handle: int, shape: LinearShape):
        self._lt = lt
        self._handle = handle
        self._objects: list[tuple[Any, int]] = []
        weakref.finalize(self, _destroy, self._objects).atexit = False  # the library may be gone by then
        in_type, out_type = CUDA_TYPES[shape.dtype], CUDA_TYPES[shape.out_dtype]
        self._desc = self._new(
            lt.matmul_desc_create, lt.matmul_desc_destroy,
            _COMPUTE_32F_FAST_TF32 if shape.tf32 else _COMPUTE_32F, CUDA_TYPES[float32],
        )
        self._w = self._new(lt.matrix_layout_create, lt.matrix_layout_destroy, in_type, shape.k, shape.n, shape.ldw)
        self._x = self._new(lt.matrix_layout_create, lt.matrix_layout_destroy, in_type, shape.k, shape.m, shape.ldx)
        self._out = self._new(lt.matrix_layout_create, lt.matrix_layout_destroy, out_type, shape.n, shape.m, shape.ldo)
        self._set("TRANSA", _OP_T)
        self._set("TRANSB", _OP_N)
        if shape.bias:
            self._set("EPILOGUE", int(lt.Epilogue.BIAS))
            self._set("BIAS_DATA_TYPE", out_type)
            self._bias = self._setter("BIAS_POINTER")
        # What the library reads at every start. NumPy needs longer to say where an array lies than to look it up.
        self._read = np.ones(1, np.float32), np.zeros(1, np.float32), self._choose(shape)
        self._one, self._zero, self._algorithm = (array.ctypes.data for array in self._read)

    def run(self, w: int, x: int, out: int, bias: int | None, workspace: int, workspace_bytes: int, stream: int
            ) -> None:
        """Start the product on `stream`; all others are addresses in device memory."""
        if bias is not None:
            self._bias(bias)
        self._lt.matmul(
            self._handle, self._desc, self._one, w, self._w, x, self._x, self._zero, out, self._out, out, self._out,
            self._algorithm, workspace, workspace_bytes, stream,
        )

    def _choose(self, shape: LinearShape) -> np.ndarray:
        lt = self._lt
        x_layout, out_layout = self._x, self._out
        if shape.row_invariant:
            # One algorithm for all m, and wherever the rows lie, which forms each sum in one piece.
            rows, in_type, out_type = _INVARIANT_ROWS, CUDA_TYPES[shape.dtype], CUDA_TYPES[shape.out_dtype]
            create, destroy = lt.matrix_layout_create, lt.matrix_layout_destroy
            x_layout = self._new(create, destroy, in_type, shape.k, rows, shape.k)
            out_layout = self._new(create, destroy, out_type, shape.n, rows, shape.n)
            scheme = int(lt.ReductionScheme.NONE)
        else:
            scheme = int(lt.ReductionScheme.COMPUTE_TYPE)  # split sums are added up in float32, not in out's type
        preference = lt.matmul_preference_create()
        try:
            w, x, out = (min(a, _INVARIANT_ALIGNMENT) if shape.row_invariant else a for a in shape.alignments)
            for name, value in (
                ("MAX_WORKSPACE_BYTES", shape.workspace_bytes), ("REDUCTION_SCHEME_MASK", scheme),
                ("MIN_ALIGNMENT_A_BYTES", w), ("MIN_ALIGNMENT_B_BYTES", x),
                ("MIN_ALIGNMENT_C_BYTES", out), ("MIN_ALIGNMENT_D_BYTES", out),
            ):
                attribute = lt.MatmulPreferenceAttribute[name]
                held = np.array([value], dtype=lt.get_matmul_preference_attribute_dtype(attribute))
                lt.matmul_preference_set_attribute(preference, attribute, held.ctypes.data, held.nbytes)
            results = np.zeros(1, dtype=lt.matmul_heuristic_result_dtype)
            count = np.zeros(1, dtype=np.int32)
            lt.matmul_algo_get_heuristic(
                self._handle, self._desc, self._w, x_layout, out_layout, out_layout, preference,
                1, results.ctypes.data, count.ctypes.data,
            )
        finally:
            lt.matmul_preference_destroy(preference)
        if count[0] < 1 or results["state"][0] != 0:
            raise DeviceError(f"cuBLASLt has no algorithm for {shape} with {shape.workspace_bytes} bytes of workspace")
        return results  # the algorithm is the first field of the first result

    def _new(self, create: Any, destroy: Any, *args: int) -> int:
        handle = create(*args)
        self._objects.append((destroy, handle))
        return handle

    def _set(self, name: str, value: int) -> None:
        self._setter(name)(value)

    def _setter(self, name: str) -> Callable[[int], None]:
        """A function that sets this attribute of the description."""
        attribute, set_attribute, description = (
            self._lt.MatmulDescAttribute[name], self._lt.matmul_desc_set_attribute, self._desc)
        held = np.zeros(1, dtype=self._lt.get_matmul_desc_attribute_dtype(attribute))
        where, size = held.ctypes.data, held.nbytes

        def set_to(value: int) -> None:
            held[0] = value
            set_attribute(description, attribute, where, size)

        return set_to


def _destroy(objects: list[tuple[Any, int]]) -> None:
    for destroy, handle in reversed(objects):
        destroy(handle)
