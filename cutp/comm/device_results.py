"""Device arrays as the collectives need them: where results lie, and what parts they consist of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.array.scratch import scratch_in_use
from cutp.comm.collectives import describe_array
from cutp.errors import ConfigError

_HOST_TYPES = (np.ndarray, np.memmap)


def is_device_array(x: Any) -> bool:
    """Whether collectives on `x` go through NCCL. Lists and scalars are taken for NumPy arrays."""
    return type(x) not in _HOST_TYPES and hasattr(x, "dtype") and not isinstance(x, np.generic)


def new_array(shape: int | Sequence[int], dtype: Any) -> Any:
    """An array in the scratch in use, else in new memory of the GPU."""
    found = scratch_in_use()
    allocate: Callable[..., Any] = cuda.cupy().empty if found is None else found.empty
    return allocate(shape, dtype)


def result_array(out: Any, shape: Sequence[int], dtype: Any, what: str) -> Any:
    """`out` if it fits, or a new array."""
    shape = tuple(shape)
    if out is None:
        return new_array(shape, dtype)
    if not is_device_array(out) or out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ConfigError(f"{what}: out must be a C-contiguous device array {describe_array(np.dtype(dtype), shape)}")
    return out


def contiguous(x: Any) -> Any:
    """x, or a copy of it that is C-contiguous."""
    return x if x.flags.c_contiguous else copied(x, new_array(x.shape, x.dtype))


def copied(x: Any, out: Any) -> Any:
    """`out`, once it will have the contents of x."""
    if out is not x and out.size:
        out[...] = x
    return out


def copied_to_host(out: Any, result: np.ndarray) -> np.ndarray:
    """`result`, in the NumPy array `out` if there is one."""
    if out is None:
        return result
    if not isinstance(out, np.ndarray) or out.shape != result.shape or out.dtype != result.dtype:
        raise ConfigError(f"out must be an array like the result, {describe_array(result.dtype, result.shape)}")
    out[...] = result
    return out


def checked_axis(x: Any, axis: int, what: str) -> int:
    """`axis` counted from the front; ConfigError if x has none such."""
    if not -x.ndim <= axis < x.ndim:
        raise ConfigError(f"{what}: an array of {x.ndim} dimensions has no axis {axis}")
    return axis % x.ndim


def with_size(shape: Sequence[int], axis: int, n: int) -> tuple[int, ...]:
    """`shape`, but n on `axis`."""
    return (*shape[:axis], n, *shape[axis + 1 :])


def span(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """The index of [start, stop) on `axis`."""
    return (*(slice(None),) * axis, slice(start, stop))


def parts_of(joined: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The arrays of these shapes that lie in `joined` [n] one after another."""
    parts, start = [], 0
    for shape in shapes:
        stop = start + math.prod(shape)
        parts.append(joined[start:stop].reshape(shape))
        start = stop
    return parts
