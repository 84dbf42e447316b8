"""Programmatic dependent launch: a kernel that may start before its predecessor in the stream has ended.

CuPy cannot set launch attributes, so this goes through cuLaunchKernelEx of cuda.bindings, on CuPy's stream and
CuPy's function. It can be captured into a graph, where it becomes a programmatic edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cutp.array.kernel_arguments import pack_arguments
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
    """Launch the CUfunction on the CUstream. args: those of `cutp.array.kernel.launch`."""
    driver = _driver()
    packed = pack_arguments(args)
    try:
        (status,) = driver.cuLaunchKernelEx(
            launch_config(grid, block, shared_bytes, stream), function, packed.addresses, 0
        )
    finally:
        packed.release()  # the driver has copied them
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"cuLaunchKernelEx failed: {status.name}")


@lru_cache(maxsize=4096)
def launch_config(grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, stream: int) -> Any:
    """The driver's description of such a launch."""
    driver = _driver()
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
