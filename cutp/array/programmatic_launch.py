"""Programmatic dependent launch: a kernel that may start before its predecessor in the stream has ended.

CuPy cannot set launch attributes, so this goes through cuLaunchKernelEx of cuda.bindings, on CuPy's stream and
CuPy's function. It can be captured into a graph, where it becomes a programmatic edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cutp.errors import DeviceError

FIRST_CAPABILITY = (9, 0)
_ALIGNMENT = 16  # of every argument: the strictest that a kernel's parameter can have


def is_supported(capability: tuple[int, int]) -> bool:
    """Whether such launches work on a GPU of this compute capability; if not, use plain ones."""
    return capability >= FIRST_CAPABILITY and _driver() is not None


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def launch(
    function: int, grid: tuple[int, int, int], block: tuple[int, int, int], args: Sequence[Any], shared_bytes: int,
    stream: int,
) -> None:
    """Launch the CUfunction on the CUstream. args: CuPy arrays, NumPy scalars, size-one NumPy arrays."""
    driver = _driver()
    # The driver copies the arguments before it returns, so they need to live only until then.
    buffer, addresses = pack_arguments(args)
    status, *_ = driver.cuLaunchKernelEx(
        launch_config(driver, grid, block, shared_bytes, stream), function, addresses.ctypes.data, 0
    )
    del buffer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"cuLaunchKernelEx failed: {status.name}")


@lru_cache(maxsize=4096)
def launch_config(
    driver: Any, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, stream: int
) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.attrs = [attribute]
    config.numAttrs = 1
    return config


def pack_arguments(args: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(buffer, addresses): all arguments' bytes, and where each of them lies (uint64).

    `addresses` is what cuLaunchKernel calls kernelParams; it is valid as long as `buffer` is. One buffer, because a
    pass over a short prompt takes as long as the host needs to start its kernels.
    """
    pieces, starts, size = [], [], 0
    for arg in args:
        data = arg.tobytes() if isinstance(arg, (np.generic, np.ndarray)) else arg.data.ptr.to_bytes(8, "little")
        starts.append(size)
        gap = -len(data) % _ALIGNMENT
        pieces.append(data + bytes(gap) if gap else data)
        size += len(data) + gap
    # NumPy's memory is aligned like malloc's, to 16 bytes.
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    buffer[:size] = np.frombuffer(b"".join(pieces), np.uint8)
    return buffer, np.array(starts or [0], np.uint64) + np.uint64(buffer.ctypes.data)
