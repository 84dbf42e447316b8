"""What a GPU's tensor copy engine (TMA, from compute capability 9.0 on) must know of an array.

A kernel takes it as `const __grid_constant__ TensorMap` (cutp/ops/hopper.cuh) and copies boxes out of the array into
shared memory by the coordinates of their first element.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cutp.array.arena import address
from cutp.array.dtypes import bfloat16, float16
from cutp.errors import ConfigError, DeviceError

MAP_BYTES = 128
ROW_ELEMENTS = 64
"""Elements of 16 bits in a row of 128 bytes, within which the copy engine permutes pieces of 16 bytes."""

_ALIGNMENT = 64  # of a map while the driver writes it
_MAX_BOX = 256
_MAX_SIZE = 2**32
_MAX_STRIDE = 2**40
# CUtensorMapDataType and other constants of cuda.h
_DATA_TYPES = {float16: 6, bfloat16: 9}
_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_256B, _FILL_ZEROS = 0, 3, 3, 0


@dataclass(frozen=True, eq=False)
class TensorMap:
    """An array and the box that one copy brings, as an argument of `cutp.array.kernel.launch`.

    array: bfloat16 or float16, 2 to 5 axes, a view of any kind whose last axis is contiguous and whose other strides
    are multiples of 16 bytes, beginning at a multiple of 16 bytes. box: elements along each axis, in the order of the
    array's axes; 64 along the last one, 1 to 256 along others; it may be larger than the array. What a box has outside
    the array arrives as zeros.

    weight: nothing writes the array while the kernel runs or is queued, so that copies may start before `pdl_wait`;
    the emulation refuses them otherwise.

    Kernels count coordinates from the last axis to the first, and along the last axis boxes begin at multiples of 8
    elements. ConfigError for what the copy engine cannot do.
    """

    array: Any
    box: tuple[int, ...]
    weight: bool = False

    def __post_init__(self) -> None:
        array = self.array
        if not isinstance(self.box, tuple):
            raise ConfigError(f"TensorMap: the box is {self.box!r}, not a tuple")
        byte_strides(array.shape, array.strides, array.dtype, self.box)
        if address(array) % 16:
            raise ConfigError(f"TensorMap: the array of shape {array.shape} begins at an address that is not a "
                              "multiple of 16 bytes")

    def encoded(self) -> np.ndarray:
        """The map as the hardware wants it: one read-only element of dtype V128.

        Encoded once for the same place, shape, strides, dtype and box. DeviceError if the driver refuses.
        """
        array = self.array
        return _encoded(address(array), array.shape, array.strides, array.dtype, self.box)


@lru_cache(maxsize=4096)
def byte_strides(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, box: tuple[int, ...]) -> tuple[int, ...]:
    """The strides to encode: the array's, but those of axes of one element, which mean nothing, are made regular.

    ConfigError unless the copy engine can serve such an array.
    """
    what = f"TensorMap: the array of shape {shape}"
    if dtype not in _DATA_TYPES:
        raise ConfigError(f"{what} has dtype {dtype}; it needs bfloat16 or float16")
    if not 2 <= len(shape) <= 5:
        raise ConfigError(f"{what} has {len(shape)} axes; it needs 2 to 5")
    if len(box) != len(shape):
        raise ConfigError(f"{what} has {len(shape)} axes, but the box is {box}")
    if box[-1] != ROW_ELEMENTS or not all(1 <= n <= _MAX_BOX for n in box):
        raise ConfigError(f"TensorMap: the box is {box}; it needs {ROW_ELEMENTS} elements along the last axis and "
                          f"1 to {_MAX_BOX} along others")
    if not all(1 <= n <= _MAX_SIZE for n in shape):
        raise ConfigError(f"{what} needs 1 to {_MAX_SIZE} elements along every axis")
    if shape[-1] > 1 and strides[-1] != dtype.itemsize:
        raise ConfigError(f"{what} and strides {strides} is not contiguous along its last axis")
    regular = [dtype.itemsize]
    for n, stride, inner in zip(shape[-2::-1], strides[-2::-1], shape[:0:-1], strict=True):
        if n == 1:
            stride = -(-regular[-1] * inner // 16) * 16
        elif stride % 16 or not 0 < stride < _MAX_STRIDE:
            raise ConfigError(f"{what} has strides of {strides} bytes; all but the last must be multiples of 16, "
                              f"above 0 and below 2^40")
        regular.append(stride)
    return tuple(reversed(regular))


@lru_cache(maxsize=16384)
def _encoded(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any,
             box: tuple[int, ...]) -> np.ndarray:
    strides = byte_strides(shape, strides, dtype, box)
    rank = len(shape)
    memory = np.empty(MAP_BYTES + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    # The driver counts axes from the innermost one, and does not want its stride.
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(memory.ctypes.data + start), ctypes.c_int(_DATA_TYPES[dtype]), ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer), (ctypes.c_uint64 * rank)(*shape[::-1]), (ctypes.c_uint64 * rank)(*strides[-2::-1]),
        (ctypes.c_uint32 * rank)(*box[::-1]), (ctypes.c_uint32 * rank)(*[1] * rank), ctypes.c_int(_INTERLEAVE_NONE),
        ctypes.c_int(_SWIZZLE_128B), ctypes.c_int(_L2_PROMOTION_256B), ctypes.c_int(_FILL_ZEROS),
    )
    if status != 0:
        raise DeviceError(f"cuTensorMapEncodeTiled failed with status {status} for an array of shape {shape}, strides "
                          f"{strides} and dtype {dtype} at {pointer:#x} and a box of {box}")
    encoded = memory[start : start + MAP_BYTES].view(f"V{MAP_BYTES}")
    encoded.flags.writeable = False
    return encoded


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The driver's library. Not through cuda.bindings, whose CUtensorMap is not aligned as the driver wants it."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuTensorMapEncodeTiled  # noqa: B018  (an attribute that is missing from drivers before CUDA 12)
    except (OSError, AttributeError) as error:
        raise DeviceError(f"the NVIDIA driver has no tensor maps: {error}",
                          hint="they need a driver of CUDA 12 or newer and a GPU of compute capability 9.0") from error
    return library
