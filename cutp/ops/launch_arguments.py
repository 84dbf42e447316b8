"""What launchers of kernels have in common: checks of their arrays, and what follows from the arrays' layouts.

A launcher makes its `LaunchPlan` in a function of layouts that is `remembered` (cutp.array.layout), checks included, so
that they cost a lookup where the same layouts come again, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.array.layout import layout
from cutp.errors import ConfigError

# The macro DTYPE of a kernel file, by the name of the arrays' dtype.
DTYPE_DEFINES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
VECTOR_BYTES = 16  # of one memory access
# Of the attention kernels; heads of other sizes are made longer by zeros.
ATTENTION_HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_ROWS = 2**31 - 1  # blocks along x, and what an int of a kernel holds


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch needs beside its arrays and settings: see `cutp.array.kernel.launch`. numbers: arguments of the
    kernel that follow from the layouts of its arrays."""

    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    defines: tuple[str, ...] = ()
    numbers: tuple[np.generic, ...] = ()
    shared_bytes: int = 0


# The checks take arrays or their layouts.


def check_dtype(op: str, name: str, array: Any, allowed: tuple[str, ...] = tuple(DTYPE_DEFINES)) -> None:
    """ConfigError unless the array has one of these dtypes."""
    if array.dtype.name not in allowed:
        raise ConfigError(f"{op}: {name} has dtype {array.dtype}; it needs {', '.join(allowed)}")


def check_array(op: str, name: str, array: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
    """ConfigError, naming the argument, unless the array is contiguous, of this shape and, if given, this dtype."""
    if array.shape != shape:
        raise ConfigError(f"{op}: {name} has shape {array.shape}; it needs {shape}")
    if dtype is not None and array.dtype != dtype:
        raise ConfigError(f"{op}: {name} has dtype {array.dtype}; it needs {dtype}")
    if not layout(array).is_contiguous:
        raise ConfigError(f"{op}: {name} of shape {array.shape} and strides {array.strides} is not contiguous")


def check_axes(op: str, name: str, array: Any, axes: str) -> None:
    """ConfigError unless the array has as many axes as `axes` names, "T, d" for example."""
    if array.ndim != len(axes.split(",")):
        raise ConfigError(f"{op}: {name} has shape {array.shape}; it needs [{axes}]")


def vector_width(dtype: Any) -> int:
    """Elements in 16 bytes."""
    return VECTOR_BYTES // dtype.itemsize
