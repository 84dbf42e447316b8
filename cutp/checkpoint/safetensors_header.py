"""The header of a safetensors file, checked as strictly as the reference implementation does.

Format (https://github.com/huggingface/safetensors): 8-byte little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets"}} and one data buffer, which the tensors must tile with no hole, overlap or
rest.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cutp.checkpoint.json_file import parse_json_object
from cutp.errors import CheckpointError, TruncatedFileError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

MAX_HEADER_BYTES = 100_000_000
_MAX_BYTES = 2**63 - 1
_MAX_DIMS = 64  # what a NumPy array can have
_PREAD_BYTES = 1 << 30  # one pread call moves at most 2 GiB - 4 KiB on Linux


@dataclass(frozen=True)
class TensorInfo:
    """One header entry. `offset_in_file` is in bytes from the start of the file and may be unaligned."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset_in_file: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def item(self, index: int) -> TensorInfo:
        """Item `index` along axis 0 as a tensor of its own; IndexError when there is none."""
        if not self.shape or not 0 <= index < self.shape[0]:
            raise IndexError(f"tensor {self.name!r} of shape {self.shape} has no item {index}")
        whole = replace(self, shape=self.shape[1:])
        return replace(whole, offset_in_file=self.offset_in_file + index * whole.nbytes)

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Items `start` to `stop` along axis 0 as a tensor of its own; IndexError when there are none such."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"tensor {self.name!r} of shape {self.shape} has no rows {start}:{stop}")
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset_in_file=self.offset_in_file + start * row)


def read_header(fd: int, path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """(metadata, tensors in the order of their data) of the open file `fd`; `path` is for messages only.

    Raises TruncatedFileError when the file is too short for what it describes, CheckpointError for other defects.
    """
    size = os.fstat(fd).st_size
    damaged = "the file is damaged or not a safetensors file; fetch it again"
    if size < 8:
        raise TruncatedFileError(f"{path} has {size} bytes, too short for the 8-byte header length", hint=damaged)
    prefix = bytearray(8)
    pread_full(fd, memoryview(prefix), 0, path)
    length = int.from_bytes(prefix, "little")
    if length == 0:
        raise CheckpointError(f"{path} has an empty header", hint=damaged)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} has a header of {length} bytes, over the limit {MAX_HEADER_BYTES}", hint=damaged)
    if length > size - 8:
        raise TruncatedFileError(f"{path} has {size} bytes, header needs {8 + length}", hint=damaged)
    data = bytearray(length)
    pread_full(fd, memoryview(data), 8, path)
    if data[:1] != b"{":
        raise CheckpointError(f"the header of {path} does not start with '{{'", hint=damaged)
    entries = parse_json_object(bytes(data), f"the header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"__metadata__ in the header of {path} does not map strings to strings", hint=damaged)
    spans = [_parse_entry(name, entry, path, 8 + length) for name, entry in entries.items()]
    spans.sort(key=lambda span: span[:2])
    expected = 0
    for begin, end, info in spans:
        if begin != expected:
            what = "a hole" if begin > expected else "an overlap"
            raise CheckpointError(
                f"the header of {path} leaves {what} before tensor {info.name!r}: "
                f"data_offsets begin at {begin}, the data so far ends at {expected}",
                hint=damaged,
            )
        expected = end
    needed = 8 + length + expected
    if size < needed:
        raise TruncatedFileError(
            f"{path} has {size} bytes, header needs {needed}", hint="the download stopped early; fetch the file again"
        )
    if size > needed:
        raise CheckpointError(f"{path} has {size} bytes, {size - needed} more than its header describes", hint=damaged)
    return metadata, {info.name: info for _, _, info in spans}


def _parse_entry(name: str, entry: Any, path: Path, data_start: int) -> tuple[int, int, TensorInfo]:
    """(begin, end, info) of one header entry whose own numbers agree."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"tensor {name!r} in the header of {path} {what}", hint="the file is damaged")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad("is not an object with dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise bad(f"has the unknown dtype {_short(kind)} (known: {', '.join(DTYPES)})")
    # bool is a subclass of int, hence `type(...) is int`
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise bad(f"has the shape {_short(shape)}, not a list of non-negative integers")
    if len(shape) > _MAX_DIMS:
        raise bad(f"has {len(shape)} dimensions, more than {_MAX_DIMS}")
    volume = dtype.itemsize  # of the non-zero dimensions: NumPy limits that product even for an empty array
    for n in shape:
        volume *= n or 1
        if volume > _MAX_BYTES:
            raise bad(f"has a shape whose size overflows: {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise bad(f"has data_offsets {_short(offsets)}, not two non-negative integers")
    begin, end = offsets
    if begin > end or end > _MAX_BYTES:
        raise bad(f"has data_offsets {_short(offsets)} that do not span a range")
    info = TensorInfo(name, dtype, tuple(shape), data_start + begin)
    if end - begin != info.nbytes:
        span = f"data_offsets span {end - begin}"
        raise bad(f"of dtype {kind} and shape {_short(shape)} needs {info.nbytes} bytes but {span}")
    return begin, end, info


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def pread_full(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from `offset` on; TruncatedFileError when the file ends before, OSError as the system gives it."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done : done + _PREAD_BYTES]], offset + done)
        if count == 0:
            raise TruncatedFileError(
                f"{path} ended at byte {offset + done} while bytes up to {offset + len(view)} were needed",
                hint="the file changed while it was open",
            )
        done += count
