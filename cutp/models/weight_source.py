"""Where a weight comes from: a tensor of the checkpoint, or a part of one that is stored in another form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.mxfp4 import BLOCK_BYTES, BLOCK_SIZE, dequantize_mxfp4
from cutp.errors import ShapeMismatchError, UnsupportedModelError
from cutp.nn.module import Weight
from cutp.nn.sharding import Ranges

_FLOATS = ("float64", "float32", "float16", "bfloat16")


class WeightSource(Protocol):
    """How a weight is read. A source reads what the rank's share needs, and no more than a block around it.

    in_pieces: whether rows can be read by themselves for the price of those rows. Only then may they lie in the buffer.
    """

    in_pieces: bool

    def check(self, checkpoint: Checkpoint, shape: tuple[int, ...]) -> Iterable[str]:
        """The names of the tensors that hold a weight of `shape`, after their headers have been held against it.

        Raises MissingTensorError, ShapeMismatchError, UnsupportedModelError (a dtype).
        """

    def read(self, checkpoint: Checkpoint, weight: Weight, rows: tuple[int, int] | None = None,
             buffer: np.ndarray | None = None) -> np.ndarray:
        """The share of `weight`, or those rows of it, in any float dtype. buffer: uint8, for the result to lie in."""


@dataclass(frozen=True)
class WholeTensor:
    """A tensor called `name`, of the weight's own shape."""

    name: str
    in_pieces: ClassVar[bool] = True

    def check(self, checkpoint: Checkpoint, shape: tuple[int, ...]) -> Iterable[str]:
        check_tensor(checkpoint, self.name, shape)
        return [self.name]

    def read(self, checkpoint: Checkpoint, weight: Weight, rows: tuple[int, int] | None = None,
             buffer: np.ndarray | None = None) -> np.ndarray:
        axis, ranges = weight.axis, weight.ranges
        if rows is not None and axis in (None, 0):
            axis, ranges, rows = 0, clipped(ranges or [(0, weight.shape[0])], *rows), None
        return checkpoint.read(self.name, axis, ranges, rows=rows, buffer=buffer)


@dataclass(frozen=True)
class StackedExpert:
    """One expert's matrix or bias, of a tensor `name` that stacks those of all experts along axis 0.

    interleaved: its rows are those of gate and up projection in turn; the weight has the rows of the gate first. A
    matrix lies transposed, [in, out], in `name`; or, quantized as MXFP4, in `name`_blocks uint8 [experts, out, in / 32,
    16] and `name`_scales uint8 [experts, out, in / 32] (GptOss).
    """

    name: str
    expert: int
    interleaved: bool = False
    in_pieces: ClassVar[bool] = False  # one expert's are small, and rows lie among others

    def check(self, checkpoint: Checkpoint, shape: tuple[int, ...]) -> Iterable[str]:
        if not self._is_quantized(checkpoint):
            self._check_stack(checkpoint, self.name, tuple(reversed(shape)))
            return [self.name]
        rows, columns = shape
        if columns % BLOCK_SIZE:
            raise ShapeMismatchError(f"{self.name}_blocks in {checkpoint.directory}: config.json describes rows of "
                                     f"{columns} numbers, which are no whole blocks of {BLOCK_SIZE}")
        scales = (rows, columns // BLOCK_SIZE)
        self._check_stack(checkpoint, self._blocks, (*scales, BLOCK_BYTES), ("uint8",))
        self._check_stack(checkpoint, self._scales, scales, ("uint8",))
        return [self._blocks, self._scales]

    def read(self, checkpoint: Checkpoint, weight: Weight, rows: tuple[int, int] | None = None,
             buffer: np.ndarray | None = None) -> np.ndarray:
        index = positions(weight, rows)
        if self.interleaved:
            half = weight.shape[0] // 2
            index[0] = np.where(index[0] < half, 2 * index[0], 2 * (index[0] - half) + 1)
        # The stored rows and columns from the first to the last that is needed, then those that are.
        bounds = [(int(part.min()), int(part.max()) + 1) for part in index]
        box = self._read_box(checkpoint, weight.shape, bounds)
        for axis, (part, (start, stop)) in enumerate(zip(index, bounds, strict=True)):
            if not np.array_equal(part, np.arange(start, stop)):
                box = box.take(part - start, axis)
        return box

    def _read_box(self, checkpoint: Checkpoint, shape: tuple[int, ...],
                  bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """The rows and columns within `bounds`."""
        axis = 1 if len(shape) == 2 else None
        if not self._is_quantized(checkpoint):
            return checkpoint.read(self.name, axis, axis and bounds[:1], self.expert, rows=bounds[-1]).T
        start, stop = bounds[1][0] // BLOCK_SIZE, -(-bounds[1][1] // BLOCK_SIZE)
        blocks, scales = (checkpoint.read(name, 1, [(start, stop)], self.expert, rows=bounds[0])
                          for name in (self._blocks, self._scales))
        first = start * BLOCK_SIZE
        return dequantize_mxfp4(blocks, scales)[:, bounds[1][0] - first : bounds[1][1] - first]

    def _check_stack(self, checkpoint: Checkpoint, name: str, shape: tuple[int, ...],
                     dtypes: tuple[str, ...] = _FLOATS) -> None:
        # How many experts there must be is known from the router.
        found = checkpoint.info(name).shape
        check_tensor(checkpoint, name, (max(found[0] if found else 0, self.expert + 1), *shape), dtypes)

    def _is_quantized(self, checkpoint: Checkpoint) -> bool:
        return self._blocks in checkpoint

    @property
    def _blocks(self) -> str:
        return f"{self.name}_blocks"

    @property
    def _scales(self) -> str:
        return f"{self.name}_scales"


def clipped(ranges: Ranges, first: int, last: int) -> Ranges:
    """The part of `ranges` that is between `first` and `last`, both counted along the ranges themselves."""
    parts, at = [], 0
    for start, stop in ranges:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            parts.append((start + low, start + high))
        at += stop - start
    return parts


def positions(weight: Weight, rows: tuple[int, int] | None) -> list[np.ndarray]:
    """Where in the whole tensor the elements of the share, or of those rows of it, are: one index array an axis."""
    index = [np.arange(length) for length in weight.shape]
    if weight.ranges is not None:
        index[weight.axis] = np.concatenate([np.arange(start, stop) for start, stop in weight.ranges])
    if rows is not None:
        index[0] = index[0][rows[0] : rows[1]]
    return index


def check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = _FLOATS) -> None:
    """Raises MissingTensorError, ShapeMismatchError or UnsupportedModelError unless `name` has `shape` and a dtype."""
    info = checkpoint.info(name)
    if tuple(info.shape) != tuple(shape):
        raise ShapeMismatchError(f"tensor {name!r} in {checkpoint.directory} has shape {list(info.shape)}, "
                                 f"config.json describes {list(shape)}")
    if info.dtype.name not in dtypes:
        raise UnsupportedModelError(f"tensor {name!r} in {checkpoint.directory} holds {info.dtype.name} values; "
                                    f"it must be one of {', '.join(dtypes)}")
