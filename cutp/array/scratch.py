"""Memory for what layers compute on a GPU: taken in order, given back in frames, at the same addresses every time.

NumPy arrays need none of this. On a GPU a pass takes its results from the `Scratch` that is in use, a captured graph
finds them at the same addresses again, and no pool has to be asked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from cutp.array.gemm import WORKSPACE_BYTES
from cutp.errors import ConfigError

ALIGNMENT = 256
_BLOCK_BYTES = 64 << 20
_MAX_TAKEN = 16384  # arrays that are remembered


class _ThisThread(threading.local):
    scratch: Scratch | None = None


_this_thread = _ThisThread()


class Memory(Protocol):
    """Where device arrays come from: a GPU, or for tests something that behaves like one."""

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """A C-contiguous array that nobody else has, at a multiple of 256 bytes."""

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """As `empty`, but all bits are zero once what was started before on the current stream has ended."""

    def pinned(self, size: int) -> np.ndarray:
        """Host memory that the device reads and writes by itself, uint8 [size]."""

    def mapped(self, size: int) -> tuple[np.ndarray, Any]:
        """`pinned` memory that kernels work on as well: uint8 [size] on the host, and the same as a device array. What
        a kernel writes there, the host may read once a `mark` behind the kernel has been reached."""

    def mark(self) -> Mark:
        """Marks where the current stream has got to when all that was started on it has ended."""

    def upload(self, target: Any, host: np.ndarray) -> None:
        """Copies `host`, of the same shape and dtype, to `target`, in the order of the current stream."""

    def numpy(self, x: Any) -> np.ndarray:
        """`x` on the host, once all that was started before has ended."""

    def synchronize(self) -> None:
        """Waits until all that was started on the device has ended."""

    def free_bytes(self) -> tuple[int, int]:
        """(bytes that are free, bytes in all) of the device."""

    def uploader(self, nbytes: int) -> Uploader:
        """An uploader for the calling thread, with two buffers of `nbytes`."""


class Mark(Protocol):
    """A point in a stream's work; `Communicator.wait` takes it too."""

    def synchronize(self) -> None:
        """Waits until it is reached."""


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

    It grows by whole blocks that are never freed, so equal sequences of calls give equal addresses, and the very same
    arrays mostly: nobody may change an array's shape or dtype in place.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        # For the library that multiplies matrices; one stream works with it at a time.
        self.workspace = memory.empty(WORKSPACE_BYTES, np.uint8)
        self._blocks: list[Any] = []
        self._block, self._used = 0, 0
        # By what was in use before, shape and dtype: an array, and what is in use with it.
        self._taken: dict[tuple[int, int, tuple[int, ...], Any], tuple[Any, int, int]] = {}

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """An array of whatever was there before, C-contiguous, at a multiple of 256 bytes."""
        # Equal sequences of calls find the arrays of the first one, as making an array costs more than a lookup.
        key = self._block, self._used, shape if type(shape) is tuple else _dimensions(shape), dtype
        found = self._taken.get(key)
        if found is None:
            found = self._take(*key)
            if len(self._taken) >= _MAX_TAKEN:
                self._taken.clear()
            self._taken[key] = found
        array, self._block, self._used = found
        return array

    def _take(self, block: int, used: int, shape: tuple[int, ...], dtype: Any) -> tuple[Any, int, int]:
        """An array behind the first `used` bytes of block number `block`, or in one after it; what is used then."""
        dims, dtype = _dimensions(shape), np.dtype(dtype)
        size = math.prod(dims) * dtype.itemsize
        step = -(-size // ALIGNMENT) * ALIGNMENT
        while block < len(self._blocks) and used + step > self._blocks[block].nbytes:
            block, used = block + 1, 0
        if block == len(self._blocks):
            self._blocks.append(self.memory.empty(max(step, _BLOCK_BYTES), np.uint8))
        return self._blocks[block][used : used + size].view(dtype).reshape(dims), block, used + step

    def frame(self) -> AbstractContextManager[None]:
        """`with scratch.frame():` what is taken inside is free again afterwards."""
        return _Frame(self)

    @contextmanager
    def use(self) -> Iterator[Scratch]:
        """Makes this the scratch that this thread's layers take their results from, in a frame of its own."""
        before, _this_thread.scratch = _this_thread.scratch, self
        try:
            with self.frame():
                yield self
        finally:
            _this_thread.scratch = before

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks)


class _Frame:
    """A frame of a scratch; a layer has two, so it is no generator, which would take several times as long."""

    def __init__(self, scratch: Scratch):
        self._scratch = scratch

    def __enter__(self) -> None:
        self._mark = self._scratch._block, self._scratch._used

    def __exit__(self, *error: object) -> None:
        self._scratch._block, self._scratch._used = self._mark


def _dimensions(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)


def scratch_in_use() -> Scratch | None:
    """The scratch that this thread uses, if any."""
    return _this_thread.scratch


def scratch() -> Scratch:
    """The scratch in use; ConfigError where there is none."""
    found = _this_thread.scratch
    if found is None:
        raise ConfigError("layers on a GPU need memory for their results", hint="compute inside `with scratch.use():`")
    return found


def frame() -> AbstractContextManager[None]:
    """A frame of the scratch in use; nothing where there is none, as with NumPy arrays."""
    found = _this_thread.scratch
    return nullcontext() if found is None else found.frame()
