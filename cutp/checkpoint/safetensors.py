"""Safetensors files: a reader that fetches only the slice asked for, and a writer.

Data is read with `pread`, never mapped: a file that shrinks gives an error here instead of a SIGBUS, and resident
memory is what the caller holds.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cutp.checkpoint.safetensors_header import DTYPES, TensorInfo, pread_full, read_header
from cutp.errors import CheckpointError, ClosedError, MissingTensorError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK_BYTES = 16 << 20  # scratch memory of a read along an inner axis
_EXACT_RUN_BYTES = 128 << 10  # runs of this size are worth a system call each


class SafetensorsFile:
    """An open safetensors file whose header has been checked.

    `metadata` is the str->str `__metadata__` entry; `bytes_read` counts data bytes fetched so far, header excluded.
    Reads from several threads are safe. Raises TruncatedFileError when the file is shorter than its header needs and
    CheckpointError for every other defect.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._fd: int | None = None
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise CheckpointError(f"{self.path} is not a regular file")
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self.metadata, self._tensors = read_header(self._fd, self.path)
        except OSError as e:
            self.close()
            raise CheckpointError(f"{self.path} cannot be read: {e.strerror or e}") from None
        except CheckpointError:
            self.close()
            raise

    def names(self) -> list[str]:
        """Tensor names in the order of their data."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Raises MissingTensorError for a name the file does not hold."""
        found = self._tensors.get(name)
        if found is None:
            raise MissingTensorError(f"{self.path} holds no tensor {name!r}")
        return found

    def read(
        self, name: str, axis: int | None = None, ranges: Sequence[tuple[int, int]] | None = None,
        item: int | None = None, *, rows: tuple[int, int] | None = None, buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """The tensor `name` as a writable, C-ordered array of its stored dtype.

        With `item`, only that item along axis 0, and the rest of the arguments are about it. With `rows`, only those
        along axis 0, as if there were no others. The result lies at the beginning of `buffer`, a uint8 array, if one is
        given and it is large enough; otherwise it is new.

        With `axis` (negative counts from the end) and `ranges`, only the half-open index ranges (start, stop) along
        that axis, concatenated in the order given. Along axis 0 exactly the bytes of the result are read; along other
        axes short runs are picked out of larger blocks, with at most `CHUNK_BYTES` of scratch memory.
        Raises MissingTensorError, CheckpointError (item, rows, axis or range out of bounds) or TruncatedFileError.
        """
        info = self.info(name)
        try:
            if item is not None:
                info = info.item(item)
            if rows is not None:
                info = info.rows(*rows)
        except IndexError as e:
            raise CheckpointError(f"{self.path}: {e}") from None
        if (axis is None) != (ranges is None):
            raise CheckpointError(f"tensor {name!r} of {self.path}: give both axis and ranges, or neither")
        if axis is None:
            raw = _room(info.nbytes, buffer)
            self._read_into(memoryview(raw), info.offset_in_file)
            return _typed(raw, info.dtype, info.shape)
        axis, picked = _check_ranges(info, axis, ranges, self.path)
        outer = math.prod(info.shape[:axis])
        unit = math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize  # bytes of one index along the axis
        row = info.shape[axis] * unit
        runs = _merge([(a * unit, b * unit) for a, b in picked])
        width = sum(b - a for a, b in runs)
        raw = _room(outer * width, buffer)
        if raw.size:
            self._read_runs(raw.reshape(outer, width), info.offset_in_file, row, runs)
        shape = (*info.shape[:axis], sum(b - a for a, b in picked), *info.shape[axis + 1 :])
        return _typed(raw, info.dtype, shape)

    def close(self) -> None:
        """Releases the file; a second call does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()

    def _read_runs(self, out: np.ndarray, offset: int, row: int, runs: list[tuple[int, int]]) -> None:
        """Fills out [outer, width] (uint8) with the byte `runs` of each of `outer` rows of `row` bytes."""
        outer, width = out.shape
        low, high = min(a for a, _ in runs), max(b for _, b in runs)
        if outer == 1 or width >= _EXACT_RUN_BYTES * len(runs) or high - low > CHUNK_BYTES:
            for i in range(outer):
                at = 0
                for a, b in runs:
                    self._read_into(memoryview(out[i, at : at + b - a]), offset + i * row + a)
                    at += b - a
            return
        if len(runs) == 1 and width == row:
            self._read_into(memoryview(out.reshape(-1)), offset)
            return
        # Short runs: a system call per run costs more than reading the bytes between them. Blocks of whole rows,
        # starting at the first wanted byte, keep the reads long and the scratch memory fixed.
        per_block = max(1, min(outer, (CHUNK_BYTES - (high - low)) // row + 1))
        block = np.empty((per_block, row), np.uint8)
        for first in range(0, outer, per_block):
            count = min(per_block, outer - first)
            length = (count - 1) * row + (high - low)
            self._read_into(memoryview(block.reshape(-1)[:length]), offset + first * row + low)
            at = 0
            for a, b in runs:
                out[first : first + count, at : at + b - a] = block[:count, a - low : b - low]
                at += b - a

    def _read_into(self, view: memoryview, offset: int) -> None:
        if self._fd is None:
            raise ClosedError(f"{self.path} is closed")
        try:
            pread_full(self._fd, view, offset, self.path)
        except OSError as e:
            raise CheckpointError(f"{self.path} cannot be read: {e.strerror or e}") from None
        with self._lock:
            self.bytes_read += len(view)


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` in the order given to `path`, replacing it atomically once the data is on disk.

    Any dtype in `DTYPES`, bfloat16 and float8 included. Raises CheckpointError for another dtype.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    arrays, end = [], 0
    for name, value in tensors.items():
        array = np.asarray(value)
        dtype = _NAMES.get(array.dtype.newbyteorder("<") if array.dtype.kind in "iuf" else array.dtype)
        if dtype is None or not isinstance(name, str) or name == "__metadata__":
            raise CheckpointError(f"tensor {name!r} of dtype {array.dtype} cannot be stored in {path}")
        array = np.ascontiguousarray(array, DTYPES[dtype])
        header[name] = {"dtype": dtype, "shape": list(np.shape(value)), "data_offsets": [end, end + array.nbytes]}
        arrays.append(array)
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data then starts 8-byte aligned
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for array in arrays:
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be written: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _room(nbytes: int, buffer: np.ndarray | None) -> np.ndarray:
    return np.empty(nbytes, np.uint8) if buffer is None or buffer.nbytes < nbytes else buffer[:nbytes]


def _typed(raw: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    # Any non-zero byte is True; NumPy must not see a bool of another byte value than 0 or 1.
    return (raw != 0).reshape(shape) if dtype == np.bool_ else raw.view(dtype).reshape(shape)


def _merge(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins neighbours that continue each other and drops empty runs; the order stays."""
    merged: list[tuple[int, int]] = []
    for a, b in runs:
        if a == b:
            continue
        if merged and merged[-1][1] == a:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    return merged


def _check_ranges(
    info: TensorInfo, axis: int, ranges: Sequence[tuple[int, int]] | None, path: Path
) -> tuple[int, list[tuple[int, int]]]:
    dims = len(info.shape)
    if not -dims <= axis < dims:
        raise CheckpointError(f"tensor {info.name!r} of {path} has shape {info.shape}: there is no axis {axis}")
    axis %= dims
    picked = [(int(a), int(b)) for a, b in ranges or ()]
    for a, b in picked:
        if not 0 <= a <= b <= info.shape[axis]:
            raise CheckpointError(
                f"tensor {info.name!r} of {path} has shape {info.shape}: "
                f"the range {a}:{b} is not within axis {axis} of size {info.shape[axis]}"
            )
    return axis, picked
