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
    values, addresses = pack_arguments(args)
    status, *_ = driver.cuLaunchKernelEx(
        launch_config(driver, grid, block, shared_bytes, stream), function, addresses.ctypes.data, 0
    )
    del values
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"cuLaunchKernelEx failed: {status.name}")


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


def pack_arguments(args: Sequence[Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """(values, addresses): one array per argument with its bytes, and where each of them lies (uint64).

    `addresses` is what cuLaunchKernel calls kernelParams; it is valid as long as `values` is.
    """
    values = [_value(a) for a in args]
    addresses = np.array([v.ctypes.data for v in values] or [0], dtype=np.uint64)
    return values, addresses


def _value(arg: Any) -> np.ndarray:
    if isinstance(arg, np.ndarray):
        return arg
    if isinstance(arg, np.generic):
        return np.array([arg])
    return np.array([arg.data.ptr], dtype=np.uint64)
