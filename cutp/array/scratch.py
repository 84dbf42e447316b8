"""Memory for what layers compute on a GPU: taken in order, given back in frames, at the same addresses every time.

NumPy arrays need none of this. On a GPU a pass takes its results from the `Scratch` that is in use, a captured graph
finds them at the same addresses again, and no pool has to be asked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from cutp.array.gemm import WORKSPACE_BYTES
from cutp.errors import ConfigError

ALIGNMENT = 256
_BLOCK_BYTES = 64 << 20

_this_thread = threading.local()


class Memory(Protocol):
    """Where device arrays come from: a GPU, or for tests something that behaves like one."""

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """A C-contiguous array that nobody else has, at a multiple of 256 bytes."""

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """As `empty`, but all bits are zero once what was started before on the current stream has ended."""

    def pinned(self, size: int) -> np.ndarray:
        """Host memory that the device reads and writes by itself, uint8 [size]."""

    def upload(self, target: Any, host: np.ndarray) -> None:
        """Copies `host`, of the same shape and dtype, to `target`, in the order of the current stream."""

    def download(self, host: np.ndarray, x: Any) -> Download:
        """Starts copying the C-contiguous `x` to `host`, which is pinned memory, in the order of the current stream."""

    def numpy(self, x: Any) -> np.ndarray:
        """`x` on the host, once all that was started before has ended."""

    def synchronize(self) -> None:
        """Waits until all that was started on the device has ended."""

    def free_bytes(self) -> tuple[int, int]:
        """(bytes that are free, bytes in all) of the device."""

    def uploader(self, nbytes: int) -> Uploader:
        """An uploader for the calling thread, with two buffers of `nbytes`."""


class Download(Protocol):
    """A copy to the host under way."""

    def synchronize(self) -> None:
        """Waits until it has arrived."""


class Uploader(Protocol):
    """Copies many arrays to the device beside whatever else it does, from buffers that the device reads itself.

    For each: fill a `buffer`, `send` from it. Uploads are not in the order of any stream: what is sent has arrived once
    `close` returns.
    """

    def buffer(self) -> np.ndarray:
        """The buffer to fill next, uint8, once what was sent from it has arrived; the same one until `send`."""

    def send(self, target: Any, host: np.ndarray) -> None:
        """Starts the copy of `host`, which lies in the buffer, to the C-contiguous `target` of its size."""

    def close(self) -> None:
        """Waits for all copies and gives up the buffers."""


def on_device(x: Any) -> bool:
    """Whether `x` is an array that kernels work on, rather than one of NumPy's own."""
    return type(x) is not np.ndarray


class Scratch:
    """A stack of device memory: `empty` takes, and a `frame` gives back at its end all that was taken in it.

    It grows by whole blocks that are never freed, so equal sequences of calls give equal addresses.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        # For the library that multiplies matrices; one stream works with it at a time.
        self.workspace = memory.empty(WORKSPACE_BYTES, np.uint8)
        self._blocks: list[Any] = []
        self._block, self._used = 0, 0

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """An array of whatever was there before, C-contiguous, at a multiple of 256 bytes."""
        dims = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)
        dtype = np.dtype(dtype)
        size = math.prod(dims) * dtype.itemsize
        step = -(-size // ALIGNMENT) * ALIGNMENT
        while self._block < len(self._blocks) and self._used + step > self._blocks[self._block].nbytes:
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(self.memory.empty(max(step, _BLOCK_BYTES), np.uint8))
        start = self._used
        self._used += step
        return self._blocks[self._block][start : start + size].view(dtype).reshape(dims)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What is taken inside is free again afterwards."""
        mark = self._block, self._used
        try:
            yield
        finally:
            self._block, self._used = mark

    @contextmanager
    def use(self) -> Iterator[Scratch]:
        """Makes this the scratch that this thread's layers take their results from, in a frame of its own."""
        before = getattr(_this_thread, "scratch", None)
        _this_thread.scratch = self
        try:
            with self.frame():
                yield self
        finally:
            _this_thread.scratch = before

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks)


def scratch_in_use() -> Scratch | None:
    """The scratch that this thread uses, if any."""
    return getattr(_this_thread, "scratch", None)


def scratch() -> Scratch:
    """The scratch in use; ConfigError where there is none."""
    found = scratch_in_use()
    if found is None:
        raise ConfigError("layers on a GPU need memory for their results", hint="compute inside `with scratch.use():`")
    return found


@contextmanager
def frame() -> Iterator[None]:
    """A frame of the scratch in use; nothing where there is none, as with NumPy arrays."""
    found = scratch_in_use()
    if found is None:
        yield
    else:
        with found.frame():
            yield
