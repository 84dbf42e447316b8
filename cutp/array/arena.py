"""Static buffers: allocated once, then always at the same address, as captured graphs need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.errors import CapacityError, ClosedError, ConfigError

ALIGNMENT = 256


class Arena:
    """Named buffers. The first request for a name sets its size; later ones get the same memory.

    Every buffer starts at a multiple of 256 bytes. Nothing is freed before `close`, and not even then what a
    captured graph holds. Contents are whatever was there before.
    """

    def __init__(self, allocate: Callable[[int], Any] | None = None):
        """`allocate(n)` gives a uint8 array of n bytes; by default one on the current GPU."""
        self._allocate = allocate or _device_bytes
        self._buffers: dict[str, Any] = {}
        self._frozen: str | None = None
        self._closed = False

    def array(self, name: str, shape: int | Sequence[int], dtype: Any) -> Any:
        """The buffer `name` as a C-contiguous array [shape] of `dtype`; it may be smaller than at first.

        Raises ConfigError if the buffer was made smaller than that or the arena is frozen and has no such buffer,
        CapacityError if the memory does not suffice.
        """
        if self._closed:
            raise ClosedError("this arena was closed")
        dims = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        dtype = np.dtype(dtype)
        size = math.prod(dims) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = self._make(name, size)
        if size > buffer.nbytes:
            raise ConfigError(
                f"arena buffer {name!r} has {buffer.nbytes} bytes, but {size} are asked for now: "
                "its first use must be the largest"
            )
        return buffer[:size].view(dtype).reshape(dims)

    def freeze(self, reason: str) -> None:
        """From now on refuse new names, because of `reason` (for example "a graph uses this arena")."""
        self._frozen = reason

    @property
    def nbytes(self) -> int:
        """The sum of the buffers' sizes."""
        return sum(b.nbytes for b in self._buffers.values())

    def sizes(self) -> dict[str, int]:
        """The bytes of each buffer, in the order of their making."""
        return {name: b.nbytes for name, b in self._buffers.items()}

    def close(self) -> None:
        """Give up the buffers. May be called again."""
        self._buffers.clear()
        self._closed = True

    def _make(self, name: str, size: int) -> Any:
        if self._frozen:
            raise ConfigError(f"arena buffer {name!r} does not exist and can no longer be made: {self._frozen}")
        wanted = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        try:
            buffer = self._allocate(wanted)
            if address(buffer) % ALIGNMENT:
                buffer = self._allocate(wanted + ALIGNMENT)
                skip = -address(buffer) % ALIGNMENT
                buffer = buffer[skip : skip + wanted]
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            raise CapacityError(
                f"no memory for arena buffer {name!r} of {wanted} bytes beside the other {self.nbytes} bytes: {error}"
            ) from error
        return buffer[:size] if size else buffer[:0]


def address(array: Any) -> int:
    """Where the first element of a NumPy or CuPy array lies."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def _device_bytes(size: int) -> Any:
    return cuda.cupy().empty(size, dtype=np.uint8)
