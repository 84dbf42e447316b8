"""Memory of a GPU, through CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.errors import CapacityError


class CudaMemory:
    """`cutp.array.scratch.Memory` on one GPU: by default the calling thread's current one.

    Arrays are CuPy's, from its memory pool. Copies are made on the calling thread's current CuPy stream.
    """

    def __init__(self, device: int | None = None):
        """DeviceError if there is no GPU to use, with the reason."""
        self._cupy = cuda.cupy()
        self.device = cuda.current_device() if device is None else device

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """See `Memory.empty`. CapacityError if the GPU has not got so much."""
        return self._take(self._cupy.empty, shape, dtype)

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """See `Memory.zeros`. CapacityError if the GPU has not got so much."""
        array = self._take(self._cupy.empty, shape, dtype)
        if array.nbytes:
            self._cupy.cuda.runtime.memsetAsync(array.data.ptr, 0, array.nbytes, self._stream.ptr)
        return array

    def pinned(self, size: int) -> np.ndarray:
        """See `Memory.pinned`. CapacityError if the host has not got so much."""
        return _pinned(self._cupy, size)

    def mapped(self, size: int) -> tuple[np.ndarray, Any]:
        """See `Memory.mapped`. CapacityError if the host has not got so much."""
        host = self.pinned(size)
        # Host and GPUs have one space of addresses, in which pinned memory is everybody's.
        memory = self._cupy.cuda.UnownedMemory(host.ctypes.data, size, host, self.device)
        return host, self._cupy.ndarray((size,), np.uint8, self._cupy.cuda.MemoryPointer(memory, 0))

    def mark(self) -> Any:
        """See `Memory.mark`: a CuPy event."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return event

    def upload(self, target: Any, host: np.ndarray) -> None:
        """See `Memory.upload`; `target` is C-contiguous. `host` may change as soon as this returns; pinned memory only
        once the copy has been made.
        """
        _copy_up(self._cupy.cuda.runtime, target, np.ascontiguousarray(host), self._stream)

    def numpy(self, x: Any) -> np.ndarray:
        """See `Memory.numpy`."""
        if not x.flags.c_contiguous:
            return x.get()
        host = np.empty(x.shape, x.dtype)
        stream = self._stream
        if host.nbytes:
            runtime = self._cupy.cuda.runtime
            runtime.memcpyAsync(host.ctypes.data, x.data.ptr, host.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
        stream.synchronize()
        return host

    def synchronize(self) -> None:
        """See `Memory.synchronize`."""
        self._cupy.cuda.runtime.deviceSynchronize()

    def free_bytes(self) -> tuple[int, int]:
        """See `Memory.free_bytes`; other programs' memory is not free."""
        with self._cupy.cuda.Device(self.device):
            free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def uploader(self, nbytes: int) -> CudaUploader:
        """See `Memory.uploader`."""
        self._cupy.cuda.runtime.setDevice(self.device)
        return CudaUploader(self._cupy, nbytes)

    @property
    def _stream(self) -> Any:
        return self._cupy.cuda.get_current_stream()

    def _take(self, make: Any, shape: int | Sequence[int], dtype: Any) -> Any:
        try:
            with self._cupy.cuda.Device(self.device):
                return make(shape, dtype)
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            free, total = self.free_bytes()
            raise CapacityError(f"GPU {self.device} has no memory for an array of shape {shape} and dtype "
                                f"{np.dtype(dtype).name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free",
                                hint="use more ranks, a smaller --kv-memory, or a GPU that others do not use"
                                ) from error


class CudaUploader:
    """`cutp.array.scratch.Uploader`: two pinned buffers and a stream of its own."""

    def __init__(self, cupy: Any, nbytes: int):
        self._runtime = cupy.cuda.runtime
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._pool = cupy.get_default_pinned_memory_pool()
        self._buffers = [_pinned(cupy, nbytes) for _ in range(2)]
        self._turn = 0

    def buffer(self) -> np.ndarray:
        """See `Uploader.buffer`."""
        self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def send(self, target: Any, host: np.ndarray) -> None:
        """See `Uploader.send`."""
        _copy_up(self._runtime, target, host, self._stream)
        self._events[self._turn].record(self._stream)
        self._turn = 1 - self._turn

    def close(self) -> None:
        """See `Uploader.close`."""
        self._stream.synchronize()
        self._buffers = []
        self._pool.free_all_blocks()  # pinned memory is of no use to others on the host


def _pinned(cupy: Any, size: int) -> np.ndarray:
    try:
        # The array keeps the memory, which goes back to CuPy's pool with it.
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
    except (RuntimeError, MemoryError) as error:  # CuPy's CUDARuntimeError is a RuntimeError
        raise CapacityError(f"the host cannot pin {size / 1e6:.0f} MB of memory for copies to the GPU: {error}",
                            hint="set CUTP_LOAD_THREADS to a smaller number, or ask for more host memory") from error


def _copy_up(runtime: Any, target: Any, host: np.ndarray, stream: Any) -> None:
    if host.nbytes:
        runtime.memcpyAsync(target.data.ptr, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, stream.ptr)
