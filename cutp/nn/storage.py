"""Where the weights of a model are held: NumPy arrays of float32, or device arrays of the model's own dtype.

The storage in use when a weight is allocated decides; there is always one, that of the host, unless another is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from cutp.array.scratch import Memory, Uploader

# Where weights live on the CPU: NumPy multiplies float32 matrices 10 to 100 times faster than 16-bit ones.
CPU_STORAGE = np.dtype(np.float32)

# Kernels read 16 bytes at a time.
_VECTOR_BYTES = 16

_this_thread = threading.local()


class Padding(NamedTuple):
    """An axis of a weight that consists of `parts` equal runs, each of which may be followed by zeros.

    Zeros in the rows of gate and up projection, and in the columns of the down projection they lead to, change no
    result: the activations in between make zero of zero.
    """

    axis: int
    parts: int = 1


class Lane(Protocol):
    """One thread's way into a storage."""

    def buffer(self) -> np.ndarray:
        """Memory to read into, uint8, whose content the next `put` may overwrite."""

    def put(self, target: Any, host: np.ndarray) -> None:
        """Writes `host`, from the buffer or from elsewhere, to the rows `target` of a weight."""

    def close(self) -> None:
        """Waits until all that was put has arrived."""


class Storage(Protocol):
    """Makes the arrays that weights live in, and fills them."""

    def held_dtype(self, dtype: np.dtype, device_dtype: np.dtype | None) -> np.dtype:
        """How a weight of `dtype` is held; device_dtype: what kernels need, if not that."""

    def padded(self, count: int, dtype: np.dtype) -> int:
        """How long a run of `count` elements is, with zeros after it."""

    def empty(self, shape: Sequence[int], dtype: np.dtype, *, zeros: bool = False) -> Any: ...

    def put(self, target: Any, host: np.ndarray) -> None:
        """Writes `host` to `target`, the rows of a weight: cast, and with zeros in the columns it does not have."""

    def ready(self) -> None:
        """Waits until all that was allocated may be written in any way."""

    def lane(self, nbytes: int) -> Lane:
        """A lane for the calling thread, with buffers of `nbytes`; pieces are no larger than that."""


class HostStorage:
    """NumPy arrays of float32, whose values are rounded to the weight's dtype."""

    def held_dtype(self, dtype: np.dtype, device_dtype: np.dtype | None) -> np.dtype:
        return CPU_STORAGE

    def padded(self, count: int, dtype: np.dtype) -> int:
        return count

    def empty(self, shape: Sequence[int], dtype: np.dtype, *, zeros: bool = False) -> np.ndarray:
        return np.zeros(shape, dtype) if zeros else np.empty(shape, dtype)

    def put(self, target: np.ndarray, host: np.ndarray) -> None:
        target[...] = host

    def ready(self) -> None:
        pass

    def lane(self, nbytes: int) -> Lane:
        return _HostLane(nbytes)


class _HostLane:
    def __init__(self, nbytes: int):
        self._buffer = np.empty(nbytes, np.uint8)

    def buffer(self) -> np.ndarray:
        return self._buffer

    def put(self, target: np.ndarray, host: np.ndarray) -> None:
        target[...] = host

    def close(self) -> None:
        pass


class DeviceStorage:
    """Device arrays of the weight's own dtype, taken from `memory`. Padded axes are multiples of 16 bytes."""

    def __init__(self, memory: Memory):
        self.memory = memory

    def held_dtype(self, dtype: np.dtype, device_dtype: np.dtype | None) -> np.dtype:
        return np.dtype(dtype if device_dtype is None else device_dtype)

    def padded(self, count: int, dtype: np.dtype) -> int:
        width = _VECTOR_BYTES // np.dtype(dtype).itemsize
        return -(-count // width) * width

    def empty(self, shape: Sequence[int], dtype: np.dtype, *, zeros: bool = False) -> Any:
        return self.memory.zeros(shape, dtype) if zeros else self.memory.empty(shape, dtype)

    def put(self, target: Any, host: np.ndarray) -> None:
        self.memory.upload(target, _fitted(host, target.shape, target.dtype))

    def ready(self) -> None:
        self.memory.synchronize()

    def lane(self, nbytes: int) -> Lane:
        return _DeviceLane(self.memory.uploader(nbytes))

    @contextmanager
    def use(self) -> Iterator[DeviceStorage]:
        """Makes this the storage that this thread's weights are allocated in."""
        before = getattr(_this_thread, "storage", None)
        _this_thread.storage = self
        try:
            yield self
        finally:
            _this_thread.storage = before


class _DeviceLane:
    def __init__(self, uploader: Uploader):
        self._uploader = uploader

    def buffer(self) -> np.ndarray:
        return self._uploader.buffer()

    def put(self, target: Any, host: np.ndarray) -> None:
        buffer = self._uploader.buffer()
        staged = buffer[: target.nbytes].view(target.dtype).reshape(target.shape)
        in_place = (host.dtype == staged.dtype and host.shape == staged.shape and host.flags.c_contiguous
                    and host.ctypes.data == staged.ctypes.data)
        if not in_place:
            staged[...] = _fitted(host, target.shape, target.dtype)
        self._uploader.send(target, staged)

    def close(self) -> None:
        self._uploader.close()


def _fitted(host: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`host` as a C-ordered array of `shape` and `dtype`, with zeros in the columns it does not have."""
    if host.shape == tuple(shape):
        return np.ascontiguousarray(host, dtype)
    wide = np.zeros(shape, dtype)
    wide[:, : host.shape[1]] = host
    return wide


_HOST = HostStorage()


def storage() -> Storage:
    """The storage in use."""
    return getattr(_this_thread, "storage", None) or _HOST
