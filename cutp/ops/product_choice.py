"""Which kernel computes x W^T on a GPU. All give the sum in float32, rounded once; the choice is one of speed.

The thresholds are measurements on an H200 (`python -m cutp.bench.kernels`, NOTES.md).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from cutp.array.arena import address
from cutp.array.kernel import runs_on
from cutp.array.layout import Layout, layout, remembered
from cutp.ops import stream_gemm_cuda
from cutp.ops.activation import activation_name

_HOPPER = (9, 0)

# Up to this many rows a product runs in the skinny kernel where its weight is below this size: there it is as fast as
# the library or faster.
_SKINNY_ROWS = 8
_SKINNY_BYTES = 150 << 20


class Kernel(Enum):
    """STREAM: stream_gemm.cu; SKINNY: skinny_gemm.cu; LIBRARY: cuBLASLt."""

    STREAM = "stream"
    SKINNY = "skinny"
    LIBRARY = "library"


def kernel_for(x: Any, weight: Any) -> Kernel:
    """For x [M, K] and weight [N, K]. The streaming kernel wherever it can: its weights arrive while the kernel before
    is still at work, so a whole step is faster (NOTES.md)."""
    rows = x.shape[0]
    if rows <= stream_gemm_cuda.max_rows(weight.shape[0]) and runs_on(_HOPPER) and _can_stream(x, weight):
        return Kernel.STREAM
    if rows <= _SKINNY_ROWS and weight.nbytes <= _SKINNY_BYTES:
        return Kernel.SKINNY
    return Kernel.LIBRARY


def gates_in_product(x: Any, weight: Any, activation: str) -> bool:
    """Whether act(gate) * up is best computed by the product of gate and up itself."""
    return (x.shape[0] <= stream_gemm_cuda.GATED_MAX_M and runs_on(_HOPPER) and _can_stream(x, weight)
            and activation_name(activation) in stream_gemm_cuda.GATED_ACTIVATIONS)


def _can_stream(x: Any, weight: Any) -> bool:
    return address(x) % 16 == 0 and address(weight) % 16 == 0 and _fits_stream(layout(x), layout(weight))


@remembered
def _fits_stream(x: Layout, weight: Layout) -> bool:
    apart = x.strides[0] if x.shape[0] > 1 else 0
    return (x.dtype.name in stream_gemm_cuda.DTYPES and x.shape[1] % stream_gemm_cuda.PANEL_LENGTH == 0
            and apart % 16 == 0
            and x.strides[1] == x.itemsize and weight.is_contiguous)
