"""A stand-in for nvmath.bindings.cublasLt that computes on host memory, by cuBLASLt's own rules.

It knows nothing of rows and of `linear`: matrices are stored by columns with a leading dimension, and the result is
op(A) op(B) plus a bias per row, as the cuBLAS documentation has it.
"""

import ctypes
import itertools
from enum import IntEnum

import ml_dtypes
import numpy as np

TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}


class MatmulDescAttribute(IntEnum):
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    BIAS_DATA_TYPE = 26


class MatmulPreferenceAttribute(IntEnum):
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class FakeCublasLt:
    class cuBLASLtError(Exception):
        pass

    class Epilogue(IntEnum):
        BIAS = 4

    class ReductionScheme(IntEnum):
        NONE = 0
        COMPUTE_TYPE = 2

    MatmulDescAttribute = MatmulDescAttribute
    MatmulPreferenceAttribute = MatmulPreferenceAttribute
    matmul_heuristic_result_dtype = np.dtype(
        [("algo", [("data_", "<u8", (8,))]), ("workspace_size", "<u8"), ("state", "<i4"), ("waves_count", "<f4"),
         ("reserved", "<i4", (4,))])

    def __init__(self, algorithms: int = 1):
        self._numbers = itertools.count(1000)
        self.alive: dict[int, object] = {}
        self.algorithms = algorithms
        self.choices: list[dict] = []

    def _make(self, thing):
        number = next(self._numbers)
        self.alive[number] = thing
        return number

    def _drop(self, number):
        del self.alive[number]

    def create(self):
        return self._make("handle")

    def matmul_desc_create(self, compute, scale):
        return self._make({"compute": compute, "scale": scale})

    def matrix_layout_create(self, kind, rows, cols, ld):
        assert ld >= rows
        return self._make((TYPES[kind], rows, cols, ld))

    def matmul_preference_create(self):
        return self._make({})

    matmul_desc_destroy = matrix_layout_destroy = matmul_preference_destroy = _drop

    def get_matmul_desc_attribute_dtype(self, attribute):
        return np.int64 if attribute == MatmulDescAttribute.BIAS_POINTER else np.int32

    def get_matmul_preference_attribute_dtype(self, attribute):
        return np.uint64 if attribute == MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES else np.uint32

    def _set(self, number, attribute, pointer, size):
        self.alive[number][attribute.name] = int.from_bytes(ctypes.string_at(pointer, size), "little")

    matmul_desc_set_attribute = matmul_preference_set_attribute = _set

    def matmul_algo_get_heuristic(self, handle, desc, a, b, c, d, preference, wanted, results, count):
        assert self.alive[handle] == "handle" and wanted == 1
        layouts = {name: self.alive[layout] for name, layout in (("A", a), ("B", b), ("C", c), ("D", d))}
        self.choices.append({**self.alive[desc], **self.alive[preference], **layouts})
        ctypes.c_uint64.from_address(results).value = 4711
        ctypes.c_int32.from_address(count).value = self.algorithms

    def matmul(self, handle, desc, alpha, a, adesc, b, bdesc, beta, c, cdesc, d, ddesc, algo, workspace, size, stream):
        assert self.alive[handle] == "handle" and (c, cdesc) == (d, ddesc)
        assert ctypes.c_uint64.from_address(algo).value == 4711 and stream == 5
        about = self.alive[desc]
        assert about["scale"] == 0 and ctypes.c_float.from_address(beta).value == 0.0
        first, second, result = (self._matrix(p, self.alive[n]) for p, n in ((a, adesc), (b, bdesc), (d, ddesc)))
        first = first.T if about["TRANSA"] else first
        second = second.T if about["TRANSB"] else second
        value = ctypes.c_float.from_address(alpha).value * (first.astype(np.float64) @ second.astype(np.float64))
        if about.get("EPILOGUE") == 4:
            bias = self._matrix(about["BIAS_POINTER"], (TYPES[about["BIAS_DATA_TYPE"]], len(value), 1, len(value)))
            value = value + bias.astype(np.float64)
        result[...] = value.astype(np.float32).astype(result.dtype)

    @staticmethod
    def _matrix(pointer, layout):
        """Column-major [rows, cols] at `pointer`."""
        dtype, rows, cols, ld = layout
        size = (ld * (cols - 1) + rows) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), (dtype.itemsize, ld * dtype.itemsize))
