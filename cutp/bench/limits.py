"""What this GPU can do, measured in the same run as the kernels that are held against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.array.dtypes import bfloat16
from cutp.array.gemm import WORKSPACE_BYTES, linear
from cutp.array.kernel import launch
from cutp.bench.timing import microseconds

_READ_BYTES = 2 << 30
_MATMUL_SIZE = 8192
_SOURCE = str(Path(__file__).parent / "read_bandwidth.cu")


def normal(shape: tuple[int, ...], dtype: Any = bfloat16) -> Any:
    """Random numbers of unit variance on the GPU; a short pattern repeated, which is as good for timing."""
    cupy = cuda.cupy()
    pattern = cupy.asarray(np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(dtype))
    count = int(np.prod(shape, dtype=np.int64))
    return cupy.resize(pattern, count).reshape(shape)


def reading(data: Any) -> Callable[[], object]:
    """The call that starts a kernel which reads `data`, of a multiple of 16 bytes, once, and does nothing else."""
    cupy = cuda.cupy()
    blocks = 4 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    args = [data, cupy.zeros(1, np.uint32), np.int64(data.nbytes // 16)]
    return lambda: launch(_SOURCE, "read_all", blocks, 512, args)


class Limits:
    """read_gbps: reading 2 GiB once, GB/s. matmul_tflops: cuBLASLt on a bfloat16 product of 8192^3, TFLOP/s."""

    def __init__(self) -> None:
        cupy = cuda.cupy()
        self.workspace = cupy.empty(WORKSPACE_BYTES, np.uint8)
        self.read_gbps = self._read_gbps(cupy)
        self.matmul_tflops = self._matmul_tflops(cupy)

    def _read_gbps(self, cupy: Any) -> float:
        time = microseconds([reading(cupy.zeros(_READ_BYTES, np.uint8))], least_launches=5)
        return _READ_BYTES / time / 1e3

    def _matmul_tflops(self, cupy: Any) -> float:
        n = _MATMUL_SIZE
        x, w, out = normal((n, n)), normal((n, n)), cupy.empty((n, n), bfloat16)
        time = microseconds([lambda: linear(x, w, out, workspace=self.workspace)], least_launches=5)
        return 2.0 * n**3 / time / 1e6
